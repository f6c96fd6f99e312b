"""Per-loop LoRA: y = x W + scale * x A[loop] B[loop] (paper, eq. 3 and 4).

B batch, L length, D in, F out, R loops, r rank.
"""

import jax
import jax.numpy as jnp

from rrt.models.matmul import matmul


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
  dtype = x_BxLxD.dtype
  a_RxDxr, b_RxrxF = a_RxDxr.astype(dtype), b_RxrxF.astype(dtype)
  if jnp.ndim(loop) == 0:
    y_BxLxF = matmul(matmul(x_BxLxD, a_RxDxr[loop]), b_RxrxF[loop])
  else:
    # All loops' products side by side, the other loops' masked out: two dense
    # matmuls and no gather of A and B by row.
    R = a_RxDxr.shape[0]
    own_BxR = jax.nn.one_hot(loop, R, dtype=dtype)
    xa_BxLxRxr = jnp.einsum('bld,xdr->blxr', x_BxLxD, a_RxDxr)
    xa_BxLxRxr = xa_BxLxRxr * own_BxR[:, None, :, None]
    y_BxLxF = jnp.einsum('blxr,xrf->blf', xa_BxLxRxr, b_RxrxF)
  return y_BxLxF if scale == 1.0 else y_BxLxF * jnp.asarray(scale, dtype)


def merge(kernel_DxF, a_Dxr, b_rxF, scale=1.0):
  """W' + scale * A B of one position: what an untied model holds there."""
  return kernel_DxF + scale * (a_Dxr @ b_rxF)
