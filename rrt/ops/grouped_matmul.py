"""Products of rows with the matrix of their own group: experts, or the loops' low-rank terms.

Rows are sorted by group. On TPUs `gmm` (megablox), on GPUs `ragged_dot`, on CPUs `tiles`: XLA
expands `ragged_dot` there to as many products as there are groups. `RRT_GROUPED_MATMUL` or `using`
overrides the choice.

N rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rrt.ops.backend import backend
from rrt.ops.choice import Choice

IMPLEMENTATIONS = ('auto', 'dense', 'ragged_dot', 'gmm', 'tiles')
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


def _tiles(x_NxI, w_ExIxO, sizes_E):
  """Tiles of rows of one group each, one product after the other."""
  return by_tile(lambda w, x, _: x @ w[0], w_ExIxO, x_NxI, sizes_E)


def by_tile(run: Callable[..., Any], kernels: Any, x_NxI, sizes_E, extra: Any = ()):
  """What each group's kernels make of its rows, a tile of rows after the other, [N, O].

  A tile goes through all of `run` before the next, so that what lies between its products stays in
  the cache, and only tiles that have rows are computed.

  Args:
    run: (kernels of one group [1, ...], rows, extra) -> rows; keeps no traced value.
    kernels: tree of arrays with a leading axis of groups.
    x_NxI: rows, those of group 0 first.
    sizes_E: int32 rows of each group. Rows behind the last group come out as zero.
    extra: integers for `run`, the same for all tiles.
  """
  return _by_tile(run, kernels, x_NxI, sizes_E, extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_tile(run, kernels, x_NxI, sizes_E, extra):
  tiles = _Tiles(x_NxI, sizes_E)
  padded = tiles.pad(x_NxI)
  like = jax.eval_shape(run, tiles.own(kernels, 0), padded[: tiles.rows], extra)
  zeros = jnp.zeros((len(padded), like.shape[1]), like.dtype)

  def body(t, y):
    e, at, _ = tiles.place(t)
    # Rows behind the group's are written again by the tiles that follow.
    return _put(y, run(tiles.own(kernels, e), tiles.cut(padded, at), extra), at)

  y_NxO = jax.lax.fori_loop(0, tiles.count, body, zeros)[: len(x_NxI)]
  return jnp.where((jnp.arange(len(x_NxI)) < jnp.sum(sizes_E))[:, None], y_NxO, 0)


def _by_tile_forward(run, kernels, x_NxI, sizes_E, extra):
  return _by_tile(run, kernels, x_NxI, sizes_E, extra), (kernels, x_NxI, sizes_E, extra)


def _by_tile_backward(run, saved, dy_NxO):
  kernels, x_NxI, sizes_E, extra = saved
  tiles = _Tiles(x_NxI, sizes_E)
  x, dy = tiles.pad(x_NxI), tiles.pad(dy_NxO)

  def body(t, sums):
    dkernels, dx = sums
    e, at, rows = tiles.place(t)
    _, back = jax.vjp(lambda own, x: run(own, x, extra), tiles.own(kernels, e), tiles.cut(x, at))
    dy_TxO = jnp.where((jnp.arange(tiles.rows) < rows)[:, None], tiles.cut(dy, at), 0)
    down, dx_TxI = back(dy_TxO)
    # In place: the sum over all tiles, of which a group has few.
    dkernels = jax.tree.map(lambda sum, d: sum.at[e].add(d[0]), dkernels, down)
    return dkernels, _put(dx, dx_TxI, at)

  zeros = jax.tree.map(jnp.zeros_like, (kernels, x))
  dkernels, dx = jax.lax.fori_loop(0, tiles.count, body, zeros)
  inside = (jnp.arange(len(x_NxI)) < jnp.sum(sizes_E))[:, None]
  return dkernels, jnp.where(inside, dx[: len(x_NxI)], 0), None, None


_by_tile.defvjp(_by_tile_forward, _by_tile_backward)


class _Tiles:
  """Where the tiles of each group begin.

  Attributes:
    rows: T, of a tile.
    count: tiles that have rows.
  """

  def __init__(self, x_NxI, sizes_E):
    N, E = x_NxI.shape[0], sizes_E.shape[0]
    # Large ones are fast, and waste up to a tile a group.
    self.rows = min(max(N, 1), 256 if N >= 512 * E else 128 if N >= 64 * E else 32)
    tiles_E = (sizes_E + self.rows - 1) // self.rows
    self._end_E = jnp.cumsum(tiles_E)
    self._first_E, self._sizes_E = self._end_E - tiles_E, sizes_E
    self._begin_E = jnp.cumsum(sizes_E) - sizes_E
    self.count = self._end_E[-1]

  def place(self, t):
    """(group, first row, how many rows are the group's) of tile t."""
    e = jnp.searchsorted(self._end_E, t, side='right')
    done = (t - self._first_E[e]) * self.rows
    return e, self._begin_E[e] + done, self._sizes_E[e] - done

  def pad(self, x_NxI):
    """Rows with a tile of zeros behind them."""
    return jnp.pad(x_NxI, ((0, self.rows), (0, 0)))

  def cut(self, x_MxI, at):
    """A tile of padded rows."""
    return jax.lax.dynamic_slice_in_dim(x_MxI, at, self.rows)

  def own(self, kernels, e):
    """The kernels of one group, [1, ...]."""
    return jax.tree.map(lambda k: jax.lax.dynamic_slice_in_dim(k, e, 1), kernels)


def _put(y_MxO, tile_TxO, at):
  return jax.lax.dynamic_update_slice_in_dim(y_MxO, tile_TxO, at, 0)


@functools.partial(jax.jit, static_argnames='experts')
def sorted_by(index_N, experts: int):
  """(order that sorts choices by expert, equal ones as they were; int32 sizes [E])."""
  order_N = jnp.argsort(index_N, stable=True)
  return order_N, jnp.bincount(index_N, length=experts).astype(jnp.int32)
