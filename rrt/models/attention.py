"""Grouped-query attention with sliding windows, segments and a cache.

B batch, L query length, S key length, D model, H heads, G kv groups,
M = H / G queries a group, Dh head size.
"""

from __future__ import annotations

from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models import cache as cache_lib
from rrt.models import pages
from rrt.models.layers import Linear, Norm, apply_rope
from rrt.models.relaxed import relax, relaxations_of
from rrt.sharding import constrain

# Queries of a run of `attend_causal`: at least, and runs: at most.
MIN_RUN = 64
MAX_RUNS = 8


class Context(NamedTuple):
  """What all layers of one forward pass see.

  Attributes:
    positions_BxL: of each token in its document.
    segments_BxL: document of each token, or None for one a row.
    cos_TxBxLxK, sin_TxBxLxK: rotary tables.
    left_BxL: bool, tokens whose residual stream no layer changes any more,
      as they have left the block; None for none.
  """

  positions_BxL: jax.Array
  segments_BxL: jax.Array | None
  cos_TxBxLxK: jax.Array
  sin_TxBxLxK: jax.Array
  left_BxL: jax.Array | None = None

  def repeat_rows(self, times: int) -> Context:
    """The context of a batch in which each row stands `times` in a row."""
    row = lambda t, axis: jnp.repeat(t, times, axis)
    segments_BxL = self.segments_BxL
    return Context(
      row(self.positions_BxL, 0),
      None if segments_BxL is None else row(segments_BxL, 0),
      row(self.cos_TxBxLxK, 1),
      row(self.sin_TxBxLxK, 1),
    )


class AttnSpec(NamedTuple):
  """What differs by depth besides weights; a scalar, or one value a row.

  Attributes:
    window: sliding window in tokens, 0 for global; None if all are global.
    rope: index of the rotary table; None if there is one.
  """

  window: jax.Array | None
  rope: jax.Array | None


def visible(queries_BxL, keys_BxS, window=None):
  """Causal (and windowed) visibility by position, bool [B, L, S].

  Token j is visible from i iff i - window < j <= i; window 0 is unlimited.
  """
  i, j = queries_BxL[:, :, None], keys_BxS[:, None, :]
  mask = j <= i
  if window is None:
    return mask
  window = jnp.reshape(window, (-1, 1, 1))
  return mask & ((j > i - window) | (window == 0))


