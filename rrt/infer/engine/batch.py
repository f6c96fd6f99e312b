"""The batch of one launch: which in-flight tokens it takes, and their KVs.

S slots, K in-flight tokens a slot, B rows of a batch, W loops that a row
writes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rrt.infer.engine.state import EngineShape
from rrt.models import pages, transformer
from rrt.models.attention import Context


class Batch(NamedTuple):
  """Rows of a launch: indices into tables [S, K, ...], and whether in use."""

  slot_B: jax.Array
  k_B: jax.Array
  live_B: jax.Array

  def of(self, table):
    """The rows' entries of a table [S, K, ...]."""
    return table[self.slot_B, self.k_B]

  def put(self, table, values):
    """The table with the entries of rows in use replaced."""
    slot_B = jnp.where(self.live_B, self.slot_B, table.shape[0])
    return table.at[slot_B, self.k_B].set(jnp.asarray(values, table.dtype), mode='drop')

  def paged_kvs(self, kv_pools, page_ranges, loop_BxW):
    """KVs of one part of the model (prelude, block or coda), by layer."""
    return tuple(
      pages.PagedKV(pool, *page_range.rows(self.slot_B, loop_BxW, self.live_B))
      for pool, page_range in zip(kv_pools, page_ranges, strict=True)
    )


def context_of(shape: EngineShape, position_B) -> Context:
  """The context of rows with one token each."""
  position_Bx1 = position_B[:, None]
  return transformer.make_context(shape.config, position_Bx1, position_Bx1)


def pools_of(kvs):
  """The written KV pools of some layers."""
  return tuple(kv.kv_pool for kv in kvs)


def run_if(wanted, body, carry):
  """`body(carry)` if wanted; a loop, through which buffers stay in place."""
  times = jnp.asarray(wanted, jnp.int32)

  def one(i, carry):
    # Without the barrier XLA would hoist what does not depend on the iteration
    # out of the loop, and compute it in any case: the whole head, say.
    _, carry = jax.lax.optimization_barrier((i, carry))
    return body(carry)

  return jax.lax.fori_loop(0, times, one, carry)
