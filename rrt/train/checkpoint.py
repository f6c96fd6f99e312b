"""Checkpoints of a run: written in the background, verified when read.

One checkpoint is a directory named by its step. It holds the train state
(Orbax, every process its own shards), the position of the data iterator, the
run's configuration and the versions of the software. Orbax writes it under a
temporary name and renames it when complete, so that a partial checkpoint is never
restored. Later damage on disk (a flipped bit, a truncated file) is detected by
digests of all arrays, computed on the devices before saving and after restoring.

A damaged newest checkpoint stops the run with an error that names the newest
intact one. It is never skipped silently, and only checkpoints beyond the newest
`keep` are deleted.
"""

from __future__ import annotations

from importlib import metadata
import json
import logging
from pathlib import Path
import platform
import shutil
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rrt.errors import InputError
from rrt.files import check_writable
from rrt.train.optim import paths
from rrt.train.recipe import Recipe
from rrt.train.step import TrainState

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


class Damaged(Exception):
  """A checkpoint that differs from what was saved."""


@jax.jit
def digest(tree) -> jax.Array:
  """One uint32 for each leaf, the same on every mesh.

  The bits of each element times an odd number that depends on its place,
  summed modulo 2^32: no single changed element goes unseen (odd numbers have
  inverses), anything else with a chance of 2^-32.
  """

  def one(x):
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
      index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      place = place * jnp.uint32(size) + index
    # Knuth's multiplier spreads neighbouring places over all 32 bits.
    odd = place * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)

  return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


def versions() -> dict[str, str]:
  """Of python and the packages that a result depends on."""
  found = {'python': platform.python_version()}
  for name in (*PACKAGES, 'relaxed-recursive-transformers'):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = 'not installed'
  return found


class NoCheckpoints:
  """Checkpoints of a run without a work directory."""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def steps(self) -> list[int]:
    """None."""
    return []

  def save(self, *_):
    """Does nothing."""

  def restore(self, *_):
    """Returns None."""


def open_checkpoints(directory: Any, keep: int):
  """The checkpoints in a directory; `NoCheckpoints` without one."""
  return Checkpoints(directory, keep) if directory else NoCheckpoints()


def newest(*stores: Any) -> Any:
  """The one of several that has the newest checkpoint."""
  return max(stores, key=lambda store: max(store.steps(), default=-1))


class Checkpoints:
  """The checkpoints of one run, `directory/STEP`."""

  def __init__(self, directory: Any, keep: int):
    """Opens the directory, of the disk or of a bucket; creates it if needed.

    Raises:
      InputError: the directory cannot be written to.
    """
    in_bucket = '://' in str(directory)
    self.directory: Any = directory if in_bucket else Path(directory).absolute()
    # Orbax tells every save and restore at level INFO, warns of defaults, and
    # prints a traceback of each thread that failed: one sentence is ours.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    _check_writable(self.directory)
    # Buckets copy no ranges between files, which OCDBT would ask for: a file an array there.
    state = ocp.StandardCheckpointHandler(use_ocdbt=not in_bucket)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
      item_handlers={'state': state, 'run': ocp.JsonCheckpointHandler()},
    )
    self._saving: int | None = None

  def steps(self) -> list[int]:
    """Steps with a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: TrainState, data: Any, config: dict[str, Any]) -> None:
    """Starts writing a checkpoint and returns; the state may be donated.

    Does nothing if the step has a checkpoint.

    Args:
      step: names the checkpoint.
      state: the whole train state.
      data: the position of this process's data iterator, for json.
      config: the run's configuration, for json.

    Raises:
      InputError: this or the checkpoint before could not be written.
    """
    if step in self.steps():
      return
    run = {
      'config': config,
      'data': _gather(json.dumps(data)),
      'digest': [int(d) for d in jax.device_get(digest(state))],
      'versions': versions(),
    }
    text = json.dumps(run)
    sealed = {'text': text, 'crc32': zlib.crc32(text.encode())}
    self.wait()
    try:
      self._saving = step
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(sealed)),
      )
    except Exception as e:
      raise self._unwritten(e) from e

  def wait(self) -> None:
    """Waits until the pending checkpoint is complete.

    Raises:
      InputError: it could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      raise self._unwritten(e) from e
    self._saving = None

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    try:
      self.wait()
    except InputError:
      if kind is None:
        raise
    self._manager.close()

  def restore(
    self, abstract: TrainState, config: dict[str, Any], free: tuple[str, ...]
  ) -> tuple[int, TrainState, list[Any]] | None:
    """Restores the newest checkpoint with the shardings of `abstract`, or None.

    Args:
      abstract: shapes, dtypes and shardings of the state, on any mesh.
      config: this run's configuration.
      free: its top-level fields that may differ from the saved one's.

    Returns:
      (step, state, the positions of all processes' data iterators).

    Raises:
      InputError: the checkpoint is damaged, or of another configuration.
    """
    steps = self.steps()
    if not steps:
      return None
    newest, *older = reversed(steps)
    try:
      run = self._read_run(newest)
      check_same(self.directory.parent, run['config'], config, free)
      data = [json.loads(text) for text in run['data']]
      return newest, self._read_state(newest, abstract, run), data
    except Damaged as e:
      remedy = 'No other checkpoint is whole: start anew with another --workdir.'
      for step in older:
        if self._whole(step, abstract):
          remedy = (
            f'The one of step {step} is whole: move {self.directory}/'
            f'{newest} away, and the same command continues from there.'
          )
          break
      raise InputError(
        f'The checkpoint {self.directory}/{newest} is damaged ({e}). {remedy}'
      ) from e

  def _read_run(self, step: int) -> dict[str, Any]:
    try:
      sealed = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
        'run'
      ]
      text = sealed['text']
      if zlib.crc32(text.encode()) != sealed['crc32']:
        raise Damaged('its run file does not match its checksum')
      return json.loads(text)
    except Damaged:
      raise
    except Exception as e:
      raise Damaged(f'its run file cannot be read: {_first_line(e)}') from e

  def _read_state(self, step: int, abstract, run) -> TrainState:
    try:
      state = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
      )['state']
    except Exception as e:
      raise Damaged(f'its arrays cannot be read: {_first_line(e)}') from e
    found = [int(d) for d in jax.device_get(digest(state))]
    if found != run['digest']:
      names = jax.tree.leaves(paths(state.params))
      wrong = sum(a != b for a, b in zip(found, run['digest']))
      raise Damaged(
        f'{wrong} of its {len(found)} arrays are not what was saved; '
        f'the model alone has {len(names)}'
      )
    return state

  def _whole(self, step: int, abstract) -> bool:
    try:
      self._read_state(step, abstract, self._read_run(step))
      return True
    except Damaged:
      return False

  def _unwritten(self, e: Exception) -> InputError:
    """The error of a failed write; removes partial files."""
    for left in self.directory.glob(f'{self._saving}.*'):
      if isinstance(left, Path):
        shutil.rmtree(left, ignore_errors=True)
      else:
        left.rmtree(missing_ok=True)
    whole = [s for s in self.steps() if (self.directory / str(s)).is_dir()]
    kept = f'those of steps {whole} are whole' if whole else 'there is no other'
    return InputError(
      f'The checkpoint of step {self._saving} could not be written to '
      f'{self.directory}: {_first_line(e)} ({kept}). Free some space there '
      'and start the same command again.'
    )


