"""Where a run is kept: a directory that all processes see, or a bucket.

Of a run in a bucket the checkpoints are written there, by orbax. Its other files (settings,
metrics, the child that it starts from, the model at its end) are kept on the disk of each
machine and copied: from the bucket before a run begins, to it once they are written.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
import shutil
import tempfile
from typing import Any

import jax

from rrt.checkpoints.native import MANIFEST
from rrt.errors import InputError
from rrt.train.recipe import Recipe

# Schemes that orbax writes arrays to, and the extra that installs their libraries.
SCHEMES = {'gs': 'gcs', 's3': 's3'}
_COPIED = 16 << 20  # Bytes at a time.


class Workdir:
  """The places of a run.

  Attributes:
    name: as it was given.
    files: directory of all but the checkpoints.
    checkpoints: directory of the checkpoints, in the bucket if there is one.
  """

  def __init__(self, name: str | Path):
    """Reads and writes nothing.

    Raises:
      InputError: an unknown scheme, or a library that is not installed.
    """
    self.name = str(name)
    self._bucket: Any = None
    if '://' not in self.name:
      self.files = Path(name).expanduser().absolute()
      self.checkpoints: Any = self.files / 'checkpoints'
      return
    scheme = self.name.partition('://')[0]
    if scheme not in SCHEMES:
      known = ' and '.join(f'{s}://' for s in SCHEMES)
      raise InputError(f'workdir={self.name}: give a directory, or a bucket by {known}.')
    from etils import epath

    self._bucket = epath.Path(self.name)
    try:
      if scheme == 'gs':
        from google.cloud import storage  # noqa: F401  (orbax needs it)
      self._bucket.exists()
    except ImportError as e:
      raise InputError(
        f'workdir={self.name}: needs libraries that are not installed: pip install '
        f'"relaxed-recursive-transformers[{SCHEMES[scheme]}]".'
      ) from e
    except Exception as e:  # No such bucket, no permission: many types, one meaning.
      raise InputError(f'workdir={self.name}: cannot be read: {_line(e)}.') from e
    self.checkpoints = self._bucket / 'checkpoints'
    name = f'rrt-{self._bucket.name}-{_mark(self.name)}-{jax.process_index()}'
    self.files = Path(tempfile.gettempdir()) / name

  @classmethod
  def of(cls, workdir: str | Path | Workdir) -> Workdir:
    """The same, or that of a name."""
    return workdir if isinstance(workdir, Workdir) else cls(workdir)

  def where(self, name: str) -> str:
    """A file or directory of the run, as users find it."""
    return f'{self.name.rstrip("/")}/{name}' if self._bucket else str(self.files / name)

  def local(self, recipe: Recipe) -> Path | None:
    """Where this run's local checkpoints are; None where none are asked for."""
    if not recipe.local_checkpoints:
      return None
    # By a name that is the same in all processes, which `files` of a bucket is not.
    return Path(recipe.local_checkpoints).absolute() / f'{Path(self.name).name}-{_mark(self.name)}'

  def fetch(self, *names: str) -> None:
    """Copies files and directories from the bucket, where it has them."""
    for name in names if self._bucket else ():
      source, target = self._bucket / name, self.files / name
      shutil.rmtree(target, ignore_errors=True)
      target.unlink(missing_ok=True)
      if source.is_dir():
        target.mkdir(parents=True)
        for file in source.iterdir():
          _copy(file, target / file.name)
      elif source.exists():
        _copy(source, target)

  def publish(self, *names: str) -> None:
    """Copies files and directories to the bucket, those of process 0.

    Raises:
      InputError: the bucket cannot be written.
    """
    if not self._bucket or jax.process_index():
      return
    try:
      for name in names:
        source, target = self.files / name, self._bucket / name
        if not source.is_dir():
          if source.exists():
            _copy(source, target)
          continue
        if target.exists():
          target.rmtree()
        target.mkdir(parents=True, exist_ok=True)
        # The manifest last: with it a model is whole.
        for file in sorted(source.iterdir(), key=lambda f: f.name == MANIFEST):
          _copy(file, target / file.name)
    except Exception as e:
      raise InputError(
        f'workdir={self.name}: {name} cannot be written there: {_line(e)}; it is in {self.files}.'
      ) from e


def _mark(name: str) -> str:
  if '://' not in name:
    name = str(Path(name).expanduser().absolute())
  return hashlib.sha1(name.encode()).hexdigest()[:12]


def _copy(source: Any, target: Any) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  with source.open('rb') as read, target.open('wb') as write:
    shutil.copyfileobj(read, write, _COPIED)


def _line(e: Exception) -> str:
  return (str(e).strip().splitlines() or [type(e).__name__])[0][:160].rstrip('.')
