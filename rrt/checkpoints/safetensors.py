"""Reads and writes safetensors files in chunks of bounded memory.

Memory may have no room for a checkpoint beside the model that is built from it,
so at most one chunk (`CHUNK` bytes) is held at a time. The `safetensors` package
returns whole tensors; these readers convert, validate and checksum one chunk at a
time while copying it into the stacked array, and name the damaged tensor.
The format: 8 bytes little-endian header length, a JSON header with dtype,
shape and byte range of every tensor, then the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
import zlib

import ml_dtypes
import numpy as np

from rrt.errors import InputError
from rrt.pieces import Pieces, pieces

CHUNK = 16 << 20
MAX_HEADER = 100 << 20
MAX_FAULTS = 8  # How many an error lists before it counts the others.
T = TypeVar('T')

DTYPES = {
  'F64': np.dtype('<f8'),
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
# Codes of quantized matrices, in files of ours.
CODES = {'I8': np.dtype('i1'), 'U8': np.dtype('u1')}
ALL_DTYPES = DTYPES | CODES
NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}


class TensorInfo(NamedTuple):
  """Shape and type of a tensor, from the header."""

  shape: tuple[int, ...]
  dtype: str


class Tensors(Protocol):
  """Interface: a checkpoint's tensors by name."""

  @property
  def infos(self) -> Mapping[str, TensorInfo]:
    """Shape and type of each tensor."""
    ...

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) over the whole first axis.

    Raises:
      InputError: missing bytes, or a type that cannot be decoded.
    """
    ...


def rows_per_chunk(shape: tuple[int, ...], row_bytes: int) -> int:
  """Number of rows of the first axis in a chunk, at least one."""
  return max(1, min(shape[0] if shape else 1, CHUNK // max(1, row_bytes)))


class SafetensorsFile:
  """The tensors of one safetensors file.

  Attributes:
    infos: shape and dtype by tensor name.
    metadata: the file's own key-value pairs.
  """

  def __init__(self, path: str | Path):
    """Reads and checks the header.

    Raises:
      InputError: the file is not a whole safetensors file.
    """
    self.path = Path(path)
    try:
      with open(self.path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size
        header = _read_header(f, size, self.path)
    except OSError as e:
      raise InputError(f'{self.path} cannot be read: {e.strerror or e}.') from e
    self._start, fields = header
    self.metadata: dict[str, str] = fields.pop('__metadata__', None) or {}
    self.infos: dict[str, TensorInfo] = {}
    self._ranges: dict[str, tuple[int, int]] = {}
    end = 0
    for name, entry in fields.items():
      try:
        shape = tuple(entry['shape'])
        begin, stop = entry['data_offsets']
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)):
          raise ValueError('not sizes')
        self.infos[name] = TensorInfo(shape, str(entry['dtype']))
      except (TypeError, KeyError, ValueError) as e:
        raise _broken(self.path, f'its entry for {name!r} is damaged') from e
      dtype = ALL_DTYPES.get(self.infos[name].dtype)
      wanted = dtype and math.prod(shape) * dtype.itemsize
      if stop < begin or (dtype and stop - begin != wanted):
        raise _broken(self.path, f'the byte range of {name!r} is damaged')
      self._ranges[name] = (begin, stop)
      end = max(end, stop)
    if self._start + end > size:
      raise _broken(self.path, f'it ends after {size:,} of {self._start + end:,} bytes')
    if self._start + end < size:
      raise _broken(self.path, f'{size - self._start - end:,} bytes follow the last tensor')

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) of a tensor in its own dtype.

    Raises:
      InputError: the dtype is unknown, or the file ends.
    """
    shape, dtype_name = self.infos[name]
    if dtype_name not in ALL_DTYPES:
      raise _broken(self.path, f'{name!r} has the unknown dtype {dtype_name[:80]!r}')
    dtype = ALL_DTYPES[dtype_name]
    begin, stop = self._ranges[name]
    if stop == begin:
      return
    n_rows = shape[0] if shape else 1
    row_bytes = (stop - begin) // n_rows
    step = rows_per_chunk(shape, row_bytes)
    with open(self.path, 'rb') as f:
      f.seek(self._start + begin)
      for row in range(0, n_rows, step):
        count = min(step, n_rows - row)
        data = f.read(count * row_bytes)
        if len(data) != count * row_bytes:
          raise _broken(self.path, f'it ends inside {name!r}')
        rows = np.frombuffer(data, dtype)
        yield row, rows.reshape((count,) + shape[1:] if shape else ())

  def pieces(self, name: str, dtype: Any) -> Pieces:
    """A tensor that is read from the file when it is used, in another dtype."""
    shape, dtype_name = self.infos[name]
    begin, stop = self._ranges[name]
    row = (stop - begin) // shape[0]

    def read(start: int, end: int) -> np.ndarray:
      with open(self.path, 'rb') as f:
        f.seek(self._start + begin + start * row)
        data = f.read((end - start) * row)
      if len(data) != (end - start) * row:
        raise _broken(self.path, f'it ends inside {name!r}')
      return np.frombuffer(data, ALL_DTYPES[dtype_name]).reshape(end - start, *shape[1:])

    step = 1 if len(shape) > 2 else rows_per_chunk(shape, row)
    return Pieces(shape, dtype, read, step)


