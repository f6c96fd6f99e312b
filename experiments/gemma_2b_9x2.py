"""Gemma 2B, 9 x 2, rank 256: the paper's recipe (appendix E).

COMMAND
  python -m rrt.train --config=experiments/gemma_2b_9x2.py \
      --workdir=runs/gemma_2b_9x2

  The paper's teacher is Gemma 2B uptrained on 15 billion tokens first; here
  it is the model as published. To do as the paper did, uptrain it without
  recursion (--config.convert.block=18 --config.convert.loops=1
  --config.convert.rank=0 --config.loss.distillation=0 --config.steps=7153)
  and name that work directory in --config.parent.

HARDWARE
  8 x H100 (the paper's). Any number of devices whose count divides the
  microbatch of 64 rows.

RESULT
  Not run. The paper (table I.2): 57.0 on average over seven tasks, where the
  model as published has 61.7, and 58.6 after the same 60 billion tokens
  without any recursion.
"""

from experiments import base


def get_config():
  """The recipe."""
  c = base.paper(base.get_config())
  c.parent = 'google/gemma-2b'
  c.convert.block, c.convert.loops = 9, 2
  c.convert.rank = 256
  # A vocabulary of 256,000.
  c.loss.chunk_tokens = 8192
  return c
