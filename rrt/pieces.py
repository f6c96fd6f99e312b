"""Arrays that are read, or made, one piece after the other and are nowhere whole.

A leaf of a large model may be one: of a checkpoint that is read when it is used, or of a
model whose shards lie on several machines. `np.asarray` makes the whole array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import math
from typing import Any

import numpy as np


class Pieces:
  """An array in pieces along its first axis.

  Attributes:
    shape, dtype: of the whole.
    step: rows of a piece.
  """

  def __init__(
    self, shape: tuple[int, ...], dtype: Any, read: Callable[[int, int], np.ndarray], step: int = 1
  ):
    """`read(start, stop)` returns these rows, an array of its own or a view not to write to."""
    self.shape, self.dtype, self.step = tuple(shape), np.dtype(dtype), step
    self._read = read

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of entries."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole."""
    return self.size * self.dtype.itemsize

  def __len__(self) -> int:
    return self.shape[0]

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Rows from `start` to before `stop`."""
    return np.asarray(self._read(start, stop)).astype(self.dtype, copy=False)

  def __getitem__(self, key: Any) -> Any:
    """A row, or part of one, for an int; `Pieces` for a slice of rows; else of the whole."""
    if isinstance(key, (int, np.integer)):
      index = range(len(self))[int(key)]
      return self.rows(index, index + 1)[0]
    if isinstance(key, tuple) and key and isinstance(key[0], (int, np.integer)):
      return self[key[0]][key[1:]]
    if isinstance(key, slice) and key.step in (None, 1):
      start, stop, _ = key.indices(len(self))
      shape = (max(stop - start, 0), *self.shape[1:])
      return Pieces(shape, self.dtype, lambda a, b: self.rows(start + a, start + b), self.step)
    return np.asarray(self)[key]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    whole = np.empty(self.shape, self.dtype if dtype is None else dtype)
    for start, rows in pieces(self):
      whole[start : start + len(rows)] = rows
    return whole

  def astype(self, dtype: Any) -> Pieces:
    """In another dtype, a piece at a time."""
    return Pieces(self.shape, dtype, self.rows, self.step)


def pieces(array: Any) -> Iterator[tuple[int, np.ndarray]]:
  """(first row, rows) over the first axis; an array that is whole is one piece."""
  if not isinstance(array, Pieces):
    yield 0, np.asarray(array)
    return
  for start in range(0, len(array), array.step):
    yield start, array.rows(start, min(start + array.step, len(array)))


def cast(array: Any, dtype: Any) -> Any:
  """In another dtype; the array itself where it has that."""
  return array if array.dtype == dtype else array.astype(dtype)


def same(a: Any, b: Any) -> bool:
  """Whether two arrays are equal, compared piece by piece."""
  if a is b:
    return True
  if a.shape != b.shape:
    return False
  if not a.shape:
    return bool(np.asarray(a) == np.asarray(b))
  if not isinstance(a, Pieces):
    a, b = b, a
  return all(
    np.array_equal(rows, np.asarray(b[start : start + len(rows)])) for start, rows in pieces(a)
  )
