"""SmolLM2-135M, 8 + 7 x 2 + 8, rank 64, with a memory layer that both loops read.

COMMAND
  python -m rrt.train --config=experiments/smollm2_memory.py --workdir=runs/smollm2_memory
  On an accelerator add --config=experiments/smollm2_memory.py:accelerator: more slots there.

HARDWARE
  Two CPU cores, 10 GiB; or one GPU or TPU chip.

RESULT
  docs/results/memory.md
"""

from experiments import base


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = base.get_config(arg)
  c.parent = 'smollm2-135m'
  c.convert.prelude, c.convert.block, c.convert.coda = 8, 7, 8
  c.convert.loops = 2
  c.convert.rank = 64
  slots = 2**20 if arg == 'accelerator' else 2**14
  c.convert.relax = (f'memory:positions=3,slots={slots},heads=4,topk=32',)
  c.optimizer.learning_rate = 2e-4
  return base.gentle_lora(c)
