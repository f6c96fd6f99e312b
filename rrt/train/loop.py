r"""Uptrains a converted model, optionally distilling from its parent.

    python -m rrt.train --config=experiments/smollm2_8_7x2_8.py \
        --workdir=runs/a --config.optimizer.learning_rate=1e-3

The work directory holds the whole run: config.json (with versions and git
revision), child/ (the converted model it starts from), checkpoints/,
metrics.jsonl and, at the end, model/. The same command resumes from the last
checkpoint, bit for bit; SIGTERM, SIGHUP and Ctrl-C save one and exit with 128 + the signal's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import math
from pathlib import Path
import signal
import threading
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from rrt import sharding
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.train import checkpoint as checkpoint_lib
from rrt.train import metrics as metrics_lib
from rrt.train import placement
from rrt.train import step as step_lib
from rrt.train.heldout import open_heldout
from rrt.train.profile import Profile
from rrt.train.recipe import Recipe
from rrt.train.setup import check, make_step, next_batch, open_data
from rrt.train.slots import trained_rows
from rrt.train.teacher import with_teacher
from rrt.train.teacher_cache import TeacherCache
from rrt.train.watchdog import Watchdog
from rrt.train.workdir import Workdir


class Uptrained(NamedTuple):
  """The result of a run.

  Attributes:
    model: the trained model, its parameters on the host; of several processes those of
      `rrt.train.placement.to_host`.
    history: the rows of metrics, from step 1.
    step: number of steps taken.
    stopped: the number of the signal that ended it: SIGTERM, SIGHUP or SIGINT
      (Ctrl-C); 0 for none.
  """

  model: LanguageModel
  history: list[dict[str, Any]]
  step: int
  stopped: int


def uptrain(
  parent: LanguageModel | None,
  child: LanguageModel,
  recipe: Recipe | dict[str, Any],
  workdir: str | Path | Workdir | None = None,
  on_row: Callable[[dict[str, Any]], None] | None = None,
  seconds: float | None = None,
  data: Iterable[Any] | None = None,
) -> Uptrained:
  """Trains a child on text and on its parent's predictions.

  Args:
    parent: the model to distil from; not needed with loss.distillation=0.
    child: the model to train; its arrays are not modified.
    recipe: the settings, as a `Recipe` or nested dicts of its fields.
    workdir: directory of checkpoints and metrics, from which a run resumes, or a bucket by
      gs:// or s3://; None keeps the run in memory.
    on_row: called with each new row of metrics.
    seconds: time for the steps, compilation included; the time of a first step
      chooses how many follow, `recipe.steps` at most. For runs in one process.
    data: training data from Python instead of `recipe.data.path`: a `datasets.Dataset`, or
      any iterable of texts or of rows (dicts), which is read into memory;
      `recipe.data.field` and `.format` say what is read of a row.

  Raises:
    InputError: invalid settings, data or work directory.

  Example:
    >>> run = rrt.uptrain(parent, child, dict(steps=20, data={'path': 'text.jsonl'}))
    >>> run = rrt.uptrain(parent, child, dict(steps=20), data=['A text.', 'Another.'])
    >>> rrt.save(run.model, 'small')
  """
  if not isinstance(recipe, Recipe):
    recipe = Recipe.from_dict(recipe)
  if seconds is not None and jax.process_count() > 1:
    raise InputError(f'seconds={seconds!r}: for runs in one process; set recipe.steps.')
  if workdir is None and (recipe.tensorboard or recipe.wandb):
    raise InputError('tensorboard and wandb write into a work directory; give workdir.')
  if not recipe.loss.distillation:
    parent = None
  mesh = sharding.make_mesh(recipe.mesh)
  check(recipe, parent.config if parent else None, child.config, mesh)
  if parent and parent.tokenizer and child.tokenizer:
    parent.tokenizer.check_same_ids(child.tokenizer)
  batches = open_data(recipe, child.tokenizer, child.config.vocab_size, mesh, data)

  place = Workdir.of(workdir) if workdir else None
  rows = trained_rows(recipe, child, batches, place) if recipe.train_only else None
  spec = make_step(recipe, child.config, child.params, rows)
  heldout = open_heldout(recipe, spec, child.tokenizer, mesh)
  spec, teacher = with_teacher(spec, parent, child, mesh)
  cache = None
  if parent and recipe.teacher_cache:
    cache = TeacherCache(recipe.teacher_cache, spec, parent, mesh)
    spec = dataclasses.replace(spec, cached=True)

  # Go on from the newest checkpoint, or begin with the child as it is.
  abstract = step_lib.abstract_state(spec, mesh)
  places = (place.checkpoints, place.local(recipe)) if place else (None, None)
  checkpoints = checkpoint_lib.open_checkpoints(places[0], recipe.keep)
  local = checkpoint_lib.open_checkpoints(places[1], 1)
  store = checkpoint_lib.newest(checkpoints, local)
  restored = store.restore(abstract, recipe.to_dict(), Recipe.FREE)
  if restored:
    step, state, positions = restored
    batches.set_state(positions)
  else:
    step = 0
    state = step_lib.init_state(spec, child.params, mesh)
  train_step = step_lib.jit_step(spec, mesh, jax.tree.map(lambda x: x.sharding, abstract))

  files = place.files if place else None
  log = metrics_lib.Log(recipe, spec, files, step, on_row)
  train_step = log.time.compiling(train_step)
  watchdog = Watchdog(recipe.watchdog)
  profile = Profile(recipe.profile, files)
  last = recipe.steps
  clock = StepClock(seconds)

  def evaluate(heldout):
    if step:  # The first step compiles, which may take longer than any other.
      watchdog.at(f'the evaluation after step {step}')
    log.flush()
    with log.time.spent('eval'):
      nats = heldout(state.params)
    log.heldout(step, nats)

  def save(store=checkpoints):
    watchdog.at(f'the checkpoint of step {step}')
    log.flush()
    with log.time.spent('save'):
      store.save(step, state, batches.get_state(), recipe.to_dict())
      if place:
        place.publish('metrics.jsonl')

  stop = Stop(recipe.log_every)
  with jax.set_mesh(mesh), checkpoints, local, log, watchdog, profile, stop:
    if heldout and step == 0:
      evaluate(heldout)
    while step < last and not stop.requested(step):
      with log.time.spent('data'):
        rows = next_batch(batches, recipe)
        if rows is None:
          log.say(f'the text is used up after {step} steps')
          break
        if cache:
          batch = cache(rows, state.params, teacher)
        else:
          batch = placement.to_mesh(rows, mesh)
      profile.before(step + 1)
      state, metrics = train_step(state, teacher, batch)
      step += 1
      if seconds is not None:
        if clock.steps < 2:
          jax.block_until_ready(metrics)
        last = min(recipe.steps, step + clock.left())
        log.expect(last)
      # The metrics of a step are fetched when the next one is on its way.
      log.step(step, metrics, state.params)
      watchdog.at(f'step {step}')
      if heldout and (step == last or recipe.is_due(step, recipe.heldout.every)):
        evaluate(heldout)
      if recipe.is_due(step, recipe.checkpoint_every):
        save()
      elif recipe.local_checkpoints and step % recipe.local_every == 0:
        save(local)
    save()
    params = placement.to_host(state.params, mesh)
  batches.close()

  meta = {**child.meta, 'uptraining': {**recipe.to_dict(), 'step': step}}
  model = dataclasses.replace(child, params=params, meta=meta)
  return Uptrained(model, log.rows, step, stop.signal)


class StepClock:
  """Chooses how many steps fit into a budget, from the time of a step.

  Attributes:
    steps: how often `left` was asked.
  """

  def __init__(self, seconds: float | None):
    self._seconds = math.inf if seconds is None else seconds
    self._begin = self._last = time.monotonic()
    self._step = 0.0  # Seconds of the second step.
    self.steps = 0

  def left(self) -> int:
    """Call it after a step: how many more fit; the first step has compiled."""
    now = time.monotonic()
    self.steps += 1
    if self.steps == 2:
      self._step = now - self._last
    self._last = now
    left = self._seconds - (now - self._begin)
    if self.steps == 1:
      return 1 if left > 0 else 0
    return max(int(left / max(self._step, 1e-9)), 0)


class Stop:
  """Records SIGTERM, SIGHUP and SIGINT, so that the loop saves and stops after a step.

  A second SIGINT (Ctrl-C) interrupts at once.

  Attributes:
    signal: the number of the one that was received, 0 for none.
  """

  def __init__(self, every: int):
    """`every`: steps between the agreements of several processes."""
    self.signal, self._every = 0, every
    self._old: dict[int, Any] = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._old = handle_stops(self._note, 'SIGTERM', 'SIGHUP', 'SIGINT')
    return self

  def __exit__(self, *_):
    for number, old in self._old.items():
      signal.signal(number, old)

  def _note(self, number, _):
    if number == self.signal == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = number

  def requested(self, step: int) -> bool:
    """Whether any process received a signal; the same on all processes. Call it each step.

    Between processes SIGTERM is jax's: its preemption service takes the signal, and all
    processes stop at the step that it names, one or two later.
    """
    if jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        self.signal = signal.SIGTERM
      elif step % self._every == 0:
        votes = multihost_utils.process_allgather(np.array(self.signal))
        self.signal = int(votes.max())
      else:
        return False
    return self.signal > 0


def handle_stops(handler, *names: str) -> dict[int, Any]:
  """Handles these signals; returns the old handlers by number.

  SIGHUP, of a terminal that is closed, stays ignored under nohup. Where there are
  several processes SIGTERM stays with jax's preemption service (`Stop.requested`).
  """
  old = {}
  for name in names:
    if name == 'SIGTERM' and jax.process_count() > 1:
      continue
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) != signal.SIG_IGN:
      old[int(number)] = signal.signal(number, handler)
  return old
