"""One checkout of `benchmarks.compare`: work in by lines, seconds out by lines.

It runs in either checkout, so it uses what both have, and asks for names where they
differ.
"""

import dataclasses
import json
import os
import sys
import time

DIRECTORY = sys.argv[1]
sys.path.insert(0, DIRECTORY)
OUT = os.dup(1)
os.dup2(2, 1)  # Nothing but seconds goes to the reader.

import jax  # noqa: E402
import numpy as np  # noqa: E402

import rrt  # noqa: E402

assert rrt.__file__.startswith(DIRECTORY), rrt.__file__
try:
  from rrt.infer.generate import Generator
  from rrt.infer.sampling import SamplingParams
  from rrt.train import optim
  from rrt.train import step as step_lib
  from rrt.train.losses import Objective
  from rrt.train.teacher import with_teacher

  settings = lambda n: SamplingParams(max_new_tokens=n, ignore_eos=True)
  request = lambda p, n: rrt.Request.of(p, n, ignore_eos=True)
except ImportError:
  from rrt.infer.sample import Settings
  from rrt.infer.sample import Writer as Generator
  from rrt.losses import Objective
  from rrt.teacher import with_teacher

  from rrt import optim
  from rrt import state as step_lib

  settings = lambda n: Settings(max_new_tokens=n, ignore_end=True)
  request = lambda p, n: rrt.Request(p, n, ignore_end=True)
from rrt import sharding  # noqa: E402

RNG = np.random.default_rng(0)
IDS = RNG.integers(5, 49000, (64, 512)).astype(np.int32)
try:
  from rrt.train.placement import to_mesh
except ImportError:
  to_mesh = step_lib.to_mesh


class Work:
  """The model, and each piece of work, prepared when first asked for."""

  def __init__(self):
    self.parent = rrt.load('smollm2-135m')
    self.child, _ = rrt.to_recursive(
      self.parent, prelude=8, loops=2, coda=8, rank=64, init='average'
    )
    self.made = {}

  def run(self, name: str) -> float:
    if name not in self.made:
      self.made[name] = getattr(self, f'make_{name}')()
      self.made[name]()
    begin = time.perf_counter()
    found = self.made[name]()
    return found if isinstance(found, float) else time.perf_counter() - begin

  def make_train(self):
    o = optim.Optimizer(learning_rate=1e-4)
    trained = step_lib.trained_paths(optim.trainable(o, self.child.params))
    spec = step_lib.Step(
      config=self.child.config,
      objective=Objective(cross_entropy=0.0, distillation=1.0),
      optimizer=optim.make_optimizer(o, step_lib.split(self.child.params, trained)[0], 100),
      trained=trained,
    )
    mesh = sharding.make_mesh()
    spec, teacher = with_teacher(spec, self.parent, self.child, mesh)
    held = [step_lib.init_state(spec, self.child.params, mesh)]
    where = jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(spec, mesh))
    step = step_lib.jit_step(spec, mesh, where)
    ids = IDS[:2]
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
        held[0], metrics = step(held[0], teacher, to_mesh(batch, mesh))
        float(metrics['loss'])

    return run

  def _generator(self):
    if 'generator' not in self.made:
      self.made['generator'] = Generator(self.child)
    return self.made['generator']

  def make_prefill(self):
    return lambda: self._timed(4, 480, 1, 'prefill_seconds')

  def make_decode(self):
    return lambda: self._timed(16, 32, 48, 'decode_seconds')

  def _timed(self, batch, length, new, field):
    generator = self._generator()
    before = dataclasses.replace(generator.clock)
    prompts = [row[:length].tolist() for row in IDS[:batch]]
    generator.complete(prompts, settings(new))
    return float(getattr(generator.clock, field) - getattr(before, field))

  def _engine(self, **options):
    engine = rrt.Engine(self.child, slots=16, context=96, **options)
    work = [(row[:32].tolist(), 32) for row in IDS[:32]]
    return lambda: engine.run([request(p, n) for p, n in work])

  def make_tied(self):
    return self._engine()

  def make_exits(self):
    loops = RNG.integers(1, 3, (16, 4096)).astype(np.int32)
    return self._engine(
      gate='replay', threshold=1.0, kv='propagate', arrays={'loops': loops}, mean_loops=1.5
    )


work = Work()
for line in sys.stdin:
  seconds = work.run(line.strip())
  os.write(OUT, (json.dumps(seconds) + '\n').encode())
