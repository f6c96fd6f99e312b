"""The key-value cache: a slot for every position of every row.

Slot s of a row holds the keys and values of that row's token at position s,
once for each depth: loops do not share them, since every loop's relaxation
makes its own. Unwritten slots lie above the row's position and are masked.

B batch, S slots, G kv groups, Dh head size, P prelude, N block, R loops,
C coda.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.errors import InputError


class KV(NamedTuple):
  """Keys (after RoPE) and values of one depth, as attention reads them."""

  k_BxGxDhxS: jax.Array
  v_BxGxSxDh: jax.Array


class EmptyKV(NamedTuple):
  """A KV that holds nothing yet, and whose next tokens take slots 0, 1, ..

  These then need not read it: they attend to each other alone.
  """

  k_BxGxDhxS: jax.Array
  v_BxGxSxDh: jax.Array


class HeldKV(NamedTuple):
  """A batch's keys and values of one layer, from one loop to the next.

  Tokens that left keep those of the loop in which they did.
  """

  k_BxLxGxDh: jax.Array
  v_BxLxGxDh: jax.Array
  left_BxL: jax.Array


class Cache(NamedTuple):
  """KVs of all depths.

  Each field is one KV with leading axes [P], [R, N], [C] for the scanned
  model, or nested tuples of KV in those shapes for the unrolled one, which
  updates them in place inside a decode loop.
  """

  prelude: Any
  block: Any
  coda: Any


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


def write(kv: KV | EmptyKV, k_BxLxGxDh, v_BxLxGxDh, positions_BxL) -> KV:
  """Puts new keys and values at their rows' positions.

  Positions past the last slot are dropped.
  """
  k, v = kv
  if isinstance(kv, EmptyKV):
    S = v.shape[2]
    new_k = k_BxLxGxDh[:, :S].transpose(0, 2, 3, 1).astype(k.dtype)
    new_v = v_BxLxGxDh[:, :S].swapaxes(1, 2).astype(v.dtype)
    return KV(
      jax.lax.dynamic_update_slice(k, new_k, (0,) * 4),
      jax.lax.dynamic_update_slice(v, new_v, (0,) * 4),
    )
  rows_Bx1 = jnp.arange(positions_BxL.shape[0])[:, None]
  return KV(
    k.at[rows_Bx1, :, :, positions_BxL].set(k_BxLxGxDh.astype(k.dtype), mode='drop'),
    v.at[rows_Bx1, :, positions_BxL].set(v_BxLxGxDh.astype(v.dtype), mode='drop'),
  )


def hold(kv: HeldKV, k_BxLxGxDh, v_BxLxGxDh) -> HeldKV:
  """New keys and values for the tokens that have not left."""
  left_BxLx1x1 = kv.left_BxL[:, :, None, None]
  return kv._replace(
    k_BxLxGxDh=jnp.where(left_BxLx1x1, kv.k_BxLxGxDh, k_BxLxGxDh),
    v_BxLxGxDh=jnp.where(left_BxLx1x1, kv.v_BxLxGxDh, v_BxLxGxDh),
  )
