"""The device side of depth-wise batching: one step of a fixed array of lanes.

A step

  1. runs the shared block on up to N flights, each in its own loop with its
     own relaxation and its own keys and values (the *lanes*);
  2. lets flights leave by the gate or at the last loop, runs coda and head on
     up to M of them and draws their tokens;
  3. runs embedding and prelude on the tokens that were drawn, which are the
     flights of the next step.

All of it is decided on the device; `call` runs several steps in one loop.

Lossless mode: a flight that has run `draft_loop` loops draws a guess, and the
guess flies on behind it. When the oldest flight has run all loops it draws the
token; where the guess differs, the younger flights are dropped. Draws share
their random numbers by position, so a guess is right whenever the full depth
would draw the same: what is written equals full depth token for token, greedy
and sampled alike.

S slots, K flights a slot, N lanes, M draws, R loops, D model, V vocabulary,
I steps of a call, E end tokens.
"""

import jax
import jax.numpy as jnp

from rrt.infer import exits, rules
from rrt.infer.flights import (
  DUE,
  EMPTY,
  ENTER,
  LAST,
  RUN,
  Drawn,
  Flights,
  Plan,
  Requests,
  Rows,
  State,
  pick,
)  # fmt: skip
from rrt.models import pages, passes, transformer
from rrt.models.attention import Context


def call(plan: Plan, params, gate, requests: Requests, end_E, state: State):
  """Runs `plan.steps` steps, fewer if no sequence is left.

  Args:
    plan: what is compiled for.
    params: of the model, unstacked and in the plan's dtype.
    gate: arrays of the exit gate.
    requests: what each slot asked for.
    end_E: tokens that end a sequence.
    state: donated.

  Returns:
    (state, Drawn).
  """

  def body(carry):
    i, state, token_IxS, loops_IxS = carry
    state = _run_block(plan, params, gate, requests, state)
    state, token_S, loops_S = _draw(plan, params, requests, end_E, state)
    state = _enter(plan, params, state)
    token_IxS = token_IxS.at[i].set(token_S)
    return i + 1, state, token_IxS, loops_IxS.at[i].set(loops_S)

  none = jnp.full((plan.steps, plan.slots), -1, jnp.int32)
  # A sequence that was just admitted has not been through the prelude.
  carry = (jnp.int32(0), _enter(plan, params, state), none, none)
  _, state, token_IxS, loops_IxS = jax.lax.while_loop(
    lambda c: (c[0] < plan.steps) & jnp.any(c[1].live_S), body, carry
  )
  return state, Drawn(token_IxS, loops_IxS, state.counters)


def _context(plan: Plan, position_B) -> Context:
  position_Bx1 = position_B[:, None]
  return transformer.make_context(plan.config, position_Bx1, position_Bx1)


def _paged(stores, regions, rows: Rows, loop_BxW):
  """The stores of one part of the model with the pages of some rows."""
  return tuple(
    pages.PagedKV(s, *g.rows(rows.slot_B, loop_BxW, rows.live_B))
    for s, g in zip(stores, regions, strict=True)
  )


def _stores(kvs):
  return tuple(kv.store for kv in kvs)