def open_all(
  paths: Sequence[Path], open_one: Callable[[Path], T], faults: Sequence[str]
) -> list[T]:
  """Opens the files of a checkpoint and collects their faults in one error.

  Args:
    paths: the files.
    open_one: opens one, or raises InputError.
    faults: sentences on faults that are known already.

  Raises:
    InputError: lists the given and the found faults.
  """
  faults, files = list(faults), []
  for path in paths:
    try:
      files.append(open_one(path))
    except InputError as e:
      faults.append(str(e))
  if len(faults) == 1:
    raise InputError(faults[0])
  if faults:
    more = len(faults) - MAX_FAULTS
    listed = '; '.join(fault.rstrip('.') for fault in faults[:MAX_FAULTS])
    raise InputError(f'{listed}{f"; and {more} more such files" if more > 0 else ""}.')
  return files


class ShardedTensors:
  """Several files as one checkpoint."""

  def __init__(self, files: Iterable[Tensors], dtypes: Any = None):
    self.dtypes = DTYPES if dtypes is None else dtypes
    self.infos: dict[str, TensorInfo] = {}
    self._file: dict[str, Tensors] = {}
    for file in files:
      self.infos.update(file.infos)
      self._file.update(dict.fromkeys(file.infos, file))

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) from the file that has the tensor."""
    return self._file[name].chunks(name)


def write(
  path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> dict[str, int]:
  """Writes a safetensors file and syncs it to the disk.

  Args:
    path: the new file.
    tensors: arrays by name, or `Pieces`, which are never whole; strided views and jax
      arrays are copied chunk by chunk, one array at a time.
    metadata: key-value strings for the header.

  Returns:
    The crc32 of every tensor's bytes.
  """
  header: dict[str, Any] = {}
  if metadata:
    header['__metadata__'] = dict(metadata)
  end = 0
  for name, array in tensors.items():
    begin, end = end, end + math.prod(array.shape) * array.dtype.itemsize
    header[name] = {
      'dtype': NAMES[np.dtype(array.dtype)],
      'shape': list(array.shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  crcs = {}
  with open(path, 'wb') as f:
    f.write(len(text).to_bytes(8, 'little'))
    f.write(text)
    for name, array in tensors.items():
      crc = 0
      for _, rows in pieces(array):
        for data in _bytes(rows):
          crc = zlib.crc32(data, crc)
          f.write(data)
      crcs[name] = crc
    f.flush()
    os.fsync(f.fileno())
  return crcs


def _bytes(array: np.ndarray) -> Iterator[memoryview]:
  rows = array.reshape(1) if array.ndim == 0 else array
  if rows.size == 0:
    return
  step = rows_per_chunk(rows.shape, rows.nbytes // rows.shape[0])
  for start in range(0, rows.shape[0], step):
    part = np.ascontiguousarray(rows[start : start + step])
    yield part.reshape(-1).view(np.uint8).data


def _read_header(f, size: int, path: Path) -> tuple[int, dict]:
  """(offset of the first tensor, the header's fields)."""
  if size < 8:
    raise _broken(path, f'it has {size} bytes')
  length = int.from_bytes(f.read(8), 'little')
  if length > min(size - 8, MAX_HEADER):
    if length <= MAX_HEADER:
      raise _broken(path, 'it ends inside its header')
    raise _broken(path, 'it does not begin with a safetensors header')
  try:
    fields = json.loads(f.read(length))
    if not isinstance(fields, dict):
      raise ValueError('not an object')
  except ValueError as e:
    raise _broken(path, 'its header is not readable JSON') from e
  return 8 + length, fields


def _broken(path: Path, why: str) -> InputError:
  return InputError(f'{path} is not a whole safetensors file: {why}; copy or download it again.')