def attend(q_BxLxHxDh, k_BxGxDhxS, v_BxGxSxDh, mask_BxLxS):
  """Softmax attention in float32; q is already scaled.  [B, L, H, Dh].

  The heads of a group are stacked along the queries and the keys lie
  transposed, so that both products are plain batched matrix products: XLA on
  CPU is 3 (prefill) to 10 times (decoding) slower on the einsums over
  [B, S, G, Dh], which it transposes at every step.
  """
  B, L, H, Dh = q_BxLxHxDh.shape
  G, S = k_BxGxDhxS.shape[1], k_BxGxDhxS.shape[3]
  M = H // G
  q_BxGxMxLxDh = q_BxLxHxDh.reshape(B, L, G, M, Dh).transpose(0, 2, 3, 1, 4)
  att_BxGxMLxS = jnp.einsum(
    'bgqd,bgds->bgqs',
    q_BxGxMxLxDh.reshape(B, G, M * L, Dh),
    k_BxGxDhxS,
    preferred_element_type=jnp.float32,
  )
  att_BxGxMxLxS = jnp.where(
    mask_BxLxS[:, None, None, :, :], att_BxGxMLxS.reshape(B, G, M, L, S), -1e30
  )
  att_BxGxMxLxS = jax.nn.softmax(att_BxGxMxLxS, -1).astype(q_BxLxHxDh.dtype)
  o_BxGxMLxDh = jnp.einsum('bgqs,bgsd->bgqd', att_BxGxMxLxS.reshape(B, G, M * L, S), v_BxGxSxDh)
  o_BxGxMxLxDh = o_BxGxMLxDh.reshape(B, G, M, L, Dh)
  return o_BxGxMxLxDh.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def attend_causal(q_BxLxHxDh, k_BxGxDhxL, v_BxGxLxDh, mask_BxLxL):
  """`attend` where no token sees a later one of its row.  [B, L, H, Dh].

  Runs of queries see only the keys up to their last: with 8 of them that is
  9/16 of the products, and scores that stay in a CPU's cache (forward and
  backward take a third of the time at 512 tokens). The backward pass computes
  the scores again: they are never kept, as in FlashAttention.
  """
  L = q_BxLxHxDh.shape[1]
  step = max(MIN_RUN, -(-L // MAX_RUNS))
  outs = []
  for begin in range(0, L, step):
    end = min(begin + step, L)
    outs.append(
      jax.checkpoint(attend)(
        q_BxLxHxDh[:, begin:end],
        k_BxGxDhxL[..., :end],
        v_BxGxLxDh[:, :, :end],
        mask_BxLxL[:, begin:end, :end],
      )
    )
  return jnp.concatenate(outs, 1)


def pick_rope(table_TxBxLxK, index):
  """The rotary table of one depth, or of each row's own, [B, L, K]."""
  if index is None:
    return table_TxBxLxK[0]
  if jnp.ndim(index) == 0:
    return table_TxBxLxK[index]
  return table_TxBxLxK[index, jnp.arange(index.shape[0])]


class Attention(nn.Module):
  """q, k, v, o projections around `attend`."""

  config: ModelConfig
  looped: bool = False

  def setup(self):
    c, looped = self.config, self.looped
    self.q, self.k = Linear(c, 'q', looped), Linear(c, 'k', looped)
    self.v, self.o = Linear(c, 'v', looped), Linear(c, 'o', looped)
    self.relaxed = relaxations_of(self, c, 'kv', looped)
    if c.qk_norm:
      self.q_norm = Norm(c, c.head_dim, looped)
      self.k_norm = Norm(c, c.head_dim, looped)

  def __call__(self, x_BxLxD, kv, attn_spec: AttnSpec, loop, context: Context):
    o_BxLxE, kv = self.mixed(x_BxLxD, kv, attn_spec, loop, context)
    return self.o(o_BxLxE, loop), kv

  def heads(self, y_BxLxE):
    """[B, L, heads, Dh]."""
    return y_BxLxE.reshape(*y_BxLxE.shape[:2], -1, self.config.head_dim)

  def keys_values(self, x_BxLxD, attn_spec: AttnSpec, loop, context: Context):
    """Keys after RoPE, and values, both [B, L, G, Dh]."""
    kv = self.heads(self.k(x_BxLxD, loop)), self.heads(self.v(x_BxLxD, loop))
    k_BxLxGxDh, v_BxLxGxDh = relax(self, self.relaxed, x_BxLxD, kv, loop)
    if self.config.qk_norm:
      k_BxLxGxDh = self.k_norm(k_BxLxGxDh, loop)
    cos = pick_rope(context.cos_TxBxLxK, attn_spec.rope)
    sin = pick_rope(context.sin_TxBxLxK, attn_spec.rope)
    return apply_rope(k_BxLxGxDh, cos, sin), v_BxLxGxDh

  def remember(self, x_BxLxD, kv, attn_spec: AttnSpec, loop, context: Context):
    """Writes keys and values of x, attends to nothing; the written cache."""
    k_BxLxGxDh, v_BxLxGxDh = self.keys_values(x_BxLxD, attn_spec, loop, context)
    return pages.write(kv, k_BxLxGxDh, v_BxLxGxDh, context.positions_BxL)

  def mixed(self, x_BxLxD, kv, attn_spec: AttnSpec, loop, context: Context):
    """The output projection's input [B, L, H * Dh], and the written cache."""
    c = self.config
    q_BxLxHxDh = self.heads(self.q(x_BxLxD, loop))
    k_BxLxGxDh, v_BxLxGxDh = self.keys_values(x_BxLxD, attn_spec, loop, context)
    if c.qk_norm:
      q_BxLxHxDh = self.q_norm(q_BxLxHxDh, loop)
    cos = pick_rope(context.cos_TxBxLxK, attn_spec.rope)
    sin = pick_rope(context.sin_TxBxLxK, attn_spec.rope)
    q_BxLxHxDh = apply_rope(q_BxLxHxDh, cos, sin)
    q_BxLxHxDh *= jnp.asarray(c.scale_q, q_BxLxHxDh.dtype)
    q_BxLxHxDh = constrain(q_BxLxHxDh, ('batch', 'length', 'act_heads', None))
    positions_BxL = context.positions_BxL
    if isinstance(kv, pages.PagedKV):
      kv = pages.write(kv, k_BxLxGxDh, v_BxLxGxDh, positions_BxL)
      o_BxLxHxDh = pages.attend(q_BxLxHxDh, kv, positions_BxL, attn_spec.window)
      return o_BxLxHxDh.reshape(*x_BxLxD.shape[:2], -1), kv
    alone = kv is None or isinstance(kv, (cache_lib.EmptyKV, cache_lib.HeldKV))
    if isinstance(kv, cache_lib.HeldKV):
      kv = cache_lib.hold(kv, k_BxLxGxDh, v_BxLxGxDh)
      k_BxLxGxDh, v_BxLxGxDh = kv.k_BxLxGxDh, kv.v_BxLxGxDh
    elif kv is not None:
      kv = cache_lib.write(kv, k_BxLxGxDh, v_BxLxGxDh, positions_BxL)
    if alone:
      mask_BxLxL = visible(positions_BxL, positions_BxL, attn_spec.window)
      if context.segments_BxL is not None:
        s = context.segments_BxL
        mask_BxLxL &= s[:, :, None] == s[:, None, :]
      o_BxLxHxDh = attend_causal(
        q_BxLxHxDh, k_BxLxGxDh.transpose(0, 2, 3, 1), v_BxLxGxDh.swapaxes(1, 2), mask_BxLxL
      )
    else:
      slots_1xS = jnp.arange(kv.v_BxGxSxDh.shape[2], dtype=jnp.int32)[None, :]
      o_BxLxHxDh = attend(
        q_BxLxHxDh,
        kv.k_BxGxDhxS.astype(x_BxLxD.dtype),
        kv.v_BxGxSxDh.astype(x_BxLxD.dtype),
        visible(positions_BxL, slots_1xS, attn_spec.window),
      )
    return o_BxLxHxDh.reshape(*x_BxLxD.shape[:2], -1), kv