def _run_block(plan: Plan, params, gate, requests, state: State) -> State:
  """One loop of the block for the picked flights; some then leave it."""
  c, f, R = plan.config, state.flights, plan.config.loops
  S = plan.slots
  # The oldest of each slot first: a token needs its predecessors' keys and
  # values of the same loop, and guesses yield to what is sure.
  age_SxK = f.position_SxK - state.base_S[:, None] + plan.flights
  order_SxK = age_SxK * S + jnp.arange(S, dtype=jnp.int32)[:, None]
  rows = pick(f.stage_SxK == RUN, order_SxK, plan.lanes)
  loop_B = jnp.where(rows.live_B, rows.of(f.loop_SxK), 0)
  position_B = jnp.where(rows.live_B, rows.of(f.position_SxK), 0)
  before_BxD = rows.of(f.x_SxKxD)
  loop_BxW = loop_B[:, None]
  if plan.kv == 'write_ahead':
    ahead_1xR = jnp.arange(R, dtype=jnp.int32)[None, :]
    loop_BxW = jnp.minimum(loop_BxW + ahead_1xR, R - 1)
  kvs = _paged(state.stores.block, plan.layout.block, rows, loop_BxW)
  x_Bx1xD, kvs = passes.block_pass(
    c, params, before_BxD[:, None], loop_B, _context(plan, position_B), kvs,
    scan=False,
  )  # fmt: skip
  after_BxD = x_Bx1xD[:, 0]

  loop_B = loop_B + 1
  fills_B = rows.of(f.fills_SxK)
  leaves_B = loop_B == R
  if plan.gate != 'none':
    sure_B = exits.score(
      plan.gate, gate, before_BxD, after_BxD, loop_B, rows.slot_B,
      state.count_S[rows.slot_B],
    )  # fmt: skip
    sure_B = sure_B >= requests.threshold_S[rows.slot_B]
    leaves_B |= sure_B & ~fills_B
  stage_B = jnp.where(leaves_B, jnp.where(fills_B, EMPTY, DUE), RUN)
  asks_SxK = f.asks_SxK
  if plan.lossless:
    asks_B = rows.of(asks_SxK) | (loop_B == plan.draft_loop)
    asks_SxK = rows.put(asks_SxK, asks_B)
  f = f._replace(
    stage_SxK=rows.put(f.stage_SxK, stage_B),
    loop_SxK=rows.put(f.loop_SxK, loop_B),
    asks_SxK=asks_SxK,
    x_SxKxD=rows.put(f.x_SxKxD, after_BxD),
  )
  counters = state.counters
  return state._replace(
    flights=f,
    stores=state.stores._replace(block=_stores(kvs)),
    counters=counters._replace(
      steps=counters.steps + 1,
      lanes=counters.lanes + jnp.sum(rows.live_B, dtype=jnp.int32),
    ),
  )


def _once(wanted, body, carry):
  """`body(carry)` if wanted; a loop, through which buffers stay in place."""
  times = jnp.asarray(wanted, jnp.int32)
  return jax.lax.fori_loop(0, times, lambda _, c: body(c), carry)


