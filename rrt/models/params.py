"""Parameters for inference: dtype and layout; bucketed lengths."""

import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.ops import matmul
from rrt.ops.quantize import KINDS

DTYPES = ('float32', 'bfloat16')


def cast(params, dtype: str):
  """Parameters on the device, matrices in `dtype`.

  Gains of norms and biases keep their dtype: they are small; so do quantized matrices.

  Raises:
    InputError: a dtype that is not supported.
  """
  if dtype not in DTYPES:
    raise InputError(f'dtype={dtype!r}: must be one of {DTYPES}.')
  kept = lambda path: getattr(path[-1], 'key', None) in ('scale', 'bias', 'step', *KINDS)
  return jax.tree_util.tree_map_with_path(
    lambda path, w: jnp.asarray(w, None if kept(path) else dtype), params
  )


def transpose_kernels(params):
  """Unstacked parameters with matrices in the layout that is fastest for decoding."""
  if not matmul.prefers_transposed():
    return params
  parts = {k: params[k] for k in ('prelude', 'block', 'coda') if k in params}
  return params | matmul.transpose_named(parts, ('kernel',))


def power_bucket(n: int, least: int = 16) -> int:
  """The least power of two times `least` that is n or more: fewer shapes than `bucket`."""
  size = least
  while size < n:
    size *= 2
  return size


def bucket(n: int, most: int | None = None, least: int = 16) -> int:
  """N rounded up to 16, 24, 32, 48, 64, 96, ..., so that few shapes compile.

  Args:
    n: the length to round up.
    most: upper limit of the result.
    least: the smallest bucket, a power of 2.
  """
  size = least
  while size < n:
    power = size & (size - 1) == 0
    size = (size * 3 // 2 if size > 1 else 2) if power else size * 4 // 3
  return size if most is None else min(size, most)
