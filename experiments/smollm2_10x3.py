"""SmolLM2-135M, 10 x 3, rank 128: every layer shared by three depths.

COMMAND
  python -m rrt.train --config=experiments/smollm2_10x3.py \
      --workdir=runs/smollm2_10x3
  On an accelerator add --config=experiments/smollm2_10x3.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, shared with other work, 1,024 tokens a step, with
  --config.data.path and .heldout.path naming news and other news,
  --config.convert.calibration Wikipedia, and --config.remat=none. Nats on
  8,192 tokens of Wikinews in rows of 1,024 (the parent has 3.396):

    converted on 16,384 tokens    5.123
    after 20 steps                4.751
    after 40 steps                4.497   25 minutes in all, 9.9 GiB

  102.8 M parameters of the parent's 134.5 M. With less LoRA:

    --config.convert.rank=64                     6.404, after 40 steps 5.258
    --config.convert.rank=16 --config.steps=60   9.508, after 60 steps 6.209

  (83.3 M and 68.6 M parameters).
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.convert.block, c.convert.loops = 10, 3
  c.convert.rank = 128
  return base.gentle_lora(c)
