"""The matrix product of activations and a kernel, in the precision asked for.

The kernel's gradient is x^T dy. Automatic differentiation asks for it as
(dy^T x)^T, for which XLA's CPU backend transposes dy by a strided loop that it
fuses with all that made dy: a training step of SmolLM2-135M then takes 1.25
times as long.

The same backend adds up a product's terms one after the other, where other
libraries add up a few sums side by side, and rounding errors grow with the
length of a sum. So under `jax.default_matmul_precision('highest')` float32 sums
on a CPU are cut into short pieces, at a price of 15 % in time.

The right factor is packed anew there in each product. For few rows it takes 0.5
to 1.2 of the time, by dtype, shape and machine, when the kernel is the left
factor and lies as [F, D] (`benchmarks.products`): decoding holds its kernels as
`TransposedKernel`. Not so on cores with AVX-512 and no AMX: it pays there for 32 rows of
bfloat16 alone, and a sum of 1,536 terms from the left is not that from the
right, so that outputs would depend on the number of rows.

N rows, D in, F out.
"""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path
from typing import Any

from flax import struct
import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

from rrt.ops.backend import backend
from rrt.ops.quantize import dense, kind_of

# Terms of one float32 sum on a CPU with precision 'highest'.
LONGEST = 192
# Rows of a prompt up to which a transposed kernel is the left factor.
FEW = 64


@struct.dataclass
class TransposedKernel:
  """A kernel [D, F] stored as [F, D]; for inference on a CPU."""

  kernel_FxD: jax.Array

  @property
  def shape(self) -> tuple[int, int]:
    """Of the kernel, (D, F)."""
    return self.kernel_FxD.shape[1], self.kernel_FxD.shape[0]

  def astype(self, dtype) -> TransposedKernel:
    """In another dtype."""
    return TransposedKernel(self.kernel_FxD.astype(dtype))


@struct.dataclass
class GatheredKernel:
  """A kernel that is whole on a device, and the float32 shards that its gradient goes to.

  Gradients are summed over tokens, loops and devices in float32, though products have
  the dtype of the whole kernel.

  Attributes:
    whole_DxF: what products read; no gradient reaches it.
    stored_DxF: of the same values, sharded as the optimizer keeps them; never read.
  """

  whole_DxF: jax.Array
  stored_DxF: jax.Array