def _check_writable(directory: Any) -> None:
  if '://' not in str(directory):
    check_writable(directory)
    return
  try:
    probe = directory / f'.writable-{jax.process_index()}'
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except Exception as e:
    raise InputError(f'{directory} cannot be written to: {_first_line(e)}.') from e


def check_seen_by_all(directory: Path) -> None:
  """Raises InputError unless all processes see one directory under this name."""
  check_writable(directory)
  if jax.process_count() == 1:
    return
  mark = directory / '.seen'
  if jax.process_index() == 0:
    mark.write_text('')
  multihost_utils.sync_global_devices('checkpoint directory written')
  seen = multihost_utils.process_allgather(np.array(mark.exists()))
  if jax.process_index() == 0:
    mark.unlink()
  if not seen.all():
    raise InputError(
      f'local_checkpoints={directory}: process {int(np.argmin(seen))} does not see it; every '
      'process writes its shards there, so give a directory of a shared disk.'
    )


def check_same(workdir: Path, saved, now, free: tuple[str, ...]) -> None:
  """Raises InputError for the first field in which two configurations differ.

  Args:
    workdir: of the run.
    saved, now: the run's configuration and that of the resuming command.
    free: top-level fields that may differ.
  """
  saved, now = (_completed(config, Recipe().to_dict()) for config in (saved, now))
  for name in sorted(saved.keys() | now.keys()):
    if name in free:
      continue
    field, a, b = _difference(name, saved.get(name), now.get(name))
    if field == 'steps' and isinstance(a, int) and isinstance(b, int) and b > a:
      raise InputError(
        f'config.steps={b}, but the run in {workdir} was started with {a}, which its schedule '
        f'ends with; to go on from its model give --config.child={workdir / "model"} and '
        'another --workdir.'
      )
    if field:
      raise InputError(
        f'config.{field}={b!r}, but the run in {workdir} was '
        f'started with {a!r}; give that value, or another --workdir.'
      )


def _completed(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
  """A configuration with the defaults of fields that were not there when it was saved."""
  found = dict(saved)
  for name, value in defaults.items():
    if name not in found:
      found[name] = value
    elif isinstance(value, dict) and isinstance(found[name], dict) and name != 'mesh':
      found[name] = _completed(found[name], value)
  return found


def _difference(name, a, b):
  """The first differing field at or below `name`, and both its values."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(a.keys() | b.keys()):
      found = _difference(f'{name}.{key}', a.get(key), b.get(key))
      if found[0]:
        return found
    return '', None, None
  return ('', None, None) if a == b else (name, a, b)


def _gather(text: str) -> list[str]:
  """The text of every process, on every process."""
  if jax.process_count() == 1:
    return [text]
  raw = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(raw.size))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: raw.size] = raw
  rows = multihost_utils.process_allgather(padded)
  return [bytes(r[:n]).decode() for r, n in zip(rows, sizes.ravel())]


def _first_line(e: BaseException) -> str:
  """The first line of an exception's root cause, shortened."""
  while e.__cause__ is not None:
    e = e.__cause__
  text = str(e)
  for known in (
    'No space left on device',
    'File too large',
    'Permission denied',
    'Read-only file system',
    'Disk quota exceeded',
  ):
    if known.lower() in text.lower():
      return known
  line = text.strip().splitlines()[0] if text.strip() else ''
  return f'{type(e).__name__}: {line[:160]}' if line else type(e).__name__
