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
import statistics
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from rrt import command, console, sharding
from rrt.checkpoints.load import load
from rrt.convert.recursive import to_recursive
from rrt.infer.engine.engine import Engine, Request
from rrt.ops import embedding_bag
from rrt.relax.memory import Memory
from rrt.train import optim, placement
from rrt.train import step as step_lib
from rrt.train.losses import Objective

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


def train_step(model):
  """A function that runs a training step of 2 x 512 tokens."""
  o = optim.Optimizer(learning_rate=1e-4)
  trained = step_lib.trained_paths(optim.trainable(o, model.params))
  spec = step_lib.Step(
    config=model.config,
    objective=Objective(cross_entropy=1.0, distillation=0.0),
    optimizer=optim.make_optimizer(o, step_lib.split(model.params, trained)[0], 100),
    trained=trained,
  )
  mesh = sharding.make_mesh()
  held = [step_lib.init_state(spec, model.params, mesh)]
  step = step_lib.jit_step(
    spec, mesh, jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(spec, mesh))
  )
  ids = np.random.default_rng(0).integers(5, 49000, (2, 512)).astype(np.int32)
  zero = np.zeros_like(ids)
  batch = {
    'tokens': ids,
    'targets': np.roll(ids, -1, 1),
    'segment_ids': zero,
    'positions': zero + np.arange(512, dtype=np.int32)[None],
    'weights': np.ones(ids.shape, np.float32),
  }

  def run():
    with jax.set_mesh(mesh):
      held[0], metrics = step(held[0], {}, placement.to_mesh(batch, mesh))
      float(metrics['loss'])

  return run


def decoding(model):
  """A function that decodes 32 sequences of 32 tokens after prompts of 32."""
  engine = Engine(model, slots=32, context=96)
  ids = np.random.default_rng(0).integers(5, 49000, (32, 32))

  def run():
    engine.run([Request.of(row.tolist(), 32, ignore_eos=True) for row in ids])

  return run


def turns(make) -> dict[str, Any]:
  """Seconds of both children in turns, and the ratio of their medians."""
  runs = {name: make(model) for name, model in children().items()}
  took: dict[str, list[float]] = {name: [] for name in runs}
  for turn in range(FLAGS.repeats + 1):
    for name in sorted(runs, reverse=bool(turn % 2)):
      begin = time.perf_counter()
      runs[name]()
      if turn:  # The first compiles.
        took[name].append(time.perf_counter() - begin)
  ratio = statistics.median(took['with']) / statistics.median(took['without'])
  return {'seconds': took, 'ratio': ratio}


def main(_) -> None:
  """Measures and prints."""
  parts = {'bag': bag, 'train': lambda: turns(train_step), 'decode': lambda: turns(decoding)}
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
