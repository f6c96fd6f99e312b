"""TinyLlama 1.1B, 11 x 2, rank 256: the paper's recipe (appendix E).

COMMAND
  python -m rrt.train --config=experiments/tinyllama_11x2.py \
      --workdir=runs/tinyllama_11x2

  The paper starts from the checkpoint after 105 billion tokens and distils
  from that same checkpoint; `parent` is its hub id. Its text is a subset of
  SlimPajama-627B: the 6-billion-token sample that is named here repeats ten
  times in 60 billion tokens; name more of it in --config.data.path.

HARDWARE
  8 x H100 (the paper's). Any number of devices whose count divides the
  microbatch of 64 rows.

RESULT
  Not run. The paper (table I.2): 45.6 on average over seven tasks, where the
  checkpoint it starts from has 43.3, and 47.4 after the same 60 billion
  tokens without any recursion.
"""

from experiments import base


def get_config():
  """The recipe."""
  c = base.paper(base.get_config())
  c.parent = 'TinyLlama/TinyLlama-1.1B-step-50K-105b'
  c.convert.block, c.convert.loops = 11, 2
  c.convert.rank = 256
  return c
