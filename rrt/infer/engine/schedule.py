"""The scheduler: which in-flight tokens the next launch takes, on the device.

Each launch has room for fewer tokens than may want it. Tokens are taken by
priority, the lowest number first; all three priorities stand here.

S slots, K in-flight tokens a slot, B rows of a batch.
"""

import jax.numpy as jnp

from rrt.infer.engine.batch import Batch
from rrt.infer.engine.state import LAST, EngineShape, State


def block_priority(shape: EngineShape, state: State):
  """For a block step: the oldest token of each slot first, int [S, K].

  A token reads its predecessors' keys and values of the same loop, so that the
  older one must not come later; and drafts yield to tokens that are certain.
  """
  S = shape.slots
  age_SxK = _ahead(state) + shape.tokens_per_slot
  return age_SxK * S + jnp.arange(S, dtype=jnp.int32)[:, None]


def prelude_priority(shape: EngineShape, state: State):
  """For the prelude: who has waited longest, of a slot the older, int [S, K]."""
  waited_SxK = state.in_flight.wait_SxK * (shape.tokens_per_slot + 1)
  return LAST // 2 - waited_SxK + _ahead(state)


def sampler_priority(state: State, final_SxK):
  """For the sampler: final tokens before drafts, then who waited, int [S, K]."""
  return jnp.where(final_SxK, 0, LAST // 4) - state.in_flight.wait_SxK + LAST // 8


def pick(shape: EngineShape, wanted_SxK, priority_SxK, count: int) -> Batch:
  """The `count` wanted tokens of the lowest priority numbers.

  Unused rows are added where these are fewer than a launch must have.
  """
  S, K = wanted_SxK.shape
  if count == S * K:
    at_B = jnp.arange(count)
  else:
    key = jnp.where(wanted_SxK, priority_SxK, LAST).reshape(-1)
    at_B = jnp.argsort(key, stable=True)[:count]
  slot_B, k_B = at_B // K, at_B % K
  more = (0, max(shape.least_rows - count, 0))
  rows = Batch(slot_B, k_B, wanted_SxK[slot_B, k_B])
  return Batch(*(jnp.pad(t_B, more) for t_B in rows))


def _ahead(state: State):
  """Positions ahead of the oldest token whose successor is not sampled yet."""
  return state.in_flight.position_SxK - state.base_S[:, None]
