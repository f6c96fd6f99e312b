"""SmolLM2-135M, 15 x 2, rank 128: every layer shared by two depths.

COMMAND
  python -m rrt.train --config=experiments/smollm2_15x2.py \
      --workdir=runs/smollm2_15x2
  On an accelerator add --config=experiments/smollm2_15x2.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Converted on 8,192 tokens of Wikipedia: 4.467 nats on 8,192 tokens of
  Wikinews in rows of 1,024 (parent 3.396). The training was not run.
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.convert.block, c.convert.loops = 15, 2
  c.convert.rank = 128
  return base.gentle_lora(c)
