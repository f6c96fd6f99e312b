"""Products of rows with the matrix of their own group: experts, or the loops' low-rank terms.

Rows are sorted by group. On TPUs `gmm` (megablox), on GPUs `ragged_dot`, on CPUs `tiles`: XLA
expands `ragged_dot` there to as many products as there are groups. `RRT_GROUPED_MATMUL` or `using`
overrides the choice.

N rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rrt.ops.backend import backend
from rrt.ops.choice import Choice

_LARGE = 256  # Rows of a tile on CPUs, where groups have as many.
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


class Joined(NamedTuple):
  """Kernels of groups that lie in two trees, which nothing puts together.

  Attributes:
    first: of group 0, without the axis of groups.
    rest: of the others, [E - 1, ...].
  """

  first: Any
  rest: Any


def count(kernels: Any) -> int:
  """E of kernels by group, `Joined` or not."""
  joined = isinstance(kernels, Joined)
  return joined + jax.tree.leaves(kernels.rest if joined else kernels)[0].shape[0]


def put_together(kernels: Any) -> Any:
  """`Joined` kernels as one tree, [E, ...]; others as they are."""
  if not isinstance(kernels, Joined):
    return kernels
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), kernels.first, kernels.rest)


def by_tile(run: Callable[..., Any], kernels: Any, x_NxI, sizes_E, extra: Any = ()):
  """What each group's kernels make of its rows, a tile of rows after the other, [N, O].

  A tile goes through all of `run` before the next, so that what lies between its products stays in
  the cache, and only tiles that have rows are computed.

  Args:
    run: (kernels of one group [1, ...], rows, extra) -> rows; keeps no traced value.
    kernels: tree of arrays with a leading axis of groups, or `Joined` ones.
    x_NxI: rows, those of group 0 first.
    sizes_E: int32 rows of each group. Rows behind the last group come out as zero.
    extra: integers for `run`, the same for all tiles.
  """
  return _by_tile(run, kernels, x_NxI, sizes_E, extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_tile(run, kernels, x_NxI, sizes_E, extra):
  padded = _padded(x_NxI)
  like = jax.eval_shape(run, _own(kernels, 0), padded[:1], extra)
  y = jnp.zeros((len(padded), like.shape[1]), like.dtype)
  for tiles in _tilings(len(x_NxI), sizes_E):

    def body(t, y, tiles=tiles):
      e, at, mine_Tx1 = tiles.place(t)
      return tiles.put(y, run(_own(kernels, e), tiles.cut(padded, at), extra), at, mine_Tx1)

    y = jax.lax.fori_loop(0, tiles.count, body, y)
  return y[: len(x_NxI)]


def _by_tile_forward(run, kernels, x_NxI, sizes_E, extra):
  return _by_tile(run, kernels, x_NxI, sizes_E, extra), (kernels, x_NxI, sizes_E, extra)


def _by_tile_backward(run, saved, dy_NxO):
  kernels, x_NxI, sizes_E, extra = saved
  x, dy = _padded(x_NxI), _padded(dy_NxO)
  sums = jax.tree.map(jnp.zeros_like, (kernels, x))
  for tiles in _tilings(len(x_NxI), sizes_E):

    def body(t, sums, tiles=tiles):
      dkernels, dx = sums
      e, at, mine_Tx1 = tiles.place(t)
      one = lambda own, x: run(own, x, extra)
      _, back = jax.vjp(one, _own(kernels, e), tiles.cut(x, at))
      down, dx_TxI = back(jnp.where(mine_Tx1, tiles.cut(dy, at), 0))
      # In place: the sum over all tiles, of which a group has few.
      return _added(dkernels, down, e), tiles.put(dx, dx_TxI, at, mine_Tx1)

    sums = jax.lax.fori_loop(0, tiles.count, body, sums)
  dkernels, dx = sums
  return dkernels, dx[: len(x_NxI)], None, None


_by_tile.defvjp(_by_tile_forward, _by_tile_backward)


class _Tiles:
  """Tiles of T rows of each group, from some row of it on.

  Attributes:
    count: of all groups together.
  """

  def __init__(self, rows: int, tiles_E, begin_E, end_E):
    self._rows, self._begin_E, self._end_E = rows, begin_E, end_E
    self._last_E = jnp.cumsum(tiles_E)
    self._first_E = self._last_E - tiles_E
    self.count = self._last_E[-1]

  def place(self, t):
    """(group, first row, which of the rows are the group's [T, 1]) of tile t."""
    e = jnp.searchsorted(self._last_E, t, side='right')
    at = self._begin_E[e] + (t - self._first_E[e]) * self._rows
    return e, at, (at + jnp.arange(self._rows) < self._end_E[e])[:, None]

  def cut(self, x_MxI, at):
    return jax.lax.dynamic_slice_in_dim(x_MxI, at, self._rows)

  def put(self, y_MxO, tile_TxO, at, mine_Tx1):
    """Writes the group's own rows of a tile."""
    tile_TxO = jnp.where(mine_Tx1, tile_TxO, self.cut(y_MxO, at))
    return jax.lax.dynamic_update_slice_in_dim(y_MxO, tile_TxO, at, 0)


def _tilings(rows: int, sizes_E) -> list[_Tiles]:
  """Large tiles, which are fast, as far as they are full; small ones for the rest of each group."""
  end_E = jnp.cumsum(sizes_E)
  begin_E = end_E - sizes_E
  each = rows // sizes_E.shape[0]
  large, found = (_LARGE if each >= _LARGE else _LARGE // 2), []
  small = min(large // 4, max(rows, 1))
  if each >= large // 2:
    found.append(_Tiles(large, sizes_E // large, begin_E, end_E))
    begin_E = begin_E + sizes_E // large * large
  return [*found, _Tiles(small, (end_E - begin_E + small - 1) // small, begin_E, end_E)]


def _padded(x_NxI):
  """Rows with as many zeros behind them as a small tile may have."""
  return jnp.pad(x_NxI, ((0, min(_LARGE // 4, max(len(x_NxI), 1))), (0, 0)))


def _own(kernels, e):
  """The kernels of one group, [1, ...]."""
  cut = lambda tree, e: jax.tree.map(lambda k: jax.lax.dynamic_slice_in_dim(k, e, 1), tree)
  if not isinstance(kernels, Joined):
    return cut(kernels, e)
  first = lambda: jax.tree.map(lambda k: k[None], kernels.first)
  return jax.lax.cond(e == 0, first, lambda: cut(kernels.rest, e - 1))


def _added(sums, d, e):
  """Sums of kernels' gradients with those of group e, [1, ...]."""
  if not isinstance(sums, Joined):
    return jax.tree.map(lambda s, d: s.at[e].add(d[0]), sums, d)
  first = jax.tree.map(lambda s, d: s + jnp.where(e == 0, d[0], 0), sums.first, d)
  rest = jax.tree.map(lambda s, d: s.at[e - 1].add(jnp.where(e == 0, 0, d[0])), sums.rest, d)
  return Joined(first, rest)


@functools.partial(jax.jit, static_argnames='experts')
def sorted_by(index_N, experts: int):
  """(order that sorts choices by expert, equal ones as they were; int32 sizes [E])."""
  order_N = jnp.argsort(index_N, stable=True)
  return order_N, jnp.bincount(index_N, length=experts).astype(jnp.int32)
