"""SmolLM2-135M cut to 15 layers: a child's size without its recursion.

Every second layer of the parent, spread from the first to the last (the start
of the paper's reduced-size baseline), and then the training that the
15 x 2 child gets.

COMMAND
  python -m experiments.baseline_reduced runs/baseline_reduced_start
  python -m rrt.train --config=experiments/baseline_reduced.py \
      --workdir=runs/baseline_reduced
  On an accelerator add --config=experiments/baseline_reduced.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, shared with other work, 1,024 tokens a step, with
  --config.data.path and .heldout.path naming news and other news,
  --config.convert.calibration Wikipedia, and --config.remat=none. Nats on
  8,192 tokens of Wikinews in rows of 1,024 (the parent has 3.396):

    15 of the 30 layers          13.838
    after 20 steps                6.308
    after 40 steps                5.940   10 minutes in all, 7.0 GiB

  81.4 M parameters. The same 15 layers looped twice, with LoRA of rank 128
  (120.5 M), are at 3.954 after as many steps.
"""

import dataclasses
import sys

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.child = 'runs/baseline_reduced_start'
  return c


def reduced(parent, layers: int = 15):
  """The parent with `layers` of its layers: a block of them, run once."""
  from rrt.convert.recursive import to_recursive

  child, _ = to_recursive(
    parent, block=layers, loops=parent.config.depth // layers, init='stepwise', loop_norms=False
  )
  return dataclasses.replace(
    child, config=dataclasses.replace(child.config, loops=1), meta=dict(parent.meta)
  )


if __name__ == '__main__':
  from rrt.checkpoints.load import load, save

  save(reduced(load('smollm2-135m')), sys.argv[1])
