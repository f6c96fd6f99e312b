"""Grouped-query attention with sliding windows, segments and a cache.

B batch, L query length, D model, H heads, G kv groups, Dh head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models.cache import BatchKV
from rrt.models.layers import Linear, Norm, apply_rope
from rrt.models.relaxed import relax, relaxations_of
from rrt.ops.flash_attention import window_sizes
from rrt.relax.base import Place
from rrt.sharding import constrain


class Context(NamedTuple):
  """Inputs shared by all layers of one forward pass.

  Attributes:
    positions_BxL: of each token in its document.
    segments_BxL: document of each token, or None for one a row.
    cos_TxBxLxK, sin_TxBxLxK: rotary tables.
    left_BxL: bool, tokens that have left the block, whose residual stream stays
      unchanged; None for none.
    pools: leaves of the block's pooled relaxations by kind (`rrt.relax.base`); inside the
      block alone.
    real_BxL: bool, tokens that are no padding; None for all.
    key: for noise in relaxations; None for none.
  """

  positions_BxL: jax.Array
  segments_BxL: jax.Array | None
  cos_TxBxLxK: jax.Array
  sin_TxBxLxK: jax.Array
  left_BxL: jax.Array | None = None
  pools: Any = None
  real_BxL: jax.Array | None = None
  key: jax.Array | None = None

  def repeat_rows(self, times: int) -> Context:
    """The context of a batch in which each row is repeated `times` times."""
    row = lambda t, axis: jnp.repeat(t, times, axis)
    segments_BxL = self.segments_BxL
    return Context(
      row(self.positions_BxL, 0),
      None if segments_BxL is None else row(segments_BxL, 0),
      row(self.cos_TxBxLxK, 1),
      row(self.sin_TxBxLxK, 1),
    )


class AttnSpec(NamedTuple):
  """Attention settings of one depth; scalars, or one value a row.

  Attributes:
    window: sliding window in tokens, 0 for global; None if all are global.
    rope: index of the rotary table; None if there is one.
  """

  window: jax.Array | None
  rope: jax.Array | None


def pick_rope(table_TxBxLxK, index):
  """The rotary table of one depth, or of each row's own, [B, L, K]."""
  if index is None:
    return table_TxBxLxK[0]
  if jnp.ndim(index) == 0:
    return table_TxBxLxK[index]
  return table_TxBxLxK[index, jnp.arange(index.shape[0])]


class Attention(nn.Module):
  """q, k, v, o projections around attention over a batch or a cache."""

  config: ModelConfig
  looped: bool = False

  def setup(self):
    c, looped = self.config, self.looped
    self.q, self.k = Linear(c, 'q', looped), Linear(c, 'k', looped)
    self.v, self.o = Linear(c, 'v', looped), Linear(c, 'o', looped)
    self.relaxed = relaxations_of(self, c, 'kv', looped)
    if c.qk_norm:
      sizes = c.norm_sizes()
      self.q_norm = Norm(c, sizes['attn/q_norm'], looped)
      self.k_norm = Norm(c, sizes['attn/k_norm'], looped)

  def __call__(self, x_BxLxD, kv, attn_spec: AttnSpec, place: Place, context: Context):
    o_BxLxE, kv = self.mixed(x_BxLxD, kv, attn_spec, place, context)
    return self.o(o_BxLxE, place), kv

  def heads(self, y_BxLxE):
    """[B, L, heads, Dh]."""
    return y_BxLxE.reshape(*y_BxLxE.shape[:2], -1, self.config.head_dim)

  def qk_normed(self, norm: Norm, y_BxLxHxDh, loop):
    """Each head normed by itself, or all together."""
    if not self.config.qk_norm_all:
      return norm(y_BxLxHxDh, loop)
    return self.heads(norm(y_BxLxHxDh.reshape(*y_BxLxHxDh.shape[:2], -1), loop))

  def keys_values(self, x_BxLxD, attn_spec: AttnSpec, place: Place, context: Context):
    """Keys after RoPE, and values, both [B, L, G, Dh]."""
    kv = self.heads(self.k(x_BxLxD, place)), self.heads(self.v(x_BxLxD, place))
    k_BxLxGxDh, v_BxLxGxDh = relax(self, self.relaxed, x_BxLxD, kv, place)
    if self.config.qk_norm:
      k_BxLxGxDh = self.qk_normed(self.k_norm, k_BxLxGxDh, place.loop)
    cos = pick_rope(context.cos_TxBxLxK, attn_spec.rope)
    sin = pick_rope(context.sin_TxBxLxK, attn_spec.rope)
    return apply_rope(k_BxLxGxDh, cos, sin), v_BxLxGxDh

  def write_kv(self, x_BxLxD, kv, attn_spec: AttnSpec, place: Place, context: Context):
    """Writes keys and values of x to the cache, without attention."""
    k_BxLxGxDh, v_BxLxGxDh = self.keys_values(x_BxLxD, attn_spec, place, context)
    return kv.update(k_BxLxGxDh, v_BxLxGxDh, context)[0]

  def mixed(self, x_BxLxD, kv, attn_spec: AttnSpec, place: Place, context: Context):
    """The output projection's input [B, L, H * Dh], and the written cache."""
    c = self.config
    q_BxLxHxDh = self.heads(self.q(x_BxLxD, place))
    k_BxLxGxDh, v_BxLxGxDh = self.keys_values(x_BxLxD, attn_spec, place, context)
    if c.qk_norm:
      q_BxLxHxDh = self.qk_normed(self.q_norm, q_BxLxHxDh, place.loop)
    cos = pick_rope(context.cos_TxBxLxK, attn_spec.rope)
    sin = pick_rope(context.sin_TxBxLxK, attn_spec.rope)
    q_BxLxHxDh = apply_rope(q_BxLxHxDh, cos, sin)
    q_BxLxHxDh *= jnp.asarray(c.scale_q, q_BxLxHxDh.dtype)
    q_BxLxHxDh = constrain(q_BxLxHxDh, ('batch', 'length', 'act_heads', None))
    kv, attend = (kv or BatchKV()).update(k_BxLxGxDh, v_BxLxGxDh, context)
    sizes = window_sizes(c.windows)
    o_BxLxHxDh = attend(q_BxLxHxDh, window=attn_spec.window, cap=c.attn_softcap, windows=sizes)
    return o_BxLxHxDh.reshape(*x_BxLxD.shape[:2], -1), kv
