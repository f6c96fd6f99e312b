"""Opens plain, gzip, xz and zstandard files; damaged ones raise InputError."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import gzip
import io
import lzma
import pathlib
from typing import Any, BinaryIO
import zlib

from rrt.errors import InputError

COMPRESSED = ('.gz', '.xz', '.zst')
_MAGIC = {b'\x1f\x8b': '.gz', b'\xfd7zXZ\x00': '.xz', b'\x28\xb5\x2f\xfd': '.zst'}


def compression(file: str) -> str | None:
  """'.gz', '.xz' or '.zst' from the file's first bytes; None for a plain file."""
  with open(file, 'rb') as f:
    head = f.read(6)
  found = next((c for m, c in _MAGIC.items() if head.startswith(m)), None)
  ending = pathlib.Path(file).suffix.lower()
  if head and ending in COMPRESSED and found is None:
    raise InputError(f'{file}: is named {ending} but is not such a file')
  return found


def open_binary(file: str) -> BinaryIO:
  """Opens a file to read its decompressed bytes.

  Call it, and read, inside `reading`, which turns their errors into InputError.
  """
  match compression(file):
    case '.gz':
      return gzip.open(file)  # type: ignore[return-value]
    case '.xz':
      return lzma.open(file)  # type: ignore[return-value]
    case '.zst':
      return io.BufferedReader(_Blocks(_zstd_blocks(file)))
    case _:
      return open(file, 'rb')


def _zstd_blocks(file: str) -> Iterator[bytes]:
  """Yields decompressed blocks; raises EOFError on a truncated file."""
  zstandard = require('zstandard', '.zst files', 'train')
  with open(file, 'rb') as f:
    frame = None
    while block := f.read(1 << 18):
      while block:
        if frame is None or frame.eof:
          frame = zstandard.ZstdDecompressor().decompressobj()
        try:
          yield frame.decompress(block)
        except zstandard.ZstdError as e:
          raise InputError(f'{file}: damaged ({e})') from e
        block = frame.unused_data if frame.eof else b''
    if frame is not None and not frame.eof:
      raise EOFError


class _Blocks(io.RawIOBase):
  """A readable file object over an iterator of blocks of bytes."""

  def __init__(self, blocks: Iterator[bytes]):
    self._blocks, self._rest = blocks, b''

  def readable(self) -> bool:
    return True

  def readinto(self, target) -> int:
    while not self._rest:
      block = next(self._blocks, None)
      if block is None:
        return 0
      self._rest = block
    size = min(len(target), len(self._rest))
    target[:size], self._rest = self._rest[:size], self._rest[size:]
    return size


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
  """Context manager: errors of reading `file` become an InputError."""
  try:
    yield
  except EOFError as e:
    raise InputError(f'{file}: ends too early, it was cut off') from e
  except (lzma.LZMAError, zlib.error, gzip.BadGzipFile) as e:
    raise InputError(f'{file}: damaged ({e})') from e
  except OSError as e:
    reason = e.strerror or str(e).split('\n')[0]
    raise InputError(f'{file}: cannot be read ({reason})') from e
  except ValueError as e:
    # pyarrow's ArrowInvalid is a ValueError; our own pass unchanged.
    if isinstance(e, InputError) or type(e).__module__ != 'pyarrow.lib':
      raise
    raise InputError(f'{file}: not a readable parquet file ({e})') from e


def require(module: str, what: str, extra: str) -> Any:
  """Imports an optional dependency; InputError names the extra that installs it."""
  try:
    return __import__(module, fromlist=['_'])
  except ImportError as e:
    raise InputError(
      f'{what} need {module.split(".")[0]}: pip install "relaxed-recursive-transformers[{extra}]"'
    ) from e
