r"""SmolLM2-135M, 8 + 7 x 2 + 8, rank 64: both loops learn to be read.

A stage after `smollm2_8_7x2_8.py`, from the model that it left.

COMMAND
  python -m rrt.train --config=experiments/smollm2_8_7x2_8_exits.py \
      --config.child=runs/smollm2_8_7x2_8/model \
      --workdir=runs/smollm2_8_7x2_8_exits

HARDWARE
  Two CPU cores, 10 GiB (remat "none"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, 24 steps of 1,024 tokens, 13 s each, on news
  (--config.data.path), --config.remat=none, --config.seed=1. Nats on 8,192
  tokens of other news in rows of 1,024, when all tokens leave after that loop:

                                      loop 1   loop 2
    before                             5.143    3.659
    weight 0.3 (this file)             4.294    3.675
    weight 1.0                         4.259    3.709
"""

from experiments import smollm2_8_7x2_8


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = smollm2_8_7x2_8.get_config(arg)
  c.exits.coefficients, c.exits.weight = 'aggressive', 0.3
  if not arg:
    c.steps = 24
  return c
