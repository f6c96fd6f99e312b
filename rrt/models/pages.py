"""The paged KV cache of depth-wise batching: one KV pool a layer, all loops.

A pool's pages hold `C` positions each. A slot has pages of its own in every
loop, since every loop has its own keys and values; logical page c of a sequence
lies at `base + c % count`. Where a depth has a sliding window, `count` covers
the window only and pages are reused cyclically.

Each row of a step reads the pages of its own (slot, loop). Attention iterates
over pages up to the last page of the longest row; pages past a row's own last
one are masked and contribute exactly zero to it.

B rows, G kv groups, M queries a group, Dh head size, P pages, C positions of
a page, W loops that a row writes, R loops, S positions of a prefilled cache.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.models.cache import KV
from rrt.ops.attention import softcap
from rrt.ops.backend import backend
from rrt.ops.paged_attention import HIDDEN, LivePages, attend_pages, chosen


class KVPool(NamedTuple):
  """Keys (after RoPE) and values of one layer, in all loops and slots.

  On a CPU bfloat16 is stored as the uint16 of its bits: XLA's CPU backend would copy the
  whole bfloat16 array for every scatter into it. int8 has a step size for every token
  and group, a 127th of the largest entry.
  """

  k_PxGxDhxC: jax.Array
  v_PxGxCxDh: jax.Array
  k_step_PxGxC: jax.Array | None = None
  v_step_PxGxC: jax.Array | None = None


class PagedKV(NamedTuple):
  """A pool and the pages of this step's rows.

  Attributes:
    kv_pool: of the layer.
    base_BxW: first pages of the row in the loops it writes; it reads the
      first. A base past the last page writes nothing.
    count_BxW: how many pages it has there.
  """

  kv_pool: KVPool
  base_BxW: jax.Array
  count_BxW: jax.Array

  def update(self, k_Bx1xGxDh, v_Bx1xGxDh, context):
    """As `rrt.models.cache` says: one token a row, in all loops it writes."""
    new = write(self, k_Bx1xGxDh, v_Bx1xGxDh, context.positions_BxL)
    return new, functools.partial(attend, kv=new, position_Bx1=context.positions_BxL)


@dataclasses.dataclass(frozen=True)
class PageRange:
  """Page ranges of one layer by loop: slot s begins at page base + s * count.

  Attributes:
    base: first page by loop.
    count: pages of a slot by loop.
    pages: of all loops and slots.
  """

  base: tuple[int, ...]
  count: tuple[int, ...]
  pages: int

  def rows(self, slot_B, loop_BxW, live_B):
    """`base_BxW` and `count_BxW` of rows; dead rows get pages past the end."""
    base_R, count_R = np.array(self.base), np.array(self.count)
    count_BxW = jnp.asarray(count_R)[loop_BxW]
    base_BxW = jnp.asarray(base_R)[loop_BxW] + slot_B[:, None] * count_BxW
    return jnp.where(live_B[:, None], base_BxW, self.pages), count_BxW


class CacheLayout(NamedTuple):
  """Page ranges of prelude, block and coda, by layer."""

  prelude: tuple[PageRange, ...]
  block: tuple[PageRange, ...]
  coda: tuple[PageRange, ...]


class KVPools(NamedTuple):
  """KV pools of prelude, block and coda, by layer."""

  prelude: tuple[KVPool, ...]
  block: tuple[KVPool, ...]
  coda: tuple[KVPool, ...]


def make_cache_layout(config: ModelConfig, slots: int, context: int, page: int) -> CacheLayout:
  """Lays out `slots` sequences of up to `context` tokens each."""
  windows = config.windows or (0,) * config.depth

  def page_range(depths: Sequence[int]) -> PageRange:
    base, count, end = [], [], 0
    for depth in depths:
      pages = math.ceil(context / page)
      if windows[depth]:
        pages = min(pages, math.ceil(windows[depth] / page) + 1)
      base.append(end)
      count.append(pages)
      end += slots * pages
    return PageRange(tuple(base), tuple(count), end)

  P, L = config.prelude_layers, config.depth
  return CacheLayout(
    tuple(page_range([d]) for d in range(P)),
    tuple(page_range(list(d_R)) for d_R in config.block_depths().T),
    tuple(page_range([d]) for d in range(L - config.coda_layers, L)),
  )


def layout_bytes(config: ModelConfig, layout: CacheLayout, page: int, dtype) -> int:
  """Bytes of all pools of a layout."""
  pages = sum(r.pages for part in layout for r in part)
  steps = 4 if jnp.dtype(dtype) == jnp.int8 else 0
  head = config.head_dim * jnp.dtype(dtype).itemsize + steps
  return pages * page * 2 * config.num_kv_heads * head


def init_pools(config: ModelConfig, layout: CacheLayout, page: int, dtype) -> KVPools:
  """Empty pools."""
  G, Dh = config.num_kv_heads, config.head_dim
  bits = jnp.dtype(dtype) == jnp.bfloat16 and backend() == 'cpu'
  kept = jnp.dtype(jnp.uint16 if bits else dtype)

  def kv_pool(page_range: PageRange) -> KVPool:
    keys = jnp.zeros((page_range.pages, G, Dh, page), kept)
    values = jnp.zeros((page_range.pages, G, page, Dh), kept)
    if kept != jnp.int8:
      return KVPool(keys, values)
    step = jnp.zeros((page_range.pages, G, page), jnp.float32)
    return KVPool(keys, values, step, step)

  return KVPools(*(tuple(map(kv_pool, part)) for part in layout))


def rounded(x, axis: int):
  """Keys or values as int8, and the step of each vector along an axis."""
  x = x.astype(jnp.float32)
  step = jnp.max(jnp.abs(x), axis, keepdims=True) / 127.0
  codes = jnp.round(x / jnp.where(step > 0, step, 1.0))
  return codes.astype(jnp.int8), jnp.squeeze(step, axis)


def pack(x, dtype):
  """Converts keys or values to a pool's storage dtype."""
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  return x.astype(dtype)


