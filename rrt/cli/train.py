r"""`rrt train`, and the same as `python -m rrt.train` for launchers.

python -m rrt.train --config=experiments/smollm2_8_7x2_8.py \
    --workdir=runs/a --config.optimizer.learning_rate=1e-3
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
import os
import signal
import sys
import textwrap
import time
from typing import NoReturn

from absl import flags
import jax

from rrt import command, console
from rrt.checkpoints.adapter import check_save_adapter, save_adapter
from rrt.checkpoints.load import load, save
from rrt.errors import InputError
from rrt.files import check_writable, lock
from rrt.models.count import count_params
from rrt.train.config_file import config_error, define_config_flag
from rrt.train.loop import Uptrained, handle_stops, uptrain
from rrt.train.placement import drain
from rrt.train.recipe import Recipe
from rrt.train.recipe_fields import describe_fields
from rrt.train.setup import check_workdir, prepare
from rrt.train.watchdog import STATUS
from rrt.train.workdir import Workdir

# ml_collections reads the process's arguments and absl's global store.
FLAGS = command.Flags(
  'Uptrains a converted model, optionally distilling from its parent.',
  'rrt train --config=experiments/smollm2_8_7x2_8.py \\\n    --workdir=runs/a --config.steps=200',
  flags.FLAGS,
)
explain = config_error
# In the error of a collective whose other side is gone.
LOST = ('Gloo', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'Connection', 'NCCL')
HEARTBEAT = 30  # Seconds after which a process that is gone is noticed by the others.


def _recipe_help() -> list[str]:
  """Every field of a recipe with its default and meaning."""
  lines = ['Fields of the recipe:']
  for path, default, meaning in describe_fields(Recipe):
    lines.append(f'  --config.{path}={default!r}'[:80])
    lines += textwrap.wrap(meaning, 80, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
  return lines


FLAGS.appendix = _recipe_help


def define_flags() -> None:
  """Defines the flags; importing this module for anything else defines none.

  Raises:
    InputError: ml_collections is not installed.
  """
  define_config_flag()
  FLAGS.needed.add('config')
  FLAGS.needed.string('workdir', None, 'Directory of the run; an existing run is resumed.')
  FLAGS.rare.bool(
    'distributed', False, 'Several processes, found from the environment (TPU pods, Slurm, MPI).'
  )
  FLAGS.rare.string('coordinator', None, 'Several processes by hand: host:port of the first.')
  FLAGS.rare.integer('processes', None, 'By hand: how many there are.')
  FLAGS.rare.integer('process', None, 'By hand: which one this is, from 0.')


def main(argv):
  """Runs a recipe from the command line."""
  del argv
  begin = time.monotonic()
  for flag in ('config', 'workdir'):
    if not getattr(flags.FLAGS, flag):
      raise InputError(f'--{flag} is not given; see --help.')
  check_overrides(sys.argv[1:])
  initialize_distributed()
  recipe = Recipe.from_dict(flags.FLAGS.config.to_dict())
  place = Workdir(flags.FLAGS.workdir)
  workdir = place.files
  check_writable(workdir)
  check_workdir(workdir)
  handle_stops(leave, 'SIGTERM', 'SIGHUP')
  # Process 0 stands for all processes of a run.
  own = lock(workdir, 'run') if jax.process_index() == 0 else nullcontext()
  with own:
    try:
      return convert_and_uptrain(recipe, place, begin)
    except (RuntimeError, ValueError) as e:  # gloo raises the second.
      lost = not isinstance(e, InputError) and any(word in str(e) for word in LOST)
      if jax.process_count() == 1 or not lost:
        raise
      lost_process(e)


def convert_and_uptrain(recipe: Recipe, place: Workdir, begin: float) -> int:
  """Converts, uptrains, saves and prints; returns the exit status."""
  workdir = place.files
  if recipe.adapter:
    check_save_adapter(workdir / 'adapter')
  parent, child = prepare(recipe, place)
  run = uptrain(parent, child, recipe, place)
  if run.stopped and run.step < recipe.steps:
    name = signal.Signals(run.stopped).name
    print(f'stopped by {name} after step {run.step}, which is saved; the same command resumes it')
    return 128 + run.stopped
  if jax.process_index() != 0:
    drain(run.model.params)
  else:
    save(run.model, workdir / 'model')
    if recipe.adapter:
      model = load(workdir / 'model', lazy=True)
      print(f'adapter alone: {save_adapter(model, workdir / "adapter")}')
    place.publish('model', 'adapter', 'metrics.jsonl')
    summarize(recipe, run, place.where('model'), time.monotonic() - begin)
  return 0


def check_overrides(arguments: Sequence[str]) -> None:
  """Raises InputError for overrides of the conversion of a child that is given."""
  if flags.FLAGS.config.child:
    for argument in arguments:
      name = argument.lstrip('-').partition('=')[0]
      if name.startswith('config.convert.'):
        raise InputError(f'--{name} has no effect beside config.child; leave one of them out.')


def initialize_distributed() -> None:
  """Initializes `jax.distributed` from the flags or the environment.

  Raises:
    InputError: no processes are found, or a flag is missing.
  """
  by_hand = (flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process)
  if flags.FLAGS.distributed:
    if any(value is not None for value in by_hand):
      raise InputError('--coordinator, --processes and --process replace --distributed.')
    try:
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as e:
      raise InputError(
        f'--distributed: the environment does not name the processes ({e}); '
        'name them with --coordinator, --processes and --process.'
      ) from e
  elif any(value is not None for value in by_hand):
    if None in by_hand:
      raise InputError('--coordinator, --processes and --process must be given together.')
    jax.distributed.initialize(*by_hand, heartbeat_timeout_seconds=HEARTBEAT)


def lost_process(e: Exception) -> NoReturn:
  """Ends this process after a collective failed; its exit would wait for the others."""
  reason = str(e).strip().splitlines()[0][:200]
  print(
    f'error: process {jax.process_index()} cannot reach the others: {reason}. Start the same '
    'command on all of them again: it resumes from the last checkpoint.',
    file=sys.stderr,
    flush=True,
  )
  os._exit(STATUS)


def leave(number, _):
  """Handles SIGTERM and SIGHUP outside of training steps."""
  name = signal.Signals(number).name
  print(f'stopped by {name}; the same command resumes from what is saved', flush=True)
  sys.exit(128 + number)


def summarize(recipe, run: Uptrained, model: str, seconds: float) -> None:
  """Prints a run's final metrics: a table and the last line of JSON."""
  count = count_params(run.model.config)
  rows = [r for r in run.history if 'train/loss' in r]
  heldout = [r for r in run.history if 'eval/cross_entropy' in r]
  first, last = (rows[0], rows[-1]) if rows else ({}, {})
  console.table(
    [
      [k, first.get(f'train/{k}'), last.get(f'train/{k}')]
      for k in ('loss', 'cross_entropy', 'distillation', 'grad_norm')
    ]
    + [[f'held-out nats, step {r["step"]}', None, r['eval/cross_entropy']] for r in heldout],
    ['', 'first step', 'last step'],
  )
  console.finish(
    {
      'model': model,
      'steps': run.step,
      'tokens': run.step * recipe.batch * recipe.length,
      'params_unique': count.unique,
      'params_total': count.total,
      'loss': last.get('train/loss'),
      'cross_entropy': last.get('train/cross_entropy'),
      'distillation': last.get('train/distillation'),
      'heldout_nats_first': heldout[0]['eval/cross_entropy'] if heldout else None,
      'heldout_nats_last': heldout[-1]['eval/cross_entropy'] if heldout else None,
      'skipped': last.get('train/skipped', 0),
      'tokens_per_second': last.get('throughput/tokens_per_second'),
      'mfu': last.get('throughput/mfu'),
      'seconds': seconds,
      'peak_memory_bytes': console.peak_memory_bytes(),
    }
  )
