"""SmolLM2-135M, 15 x 2, rank 128: every layer shared by two depths.

COMMAND
  python -m rrt.train --config=experiments/smollm2_15x2.py \
      --workdir=runs/smollm2_15x2
  On an accelerator add --config=experiments/smollm2_15x2.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, shared with other work, 1,024 tokens a step, with
  --config.data.path and .heldout.path naming news and other news,
  --config.convert.calibration Wikipedia, and --config.remat=none. Nats on
  8,192 tokens of Wikinews in rows of 1,024 (the parent has 3.396):

    converted on 16,384 tokens    4.263
    after 20 steps                4.036
    after 40 steps                3.954   34 minutes in all, 10.9 GiB

  120.5 M parameters of the parent's 134.5 M. Converted on 8,192 tokens of
  Wikipedia it starts at 4.467.
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.convert.block, c.convert.loops = 15, 2
  c.convert.rank = 128
  return base.gentle_lora(c)
