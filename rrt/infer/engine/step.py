"""The engine's jitted step: block, sampler, prelude.

A step

  1. runs the shared block on up to N in-flight tokens, each in its own loop with
     its own relaxation and its own keys and values;
  2. lets tokens leave by the gate or at the last loop, runs coda and head on up
     to M of them and samples their successors (`sampler.py`);
  3. runs embedding and prelude on the sampled tokens, which are in token from
     the next step on.

Everything is decided on the device; `call` runs several steps in one loop.

S slots, K in-flight tokens a slot, N = max_batch_tokens, M =
max_sampled_tokens, R loops, D model, I steps of a call.
"""

import chex
import jax
import jax.numpy as jnp

from rrt.exits import score as score_lib
from rrt.infer.engine.batch import context_of, pools_of, run_if
from rrt.infer.engine.sampler import sample_tokens
from rrt.infer.engine.schedule import block_priority, pick, prelude_priority
from rrt.infer.engine.state import (
  EMPTY,
  IN_BLOCK,
  WAIT_PRELUDE,
  WAIT_SAMPLE,
  EngineShape,
  SlotParams,
  State,
  empty_output,
)
from rrt.models import passes


def call(shape: EngineShape, params, gate, slot_params: SlotParams, state: State):
  """Runs `shape.steps` steps, fewer if no sequence can go on.

  Args:
    shape: what is compiled for.
    params: of the model, unstacked and in the engine's dtype.
    gate: arrays of the exit gate.
    slot_params: parameters of each slot's request.
    state: donated.

  Returns:
    (state, SamplerOutput by step, Counters).
  """
  S, K = shape.slots, shape.tokens_per_slot
  chex.assert_shape([state.live_S, slot_params.max_new_tokens_S], (S,))
  chex.assert_shape(state.in_flight.x_SxKxD, (S, K, shape.config.d_model))

  def body(carry):
    i, state, all_outputs = carry
    state = run_block(shape, params, gate, slot_params, state)
    state, output = sample_tokens(shape, params, gate, slot_params, state)
    state = run_prelude(shape, params, state)
    put = lambda all_I, one: all_I.at[i].set(one)
    return i + 1, state, jax.tree.map(put, all_outputs, output)

  none = jax.tree.map(lambda t: jnp.broadcast_to(t, (shape.steps, *t.shape)), empty_output(shape))
  # A sequence that was just admitted has not been through the prelude.
  carry = (jnp.int32(0), run_prelude(shape, params, state), none)
  _, state, output = jax.lax.while_loop(
    lambda c: (c[0] < shape.steps) & jnp.any(c[1].ready_S), body, carry
  )
  return state, output, state.counters


def run_block(shape: EngineShape, params, gate, slot_params, state: State) -> State:
  """One loop of the block for the scheduled tokens; some leave it then."""
  c, f, R = shape.config, state.in_flight, shape.config.loops
  rows = pick(shape, f.stage_SxK == IN_BLOCK, block_priority(shape, state), shape.max_batch_tokens)
  loop_B = jnp.where(rows.live_B, rows.of(f.loop_SxK), 0)
  position_B = jnp.where(rows.live_B, rows.of(f.position_SxK), 0)
  before_BxD = rows.of(f.x_SxKxD)
  loop_BxW = loop_B[:, None]
  if shape.kv == 'write_ahead':
    ahead_1xR = jnp.arange(R, dtype=jnp.int32)[None, :]
    loop_BxW = jnp.minimum(loop_BxW + ahead_1xR, R - 1)
  kvs = rows.paged_kvs(state.kv_pools.block, shape.layout.block, loop_BxW)
  x_Bx1xD, kvs = passes.block_pass(
    c, params, before_BxD[:, None], loop_B, context_of(shape, position_B), kvs, scan=False
  )
  after_BxD = x_Bx1xD[:, 0]

  loop_B = loop_B + 1
  fills_B = rows.of(f.fills_SxK)
  lossless_B = jnp.asarray(slot_params.lossless_S)[rows.slot_B]
  leaves_B = loop_B == R
  if shape.gate != 'none':
    sure_B = score_lib.score(
      shape.gate,
      gate,
      before_BxD,
      after_BxD,
      loop_B,
      position_B,
      rows.slot_B,
      state.count_S[rows.slot_B],
    )
    stay_B = jnp.where(loop_B == 1, 1.0, rows.of(f.stay_SxK))
    sure_B, stay_B = score_lib.accumulate(shape.gate, sure_B, stay_B)
    f = f._replace(stay_SxK=rows.put(f.stay_SxK, stay_B))
    sure_B = sure_B >= slot_params.threshold_S[rows.slot_B]
    leaves_B |= sure_B & ~fills_B & ~lossless_B
  stage_B = jnp.where(leaves_B, jnp.where(fills_B, EMPTY, WAIT_SAMPLE), IN_BLOCK)
  wants_draft_SxK = f.wants_draft_SxK
  if shape.lossless:
    wants_draft_B = rows.of(wants_draft_SxK) | ((loop_B >= shape.draft_loop) & lossless_B)
    wants_draft_SxK = rows.put(wants_draft_SxK, wants_draft_B)
  f = f._replace(
    stage_SxK=rows.put(f.stage_SxK, stage_B),
    loop_SxK=rows.put(f.loop_SxK, loop_B),
    wants_draft_SxK=wants_draft_SxK,
    x_SxKxD=rows.put(f.x_SxKxD, after_BxD),
  )
  counters = state.counters
  return state._replace(
    in_flight=f,
    kv_pools=state.kv_pools._replace(block=pools_of(kvs)),
    counters=counters._replace(
      steps=counters.steps + 1,
      batch_tokens=counters.batch_tokens + jnp.sum(rows.live_B, dtype=jnp.int32),
    ),
  )


def run_prelude(shape: EngineShape, params, state: State) -> State:
  """Embedding and prelude of tokens that wait for them."""
  wanted_SxK = state.in_flight.stage_SxK == WAIT_PRELUDE

  def body(state):
    f = state.in_flight
    rows = pick(shape, wanted_SxK, prelude_priority(shape, state), shape.max_sampled_tokens)
    position_B = jnp.where(rows.live_B, rows.of(f.position_SxK), 0)
    token_B = jnp.where(rows.live_B, rows.of(f.token_SxK), 0)
    zero_Bx1 = jnp.zeros_like(token_B)[:, None]
    kv_pools = state.kv_pools
    kvs = rows.paged_kvs(kv_pools.prelude, shape.layout.prelude, zero_Bx1)
    x_Bx1xD, kvs = passes.run_prelude(
      shape.config, params, token_B[:, None], context_of(shape, position_B), kvs, shape.dtype
    )
    stage_B = jnp.full_like(token_B, IN_BLOCK)
    f = f._replace(
      stage_SxK=rows.put(f.stage_SxK, stage_B), x_SxKxD=rows.put(f.x_SxKxD, x_Bx1xD[:, 0])
    )
    waits_SxK = f.stage_SxK == WAIT_PRELUDE
    f = f._replace(wait_SxK=jnp.where(waits_SxK, f.wait_SxK + 1, f.wait_SxK))
    n = state.counters
    stalls = n.stalls + jnp.sum(waits_SxK, dtype=jnp.int32)
    return state._replace(
      in_flight=f,
      kv_pools=kv_pools._replace(prelude=pools_of(kvs)),
      counters=n._replace(stalls=stalls),
    )

  return run_if(jnp.any(wanted_SxK), body, state)
