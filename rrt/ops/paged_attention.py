"""Decoding attention over a paged KV cache by Pallas kernels that read live pages only.

XLA's loop in `rrt.models.pages` gathers a page of every row until the longest row ends; these
kernels read each row's own pages. On TPUs a page is copied to VMEM ahead of its use: its index
is a scalar known before the kernel runs, and an index that repeats is not copied again, so that
rows which have ended cost nothing. On GPUs (Triton) a program walks the pages of one row and group.

`RRT_PAGED_ATTENTION` or `using` overrides the choice: 'pallas' on TPUs, 'xla' elsewhere. The GPU
kernel is chosen by name alone.

B rows, G kv groups, M queries a group, Dh head size, P pages, C positions of a page.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rrt.ops.attention import softcap
from rrt.ops.backend import backend
from rrt.ops.choice import Choice

IMPLEMENTATIONS = ('auto', 'xla', 'pallas')
HIDDEN = -1e30
CHOICE = Choice(
  'paged attention',
  'RRT_PAGED_ATTENTION',
  IMPLEMENTATIONS,
  lambda: 'pallas' if backend() == 'tpu' else 'xla',
)
using, chosen = CHOICE.using, CHOICE.chosen


class LivePages(NamedTuple):
  """Which pages each row reads, and which of their positions; int32 [B] each.

  Attributes:
    base: first page of the row in the pool.
    pages: how many the row has there, used cyclically.
    begin, end: logical pages that are read, `end` excluded; equal for a dead row.
    first, last: positions that are visible, both included.
  """

  base: jax.Array
  pages: jax.Array
  begin: jax.Array
  end: jax.Array
  first: jax.Array
  last: jax.Array


def attend_pages(q_BxGxMxDh, pool, live: LivePages, cap: float | None = None):
  """Softmax attention of one token a row over its live pages, float32 [B, G, M, Dh].

  Args:
    q_BxGxMxDh: scaled queries.
    pool: (keys [P, G, Dh, C], values [P, G, C, Dh], and for int8 the step sizes of both,
      [P, G, C] each, else None).
    live: the pages of each row.
    cap: see `rrt.ops.attention.softcap`.
  """
  kernel = _triton if backend() == 'gpu' else _mosaic
  return kernel(q_BxGxMxDh, pool, live, cap, interpret=backend() == 'cpu')


def _read(q_MxDh, page, step, at, live, carry, cap):
  """One page of one group, taken into a running softmax.

  Args:
    q_MxDh: queries.
    page: (keys [Dh, C], values [C, Dh]).
    step: their step sizes [1, C], or None.
    at: positions of the page's entries, [1, C].
    live: (first, last) visible position.
    carry: running maximum [M, 1], sum [M, 1] and output [M, Dh], float32.
    cap: soft cap of scores, or None.
  """
  (k_DhxC, v_CxDh), (top, total, out) = page, carry
  dtype = q_MxDh.dtype
  att_MxC = jnp.dot(q_MxDh, k_DhxC.astype(dtype), preferred_element_type=jnp.float32)
  if step is not None:
    att_MxC *= step[0]
  seen_1xC = (at >= live[0]) & (at <= live[1])
  att_MxC = jnp.where(seen_1xC, softcap(att_MxC, cap), HIDDEN)
  new_top = jnp.maximum(top, jnp.max(att_MxC, -1, keepdims=True))
  att_MxC, shrink = jnp.exp(att_MxC - new_top), jnp.exp(top - new_top)
  total = total * shrink + jnp.sum(att_MxC, -1, keepdims=True)
  if step is not None:
    att_MxC *= step[1]
  add = jnp.dot(att_MxC.astype(dtype), v_CxDh.astype(dtype), preferred_element_type=jnp.float32)
  return new_top, total, out * shrink + add


def _mosaic(q_BxGxMxDh, pool, live: LivePages, cap, interpret: bool):
  """For TPUs: a grid of rows and pages, all groups of a page at a time."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  B, G, M, Dh = q_BxGxMxDh.shape
  C = pool[1].shape[2]
  pages = jnp.max(live.end - live.begin)

  def page(b, c, base, count, begin, end, *_):
    logical = jnp.maximum(jnp.minimum(begin[b] + c, end[b] - 1), 0)
    return base[b] + jax.lax.rem(logical, count[b])

  def body(base, count, begin, end, first, last, q, k, v, *rest):
    del base, count
    *steps, o, top, total, out = rest
    b, c = pl.program_id(0), pl.program_id(1)

    @pl.when(c == 0)
    def _():
      top[...] = jnp.full_like(top, HIDDEN)
      total[...] = jnp.zeros_like(total)
      out[...] = jnp.zeros_like(out)

    @pl.when(begin[b] + c < end[b])
    def _():
      at = (begin[b] + c) * C + jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
      for g in range(G):
        step = [s[0, g][None] for s in steps] or None
        carry = top[g], total[g], out[g]
        got = _read(q[0, g], (k[0, g], v[0, g]), step, at, (first[b], last[b]), carry, cap)
        top[g], total[g], out[g] = got

    @pl.when(c == pl.num_programs(1) - 1)
    def _():
      o[0] = out[...] / jnp.maximum(total[...], 1e-30)

  arrays = [x for x in pool if x is not None]
  of_page = lambda x: pl.BlockSpec(
    (1, *x.shape[1:]), lambda *index: (page(*index), *(0,) * (x.ndim - 1))
  )
  of_row = pl.BlockSpec((1, G, M, Dh), lambda b, *_: (b, 0, 0, 0))
  spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=len(live),
    grid=(B, jnp.maximum(pages, 1)),
    in_specs=[of_row, *map(of_page, arrays)],
    out_specs=of_row,
    scratch_shapes=[pltpu.VMEM((G, M, n), jnp.float32) for n in (1, 1, Dh)],
  )
  shape = jax.ShapeDtypeStruct((B, G, M, Dh), jnp.float32)
  kernel = pl.pallas_call(body, out_shape=shape, grid_spec=spec, interpret=interpret)
  return kernel(*live, q_BxGxMxDh, *arrays)


