"""Gemma 3 270M, 6 x 3, rank 128: 18 layers from 6, one period of its windows.

Five local layers and a global one are Gemma 3's period: in a block of six,
each shared layer is local in all loops, or global in all.

COMMAND
  python -m rrt.train --config=experiments/gemma3_270m_6x3.py \
      --workdir=runs/gemma3_270m_6x3
  On an accelerator add --config=experiments/gemma3_270m_6x3.py:accelerator

HARDWARE
  Two CPU cores, 16 GiB; or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, shared with other work, --config.steps=10 of 1,024
  tokens, with --config.data.path and .heldout.path naming news and other news,
  --config.convert.calibration Wikipedia (8,192 tokens), --config.remat=none.
  Nats on 8,192 tokens of Wikinews in rows of 1,024 (the parent has 3.177):

    converted                     5.280
    after 10 steps                4.740   10 minutes in all, 14.0 GiB

  231.6 M parameters of the parent's 268.1 M, most of them the embedding's.
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'gemma3-270m'
  c.convert.block, c.convert.loops = 6, 3
  c.convert.rank = 128
  # A vocabulary of 262,144: half as many tokens of logits at a time.
  c.loss.chunk_tokens //= 2
  # Its gradients are five times as large as SmolLM2's and turn quickly: at 3e-4
  # the loss rises from the third step on.
  c.optimizer.learning_rate = 5e-5
  return base.gentle_lora(c)
