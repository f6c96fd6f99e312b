r"""SmolLM2-135M, 10 x 3, rank 128: all three loops learn to be read.

A stage after `smollm2_10x3.py`, from the model that it left.

COMMAND
  python -m rrt.train --config=experiments/smollm2_10x3_exits.py \
      --config.child=runs/smollm2_10x3/model --workdir=runs/smollm2_10x3_exits

HARDWARE
  Two CPU cores, 12 GiB (remat "none"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, 40 steps of 1,024 tokens on news
  (--config.data.path), --config.remat=none, --config.seed=1. It fails: nats on
  8,192 tokens of other news, when all tokens leave after that loop:

                           loop 1   loop 2   loop 3
    before                  22.8     24.4     4.497
    weight 1.0 (this file)   7.748    7.558   6.308
    before, with a lens      6.1      5.7     4.497

  The first loops begin so far off that their losses rule the step, and the last
  loop pays. The lens (`rrt fit-gate`; least squares on 16,384 tokens, rows of
  512) is better than the training and costs the last loop nothing; its most
  likely token after loop 1 is that of full depth for 38 % of the tokens. Tuned
  (`--lens_epochs=4`, 65,280 tokens, rows of 256) it is for 48 %.
"""

from experiments import smollm2_10x3


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = smollm2_10x3.get_config(arg)
  c.exits.coefficients, c.exits.weight = 'aggressive', 1.0
  return c
