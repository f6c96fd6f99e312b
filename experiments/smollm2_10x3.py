"""SmolLM2-135M, 10 x 3, rank 128: every layer shared by three depths.

COMMAND
  python -m rrt.train --config=experiments/smollm2_10x3.py \
      --workdir=runs/smollm2_10x3
  On an accelerator add --config=experiments/smollm2_10x3.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Not run.
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.convert.block, c.convert.loops = 10, 3
  c.convert.rank = 128
  return base.gentle_lora(c)
