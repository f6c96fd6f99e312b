"""Per-loop LoRA: y = x W + scale * x A[loop] B[loop] (paper, eq. 3 and 4).

B batch, L length, D in, F out, R loops, r rank, N layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.ops import least_squares
from rrt.ops.backend import backend
from rrt.ops.grouped_matmul import grouped_matmul
from rrt.ops.matmul import (
  TransposedKernel,
  matmul,
  prefers_transposed,
  slice_columns,
  transpose_named,
)
from rrt.relax.base import NO_AUX, Fitted, Leaf, Leaves, Relaxation
from rrt.relax.hosts import Host

# One rank for all positions, or a table [R][N] of ranks.
Rank = int | tuple[tuple[int, ...], ...]
# Ranks of all loops together from which sorting rows by loop pays off on an
# accelerator.
_LARGE = 256


@dataclasses.dataclass(frozen=True)
class Lora(Relaxation):
  """A low-rank term a loop on each of the block's seven linears.

  A rank is one integer for all positions or a table [R][N], indexed by loop
  and layer. Arrays are as wide as the largest rank of their component;
  narrower positions are padded with zeros in both factors. Such columns add
  nothing, get exactly zero gradients, and are not counted as parameters.

  Attributes:
    q, k, v, o, gate, up, down: ranks; 0 leaves the component without LoRA.
    alpha: the forward pass scales the low-rank product by alpha / (the
      component's largest rank); None means a scale of 1.
  """

  kind: ClassVar[str] = 'lora'
  site: ClassVar[str] = 'linear'
  matrices: ClassVar[bool] = True
  of_experts: ClassVar[bool] = True

  q: Rank = 0
  k: Rank = 0
  v: Rank = 0
  o: Rank = 0
  gate: Rank = 0
  up: Rank = 0
  down: Rank = 0
  alpha: float | None = None

  def table(self, component: str, loops: int, layers: int) -> np.ndarray:
    """Ranks of one component by position, int [R, N]."""
    rank = getattr(self, component)
    if isinstance(rank, int):
      return np.full((loops, layers), rank, np.int32)
    return np.asarray(rank, np.int32)

  def ranks(self, host: Host) -> np.ndarray:
    """Ranks on one host by loop and layer, [R, N]; a table's serve all experts of a layer."""
    if host.experts:
      table_RxN = self.table(host.name, host.loops, host.layers // host.experts)
      return np.repeat(table_RxN, host.experts, axis=1)
    return self.table(host.name, host.loops, host.layers)

  def is_absent(self, host: Host, layer: int) -> bool:
    return not self.ranks(host)[:, host.instances(layer)].any()

  def width(self, component: str) -> int:
    """The component's largest rank: the width of its arrays."""
    rank = getattr(self, component)
    return rank if isinstance(rank, int) else max(max(r) for r in rank)

  def uniform(self, component: str) -> bool:
    """Whether all positions have the component's largest rank."""
    rank = getattr(self, component)
    return isinstance(rank, int) or len({v for r in rank for v in r}) == 1

  def scale(self, component: str) -> float:
    """The factor of the low-rank product in the forward pass."""
    width = self.width(component)
    if self.alpha is None or not width:
      return 1.0
    return self.alpha / width

  def check(self, hosts: tuple[Host, ...]) -> None:
    if self.alpha is not None and not (
      isinstance(self.alpha, (int, float)) and 0 < self.alpha < 1e300
    ):
      raise InputError(f'lora.alpha={self.alpha!r}: must be a finite number above 0, or none.')
    for host in hosts:
      table = self.ranks(host)
      if table.shape != (host.loops, host.layers):
        raise InputError(
          f'lora.{host.name} has ranks of shape {table.shape}; it needs '
          f'({host.loops}, {host.layers}): loops x block_layers.'
        )
      most = min(host.d_in, host.d_out)
      if table.min() < 0 or table.max() > most:
        raise InputError(
          f'lora.{host.name}={getattr(self, host.name)!r}: a rank must lie between 0 '
          f'and {most}, the smaller side of the matrix.'
        )

  def leaves(self, host: Host) -> dict[str, Leaf]:
    R, r = host.loops, self.width(host.name)
    if not r:
      return {}
    start = nn.initializers.normal(host.d_in**-0.5)
    return {
      'lora_a': Leaf((R, host.d_in, r), ('loops', host.axes[0], 'rank'), start),
      'lora_b': Leaf((R, r, host.d_out), ('loops', 'rank', host.axes[1]), nn.initializers.zeros),
    }

  def apply(self, params: Leaves, x, y, loop, host: Host):
    scale = self.scale(host.name)
    if 'lora_a_wide' in params:  # From `prepare`.
      a_DxRr, b_RrxF = params['lora_a_wide'], params['lora_b_wide']
      return y + low_rank_wide(x, a_DxRr, b_RrxF, loop, host.loops, scale), NO_AUX
    return y + low_rank(x, params['lora_a'], params['lora_b'], loop, scale), NO_AUX

  def apply_experts(self, params: Leaves, x, y, loop, product, host: Host):
    a_ExRxIxr, b_ExRxrxO = (params[name].astype(x.dtype) for name in ('lora_a', 'lora_b'))
    scale = self.scale(host.name)
    if not jnp.ndim(loop):
      low = product(product(x, a_ExRxIxr[:, loop]), b_ExRxrxO[:, loop])
      return y + _scaled(low, scale)
    E, R, r = a_ExRxIxr.shape[0], host.loops, self.width(host.name)
    a_ExIxRr = a_ExRxIxr.swapaxes(1, 2).reshape(E, -1, R * r)
    own = jnp.repeat(loop.astype(x.dtype), r, axis=-1)
    return y + _scaled(product(product(x, a_ExIxRr) * own, b_ExRxrxO.reshape(E, R * r, -1)), scale)

  def mask(self, params: Leaves, host: Host) -> Leaves:
    if self.uniform(host.name):
      return params
    table_RxN = self.ranks(host)
    own_NxRxr = np.arange(self.width(host.name)) < table_RxN.T[:, :, None]
    return {
      'lora_a': params['lora_a'] * own_NxRxr[:, :, None, :],
      'lora_b': params['lora_b'] * own_NxRxr[:, :, :, None],
    }

  def prepare(self, params: Leaves, host: Host, layout: str) -> Leaves:
    if layout == 'auto':
      large = host.loops * self.width(host.name) >= _LARGE
      layout = 'grouped' if large and backend() != 'cpu' else 'wide'
    if layout == 'grouped':
      return params
    a_DxRr, b_RrxF = widen(params['lora_a'], params['lora_b'])
    wide: dict[str, Any] = {'lora_a_wide': a_DxRr, 'lora_b_wide': b_RrxF}
    return transpose_named(wide, tuple(wide)) if prefers_transposed() else wide

  def merge(self, base_IxO: np.ndarray, params: Leaves, position, host: Host):
    loop, layer = position
    rank = int(self.ranks(host)[loop, layer])
    if not rank:
      return base_IxO
    a, b = (np.asarray(params[k][layer, loop]) for k in ('lora_a', 'lora_b'))
    # In float64, so that the only rounding is that of the merged weight.
    a, b = a[:, :rank].astype(np.float64), b[:rank].astype(np.float64)
    return base_IxO + self.scale(host.name) * (a @ b)

  def term(self, params: Leaves, host: Host):
    a_RxIxr, b_RxrxO = (np.asarray(params[k], np.float32) for k in ('lora_a', 'lora_b'))
    return 'low_rank', {'a': a_RxIxr, 'b': self.scale(host.name) * b_RxrxO}

  def count(self, host: Host) -> int:
    ranks = self.ranks(host).sum()
    return int(ranks) * (host.d_in + host.d_out)

  def tie(self, cs_RxIxI, ws_RxIxO, layer: int, host: Host):
    ranks_R = self.ranks(host)[:, layer]
    if not ranks_R.any():
      return None
    return least_squares.tie(cs_RxIxI, ws_RxIxO, jnp.asarray(ranks_R))

  def fit(self, base_IxO, target_IxO, c_IxI, position, host: Host) -> Fitted:
    """The best low-rank approximation of what the shared weight lacks.

    In the norm of the inputs where their covariance is known, else the
    truncated SVD of the paper (eq. 4).
    """
    loop, layer = position
    rank = int(self.ranks(host)[loop, layer])
    width = self.width(host.name)
    rest_IxO = target_IxO - base_IxO
    if c_IxI is None:
      a_Ixr, b_rxO, _ = least_squares.truncated_svd(rest_IxO, rank)
      a_Ixr = np.pad(a_Ixr, ((0, 0), (0, width - rank)))
      b_rxO = np.pad(b_rxO, ((0, width - rank), (0, 0)))
    else:
      a_Ixr, b_rxO, _ = least_squares.low_rank(c_IxI, rest_IxO, rank, width)
    # The forward pass multiplies the product by the scale.
    root = self.scale(host.name) ** -0.5
    leaves = {'lora_a': a_Ixr * root, 'lora_b': b_rxO * root}
    return Fitted(leaves, base_IxO + a_Ixr @ b_rxO)

  def is_exact(self, host: Host) -> bool:
    table = self.ranks(host)
    return table.min() == min(host.d_in, host.d_out)

  def square_norm(self, params: Leaves, host: Host):
    """|A B|^2 = trace((A^T A)(B B^T)), without alpha: no A B is built."""
    a, b = params['lora_a'], params['lora_b']
    aa = jnp.einsum('nrdi,nrdj->nrij', a, a)
    bb = jnp.einsum('nrif,nrjf->nrij', b, b)
    return jnp.einsum('nrij,nrij->r', aa, bb)


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
  chex.assert_rank([x_BxLxD, a_RxDxr, b_RxrxF], 3)
  chex.assert_axis_dimension(a_RxDxr, 1, x_BxLxD.shape[-1])
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
  xa_Nxr = grouped_matmul(x_NxD, a_RxDxr.astype(dtype), sizes_R)
  y_NxF = grouped_matmul(xa_Nxr, b_RxrxF.astype(dtype), sizes_R)
  back_B = jnp.argsort(order_B, stable=True)
  return _scaled(y_NxF.reshape(B, L, -1)[back_B], scale)


def low_rank_wide(x_BxLxD, a_DxRr, b_RrxF, loop, loops: int, scale=1.0):
  """`low_rank` with the loops' factors side by side.

  Rows at different loops share two dense matmuls: all loops' products are
  computed and the other loops' masked out, with no gather of factors by row. A
  scalar loop takes its own columns of A alone, and its own rows of B where
  these are not `TransposedKernel`.

  Args:
    x_BxLxD: the linear's input.
    a_DxRr: down projections; loop b has columns b * r and on. Both may be
      `TransposedKernel`.
    b_RrxF: up projections; loop b has rows b * r and on.
    loop: int scalar, or int [B] with one loop a row.
    loops: R.
    scale: alpha / r.
  """
  chex.assert_rank(x_BxLxD, 3)
  dtype = x_BxLxD.dtype
  a_DxRr, b_RrxF = a_DxRr.astype(dtype), b_RrxF.astype(dtype)
  rank = a_DxRr.shape[1] // loops
  if jnp.ndim(loop):
    xa_BxLxRr = matmul(x_BxLxD, a_DxRr)
  else:
    xa_BxLxr = matmul(x_BxLxD, slice_columns(a_DxRr, loop * rank, rank))
    if not isinstance(b_RrxF, TransposedKernel):
      b_rxF = jax.lax.dynamic_slice_in_dim(b_RrxF, loop * rank, rank, 0)
      return _scaled(matmul(xa_BxLxr, b_rxF), scale)
    # A loop's part of a `TransposedKernel` factor is strided, slow to cut out.
    xa_BxLxRr = jnp.tile(xa_BxLxr, loops)
  of_column_1x1xRr = jnp.arange(loops * rank)[None, None, :] // rank
  own_Bx1xRr = of_column_1x1xRr == jnp.reshape(loop, (-1, 1, 1))
  return _scaled(matmul(jnp.where(own_Bx1xRr, xa_BxLxRr, 0), b_RrxF), scale)


def widen(a_RxDxr, b_RxrxF):
  """The factors of all loops side by side, [D, R r] and [R r, F]."""
  R, D, r = a_RxDxr.shape
  a_DxRr = jnp.swapaxes(a_RxDxr, 0, 1).reshape(D, R * r)
  return a_DxRr, b_RxrxF.reshape(R * r, -1)


def _scaled(y_BxLxF, scale):
  if scale == 1.0:
    return y_BxLxF
  return y_BxLxF * jnp.asarray(scale, y_BxLxF.dtype)
