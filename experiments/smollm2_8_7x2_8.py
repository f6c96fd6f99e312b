"""SmolLM2-135M, 8 + 7 x 2 + 8, rank 64: the middle half shared.

COMMAND
  python -m rrt.train --config=experiments/smollm2_8_7x2_8.py \
      --workdir=runs/smollm2_8_7x2_8
  On an accelerator add --config=experiments/smollm2_8_7x2_8.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Cross-entropy on 8,192 tokens of Wikinews in rows of 1,024; the parent has
  3.396 nats. Converted on 16,384 tokens of Wikipedia: 3.824 before training.
  With 1,024 tokens a step, --config.loss.cross_entropy=0.0 --config.remat=none,
  --config.data.path and .heldout.path naming the texts, and
  --config.convert.calibration and .calibration_tokens as said:

  trained on                       learning rate    20 steps   40 steps
  Wikinews, other documents        2e-4 (LoRA 1e-4)    3.705      3.659
  Wikipedia                        3e-4                3.777    not run
  Wikipedia, converted on 8,192    3e-4 (LoRA 9e-5)    3.814      3.771
      tokens of it: from 3.899

  The text that it trains on counts most: news for news. A step took 9.2 s
  on two cores (remat "none").
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.convert.prelude, c.convert.block, c.convert.coda = 8, 7, 8
  c.convert.loops = 2
  c.convert.rank = 64
  c.optimizer.learning_rate = 2e-4
  return base.gentle_lora(c)
