"""Directories that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import shutil

from rrt.errors import InputError


def write_directory(
  directory: str | Path,
  write: Callable[[Path], None],
  is_ours: Callable[[Path], bool],
  what: str,
) -> Path:
  """Writes a directory under another name and renames it when complete.

  Args:
    directory: the final name.
    write: fills the folder that it is given.
    is_ours: whether an existing directory may be replaced.
    what: such a directory in words, for errors.

  Raises:
    InputError: the directory may not be replaced, or cannot be written.
  """
  directory = check_replaceable(directory, is_ours, what)
  mark = f'{directory.name}-{os.getpid()}'
  new, old = (directory.with_name(f'.{mark}.{end}') for end in ('new', 'old'))
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    write(new)
    for file in (*new.iterdir(), new):
      _sync(file)
    if directory.exists():
      directory.rename(old)
    new.rename(directory)
    _sync(directory.parent)
  except OSError as e:
    if old.exists() and not directory.exists():
      old.rename(directory)
    raise InputError(
      f'{directory} cannot be written: {e.strerror or e}; nothing there '
      'was changed.'
    ) from e
  finally:
    shutil.rmtree(new, ignore_errors=True)
    if directory.exists():
      shutil.rmtree(old, ignore_errors=True)
  return directory


def check_replaceable(
  directory: str | Path, is_ours: Callable[[Path], bool], what: str
) -> Path:
  """Checks that `write_directory` may and can write, changing nothing.

  Args:
    directory: the name to be written.
    is_ours: whether an existing directory may be replaced.
    what: such a directory in words, for errors.

  Returns:
    The directory's absolute path.

  Raises:
    InputError: the directory may not be replaced, or cannot be written.
  """
  directory = Path(directory).expanduser().absolute()
  if directory.exists() and not (
    directory.is_dir() and (not any(directory.iterdir()) or is_ours(directory))
  ):
    raise InputError(
      f'{directory} exists and is not {what}, so it is left alone; choose '
      'a new directory.'
    )
  check_writable(next(p for p in directory.parents if p.exists()))
  return directory


def _sync(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def check_writable(directory: str | Path) -> None:
  """Makes the directory, and for a moment a file in it.

  Raises:
    InputError: either fails.
  """
  directory = Path(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.writable-{os.getpid()}'
    probe.write_text('')
    probe.unlink()
  except OSError as e:
    raise InputError(
      f'{directory} cannot be written to: {e.strerror}; choose another '
      'directory.'
    ) from e