def transpose_named(params: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
  """Unstacked parameters with the matrices of these names transposed."""

  def one(name: str, value):
    if isinstance(value, dict):
      return transpose_named(value, names)
    return TransposedKernel(jnp.asarray(value).T) if name in names else value

  return {name: one(name, value) for name, value in params.items()}


def prefers_transposed() -> bool:
  """Whether small-batch matmuls are faster here with transposed kernels."""
  return backend() == 'cpu' and not _avx512_alone()


def slice_columns(kernel, start, count: int):
  """Columns of a matrix, `TransposedKernel` or not."""
  if isinstance(kernel, TransposedKernel):
    part = jax.lax.dynamic_slice_in_dim(kernel.kernel_FxD, start, count, 0)
    return TransposedKernel(part)
  return jax.lax.dynamic_slice_in_dim(kernel, start, count, 1)


def float32_is_float32(dtype) -> contextlib.AbstractContextManager:
  """The context in which products of a float32 computation are float32.

  GPUs would round the factors to TF32, TPUs to bfloat16. In it, what is jitted
  asks for float32; an explicit choice by the user is left alone.
  """
  if jnp.dtype(dtype) == jnp.float32 and precision() is None:
    return jax.default_matmul_precision('float32')
  return contextlib.nullcontext()


def precision() -> str | None:
  """What `jax.default_matmul_precision` is set to."""
  return getattr(jax.config, 'jax_default_matmul_precision')  # noqa: B009


def matmul(x_BxLxD, kernel_DxF):
  """x W in the dtype of x, [B, L, F]; differentiable once, in reverse.

  A `TransposedKernel` kernel takes x of any rank and is not differentiable, and codes
  (`rrt.ops.quantize`) are constants. Kernels' gradients are summed in their own dtype, not
  in that of x.
  """
  if isinstance(kernel_DxF, GatheredKernel):
    return _matmul_gathered(x_BxLxD, kernel_DxF.whole_DxF, kernel_DxF.stored_DxF)
  if kind_of(kernel_DxF):
    kernel_DxF = dense(kernel_DxF, x_BxLxD.dtype, after=x_BxLxD)
  if isinstance(kernel_DxF, TransposedKernel):
    return _matmul_transposed(x_BxLxD, kernel_DxF.astype(x_BxLxD.dtype).kernel_FxD)
  return _matmul(x_BxLxD, kernel_DxF)


def _matmul_transposed(x, kernel_FxD):
  """X of [..., D] times a transposed kernel, [..., F]."""
  F, D = kernel_FxD.shape
  *lead, _ = x.shape
  N = math.prod(lead)
  # One token a row, or a short prompt.
  few = lead[1:] in ([], [1]) or N <= FEW
  if not few or _pieces(D, x.dtype) > 1:
    return _matmul(x, kernel_FxD.T)
  # A product of another layout would run in float32, on kernels converted anew.
  x_NxD = with_layout_constraint(x.reshape(N, D), Layout((0, 1)))
  y_FxN = jax.lax.dot_general(kernel_FxD, x_NxD, (((1,), (1,)), ((), ())))
  # XLA would turn the product itself, into the slow one.
  return jax.lax.optimization_barrier(y_FxN).T.reshape(*lead, F)


@functools.cache
def _avx512_alone() -> bool:
  """Whether these cores have AVX-512 and no AMX."""
  cpuinfo = Path('/proc/cpuinfo')
  flags = cpuinfo.read_text().split() if cpuinfo.exists() else ()
  return 'avx512f' in flags and 'amx_bf16' not in flags


@jax.custom_vjp
def _matmul(x_BxLxD, kernel_DxF):
  kernel_DxF = kernel_DxF.astype(x_BxLxD.dtype)
  count = _pieces(kernel_DxF.shape[0], x_BxLxD.dtype)
  if count == 1:
    return x_BxLxD @ kernel_DxF
  return sum(
    x @ kernel
    for x, kernel in zip(
      jnp.array_split(x_BxLxD, count, -1), jnp.array_split(kernel_DxF, count, 0), strict=True
    )
  )


def _pieces(terms: int, dtype) -> int:
  """Into how many partial sums a product is cut."""
  exact = dtype == jnp.float32 and precision() == 'highest'
  if not exact or backend() != 'cpu':
    return 1
  return -(-terms // LONGEST)


def _forward(x_BxLxD, kernel_DxF):
  return _matmul(x_BxLxD, kernel_DxF), (x_BxLxD, kernel_DxF)


def _backward(saved, dy_BxLxF):
  x_BxLxD, kernel_DxF = saved
  return _gradients(x_BxLxD, kernel_DxF, dy_BxLxF, kernel_DxF.dtype)


def _gradients(x_BxLxD, kernel_DxF, dy_BxLxF, dtype):
  """Of a product, by x in its own dtype and by the kernel in `dtype`."""
  product = jax.lax.dot_general
  with float32_is_float32(dy_BxLxF.dtype):
    dx_BxLxD = product(dy_BxLxF, kernel_DxF.astype(dy_BxLxF.dtype), (((2,), (1,)), ((), ())))
    sums = jnp.promote_types(dtype, dy_BxLxF.dtype)
    dkernel_DxF = product(
      x_BxLxD, dy_BxLxF, (((0, 1), (0, 1)), ((), ())), preferred_element_type=sums
    )
  return dx_BxLxD, dkernel_DxF.astype(dtype)


_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def _matmul_gathered(x_BxLxD, whole_DxF, stored_DxF):
  return _matmul(x_BxLxD, whole_DxF)


def _forward_gathered(x_BxLxD, whole_DxF, stored_DxF):
  return _matmul(x_BxLxD, whole_DxF), (x_BxLxD, whole_DxF)


def _backward_gathered(saved, dy_BxLxF):
  x_BxLxD, whole_DxF = saved
  dx_BxLxD, dkernel_DxF = _gradients(x_BxLxD, whole_DxF, dy_BxLxF, jnp.float32)
  return dx_BxLxD, None, dkernel_DxF


_matmul_gathered.defvjp(_forward_gathered, _backward_gathered)
