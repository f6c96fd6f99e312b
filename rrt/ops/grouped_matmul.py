"""Products of rows with the matrix of their own group: experts, or the loops' low-rank terms.

Rows are sorted by group. On TPUs `gmm` (megablox), on GPUs `ragged_dot`, on CPUs `tiles`: XLA
expands `ragged_dot` there to as many products as there are groups. `RRT_GROUPED_MATMUL` or `using`
overrides the choice.

N rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rrt.ops.backend import backend
from rrt.ops.choice import Choice

IMPLEMENTATIONS = ('auto', 'dense', 'ragged_dot', 'gmm', 'tiles')
_TILE = 64  # Rows of a tile on CPUs.
CHOICE = Choice(
  'grouped matmul',
  'RRT_GROUPED_MATMUL',
  IMPLEMENTATIONS,
  lambda: {'tpu': 'gmm', 'gpu': 'ragged_dot'}.get(backend(), 'tiles'),
)
using, chosen = CHOICE.using, CHOICE.chosen


def grouped_matmul(x_NxI, w_ExIxO, sizes_E):
  """x[i] @ w[group of row i], [N, O] in the dtype of x.

  Args:
    x_NxI: rows, those of group 0 first.
    w_ExIxO: a matrix a group, in the dtype of x.
    sizes_E: int32 rows of each group. Rows behind the last group come out as zero.
  """
  kind = chosen()
  if kind == 'dense':
    return _dense(x_NxI, w_ExIxO, sizes_E)
  if kind == 'gmm' and min(x_NxI.shape[0], *w_ExIxO.shape[1:]) >= 128:
    return _gmm(x_NxI, w_ExIxO, sizes_E)
  if kind == 'tiles':
    return _tiles(x_NxI, w_ExIxO, sizes_E)
  return jax.lax.ragged_dot(x_NxI, w_ExIxO, sizes_E)


def groups_of(sizes_E, rows: int):
  """The group of each row, int32 [rows]; E behind the last."""
  return jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(rows), side='right').astype(jnp.int32)


def _dense(x_NxI, w_ExIxO, sizes_E):
  """All products, the other groups' masked out: E times the operations."""
  own_NxE = groups_of(sizes_E, x_NxI.shape[0])[:, None] == jnp.arange(w_ExIxO.shape[0])[None]
  y_NxExO = jnp.einsum('ni,eio->neo', x_NxI, w_ExIxO)
  return jnp.sum(jnp.where(own_NxE[..., None], y_NxExO, 0), 1)


def _gmm(x_NxI, w_ExIxO, sizes_E):
  """jax's Pallas kernel for TPUs, whose rows are a multiple of its tile."""
  from jax.experimental.pallas.ops.tpu.megablox import gmm

  N = x_NxI.shape[0]
  padded = jnp.pad(x_NxI, ((0, -N % 128), (0, 0)))
  y_NxO = gmm(padded, w_ExIxO, sizes_E, x_NxI.dtype, (128, 128, 128))[:N]
  # The kernel leaves rows behind the last group as they were in memory.
  inside_Nx1 = (jnp.arange(N) < jnp.sum(sizes_E))[:, None]
  return jnp.where(inside_Nx1, y_NxO, 0)


@jax.custom_vjp
def _tiles(x_NxI, w_ExIxO, sizes_E):
  """Tiles of rows of one group each, one product after the other."""
  return _tiles_forward(x_NxI, w_ExIxO, sizes_E)[0]


def _tiles_forward(x_NxI, w_ExIxO, sizes_E):
  place_N, group_C = _tiling(sizes_E, x_NxI.shape[0])
  x_CxTxI = _to_tiles(x_NxI, place_N, len(group_C))
  y_CxTxO = jax.lax.map(lambda at: at[0] @ w_ExIxO[at[1]], (x_CxTxI, group_C))
  return _from_tiles(y_CxTxO, place_N), (x_NxI, w_ExIxO, sizes_E)


def _tiles_backward(saved, dy_NxO):
  x_NxI, w_ExIxO, sizes_E = saved
  place_N, group_C = _tiling(sizes_E, x_NxI.shape[0])
  x_CxTxI = _to_tiles(x_NxI, place_N, len(group_C))
  dy_CxTxO = _to_tiles(dy_NxO, place_N, len(group_C))

  def body(dw_ExIxO, at):
    x_TxI, dy_TxO, group = at
    # In place: the sum over all tiles, of which a group has few.
    return dw_ExIxO.at[group].add(x_TxI.T @ dy_TxO), dy_TxO @ w_ExIxO[group].T

  zeros = jnp.zeros_like(w_ExIxO)
  dw_ExIxO, dx_CxTxI = jax.lax.scan(body, zeros, (x_CxTxI, dy_CxTxO, group_C))
  return _from_tiles(dx_CxTxI, place_N), dw_ExIxO, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _tiling(sizes_E, rows: int):
  """(place of each row among the tiles' rows, or -1; group of each tile).

  There are C = rows / T + E tiles of T rows, enough for any sizes, and no more than rows.
  """
  E, T = sizes_E.shape[0], min(_TILE, max(rows, 1))
  C = max(min(rows // T + E, rows), 1)
  tiles_E = (sizes_E + T - 1) // T
  first_E = jnp.cumsum(tiles_E) - tiles_E
  group_N = groups_of(sizes_E, rows)
  begin_E = jnp.cumsum(sizes_E) - sizes_E
  inside = jnp.minimum(group_N, E - 1)
  place_N = first_E[inside] * T + jnp.arange(rows) - begin_E[inside]
  group_C = jnp.minimum(groups_of(tiles_E, C), E - 1)
  return jnp.where(group_N < E, place_N, -1), group_C


def _to_tiles(x_NxI, place_N, tiles: int):
  T = min(_TILE, max(x_NxI.shape[0], 1))
  flat = jnp.zeros((tiles * T, x_NxI.shape[1]), x_NxI.dtype)
  outside = tiles * T  # Dropped.
  flat = flat.at[jnp.where(place_N < 0, outside, place_N)].set(x_NxI, mode='drop')
  return flat.reshape(tiles, T, -1)


def _from_tiles(y_CxTxO, place_N):
  flat = y_CxTxO.reshape(-1, y_CxTxO.shape[-1])
  return jnp.where((place_N < 0)[:, None], 0, flat[place_N])


@functools.partial(jax.jit, static_argnames='experts')
def sorted_by(index_N, experts: int):
  """(order that sorts choices by expert, equal ones as they were; int32 sizes [E])."""
  order_N = jnp.argsort(index_N, stable=True)
  return order_N, jnp.bincount(index_N, length=experts).astype(jnp.int32)
