"""Gemma 3 270M, 9 x 2, rank 128: 18 layers from 9.

COMMAND
  python -m rrt.train --config=experiments/gemma3_270m_9x2.py \
      --workdir=runs/gemma3_270m_9x2
  On an accelerator add --config=experiments/gemma3_270m_9x2.py:accelerator

HARDWARE
  Two CPU cores, 16 GiB; or one GPU or TPU chip.

RESULT
  Not run.
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'gemma3-270m'
  c.convert.block, c.convert.loops = 9, 2
  c.convert.rank = 128
  # A vocabulary of 262,144: half as many tokens of logits at a time.
  c.loss.chunk_tokens //= 2
  # Its gradients are five times as large as SmolLM2's and turn quickly: at 3e-4
  # the loss rises from the third step on.
  c.optimizer.learning_rate = 5e-5
  return base.gentle_lora(c)
