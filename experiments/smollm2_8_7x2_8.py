"""SmolLM2-135M, 8 + 7 x 2 + 8, rank 64: the middle half shared.

COMMAND
  python -m rrt.train --config=experiments/smollm2_8_7x2_8.py \
      --workdir=runs/smollm2_8_7x2_8
  On an accelerator add --config=experiments/smollm2_8_7x2_8.py:accelerator

HARDWARE
  Two CPU cores, 8 GiB (remat "dots"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, 1,024 tokens a step, 9.2 s each (remat "none"),
  --config.convert.calibration naming Wikipedia. Nats on 8,192 tokens of
  Wikinews in rows of 1,024; the parent has 3.396, the start 3.824:

    --config.data.path names                     20 steps   40 steps
    other news                                      3.705      3.659
    Wikipedia 55 %, podcast transcripts 19 %,
      novels 15 %, news 10 %, textbooks 1 %         3.729      3.689
    Wikipedia alone                                 3.739      3.709

  The mix is six files with --config.data.weights="(0.28,0.27,0.19,0.15,0.1,
  0.01)".
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
