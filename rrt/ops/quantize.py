"""Matrices in 8 and 4 bits: codes, and a step size a group of inputs.

A quantized matrix is a dict in place of the array: the codes under the name of their
kind, and `step`. Rounding, codebooks and the way back are qwix's; two codes of four
bits share a byte.

    int8   {'int8': int8 [I, O],      'step': float32 [I / g, O]}
    int4   {'int4': uint8 [I / 2, O], 'step': ...}
    nf4    {'nf4':  uint8 [I / 2, O], 'step': ...}, quantiles of a normal distribution
                                                    (arXiv 2305.14314)

Leading axes are allowed. I inputs, O outputs, g inputs of a group.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rrt.errors import InputError

KINDS = ('int8', 'int4', 'nf4')
GROUP = 64  # g, where it divides the inputs; the largest divisor below it elsewhere.


def group_of(size: int) -> int:
  """How many inputs of a matrix share a step."""
  return max(g for g in range(1, min(GROUP, size) + 1) if size % g == 0)


def kind_of(matrix: Any) -> str | None:
  """The kind of a quantized matrix; None for an array."""
  return next((k for k in KINDS if k in matrix), None) if isinstance(matrix, dict) else None


def shapes(shape: tuple[int, ...], kind: str, axis: int = -2) -> dict[str, tuple[int, ...]]:
  """Shapes of the parts of a quantized matrix."""
  axis %= len(shape)
  at = lambda size: (*shape[:axis], size, *shape[axis + 1 :])
  size = shape[axis]
  if kind != 'int8' and size % 2:
    raise InputError(f'weights={kind!r}: two codes share a byte, so that {size} inputs are odd.')
  return {kind: at(size if kind == 'int8' else size // 2), 'step': at(size // group_of(size))}


def quantize(matrix, kind: str, axis: int = -2) -> dict[str, jax.Array]:
  """A matrix rounded to the nearest codes.

  Args:
    matrix: float [..., I, O].
    kind: one of `KINDS`.
    axis: of the inputs, along which a group shares its step.

  Raises:
    InputError: an odd number of inputs in four bits.
  """
  axis %= jnp.ndim(matrix)
  shapes(jnp.shape(matrix), kind, axis)  # For the error.
  rest = [i for i in range(jnp.ndim(matrix)) if i != axis]
  found = _qwix().quantize(
    jnp.asarray(matrix, jnp.float32),
    kind if kind == 'nf4' else jnp.dtype(kind),
    channelwise_axes=rest,
    tiled_axes={axis: group_of(jnp.shape(matrix)[axis])},
  )
  codes = found.qvalue
  if kind != 'int8':
    codes = _packed(codes.astype(jnp.int32) & 15, axis)
  return {kind: codes, 'step': found.scale}


def dense(matrix: Any, dtype=None, after=None):
  """The matrix that codes stand for; an array is returned as it is.

  Args:
    matrix: quantized, or an array, or what stands for one.
    dtype: of the result; None keeps an array's, and gives float32 for codes.
    after: an array before which the codes stay codes: XLA would otherwise move this
      out of a decoding loop, and hold all weights dense there.
  """
  kind = kind_of(matrix)
  if kind is None:
    return matrix if dtype is None else matrix.astype(dtype)
  if after is not None:
    matrix, _ = jax.lax.optimization_barrier((matrix, jax.lax.stop_gradient(after)))
  codes, step = jnp.asarray(matrix[kind]), jnp.asarray(matrix['step'])
  if kind != 'int8':
    codes = _unpacked(codes, codes.ndim - 2)
    codes = codes.astype(jnp.uint4 if kind == 'nf4' else jnp.uint8)
    if kind == 'int4':  # Two's complement.
      codes = codes.astype(jnp.int8)
      codes = (codes - 16 * (codes > 7)).astype(jnp.int8)
  array = _qwix().QArray(codes, step.astype(dtype or jnp.float32), qtype=_qtype(kind))
  return _qwix().dequantize(array)


def rows(matrix: Any, index):
  """Rows of a matrix whose groups lie within them."""
  return jax.tree.map(lambda t: jnp.take(t, index, axis=0), matrix)


def cast_floats(tree: Any, dtype):
  """A tree of arrays in a dtype; codes stay integers."""
  is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
  return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


def _qtype(kind: str):
  return 'nf4' if kind == 'nf4' else jnp.int8


def _packed(codes, axis: int):
  """Codes of four bits, two neighbours a byte, the first in the low bits."""
  shape = codes.shape
  pairs = codes.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
  low, high = (jnp.take(pairs, i, axis + 1) for i in range(2))
  return (low | (high << 4)).astype(jnp.uint8)


def _unpacked(codes, axis: int):
  shape = codes.shape
  pairs = jnp.stack([codes & 15, codes >> 4], axis + 1)
  return pairs.reshape(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


def _qwix():
  try:
    import qwix
  except ImportError as e:
    raise InputError(
      "Quantized weights need qwix: pip install 'relaxed-recursive-transformers[quantize]'."
    ) from e
  return qwix
