"""Storage of unpacked documents, in memory or in one file of the user's cache.

Documents are UTF-8 bytes end to end with an array of end offsets: 8 bytes a
document beside its text. `sizes` are the documents' lengths, in bytes or
characters. The cache directory is `$RRT_CACHE`, else `$XDG_CACHE_HOME/rrt`,
else `~/.cache/rrt`. An entry's key is made of the files' paths, sizes and
modification times, so a changed file is unpacked again. The directory can be
deleted at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import contextlib
import hashlib
import mmap
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from rrt import runtime
from rrt.errors import InputError

IN_MEMORY = 256 << 20
_FORMAT = '1'


class Flat(Sequence[str]):
  """Documents concatenated in a buffer, with random access."""

  def __init__(self, buffer: Any, ends: np.ndarray):
    self._buffer, self._ends = buffer, ends

  @property
  def sizes(self) -> np.ndarray:
    return np.diff(self._ends, prepend=0)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index):
    start = self._ends[index - 1] if index else 0
    return bytes(self._buffer[start : self._ends[index]]).decode('utf-8')


class Lines(Sequence[str]):
  """Lines of a file that is read in place, parsed on access."""

  def __init__(
    self, file: str, offsets: Sequence[int], sizes: Sequence[int], parse: Callable[[bytes], str]
  ):
    self._offsets = np.asarray(offsets, np.int64)
    self.sizes = np.asarray(sizes, np.int64)
    self._parse = parse
    self._buffer = _map(pathlib.Path(file)) if len(offsets) else b''

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, index):
    start = int(self._offsets[index])
    # A slice, not seek and readline: several threads read the same map.
    end = self._buffer.find(b'\n', start)
    return self._parse(self._buffer[start : end if end >= 0 else None])


def flat(texts: Iterable[str]) -> Flat:
  """Documents in memory."""
  held, ends = bytearray(), []
  for text in texts:
    held += text.encode('utf-8', 'replace')
    ends.append(len(held))
  return Flat(bytes(held), np.asarray(ends, np.int64))


def cache_dir() -> pathlib.Path:
  """The directory for unpacked text."""
  return runtime.cache_root()


def unpack(texts: Iterable[str], files: Sequence[str], options: str) -> Sequence[str]:
  """Stores documents for random access, or finds them in the cache.

  Args:
    texts: the documents; iterated only if the cache does not have them.
    files: the files they come from, part of the cache key.
    options: every other setting that `texts` depends on, as one string.

  Raises:
    InputError: raised by `texts`, or the cache cannot be written.
  """
  entry = cache_dir() / _key(files, options)
  ends_file = entry.with_suffix('.npy')
  if ends_file.exists():
    with contextlib.suppress(OSError, ValueError):
      ends = np.load(ends_file, mmap_mode='r', allow_pickle=False)
      buffer = _map(entry.with_suffix('.txt'))
      if len(buffer) == ends[-1]:
        return Flat(buffer, ends)
  held, ends = bytearray(), []
  texts = iter(texts)
  for text in texts:
    held += text.encode('utf-8', 'replace')
    ends.append(len(held))
    if len(held) > IN_MEMORY:
      return _unpack_to(entry, held, ends, texts)
  return Flat(bytes(held), np.asarray(ends, np.int64))


def _unpack_to(entry, buffer, ends, texts) -> Flat:
  """Writes an entry of the cache; the index last, which marks it complete."""
  names: list[str] = []
  text_file, ends_file = entry.with_suffix('.txt'), entry.with_suffix('.npy')
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(entry, names) as f:
      f.write(buffer)
      end = len(buffer)
      for text in texts:
        end += f.write(text.encode('utf-8', 'replace'))
        ends.append(end)
      f.flush()
      os.fsync(f.fileno())
    with _temporary(entry, names) as f:
      np.save(f, np.asarray(ends, np.int64), allow_pickle=False)
      f.flush()
      os.fsync(f.fileno())
    os.replace(names[0], text_file)
    os.replace(names[1], ends_file)
  except OSError as e:
    raise InputError(
      f'{entry.parent}: the text cannot be unpacked there ({e.strerror}); '
      'set RRT_CACHE to a directory with enough room'
    ) from e
  finally:
    for name in names:
      pathlib.Path(name).unlink(missing_ok=True)
  return Flat(_map(text_file), np.asarray(ends, np.int64))


def _temporary(entry: pathlib.Path, names: list[str]):
  f = tempfile.NamedTemporaryFile(dir=entry.parent, prefix=f'.{entry.name}.', delete=False)
  names.append(f.name)
  return f


def _key(files: Sequence[str], options: str) -> str:
  digest = hashlib.sha256(f'{_FORMAT} {options}'.encode())
  for file in files:
    digest.update(os.path.abspath(file).encode('utf-8', 'replace'))
    with contextlib.suppress(OSError):
      status = os.stat(file)
      digest.update(f' {status.st_size} {status.st_mtime_ns}\n'.encode())
  return digest.hexdigest()[:32]


def _map(file: pathlib.Path) -> mmap.mmap:
  with open(file, 'rb') as f:
    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
