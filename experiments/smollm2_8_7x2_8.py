"""SmolLM2-135M, 8 + 7 x 2 + 8, rank 64: the middle half shared.

COMMAND
  python -m rrt.train --config=experiments/smollm2_8_7x2_8.py \
      --workdir=runs/smollm2_8_7x2_8
  On an accelerator add --config=experiments/smollm2_8_7x2_8.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Converted on 16,384 tokens of Wikipedia; cross-entropy on 8,192 tokens of
  Wikinews in rows of 1,024 (parent 3.396 nats), trained on Wikipedia with
  --config.loss.cross_entropy=0.0: 3.824 nats before training, 3.777 after 20
  steps. That run was stopped at step 24; 40 steps were not measured. On two
  shared cores a step took 9 to 20 s.
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config()
  if arg == 'accelerator':
    c = base.accelerator(c)
  c.parent = 'smollm2-135m'
  c.convert.prelude, c.convert.block, c.convert.coda = 8, 7, 8
  c.convert.loops = 2
  c.convert.rank = 64
  return c