def unpack(x, dtype):
  """Converts a pool's storage to the dtype of a computation."""
  if x.dtype == jnp.uint16:
    x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
  return x.astype(dtype)


def write(kv: PagedKV, k_Bx1xGxDh, v_Bx1xGxDh, position_Bx1) -> PagedKV:
  """Writes one token a row at its position, in all loops that it writes."""
  k_PxGxDhxC, v_PxGxCxDh, k_step_PxGxC, v_step_PxGxC = kv.kv_pool
  P, C = v_PxGxCxDh.shape[0], v_PxGxCxDh.shape[2]
  page_BxW = kv.base_BxW + (position_Bx1 // C) % kv.count_BxW
  page_BxW = jnp.where(kv.base_BxW < P, page_BxW, P)
  at_BxW = jnp.broadcast_to(position_Bx1 % C, page_BxW.shape)
  wide = lambda t, like: jnp.broadcast_to(pack(t, like.dtype), (*page_BxW.shape, *t.shape[2:]))
  if k_step_PxGxC is not None:
    (k_Bx1xGxDh, k_Bx1xG), (v_Bx1xGxDh, v_Bx1xG) = rounded(k_Bx1xGxDh, -1), rounded(v_Bx1xGxDh, -1)
    put = lambda step, t: step.at[page_BxW, :, at_BxW].set(wide(t, step), mode='drop')
    k_step_PxGxC, v_step_PxGxC = put(k_step_PxGxC, k_Bx1xG), put(v_step_PxGxC, v_Bx1xG)
  return kv._replace(
    kv_pool=KVPool(
      k_PxGxDhxC.at[page_BxW, :, :, at_BxW].set(wide(k_Bx1xGxDh, k_PxGxDhxC), mode='drop'),
      v_PxGxCxDh.at[page_BxW, :, at_BxW].set(wide(v_Bx1xGxDh, v_PxGxCxDh), mode='drop'),
      k_step_PxGxC,
      v_step_PxGxC,
    )
  )


def attend(
  q_Bx1xHxDh, kv: PagedKV, position_Bx1, window=None, cap: float | None = None, windows=(0,)
):
  """Softmax attention of one token a row over its pages, [B, 1, H, Dh].

  Args:
    q_Bx1xHxDh: scaled queries.
    kv: with this step's tokens written.
    position_Bx1: of each row's token.
    window: as in `AttnSpec`: None, a scalar, or one a row; 0 is global.
    cap: see `rrt.ops.attention.softcap`.
    windows: for kernels of batches; not used.
  """
  B, _, H, Dh = q_Bx1xHxDh.shape
  k_PxGxDhxC, v_PxGxCxDh, k_step_PxGxC, v_step_PxGxC = kv.kv_pool
  P, G, C, _ = v_PxGxCxDh.shape
  # Small products in bfloat16 are slower than in float32 on a CPU.
  cpu = backend() == 'cpu'
  dtype = jnp.float32 if cpu else q_Bx1xHxDh.dtype
  q_BxGxMxDh = q_Bx1xHxDh.reshape(B, G, H // G, Dh).astype(dtype)
  position_B = position_Bx1[:, 0]
  base_B, count_B = kv.base_BxW[:, 0], kv.count_BxW[:, 0]
  live_B = base_B < P
  first_B = jnp.zeros_like(position_B)
  if window is not None:
    window = jnp.broadcast_to(window, (B,))
    oldest_B = jnp.maximum(position_B - window + 1, 0)
    first_B = jnp.where(window > 0, oldest_B, 0)
  if chosen() == 'pallas' and k_PxGxDhxC.dtype != jnp.uint16:
    begin_B = first_B // C
    end_B = jnp.where(live_B, position_B // C + 1, begin_B)
    pages = LivePages(jnp.where(live_B, base_B, 0), count_B, begin_B, end_B, first_B, position_B)
    out_BxGxMxDh = attend_pages(q_BxGxMxDh, kv.kv_pool, pages, cap)
    return out_BxGxMxDh.reshape(B, 1, H, Dh).astype(q_Bx1xHxDh.dtype)
  end = jnp.max(jnp.where(live_B, position_B // C, -1)) + 1
  begin = jnp.min(jnp.where(live_B, first_B // C, end))

  def body(c, carry):
    top_BxGxMx1, sum_BxGxMx1, out_BxGxMxDh = carry
    page_B = jnp.where(live_B, base_B + c % count_B, 0)
    at_BxC = jnp.broadcast_to(c * C + jnp.arange(C)[None, :], (B, C))
    seen_BxC = (at_BxC <= position_B[:, None]) & (at_BxC >= first_B[:, None])
    att_BxGxMxC = jnp.einsum(
      'bgmd,bgdc->bgmc',
      q_BxGxMxDh,
      unpack(k_PxGxDhxC[page_B], dtype),
      preferred_element_type=jnp.float32,
    )
    if k_step_PxGxC is not None:
      att_BxGxMxC *= k_step_PxGxC[page_B][:, :, None]
    att_BxGxMxC = softcap(att_BxGxMxC, cap)
    att_BxGxMxC = jnp.where(seen_BxC[:, None, None, :], att_BxGxMxC, HIDDEN)
    new_BxGxMx1 = jnp.maximum(top_BxGxMx1, jnp.max(att_BxGxMxC, -1, keepdims=True))
    att_BxGxMxC = jnp.exp(att_BxGxMxC - new_BxGxMx1)
    shrink_BxGxMx1 = jnp.exp(top_BxGxMx1 - new_BxGxMx1)
    read_BxGxMxC = att_BxGxMxC
    if v_step_PxGxC is not None:
      read_BxGxMxC = att_BxGxMxC * v_step_PxGxC[page_B][:, :, None]
    add_BxGxMxDh = jnp.einsum(
      'bgmc,bgcd->bgmd',
      read_BxGxMxC.astype(dtype),
      unpack(v_PxGxCxDh[page_B], dtype),
      preferred_element_type=jnp.float32,
    )
    return (
      new_BxGxMx1,
      sum_BxGxMx1 * shrink_BxGxMx1 + jnp.sum(att_BxGxMxC, -1, keepdims=True),
      out_BxGxMxDh * shrink_BxGxMx1 + add_BxGxMxDh,
    )

  shape = (B, G, H // G)
  start = (
    jnp.full((*shape, 1), HIDDEN, jnp.float32),
    jnp.zeros((*shape, 1), jnp.float32),
    jnp.zeros((*shape, Dh), jnp.float32),
  )
  _, sum_BxGxMx1, out_BxGxMxDh = jax.lax.fori_loop(begin, end, body, start)
  out_BxGxMxDh = out_BxGxMxDh / jnp.maximum(sum_BxGxMx1, 1e-30)
  return out_BxGxMxDh.reshape(B, 1, H, Dh).astype(q_Bx1xHxDh.dtype)


def insert(kv_pool: KVPool, page_range: PageRange, loop: int, slot, kv: KV, length):
  """Copies one prefilled row into a slot's pages of one loop.

  Args:
    kv_pool: of the layer.
    page_range: of the layer.
    loop: which loop `kv` belongs to.
    slot: int scalar.
    kv: of one row: keys [1, G, Dh, S], values [1, G, S, Dh].
    length: int scalar; number of valid tokens.
  """
  G, S, Dh = kv.v_BxGxSxDh.shape[1:]
  P, C = kv_pool.v_PxGxCxDh.shape[0], kv_pool.v_PxGxCxDh.shape[2]
  pad = -S % C
  pages = (S + pad) // C
  k_GxDhxS = jnp.pad(kv.k_BxGxDhxS[0], ((0, 0), (0, 0), (0, pad)))
  v_GxSxDh = jnp.pad(kv.v_BxGxSxDh[0], ((0, 0), (0, pad), (0, 0)))
  k_cxGxDhxC = k_GxDhxS.reshape(G, Dh, pages, C).transpose(2, 0, 1, 3)
  v_cxGxCxDh = v_GxSxDh.reshape(G, pages, C, Dh).swapaxes(0, 1)
  count = page_range.count[loop]
  kept = min(count, pages)
  from_c = (length - 1) // C - kept + 1 + jnp.arange(kept)
  base = page_range.base[loop] + slot * count
  to_c = jnp.where((from_c >= 0) & (length > 0), base + from_c % count, P)
  from_c = jnp.clip(from_c, 0, pages - 1)
  k_cxGxDhxC, v_cxGxCxDh = k_cxGxDhxC[from_c], v_cxGxCxDh[from_c]
  put = lambda pool, pages: pool.at[to_c].set(pack(pages, pool.dtype), mode='drop')
  steps = None, None
  if kv_pool.k_step_PxGxC is not None:
    (k_cxGxDhxC, k_cxGxC), (v_cxGxCxDh, v_cxGxC) = rounded(k_cxGxDhxC, 2), rounded(v_cxGxCxDh, 3)
    steps = put(kv_pool.k_step_PxGxC, k_cxGxC), put(kv_pool.v_step_PxGxC, v_cxGxC)
  return KVPool(put(kv_pool.k_PxGxDhxC, k_cxGxDhxC), put(kv_pool.v_PxGxCxDh, v_cxGxCxDh), *steps)
