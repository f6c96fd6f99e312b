"""Reads GGUF files: metadata, and tensors dequantized row by row.

The `gguf` package dequantizes all quantization types. Its reader is not used
because it maps one whole file: this one reads pieces of a file in place, reports
damage in one sentence, and decodes one chunk at a time.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
import math
import os
from pathlib import Path
import struct
from typing import Any

import numpy as np

from rrt.checkpoints import safetensors
from rrt.checkpoints.safetensors import TensorInfo
from rrt.errors import InputError

MAGIC = b'GGUF'
_SCALARS = {
  0: '<u1',
  1: '<i1',
  2: '<u2',
  3: '<i2',
  4: '<u4',
  5: '<i4',
  6: '<f4',
  7: '?',
  10: '<u8',
  11: '<i8',
  12: '<f8',
}
_STRING, _ARRAY = 8, 9


class _Pieces:
  """Concatenated files; none is open between two reads."""

  def __init__(self, paths: Sequence[Path]):
    self.name = str(paths[0])
    self._paths = list(paths)
    self._starts = [0]
    for path in paths:
      with open(path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size
      self._starts.append(self._starts[-1] + size)
    self.size = self._starts[-1]

  def read(self, offset: int, count: int) -> bytes:
    """Bytes at an offset of the concatenation.

    Raises:
      InputError: the files end before them.
    """
    if offset + count > self.size:
      raise self.broken(f'it ends after {self.size:,} of at least {offset + count:,} bytes')
    parts = []
    while count:
      i = bisect.bisect_right(self._starts, offset) - 1
      take = min(count, self._starts[i + 1] - offset)
      try:
        with open(self._paths[i], 'rb') as f:
          f.seek(offset - self._starts[i])
          data = f.read(take)
      except OSError as e:
        raise self.broken(f'{self._paths[i].name} cannot be read ({e.strerror or e})') from e
      if len(data) != take:
        raise self.broken(f'it cannot be read at byte {offset:,}')
      parts.append(data)
      offset, count = offset + take, count - take
    return parts[0] if len(parts) == 1 else b''.join(parts)

  def broken(self, why: str) -> InputError:
    n = len(self._paths)
    pieces = f' and its {n - 1} other pieces' if n > 1 else ''
    verb = 'are' if n > 1 else 'is'
    return InputError(
      f'{self.name}{pieces} {verb} not a whole GGUF file: {why}; copy or download it again.'
    )


class _Cursor:
  """Reads consecutive values from a buffered window of the file."""

  def __init__(self, pieces: _Pieces):
    self._pieces = pieces
    self._window = b''
    self._base = 0
    self._at = 0

  @property
  def offset(self) -> int:
    return self._base + self._at

  def take(self, count: int) -> bytes:
    stop = self._at + count
    if stop > len(self._window):
      left = self._pieces.size - self.offset
      size = max(count, min(left, 4 << 20))
      self._base, self._window = (self.offset, self._pieces.read(self.offset, size))
      self._at, stop = 0, count
    data = self._window[self._at : stop]
    self._at = stop
    return data

  def number(self, form: str) -> int:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def string(self) -> str:
    return self.take(self.number('<Q')).decode('utf-8', errors='replace')

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      item, count = self.number('<I'), self.number('<Q')
      if item in _SCALARS:
        dtype = np.dtype(_SCALARS[item])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)
      return [self.value(item) for _ in range(count)]
    if kind in _SCALARS:
      dtype = np.dtype(_SCALARS[kind])
      return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
    raise self._pieces.broken(f'it has a value of the unknown type {kind}')


class GgufFile:
  """One GGUF file, whole or in consecutive pieces.

  Attributes:
    metadata: the key-value pairs; arrays of numbers are numpy arrays.
    infos: shape (first axis slowest) and quantization type by tensor name.
    dtypes: the types that can be decoded.
  """

  def __init__(self, paths: Sequence[Path]):
    """Reads and checks the header.

    Raises:
      InputError: not a GGUF file, damaged, or the `gguf` package is missing.
    """
    self._gguf = library()
    sizes = self._gguf.GGML_QUANT_SIZES
    try:
      self._pieces = _Pieces(paths)
    except OSError as e:
      raise InputError(f'{e.filename} cannot be read: {e.strerror or e}.') from e
    broken = self._pieces.broken
    cursor = _Cursor(self._pieces)
    if cursor.take(4) != MAGIC:
      raise broken('it does not begin with the letters GGUF')
    version = cursor.number('<I')
    if version not in (2, 3):
      raise broken(f'its version is {version}, where 2 or 3 can be read')
    n_tensors, n_fields = cursor.number('<Q'), cursor.number('<Q')
    self.metadata: dict[str, Any] = {}
    for _ in range(n_fields):
      key = cursor.string()
      self.metadata[key] = cursor.value(cursor.number('<I'))
    used: set[Any] = set()
    self.infos: dict[str, TensorInfo] = {}
    self._places: dict[str, tuple[int, int, int]] = {}
    for _ in range(n_tensors):
      name = cursor.string()
      n_axes = cursor.number('<I')
      if n_axes > 8:
        raise broken(f'the entry of tensor {name[:80]!r} is damaged')
      shape = tuple(cursor.number('<Q') for _ in range(n_axes))[::-1]
      kind, offset = cursor.number('<I'), cursor.number('<Q')
      types = [t for t in sizes if t.value == kind]
      self.infos[name] = TensorInfo(shape, types[0].name if types else f'type {kind}')
      if types:
        used.add(types[0])
        per_block, block_bytes = sizes[types[0]]
        if shape and shape[-1] % per_block:
          raise broken(
            f'the rows of {name!r} have {shape[-1]} values, not a multiple of {per_block}'
          )
        row = shape[-1] // per_block * block_bytes if shape else block_bytes
        self._places[name] = (kind, offset, row)
    self.dtypes = {t.name for t in used if _decodable(self._gguf, t)}
    align = self.metadata.get('general.alignment', 32)
    if type(align) is not int or align < 1:
      raise broken(
        f'its general.alignment is {str(align)[:80]!r}, where a number above 0 is needed'
      )
    self._data = -(-cursor.offset // align) * align
    for name, (_, offset, row) in self._places.items():
      end = self._data + offset + row * math.prod(self.infos[name].shape[:-1])
      if end > self._pieces.size:
        raise broken(f'it ends after {self._pieces.size:,} bytes, {name!r} at {end:,}')

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, float rows) of a tensor."""
    shape = self.infos[name].shape
    kind, offset, row_bytes = self._places[name]
    n_rows = math.prod(shape[:-1])
    # Decoding makes several float32 copies of a chunk.
    step = max(1, safetensors.CHUNK // 16 // max(1, shape[-1]))
    for start in range(0, n_rows, step):
      count = min(step, n_rows - start)
      data = self._pieces.read(self._data + offset + start * row_bytes, count * row_bytes)
      rows = self._decode(data, kind).reshape(count, -1)
      yield start, rows if len(shape) > 1 else rows.reshape(shape)

  def _decode(self, data: bytes, kind: int) -> np.ndarray:
    if kind == 0:
      return np.frombuffer(data, '<f4')
    if kind == 1:
      return np.frombuffer(data, '<f2')
    raw = np.frombuffer(data, np.uint8)
    qtype = self._gguf.GGMLQuantizationType(kind)
    with np.errstate(over='ignore', invalid='ignore'):  # The caller checks.
      return self._gguf.quants.dequantize(raw, qtype)


def library() -> Any:
  """The gguf package.

  Raises:
    InputError: it is not installed.
  """
  try:
    import gguf
  except ImportError as e:
    raise InputError(
      'GGUF files need the gguf package: pip install "relaxed-recursive-transformers[convert]".'
    ) from e
  return gguf


def _decodable(gguf, kind) -> bool:
  """Whether the gguf package dequantizes a type; it exports no list of them."""
  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.quants.dequantize(np.zeros(block_bytes, np.uint8), kind)
  except NotImplementedError:
    return kind == gguf.GGMLQuantizationType.F16
  return True
