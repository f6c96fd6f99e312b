"""SmolLM2-135M on the same tokens without recursion: what a child can reach.

All 30 layers as they are, one loop, no LoRA, cross-entropy only: what the
other recipes of this parent gain from their text alone, at full size.

COMMAND
  python -m rrt.train --config=experiments/baseline_parent.py \
      --workdir=runs/baseline_parent
  On an accelerator add --config=experiments/baseline_parent.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, shared with other work, 1,024 tokens a step, with
  --config.data.path and .heldout.path naming news and other news,
  --config.convert.calibration Wikipedia, and --config.remat=none. Nats on
  8,192 tokens of Wikinews in rows of 1,024 (the parent has 3.396):

    as published                  3.396
    after 20 steps                3.349
    after 40 steps                3.330   9 minutes in all, 9.4 GiB

  So 0.07 of what a child gains on this text is the text's, not recursion's.
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.convert.block, c.convert.loops = 30, 1
  c.convert.loop_norms = False
  c.loss.cross_entropy, c.loss.distillation = 1.0, 0.0
  return c
