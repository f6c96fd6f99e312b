"""Rows of a pass: the flights that one launch takes, and what it needs of them.

S slots, K flights a slot, B rows of a pass, W loops that a row writes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rrt.infer.engine.state import LAST, EngineShape
from rrt.models import pages, transformer
from rrt.models.attention import Context


class Rows(NamedTuple):
  """Flights picked for one pass: their place in the table, and whether real."""

  slot_B: jax.Array
  k_B: jax.Array
  live_B: jax.Array

  def of(self, table):
    """The rows' entries of a table [S, K, ...]."""
    return table[self.slot_B, self.k_B]

  def put(self, table, values):
    """The table with the rows' entries replaced where they are real."""
    slot_B = jnp.where(self.live_B, self.slot_B, table.shape[0])
    return table.at[slot_B, self.k_B].set(jnp.asarray(values, table.dtype), mode='drop')


def pick(plan: EngineShape, wanted_SxK, order_SxK, count: int) -> Rows:
  """The `count` wanted flights that come first in order.

  Rows are added where these are fewer than a pass must have.
  """
  S, K = wanted_SxK.shape
  if count == S * K:
    at_B = jnp.arange(count)
  else:
    key = jnp.where(wanted_SxK, order_SxK, LAST).reshape(-1)
    at_B = jnp.argsort(key, stable=True)[:count]
  slot_B, k_B = at_B // K, at_B % K
  more = (0, max(plan.least_rows - count, 0))
  rows = Rows(slot_B, k_B, wanted_SxK[slot_B, k_B])
  return Rows(*(jnp.pad(t_B, more) for t_B in rows))


def context_of(plan: EngineShape, position_B) -> Context:
  """The context of rows with one token each."""
  position_Bx1 = position_B[:, None]
  return transformer.make_context(plan.config, position_Bx1, position_Bx1)


def paged_kvs(kv_pools, page_ranges, rows: Rows, loop_BxW):
  """The stores of one part of the model with the pages of some rows."""
  return tuple(
    pages.PagedKV(s, *g.rows(rows.slot_B, loop_BxW, rows.live_B))
    for s, g in zip(kv_pools, page_ranges, strict=True)
  )


def pools_of(kvs):
  """The written stores of some layers."""
  return tuple(kv.kv_pool for kv in kvs)


def run_if(wanted, body, carry):
  """`body(carry)` if wanted; a loop, through which buffers stay in place."""
  times = jnp.asarray(wanted, jnp.int32)

  def one(i, carry):
    # What does not depend on the round, XLA would compute before the loop,
    # wanted or not: the whole head, where there is no coda.
    _, carry = jax.lax.optimization_barrier((i, carry))
    return body(carry)

  return jax.lax.fori_loop(0, times, one, carry)
