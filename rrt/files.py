"""Atomic writing of directories, locks, and JSON files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import fcntl
import json
import os
from pathlib import Path
import platform
import re
import secrets
import shutil
from typing import Any

from rrt.errors import InputError


def write_directory(
  directory: str | Path,
  write: Callable[[Path], None],
  is_ours: Callable[[Path], bool],
  what: str,
  keep: Sequence[str] = (),
) -> Path:
  """Writes a directory under a temporary name and renames it when complete.

  Temporary directories of killed processes are removed by the next writer of the
  directory, which also restores an old directory if the process was killed
  between the two renames.

  Args:
    directory: the final name.
    write: fills the folder that it is given.
    is_ours: whether an existing directory may be replaced.
    what: such a directory in words, for errors.
    keep: names of files of a replaced directory that stay.

  Raises:
    InputError: the directory may not be replaced, or cannot be written.
  """
  _tidy(_target(directory))
  directory = check_replaceable(directory, is_ours, what)
  mark = f'{directory.name}-{platform.node()}-{os.getpid()}'
  new, old = (directory.with_name(f'.{mark}.{end}') for end in ('new', 'old'))
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    write(new)
    for name in keep:
      if (directory / name).is_file():
        shutil.copy2(directory / name, new / name)
    for file in (*new.rglob('*'), new):
      _sync(file)
    if directory.exists():
      directory.rename(old)
    new.rename(directory)
    _sync(directory.parent)
  except OSError as e:
    if old.exists() and not directory.exists():
      old.rename(directory)
    raise InputError(
      f'{directory} cannot be written: {e.strerror or e}; nothing there was changed.'
    ) from e
  finally:
    shutil.rmtree(new, ignore_errors=True)
    if directory.exists():
      shutil.rmtree(old, ignore_errors=True)
  return directory


def _target(directory: str | Path) -> Path:
  """The absolute path of a name, with symbolic links resolved.

  Raises:
    InputError: no directory can have that name.
  """
  directory = Path(directory).expanduser().absolute()
  if len(os.fsencode(directory.name)) > 150:  # More is added to it meanwhile.
    raise InputError(f'{directory.name[:40]}...: is too long a name.')
  if directory.is_symlink():
    if not directory.is_dir():
      raise InputError(f'{directory} is a link to what is no directory.')
    directory = directory.resolve()
  return directory


def _tidy(directory: Path) -> None:
  """Removes temporary directories of writers that are no longer running.

  Those of other hosts are kept, as their processes cannot be checked.
  """
  # Earlier versions left the host out of the name.
  host = re.escape(platform.node())
  form = re.compile(rf'\.{re.escape(directory.name)}-(?:{host}-)?(\d+)\.(new|old)')
  with contextlib.suppress(OSError):  # Writing will tell what is wrong.
    for path in sorted(directory.parent.iterdir()):
      found = form.fullmatch(path.name)
      if not found or _is_alive(int(found[1])):
        continue
      if found[2] == 'old' and not directory.exists():
        path.rename(directory)
      else:
        shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
  """Whether another process of this host has this id."""
  if pid == os.getpid():
    return False  # A container's ids begin anew: the name is a dead one's.
  try:
    os.kill(pid, 0)
  except PermissionError:
    return True
  except (OSError, OverflowError):
    return False
  return True


def check_replaceable(directory: str | Path, is_ours: Callable[[Path], bool], what: str) -> Path:
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
  directory = _target(directory)
  if directory.exists() and not (
    directory.is_dir() and (not any(directory.iterdir()) or is_ours(directory))
  ):
    raise InputError(
      f'{directory} exists and is not just {what}, so it is left alone; choose a new directory.'
    )
  check_writable(next(p for p in directory.parents if p.exists()))
  return directory


@contextlib.contextmanager
def lock(directory: Path, what: str):
  """Locks a directory against other processes, at most until this one ends.

  Args:
    directory: exists and can be written to.
    what: such a directory in words, for the error.

  Raises:
    InputError: another process has it.
  """
  with open(directory / '.lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise InputError(
        f'{directory}: another process is writing to this {what}; wait for '
        'its end, or choose another directory.'
      ) from e
    except OSError:
      pass  # File systems without locks: as good as none.
    yield


def _sync(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def check_writable(directory: str | Path) -> None:
  """Creates the directory, and a temporary file in it.

  Raises:
    InputError: either fails.
  """
  directory = Path(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    # Hosts and containers that share a disk may share process ids.
    probe = directory / f'.writable-{os.getpid()}-{secrets.token_hex(4)}'
    probe.write_text('')
    probe.unlink()
  except OSError as e:
    raise InputError(
      f'{directory} cannot be written to: {e.strerror}; choose another directory.'
    ) from e


def check_file_writable(path: Path) -> None:
  """Raises OSError unless a file can be written; leaves it as it is."""
  new = not path.exists()
  with open(path, 'ab'):
    pass
  if new:
    path.unlink()


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
  """A JSON object from a file; {} for a missing file that is optional.

  Raises:
    InputError: the file is missing, unreadable or not an object.
  """
  if optional and not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise InputError(f'{path} cannot be read: {e.strerror or e}.') from e
  except ValueError as e:
    raise InputError(f'{path} is not valid JSON: {e}.') from e
  if not isinstance(value, dict):
    raise InputError(f'{path} must hold a JSON object.')
  return value
