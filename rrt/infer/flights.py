"""What the engine keeps on the device: slots, tokens under way, the cache.

A sequence has a *slot*. Its tokens under way are *flights*: one a slot, or up
to R where younger tokens run beside older ones (lossless mode, exact fill).
Flight k of a slot holds the token whose position is k modulo K.

S slots, K flights a slot, R loops, D model, B rows of a pass, I steps of a
call.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.infer import rules
from rrt.models import pages

# Stages of a flight: none, waits for the prelude, in the block, waits for the
# draw.
EMPTY, ENTER, RUN, DUE = range(4)
LAST = jnp.int32(2**30)  # Sorts behind every flight.


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step is compiled for.

  Attributes:
    config: the model's shape, of cycle order.
    layout: where the cache keeps each layer and loop.
    page: positions of a page.
    slots: S.
    lanes: N, flights that one block step runs, at most S * K.
    draws: M, flights that one draw takes.
    pool: a draw waits until this many flights are due, or all that live.
    flights: K; 1, or R for 'exact_fill' and lossless.
    steps: of one call.
    kv: what the loops that a token skipped keep of it; see `Engine`.
    gate: kind of exit gate.
    lossless: draft after `draft_loop` loops, verify after all.
    draft_loop: loops before a guess.
    dtype: of the computation.
    kv_dtype: of the cache.
  """

  config: ModelConfig
  layout: pages.Layout
  page: int
  slots: int
  lanes: int
  draws: int
  pool: int
  flights: int
  steps: int
  kv: str = 'own'
  gate: str = 'none'
  lossless: bool = False
  draft_loop: int = 1
  dtype: str = 'float32'
  kv_dtype: str = 'float32'


class Requests(NamedTuple):
  """What the sequence of each slot asked for.

  Attributes:
    room_S: tokens that it may draw.
    ends_S: whether an end token ends it.
    threshold_S: of its exits.
    sampling: its rules.
  """

  room_S: rules.Array
  ends_S: rules.Array
  threshold_S: rules.Array
  sampling: rules.Sampling


class Flights(NamedTuple):
  """Tokens under way.

  Attributes:
    stage_SxK: EMPTY, ENTER, RUN or DUE.
    token_SxK: what goes in.
    position_SxK: where it stands in its sequence.
    loop_SxK: how many loops it has run.
    wait_SxK: for how many steps it has waited for a draw or the prelude.
    asks_SxK: whether a guess is to be drawn from it.
    fills_SxK: whether its successor is drawn and only its missing keys and
      values are computed.
    x_SxKxD: the residual stream.
  """

  stage_SxK: jax.Array
  token_SxK: jax.Array
  position_SxK: jax.Array
  loop_SxK: jax.Array
  wait_SxK: jax.Array
  asks_SxK: jax.Array
  fills_SxK: jax.Array
  x_SxKxD: jax.Array


class Counters(NamedTuple):
  """What happened since the engine began.

  Attributes:
    steps: block steps.
    lanes: lanes that ran a flight.
    stalls: flights that waited a step because a pass was full.
    draws: rows drawn from, guesses included.
    draw_steps: steps in which coda and head ran.
    guesses: guesses that were verified.
    right: of those, the ones that full depth confirmed.
    depths_R: tokens by the loop after which they were drawn.
  """

  steps: jax.Array
  lanes: jax.Array
  stalls: jax.Array
  draws: jax.Array
  draw_steps: jax.Array
  guesses: jax.Array
  right: jax.Array
  depths_R: jax.Array


class State(NamedTuple):
  """All that a step reads and writes.

  Attributes:
    live_S: whether the slot has a sequence that goes on.
    base_S: position of the oldest token whose successor is not drawn yet.
    count_S: how many tokens are drawn.
    flights: tokens under way.
    stores: the cache.
    counters: statistics.
  """

  live_S: jax.Array
  base_S: jax.Array
  count_S: jax.Array
  flights: Flights
  stores: pages.Stores
  counters: Counters


