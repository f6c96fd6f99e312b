"""What a memory layer costs: the sum of rows by itself, a training step, decoding.

python -m benchmarks.memory --out=benchmarks/results/memory.json

Bandwidth of `rrt.ops.embedding_bag` stands beside that of copying memory and that of an einsum
over gathered rows. Then SmolLM2-135M as 8 + 7 x 2 + 8 with and without one memory layer of 65,536
slots (4 heads, top 32) beside the MLP of the block's middle layer takes turns at a training step
of 1,024 tokens and at decoding 32 sequences; a ratio above 1 is how much longer it takes with the
layer.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, turns
from rrt import command, console
from rrt.checkpoints.load import load
from rrt.convert.recursive import to_recursive
from rrt.ops import embedding_bag
from rrt.relax.memory import Memory

FLAGS = flags.FLAGS
flags.DEFINE_integer('repeats', 3, 'Turns of each.')
flags.DEFINE_list('parts', ['bag', 'train', 'decode'], 'What to measure.')
flags.DEFINE_bool('tiny', False, 'Toy sizes: a rehearsal.')
flags.DEFINE_string('out', None, 'JSON file for the figures.')


def bag() -> dict[str, Any]:
  """Bytes of rows read a second, forward and with the backward pass."""
  T, J, N, D = (64, 8, 256, 32) if FLAGS.tiny else (1024, 128, 65536, 576)
  keys = jax.random.split(jax.random.key(0), 4)
  values = jax.random.normal(keys[0], (N, D))
  index = jax.random.randint(keys[1], (T, J), 0, N)
  weight, dy = jax.random.normal(keys[2], (T, J)), jax.random.normal(keys[3], (T, D))
  plain = lambda v, w: jnp.einsum('tj,tjd->td', w, v[index])
  ours = lambda v, w: embedding_bag.bag(v, index, w)
  rows, figures = T * J * D * 4, {}
  for name, sums in (('bag', ours), ('einsum', plain)):
    whole = jax.jit(jax.grad(lambda v, w, f=sums: jnp.vdot(f(v, w), dy), (0, 1)))
    forward = jax.jit(sums)
    memory = whole.lower(values, weight).compile().memory_analysis()
    figures[name] = {
      'forward_gb_per_s': rows / common.best(lambda f=forward: f(values, weight)) / 1e9,
      # Rows are read for the weights' gradient; the values' is read and written.
      'backward_gb_per_s': 3 * rows / common.best(lambda f=whole: f(values, weight)) / 1e9,
      'backward_temporary_mib': memory.temp_size_in_bytes / 2**20,
    }
  source = np.ones(rows // 4, np.float32)
  target = np.empty_like(source)
  figures['copy_gb_per_s'] = 2 * rows / common.best(lambda: np.copyto(target, source)) / 1e9
  return figures


def children() -> dict[str, Any]:
  """The child without and with a memory layer; the same other weights."""
  parent = load('smollm2-135m')
  memory = Memory((3,), 65536, heads=4, topk=32)
  arranged = dict(prelude=8, loops=2, coda=8, rank=64, init='average')
  plain, _ = to_recursive(parent, **arranged)
  wide, _ = to_recursive(parent, relax=(memory,), **arranged)
  return {'without': plain, 'with': wide}


def main(_) -> None:
  """Measures and prints."""
  compared = lambda make: turns.compare(make, children(), FLAGS.repeats)
  parts = {
    'bag': bag,
    'train': lambda: compared(turns.train_step),
    'decode': lambda: compared(turns.decoding),
  }
  figures = {}
  for name in FLAGS.parts:
    figures[name] = parts[name]()
    print(f'{name}: {json.dumps(figures[name])}', flush=True)
  figures |= common.machine(2)
  if FLAGS.out:
    Path(FLAGS.out).write_text(json.dumps(figures, indent=1) + '\n')
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
