"""The key-value cache: a slot for every position of every row.

Slot s of a row holds the keys and values of that row's token at position s,
once for each depth: loops do not share them, since every loop's relaxation
makes its own. Unwritten slots lie above the row's position and are masked.

Every kind of KV has one method, `update(k, v, context)`: it writes a batch's keys
(after RoPE) and values, both [B, L, G, Dh], at `context.positions_BxL`, and
returns itself as written and a function `attend(q_BxLxHxDh, window, cap, windows)` over
what the batch sees then; `windows` are all values that the model's windows have.

B batch, L length, S slots, G kv groups, Dh head size, P prelude, N block, R loops,
C coda.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.ops.attention import attend, visible
from rrt.ops.flash_attention import attend_batch


class BatchKV(NamedTuple):
  """No cache: a batch attends to itself."""

  def update(self, k_BxLxGxDh, v_BxLxGxDh, context):
    return None, functools.partial(_attend_batch, k_BxLxGxDh, v_BxLxGxDh, context)


class KV(NamedTuple):
  """Keys (after RoPE) and values of one depth, as attention reads them."""

  k_BxGxDhxS: jax.Array
  v_BxGxSxDh: jax.Array

  def update(self, k_BxLxGxDh, v_BxLxGxDh, context):
    """Positions past the last slot are dropped."""
    k, v = self
    positions_BxL = context.positions_BxL
    rows_Bx1 = jnp.arange(positions_BxL.shape[0])[:, None]
    new = KV(
      k.at[rows_Bx1, :, :, positions_BxL].set(k_BxLxGxDh.astype(k.dtype), mode='drop'),
      v.at[rows_Bx1, :, positions_BxL].set(v_BxLxGxDh.astype(v.dtype), mode='drop'),
    )
    return new, functools.partial(new.attend, context=context)

  def attend(self, q_BxLxHxDh, window, cap=None, windows=(0,), *, context):
    """Attention over all slots up to each query's position."""
    dtype = q_BxLxHxDh.dtype
    slots_1xS = jnp.arange(self.v_BxGxSxDh.shape[2], dtype=jnp.int32)[None, :]
    mask_BxLxS = visible(context.positions_BxL, slots_1xS, window)
    k, v = (t.astype(dtype) for t in self)
    return attend(q_BxLxHxDh, k, v, mask_BxLxS, cap)


class EmptyKV(NamedTuple):
  """An empty KV, whose next tokens are written to slots 0, 1, ...

  They attend to each other only, so the slots are not read.
  """

  k_BxGxDhxS: jax.Array
  v_BxGxSxDh: jax.Array

  def update(self, k_BxLxGxDh, v_BxLxGxDh, context):
    k, v = self
    S = v.shape[2]
    new_k = k_BxLxGxDh[:, :S].transpose(0, 2, 3, 1).astype(k.dtype)
    new_v = v_BxLxGxDh[:, :S].swapaxes(1, 2).astype(v.dtype)
    new = KV(
      jax.lax.dynamic_update_slice(k, new_k, (0,) * 4),
      jax.lax.dynamic_update_slice(v, new_v, (0,) * 4),
    )
    return new, functools.partial(_attend_batch, k_BxLxGxDh, v_BxLxGxDh, context)


class HeldKV(NamedTuple):
  """A batch's keys and values of one layer, from one loop to the next.

  Tokens that left keep those of the loop in which they did.
  """

  k_BxLxGxDh: jax.Array
  v_BxLxGxDh: jax.Array
  left_BxL: jax.Array

  def update(self, k_BxLxGxDh, v_BxLxGxDh, context):
    left_BxLx1x1 = self.left_BxL[:, :, None, None]
    new = self._replace(
      k_BxLxGxDh=jnp.where(left_BxLx1x1, self.k_BxLxGxDh, k_BxLxGxDh),
      v_BxLxGxDh=jnp.where(left_BxLx1x1, self.v_BxLxGxDh, v_BxLxGxDh),
    )
    return new, functools.partial(_attend_batch, new.k_BxLxGxDh, new.v_BxLxGxDh, context)


def _attend_batch(k_BxLxGxDh, v_BxLxGxDh, context, q_BxLxHxDh, window, cap=None, windows=(0,)):
  """Causal attention of a batch to itself, within segments."""
  places = context.positions_BxL, context.segments_BxL
  return attend_batch(
    q_BxLxHxDh, k_BxLxGxDh, v_BxLxGxDh, *places, window=window, windows=windows, cap=cap
  )


class Cache(NamedTuple):
  """KVs of all depths.

  Each field is one KV with leading axes [P], [R, N], [C] for the scanned
  model, or nested tuples of KV in those shapes for the unrolled one, which
  updates them in place inside a decode loop.
  """

  prelude: Any
  block: Any
  coda: Any

  @property
  def slots(self) -> int:
    """S, the tokens that a row can have."""
    return jax.tree.leaves(self.block)[-1].shape[-2]  # Of values.


def init_cache(
  config: ModelConfig,
  batch: int,
  length: int,
  dtype=jnp.float32,
  scan: bool = False,
  loops: int | None = None,
) -> Cache:
  """An empty cache for `batch` rows of up to `length` tokens.

  Args:
    config: the model's shape.
    batch: rows.
    length: slots a row; at most `config.max_context`.
    dtype: of keys and values.
    scan: stacked for `Transformer(scan=True)`; tuples otherwise.
    loops: how many loops will run; None for all.

  Raises:
    InputError: the length exceeds the model's context.
  """
  if length > config.max_context:
    raise InputError(
      f'A cache of {length} tokens exceeds max_context='
      f'{config.max_context}; shorten the prompt or ask for fewer tokens.'
    )
  R = config.loops if loops is None else loops
  P, N, C = config.prelude_layers, config.block_layers, config.coda_layers
  G, Dh = config.num_kv_heads, config.head_dim

  def empty(*lead):
    return KV(
      jnp.zeros((*lead, batch, G, Dh, length), dtype),
      jnp.zeros((*lead, batch, G, length, Dh), dtype),
    )

  if scan:
    return Cache(empty(P), empty(R, N), empty(C))
  return Cache(
    tuple(empty() for _ in range(P)),
    tuple(tuple(empty() for _ in range(N)) for _ in range(R)),
    tuple(empty() for _ in range(C)),
  )


def as_empty(cache: Cache) -> Cache:
  """The same cache, known to be empty when a step is compiled."""
  return jax.tree.map(lambda kv: EmptyKV(*kv), cache, is_leaf=lambda x: isinstance(x, KV))