class Drawn(NamedTuple):
  """What a call drew, by step and slot, -1 where nothing; and the counters."""

  token_IxS: jax.Array
  loops_IxS: jax.Array
  counters: Counters


def init_state(plan: Plan) -> State:
  """All slots free."""
  S, K, R = plan.slots, plan.flights, plan.config.loops
  zero = jnp.zeros((), jnp.int32)
  table = jnp.zeros((S, K), jnp.int32)
  off = jnp.zeros((S, K), bool)
  x = jnp.zeros((S, K, plan.config.d_model), plan.dtype)
  return State(
    jnp.zeros(S, bool), jnp.zeros(S, jnp.int32), jnp.zeros(S, jnp.int32),
    Flights(table, table, table, table, table, off, off, x),
    pages.init_stores(plan.config, plan.layout, plan.page, plan.kv_dtype),
    Counters(
      zero, zero, zero, zero, zero, zero, zero, jnp.zeros(R, jnp.int32)
    ),
  )  # fmt: skip


def admit(plan: Plan, state: State, slot, token, position, cache) -> State:
  """Puts a sequence into a slot.

  Args:
    plan: the engine's.
    state: its state; the slot is overwritten.
    slot: int scalar.
    token: the prompt's last token.
    position: its position; the cache holds the tokens before it.
    cache: of one row, from prefilling the prompt without its last token;
      None where the prompt has one token.
  """
  f = state.flights
  k = position % plan.flights
  f = f._replace(
    stage_SxK=f.stage_SxK.at[slot].set(EMPTY).at[slot, k].set(ENTER),
    token_SxK=f.token_SxK.at[slot, k].set(token),
    position_SxK=f.position_SxK.at[slot, k].set(position),
    loop_SxK=f.loop_SxK.at[slot, k].set(0),
    wait_SxK=f.wait_SxK.at[slot, k].set(0),
    asks_SxK=f.asks_SxK.at[slot].set(False),
    fills_SxK=f.fills_SxK.at[slot].set(False),
  )
  stores = state.stores
  if cache is not None:
    put = lambda store, region, loop, kv: pages.insert(
      store, region, loop, slot, kv, position
    )
    block = list(stores.block)
    for r, kvs in enumerate(cache.block):
      for n, kv in enumerate(kvs):
        block[n] = put(block[n], plan.layout.block[n], r, kv)
    ends = [
      tuple(put(s, g, 0, kv) for s, g, kv in zip(*part, strict=True))
      for part in (
        (stores.prelude, plan.layout.prelude, cache.prelude),
        (stores.coda, plan.layout.coda, cache.coda),
      )
    ]
    stores = pages.Stores(ends[0], tuple(block), ends[1])
  return state._replace(
    live_S=state.live_S.at[slot].set(True),
    base_S=state.base_S.at[slot].set(position),
    count_S=state.count_S.at[slot].set(0),
    flights=f, stores=stores,
  )  # fmt: skip


def drop(state: State, gone_S) -> State:
  """Ends the sequences of some slots."""
  f = state.flights
  stage_SxK = jnp.where(gone_S[:, None], EMPTY, f.stage_SxK)
  return state._replace(
    live_S=state.live_S & ~gone_S, flights=f._replace(stage_SxK=stage_SxK)
  )


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
    return table.at[slot_B, self.k_B].set(
      jnp.asarray(values, table.dtype), mode='drop'
    )


def pick(wanted_SxK, order_SxK, count: int) -> Rows:
  """The `count` wanted flights that come first in order."""
  S, K = wanted_SxK.shape
  if count == S * K:
    at_B = jnp.arange(count)
  else:
    key = jnp.where(wanted_SxK, order_SxK, LAST).reshape(-1)
    at_B = jnp.argsort(key, stable=True)[:count]
  slot_B, k_B = at_B // K, at_B % K
  return Rows(slot_B, k_B, wanted_SxK[slot_B, k_B])
