r"""SmolLM2-135M, 10 x 3, rank 128: all three loops learn to be read.

A stage after `smollm2_10x3.py`, from the model that it left.

COMMAND
  python -m rrt.train --config=experiments/smollm2_10x3_exits.py \
      --config.child=runs/smollm2_10x3/model --workdir=runs/smollm2_10x3_exits

HARDWARE
  Two CPU cores, 12 GiB (remat "none"); or one GPU or TPU chip.

RESULT
"""

from experiments import smollm2_10x3


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = smollm2_10x3.get_config(arg)
  c.exits.coefficients, c.exits.weight = 'aggressive', 1.0
  return c