def _triton(q_BxGxMxDh, pool, live: LivePages, cap, interpret: bool):
  """For GPUs: a program a row and group, which walks the row's pages."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  B, G, M, Dh = q_BxGxMxDh.shape
  C = pool[1].shape[2]
  rows = max(16, M)  # Of a product of Triton's, at least.
  q_BxGxMxDh = jnp.pad(q_BxGxMxDh, ((0, 0), (0, 0), (0, rows - M), (0, 0)))

  def body(q, table, k, v, *rest):
    *steps, o = rest
    g = pl.program_id(1)
    base, count, begin, end, first, last = (table[0, i] for i in range(len(live)))
    q_MxDh = q[0, 0]

    def step_of(c, carry):
      page = base + jax.lax.rem(c, count)
      at = c * C + jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)
      step = [s[page, g][None] for s in steps] or None
      return _read(q_MxDh, (k[page, g], v[page, g]), step, at, (first, last), carry, cap)

    start = (
      jnp.full((rows, 1), HIDDEN, jnp.float32),
      jnp.zeros((rows, 1), jnp.float32),
      jnp.zeros((rows, Dh), jnp.float32),
    )
    _, total, out = jax.lax.fori_loop(begin, end, step_of, start)
    o[0, 0] = out / jnp.maximum(total, 1e-30)

  arrays = [x for x in pool if x is not None]
  whole: Any = [pl.BlockSpec(x.shape, functools.partial(_zeros, x.ndim)) for x in arrays]
  of_row = pl.BlockSpec((1, 1, rows, Dh), lambda b, g: (b, g, 0, 0))
  table_Bx8 = jnp.pad(jnp.stack(live, 1), ((0, 0), (0, 8 - len(live))))
  of_table = pl.BlockSpec((1, 8), lambda b, g: (b, 0))
  kernel = pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((B, G, rows, Dh), jnp.float32),
    grid=(B, G),
    in_specs=[of_row, of_table, *whole],
    out_specs=of_row,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
  )
  return kernel(q_BxGxMxDh, table_Bx8, *arrays)[:, :, :M]


def _zeros(ndim: int, *_):
  return (0,) * ndim
