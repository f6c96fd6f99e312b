"""Per-loop LoRA: y = x W + scale * x A[loop] B[loop] (paper, eq. 3 and 4).

B batch, L length, D in, F out, R loops, r rank.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rrt.ops.matmul import Turned, matmul, slice_columns


def low_rank(x_BxLxD, a_RxDxr, b_RxrxF, loop, scale=1.0):
  """The low-rank product of each row's own loop.

  Args:
    x_BxLxD: the linear's input.
    a_RxDxr: down projections, one a loop.
    b_RxrxF: up projections, one a loop.
    loop: int scalar, or int [B] with one loop a row.
    scale: alpha / r.

  Returns:
    [B, L, F] in the dtype of `x`.
  """
  if jnp.ndim(loop):
    return low_rank_grouped(x_BxLxD, a_RxDxr, b_RxrxF, loop, scale)
  dtype = x_BxLxD.dtype
  a_RxDxr, b_RxrxF = a_RxDxr.astype(dtype), b_RxrxF.astype(dtype)
  y_BxLxF = matmul(matmul(x_BxLxD, a_RxDxr[loop]), b_RxrxF[loop])
  return _scaled(y_BxLxF, scale)


def low_rank_grouped(x_BxLxD, a_RxDxr, b_RxrxF, loop_B, scale=1.0):
  """`low_rank` of rows at different loops, sorted by loop.

  Each row meets its own loop's factors alone: as many operations as with one
  loop, where the backend has a grouped product.
  """
  dtype = x_BxLxD.dtype
  R = a_RxDxr.shape[0]
  B, L, D = x_BxLxD.shape
  order_B = jnp.argsort(loop_B, stable=True)
  rows_R = L * jnp.sum(loop_B[:, None] == jnp.arange(R)[None, :], 0)
  sizes_R = rows_R.astype(jnp.int32)
  x_NxD = x_BxLxD[order_B].reshape(B * L, D)
  xa_Nxr = jax.lax.ragged_dot(x_NxD, a_RxDxr.astype(dtype), sizes_R)
  y_NxF = jax.lax.ragged_dot(xa_Nxr, b_RxrxF.astype(dtype), sizes_R)
  back_B = jnp.argsort(order_B, stable=True)
  return _scaled(y_NxF.reshape(B, L, -1)[back_B], scale)


def low_rank_wide(x_BxLxD, a_DxRr, b_RrxF, loop, loops: int, scale=1.0):
  """`low_rank` with the loops' factors side by side.

  Rows at different loops share two dense matmuls: all loops' products are
  computed and the other loops' masked out, with no gather of factors by row. A
  scalar loop takes its own columns of A alone, and its own rows of B where
  these are not `Turned`.

  Args:
    x_BxLxD: the linear's input.
    a_DxRr: down projections; loop b has columns b * r and on. Both may be
      `Turned`.
    b_RrxF: up projections; loop b has rows b * r and on.
    loop: int scalar, or int [B] with one loop a row.
    loops: R.
    scale: alpha / r.
  """
  dtype = x_BxLxD.dtype
  a_DxRr, b_RrxF = a_DxRr.astype(dtype), b_RrxF.astype(dtype)
  rank = a_DxRr.shape[1] // loops
  if jnp.ndim(loop):
    xa_BxLxRr = matmul(x_BxLxD, a_DxRr)
  else:
    xa_BxLxr = matmul(x_BxLxD, slice_columns(a_DxRr, loop * rank, rank))
    if not isinstance(b_RrxF, Turned):
      b_rxF = jax.lax.dynamic_slice_in_dim(b_RrxF, loop * rank, rank, 0)
      return _scaled(matmul(xa_BxLxr, b_rxF), scale)
    # A loop's part of a `Turned` factor is strided, slow to cut out.
    xa_BxLxRr = jnp.tile(xa_BxLxr, loops)
  of_column_1x1xRr = jnp.arange(loops * rank)[None, None, :] // rank
  own_Bx1xRr = of_column_1x1xRr == jnp.reshape(loop, (-1, 1, 1))
  return _scaled(matmul(jnp.where(own_Bx1xRr, xa_BxLxRr, 0), b_RrxF), scale)


def widen(a_RxDxr, b_RxrxF):
  """The factors of all loops side by side, [D, R r] and [R r, F]."""
  R, D, r = a_RxDxr.shape
  a_DxRr = jnp.swapaxes(a_RxDxr, 0, 1).reshape(D, R * r)
  return a_DxRr, b_RxrxF.reshape(R * r, -1)


def widen_all(params: dict[str, Any]) -> dict[str, Any]:
  """Unstacked parameters with every LoRA side by side, laid out once.

  Inside a loop the layout would be made anew at every step.
  """
  if 'lora_a' in params:
    rest = {k: v for k, v in params.items() if not k.startswith('lora_')}
    a_DxRr, b_RrxF = widen(params['lora_a'], params['lora_b'])
    return rest | {'lora_a_wide': a_DxRr, 'lora_b_wide': b_RrxF}
  return {k: widen_all(v) if isinstance(v, dict) else v for k, v in params.items()}


def _scaled(y_BxLxF, scale):
  if scale == 1.0:
    return y_BxLxF
  return y_BxLxF * jnp.asarray(scale, y_BxLxF.dtype)


def merge(kernel_DxF, a_Dxr, b_rxF, scale=1.0):
  """W' + scale * A B of one position: what an untied model holds there."""
  return kernel_DxF + scale * (a_Dxr @ b_rxF)
