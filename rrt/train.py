r"""Uptraining: a converted model learns to be its parent again.

    python -m rrt.train --config=experiments/smollm2_8_7x2_8.py \
        --workdir=runs/a --config.optimizer.learning_rate=1e-3

The work directory holds the whole run: config.json (with versions and git
revision), child/ (the converted model it starts from), checkpoints/,
metrics.jsonl and, at the end, model/. The same command started again goes on
where the last checkpoint was, bit for bit; SIGTERM saves one and leaves with
status 143.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
import dataclasses
from pathlib import Path
import signal
import sys
import threading
import time
from typing import Any, NamedTuple, cast

from absl import flags
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from rrt import checkpoint as checkpoint_lib
from rrt import cli, optim, sharding
from rrt import metrics as metrics_lib
from rrt import state as state_lib
from rrt.checkpoints.load import save
from rrt.config_file import config_error, define_config_flag
from rrt.errors import InputError
from rrt.files import check_writable, lock
from rrt.heldout import open_heldout
from rrt.model import LanguageModel
from rrt.models.count import count_params
from rrt.prepare import check, check_workdir, next_batch, open_data, prepare
from rrt.recipe import Recipe
from rrt.teacher import with_teacher


class Uptrained(NamedTuple):
  """What a run gives.

  Attributes:
    model: the trained model, its parameters on the host.
    history: the rows of metrics, from step 1.
    step: how many steps it has taken.
    stopped: whether SIGTERM asked it to end.
  """

  model: LanguageModel
  history: list[dict[str, Any]]
  step: int
  stopped: bool


def uptrain(
  parent: LanguageModel | None,
  child: LanguageModel,
  recipe: Recipe | dict[str, Any],
  workdir: str | Path | None = None,
  on_row: Callable[[dict[str, Any]], None] | None = None,
) -> Uptrained:
  """Trains a child on text and on its parent's predictions.

  Args:
    parent: the model to distil from; not needed with loss.distillation=0.
    child: the model to train; its arrays are left as they are.
    recipe: the settings, as a `Recipe` or nested dicts of its fields.
    workdir: where checkpoints and metrics go, and where a run is continued
      from; None keeps the run in memory.
    on_row: called with each new row of metrics.

  Raises:
    InputError: the settings, the data or the work directory are no good.
  """
  if not isinstance(recipe, Recipe):
    recipe = Recipe.from_dict(recipe)
  if not recipe.loss.distillation:
    parent = None
  mesh = sharding.make_mesh(recipe.mesh)
  check(recipe, parent.config if parent else None, child.config, mesh)
  if parent and parent.tokenizer and child.tokenizer:
    parent.tokenizer.check_same_ids(child.tokenizer)
  data = open_data(recipe, child.tokenizer, child.config.vocab_size)

  # What is trained, by which optimizer; what the parent shares with it.
  o = recipe.optimizer
  trained = state_lib.trained_paths(optim.trainable(o, child.params))
  weights, _ = state_lib.split(child.params, trained)
  spec = state_lib.Step(
    config=child.config,
    objective=recipe.loss,
    optimizer=optim.make_optimizer(o, weights, recipe.steps),
    trained=trained,
    clip=o.clip,
    accumulate=recipe.accumulate,
    dtype=jnp.dtype(recipe.dtype),
    remat=recipe.remat,
    exits=recipe.exits,
  )
  heldout = open_heldout(recipe, spec, child.tokenizer, mesh)
  spec, teacher = with_teacher(spec, parent, child, mesh)

  # Go on from the newest checkpoint, or begin with the child as it is.
  abstract = state_lib.abstract_state(spec, mesh, recipe.seed)
  checkpoints = checkpoint_lib.open_checkpoints(workdir, recipe.keep)
  restored = checkpoints.restore(abstract, recipe.to_dict(), Recipe.FREE)
  if restored:
    step, state, positions = restored
    data.set_state(positions)
  else:
    step = 0
    state = state_lib.init_state(spec, child.params, mesh, recipe.seed)
  train_step = state_lib.jit_step(
    spec, mesh, jax.tree.map(lambda x: x.sharding, abstract)
  )

  log = metrics_lib.Log(recipe, spec, workdir, step, on_row)
  with jax.set_mesh(mesh), checkpoints, log, Stop(recipe.log_every) as stop:
    if heldout and step == 0:
      log.heldout(0, heldout(state.params))
    while step < recipe.steps and not stop.requested(step):
      batch = next_batch(data, recipe)
      if batch is None:
        log.say(f'the text is used up after {step} steps')
        break
      state, metrics = train_step(
        state, teacher, state_lib.to_mesh(batch, mesh)
      )
      step += 1
      # The metrics of a step are fetched when the next one is on its way.
      log.step(step, metrics, state.params)
      if heldout and recipe.is_due(step, recipe.heldout.every):
        log.heldout(step, heldout(state.params))
      if recipe.is_due(step, recipe.checkpoint_every):
        log.flush()
        checkpoints.save(step, state, data.get_state(), recipe.to_dict())
    log.flush()
    checkpoints.save(step, state, data.get_state(), recipe.to_dict())
    params = state_lib.to_host(state.params, mesh)
  data.close()

  meta = {**child.meta, 'uptraining': {**recipe.to_dict(), 'step': step}}
  model = dataclasses.replace(child, params=params, meta=meta)
  return Uptrained(model, log.rows, step, stop.asked)


class Stop:
  """Notes SIGTERM, so that the loop can save and leave between two steps."""

  def __init__(self, every: int):
    """`every`: steps between agreements, where there are many processes."""
    self.asked, self._every, self._old = False, every, cast(Any, None)

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_):
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)

  def _note(self, *_):
    self.asked = True

  def requested(self, step: int) -> bool:
    """Whether any process was asked to stop: all answer alike."""
    if jax.process_count() > 1:
      if step % self._every:
        return False
      votes = multihost_utils.process_allgather(np.array(self.asked))
      self.asked = bool(votes.any())
    return self.asked


def main(argv):
  """Runs a recipe from the command line."""
  del argv
  begin = time.monotonic()
  for flag in ('config', 'workdir'):
    if not getattr(FLAGS, flag):
      raise InputError(f'--{flag} is not given; see --help.')
  if '://' in FLAGS.workdir:
    raise InputError(
      f'--workdir={FLAGS.workdir}: must be a directory of a file system that '
      'all processes see; mount the bucket first.'
    )
  initialize_distributed()
  recipe = Recipe.from_dict(FLAGS.config.to_dict())
  workdir = Path(FLAGS.workdir).expanduser().absolute()
  check_writable(workdir)
  check_workdir(workdir)
  signal.signal(signal.SIGTERM, leave)
  # Process 0 stands for all processes of a run.
  own = lock(workdir, 'run') if jax.process_index() == 0 else nullcontext()
  with own:
    return convert_and_uptrain(recipe, workdir, begin)


def convert_and_uptrain(recipe: Recipe, workdir: Path, begin: float) -> int:
  """Converts, uptrains, saves and prints; returns the exit status."""
  parent, child = prepare(recipe, workdir)
  run = uptrain(parent, child, recipe, workdir)
  if run.stopped and run.step < recipe.steps:
    print(
      f'stopped by SIGTERM after step {run.step}, which is saved; the same '
      'command goes on from there'
    )
    return 143
  if jax.process_index() == 0:
    save(run.model, workdir / 'model')
    summarize(recipe, run, workdir, time.monotonic() - begin)
  return 0


def initialize_distributed() -> None:
  """Joins the processes that the flags speak of.

  Raises:
    InputError: there are none to be found, or a flag is missing.
  """
  by_hand = (FLAGS.coordinator, FLAGS.processes, FLAGS.process)
  if FLAGS.distributed:
    try:
      jax.distributed.initialize()
    except (ValueError, RuntimeError) as e:
      raise InputError(
        f'--distributed: the environment does not tell the processes ({e}); '
        'name them with --coordinator, --processes and --process.'
      ) from e
  elif any(value is not None for value in by_hand):
    if None in by_hand:
      raise InputError(
        '--coordinator, --processes and --process must be given together.'
      )
    jax.distributed.initialize(*by_hand)


def leave(*_):
  """Answers SIGTERM while no training step runs."""
  print(
    'stopped by SIGTERM; the same command goes on from what is saved',
    flush=True,
  )
  sys.exit(143)


def summarize(recipe, run: Uptrained, workdir: Path, seconds: float) -> None:
  """Prints what a run has reached: a table and the last line."""
  count = count_params(run.model.config)
  rows = [r for r in run.history if 'loss' in r]
  heldout = [r for r in run.history if 'heldout_nats' in r]
  first, last = (rows[0], rows[-1]) if rows else ({}, {})
  pick = lambda r, k: r.get(k)
  cli.table(
    [
      [k, pick(first, k), pick(last, k)]
      for k in ('loss', 'cross_entropy', 'distillation', 'grad_norm')
    ]
    + [
      [f'held-out nats, step {r["step"]}', None, r['heldout_nats']]
      for r in heldout
    ],
    ['', 'first step', 'last step'],
  )
  cli.finish(
    {
      'model': str(workdir / 'model'),
      'steps': run.step,
      'tokens': run.step * recipe.batch * recipe.length,
      'params_unique': count.unique,
      'params_total': count.total,
      'loss': last.get('loss'),
      'cross_entropy': last.get('cross_entropy'),
      'distillation': last.get('distillation'),
      'heldout_nats_first': heldout[0]['heldout_nats'] if heldout else None,
      'heldout_nats_last': heldout[-1]['heldout_nats'] if heldout else None,
      'skipped': last.get('skipped', 0),
      'tokens_per_second': last.get('tokens_per_second'),
      'mfu': last.get('mfu'),
      'seconds': seconds,
      'peak_memory_bytes': cli.peak_memory_bytes(),
    }
  )


FLAGS = flags.FLAGS


def define_flags() -> None:
  """The command line's; importing `uptrain` defines none."""
  define_config_flag()
  flags.declare_key_flag('config')
  flags.DEFINE_string(
    'workdir', None, 'Directory of the run; it goes on where it was.'
  )
  flags.DEFINE_bool(
    'distributed', False,
    'Several processes, found from the environment (TPU pods, Slurm, MPI).',
  )  # fmt: skip
  flags.DEFINE_string(
    'coordinator', None, 'Several processes by hand: host:port of the first.'
  )
  flags.DEFINE_integer('processes', None, 'By hand: how many there are.')
  flags.DEFINE_integer('process', None, 'By hand: which one this is, from 0.')


if __name__ == '__main__':
  try:
    define_flags()
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  cli.run(main, config_error)