def _draw(plan: Plan, params, requests, end_E, state: State):
  """Coda, head and the next token of flights that are due.

  Returns:
    (state, token_S, loops_S): -1 for slots that drew nothing.
  """
  f, K = state.flights, plan.flights
  final_SxK = (f.stage_SxK == DUE) & (f.position_SxK == state.base_S[:, None])
  next_SxK = jnp.roll(f.stage_SxK, -1, 1)
  if plan.kv == 'exact_fill' and K > 1:
    # The successor's place may still hold a token of K positions before.
    final_SxK &= next_SxK == EMPTY
  wanted_SxK = final_SxK
  if plan.lossless:
    freed_SxK = (next_SxK == EMPTY) | jnp.roll(final_SxK, -1, 1)
    guess_SxK = f.asks_SxK & (f.stage_SxK != EMPTY) & ~final_SxK & freed_SxK
    # Behind the last token that there is room for, nothing is guessed.
    ahead_SxK = f.position_SxK - state.base_S[:, None]
    number_SxK = state.count_S[:, None] + ahead_SxK + 1
    guess_SxK &= number_SxK < requests.room_S[:, None]
    wanted_SxK |= guess_SxK
  order_SxK = jnp.where(final_SxK, 0, LAST // 4) - f.wait_SxK + LAST // 8
  finals = jnp.sum(final_SxK)
  enough = finals >= jnp.minimum(plan.pool, jnp.sum(state.live_S))
  go = jnp.any(wanted_SxK) & (enough if not plan.lossless else True)
  none_S = jnp.full(plan.slots, -1, jnp.int32)

  def body(carry):
    state, _, _ = carry
    rows = pick(wanted_SxK, order_SxK, plan.draws)
    final_B = rows.live_B & rows.of(final_SxK)
    state, token_B = _head(plan, params, requests, state, rows, final_B)
    return _commit(plan, requests, end_E, state, rows, final_B, token_B)

  state, token_S, loops_S = _once(go, body, (state, none_S, none_S))
  f = state.flights
  waits_SxK = (f.stage_SxK == DUE) | (f.asks_SxK & (f.stage_SxK != EMPTY))
  due = jnp.sum(f.stage_SxK == DUE, dtype=jnp.int32)
  counters = state.counters._replace(stalls=state.counters.stalls + due)
  keeps_SxK = jnp.where(f.stage_SxK == ENTER, f.wait_SxK, 0)
  f = f._replace(wait_SxK=jnp.where(waits_SxK, f.wait_SxK + 1, keeps_SxK))
  return state._replace(flights=f, counters=counters), token_S, loops_S


def _head(plan: Plan, params, requests, state: State, rows: Rows, final_B):
  """Runs coda and head on rows and draws a token from each."""
  c, f, R = plan.config, state.flights, plan.config.loops
  position_B = jnp.where(rows.live_B, rows.of(f.position_SxK), 0)
  x_Bx1xD = rows.of(f.x_SxKxD)[:, None]
  context = _context(plan, position_B)
  stores = state.stores
  if plan.kv == 'propagate':
    loop_B = rows.of(f.loop_SxK)
    block_kvs = stores.block
    for r in range(1, R):
      skipped = rows._replace(live_B=final_B & (loop_B <= r))
      loop_Bx1 = jnp.full((plan.draws, 1), r, jnp.int32)
      kvs = _paged(block_kvs, plan.layout.block, skipped, loop_Bx1)
      kvs = passes.fill_pass(c, params, x_Bx1xD, r, context, kvs)
      block_kvs = _stores(kvs)
    stores = stores._replace(block=block_kvs)
  zero_Bx1 = jnp.zeros((plan.draws, 1), jnp.int32)
  kvs = _paged(stores.coda, plan.layout.coda, rows, zero_Bx1)
  hidden_Bx1xD, kvs = passes.leave(c, params, x_Bx1xD, context, kvs)
  stores = stores._replace(coda=_stores(kvs))

  head = c, params, hidden_Bx1xD[:, 0], plan.dtype
  sampling = rules.Sampling(*(t[rows.slot_B] for t in requests.sampling))
  ahead_B = position_B - state.base_S[rows.slot_B]
  count_B = state.count_S[rows.slot_B] + ahead_B
  hot = jnp.any(rows.live_B & (sampling.temperature_B > 0))
  token_B = jax.lax.cond(
    hot,
    lambda: rules.sample(transformer.logits(*head), sampling, count_B),
    lambda: transformer.greedy_token(*head),
  )
  return state._replace(stores=stores), token_B


def _commit(
  plan: Plan, requests, end_E, state: State, rows: Rows, final_B, token_B
):
  """Takes drawn tokens over: ends, confirms, drops and starts flights."""
  S, K = plan.slots, plan.flights
  f, base_S = state.flights, state.base_S
  slots_S = jnp.arange(S)
  final_S = Rows(rows.slot_B, rows.k_B, final_B).put(
    jnp.zeros((S, K), bool), True
  )
  drawn_SxK = rows.put(jnp.full((S, K), -1, jnp.int32), token_B)
  k_S, next_S = base_S % K, (base_S + 1) % K
  got_S = jnp.any(final_S, 1)
  token_S = jnp.where(got_S, drawn_SxK[slots_S, k_S], -1)
  loops_S = jnp.where(got_S, f.loop_SxK[slots_S, k_S], -1)
  count_S = state.count_S + got_S
  ended_S = jnp.any(token_S[:, None] == end_E[None, :], 1) & requests.ends_S
  ended_S = got_S & (ended_S | (count_S >= requests.room_S))

  younger_SxK = f.position_SxK > base_S[:, None]
  guessed_S = (f.stage_SxK[slots_S, next_S] != EMPTY) & younger_SxK[
    slots_S, next_S
  ]
  right_S = got_S & guessed_S & (f.token_SxK[slots_S, next_S] == token_S)
  # The flight that was drawn from ends, or goes on to fill its missing loops.
  fills_S = jnp.zeros(S, bool)
  if plan.kv == 'exact_fill':
    fills_S = got_S & (f.loop_SxK[slots_S, k_S] < plan.config.loops)
  of_base_SxK = jnp.arange(K)[None, :] == k_S[:, None]
  stage_SxK = f.stage_SxK
  stage_SxK = jnp.where(
    got_S[:, None] & of_base_SxK,
    jnp.where(fills_S[:, None], RUN, EMPTY), stage_SxK,
  )  # fmt: skip
  wrong_S = got_S & ~right_S
  stage_SxK = jnp.where(wrong_S[:, None] & younger_SxK, EMPTY, stage_SxK)
  stage_SxK = jnp.where(ended_S[:, None], EMPTY, stage_SxK)
  f = f._replace(
    stage_SxK=stage_SxK,
    asks_SxK=f.asks_SxK & ~(got_S[:, None] & of_base_SxK),
    fills_SxK=jnp.where(
      got_S[:, None] & of_base_SxK, fills_S[:, None], f.fills_SxK
    ),
  )
  new = Rows(slots_S, next_S, wrong_S & ~ended_S)
  f = _start(f, new, token_S, base_S + 1)
  if plan.lossless:
    # Guesses of flights that are still there and have room behind them.
    after_B = (rows.k_B + 1) % K
    alive_B = rows.live_B & ~final_B & (rows.of(f.stage_SxK) != EMPTY)
    alive_B &= f.stage_SxK[rows.slot_B, after_B] == EMPTY
    asked = rows._replace(live_B=alive_B)
    f = f._replace(asks_SxK=asked.put(f.asks_SxK, False))
    behind = Rows(rows.slot_B, after_B, alive_B)
    f = _start(f, behind, token_B, rows.of(f.position_SxK) + 1)
  n = state.counters
  add = lambda total, flags: total + jnp.sum(flags, dtype=jnp.int32)
  depth_SxR = loops_S[:, None] == 1 + jnp.arange(plan.config.loops)[None, :]
  state = state._replace(
    live_S=state.live_S & ~ended_S, base_S=base_S + got_S, count_S=count_S,
    flights=f,
    counters=n._replace(
      draws=add(n.draws, rows.live_B), draw_steps=n.draw_steps + 1,
      guesses=add(n.guesses, got_S & guessed_S), right=add(n.right, right_S),
      depths_R=n.depths_R + jnp.sum(depth_SxR, 0, dtype=jnp.int32),
    ),
  )  # fmt: skip
  return state, token_S, loops_S


def _start(f: Flights, rows: Rows, token_B, position_B) -> Flights:
  """New flights, which wait for the prelude."""
  return f._replace(
    stage_SxK=rows.put(f.stage_SxK, jnp.full_like(token_B, ENTER)),
    token_SxK=rows.put(f.token_SxK, token_B),
    position_SxK=rows.put(f.position_SxK, position_B),
    loop_SxK=rows.put(f.loop_SxK, jnp.zeros_like(token_B)),
    wait_SxK=rows.put(f.wait_SxK, jnp.zeros_like(token_B)),
    asks_SxK=rows.put(f.asks_SxK, jnp.zeros_like(rows.live_B)),
    fills_SxK=rows.put(f.fills_SxK, jnp.zeros_like(rows.live_B)),
  )


def _enter(plan: Plan, params, state: State) -> State:
  """Embedding and prelude of flights that wait for them."""
  wanted_SxK = state.flights.stage_SxK == ENTER

  def body(state):
    f = state.flights
    rows = pick(wanted_SxK, LAST // 2 - f.wait_SxK, plan.draws)
    position_B = jnp.where(rows.live_B, rows.of(f.position_SxK), 0)
    token_B = jnp.where(rows.live_B, rows.of(f.token_SxK), 0)
    zero_Bx1 = jnp.zeros((plan.draws, 1), jnp.int32)
    stores = state.stores
    kvs = _paged(stores.prelude, plan.layout.prelude, rows, zero_Bx1)
    x_Bx1xD, kvs = passes.enter(
      plan.config, params, token_B[:, None], _context(plan, position_B), kvs,
      plan.dtype,
    )  # fmt: skip
    stage_B = jnp.full_like(token_B, RUN)
    f = f._replace(
      stage_SxK=rows.put(f.stage_SxK, stage_B),
      x_SxKxD=rows.put(f.x_SxKxD, x_Bx1xD[:, 0]),
    )
    waits_SxK = f.stage_SxK == ENTER
    f = f._replace(wait_SxK=jnp.where(waits_SxK, f.wait_SxK + 1, f.wait_SxK))
    n = state.counters
    stalls = n.stalls + jnp.sum(waits_SxK, dtype=jnp.int32)
    return state._replace(
      flights=f, stores=stores._replace(prelude=_stores(kvs)),
      counters=n._replace(stalls=stalls),
    )  # fmt: skip

  return _once(jnp.any(wanted_SxK), body, state)
