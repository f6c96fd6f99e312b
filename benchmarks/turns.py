"""Two models that take turns at a training step and at decoding, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import statistics
import time
from typing import Any

import jax
import numpy as np

from rrt import sharding
from rrt.infer.engine.engine import Engine, Request
from rrt.train import optim, placement
from rrt.train import step as step_lib
from rrt.train.losses import Objective


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
    'segment_ids': zero + 1,
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


def compare(
  make: Callable[[Any], Callable[[], None]], models: Mapping[str, Any], repeats: int
) -> dict[str, Any]:
  """Seconds of two models in turns, and the ratio of the second's median to the first's."""
  runs = {name: make(model) for name, model in models.items()}
  took: dict[str, list[float]] = {name: [] for name in runs}
  for turn in range(repeats + 1):
    for name in sorted(runs, reverse=bool(turn % 2)):
      begin = time.perf_counter()
      runs[name]()
      if turn:  # The first compiles.
        took[name].append(time.perf_counter() - begin)
  first, second = (statistics.median(took[name]) for name in models)
  return {'seconds': took, 'ratio': second / first}
