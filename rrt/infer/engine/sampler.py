"""Runs coda and LM head, samples, and updates the in-flight tokens.

In the lossless mode draft tokens are sampled too (`speculate.py`). Random
numbers are shared by position, so that a draft is accepted whenever full depth
would sample the same token.

S slots, K in-flight tokens a slot, B rows of a batch, R loops, D model, V
vocabulary, A alternatives, E end tokens of a slot.
"""

import jax
import jax.numpy as jnp

from rrt.exits import score as score_lib
from rrt.infer.engine import speculate
from rrt.infer.engine.batch import Batch, context_of, pools_of, run_if
from rrt.infer.engine.schedule import pick, sampler_priority
from rrt.infer.engine.state import (
  EMPTY,
  IN_BLOCK,
  WAIT_PRELUDE,
  WAIT_SAMPLE,
  EngineShape,
  SamplerOutput,
  State,
  empty_output,
)
from rrt.infer.sampling import penalize, sample
from rrt.models import lm_head, passes


def sample_tokens(shape: EngineShape, params, gate, slot_params, state: State):
  """Samples the successors of tokens that have left; (state, SamplerOutput)."""
  f, K = state.in_flight, shape.tokens_per_slot
  final_SxK = (f.stage_SxK == WAIT_SAMPLE) & (f.position_SxK == state.base_S[:, None])
  if state.masks is not None:
    final_SxK &= ~state.masks.held_S[:, None]
  next_SxK = jnp.roll(f.stage_SxK, -1, 1)
  if shape.kv == 'exact_fill' and K > 1:
    # The successor's place may still hold a token of K positions before.
    final_SxK &= next_SxK == EMPTY
  wanted_SxK = final_SxK
  if shape.lossless:
    wanted_SxK |= speculate.wanted(shape, slot_params, state, final_SxK)
  finals = jnp.sum(final_SxK)
  enough = finals >= jnp.minimum(shape.min_sampled_tokens, jnp.sum(state.ready_S))
  go = jnp.any(wanted_SxK) & (enough if not shape.lossless else True)

  def body(carry):
    state, _ = carry
    rows = pick(shape, wanted_SxK, sampler_priority(state, final_SxK), shape.max_sampled_tokens)
    final_B = rows.live_B & rows.of(final_SxK)
    known_B = speculate.from_text(shape, slot_params, state, rows)
    known_B = jnp.where(final_B, speculate.UNKNOWN, known_B)
    unknown_B = rows.live_B & (known_B == speculate.UNKNOWN)

    def read(carry):
      state, _ = carry
      state, hidden_BxD = _coda(shape, params, gate, state, rows, final_B)
      return state, _head(shape, params, slot_params, state, rows, final_B, hidden_BxD)

    carry = state, (known_B, _no_logprobs(shape, rows))
    if shape.lookup:
      carry = run_if(jnp.any(unknown_B), read, carry)
    else:
      carry = read(carry)
    state, (token_B, logprobs_of) = carry
    token_B = jnp.where(unknown_B, token_B, known_B)
    state, token_S, loops_S = _commit(shape, slot_params, state, rows, final_B, token_B)
    by_slot = lambda t: Batch(rows.slot_B, rows.k_B * 0, final_B).put(
      jnp.zeros((shape.slots, 1, *t.shape[1:]), t.dtype), t
    )[:, 0]
    state = speculate.remember(shape, state)
    return state, SamplerOutput(token_S, loops_S, *jax.tree.map(by_slot, logprobs_of))

  state, output = run_if(go, body, (state, empty_output(shape)))
  f = state.in_flight
  waits_SxK = (f.stage_SxK == WAIT_SAMPLE) | (f.wants_draft_SxK & (f.stage_SxK != EMPTY))
  due = jnp.sum(f.stage_SxK == WAIT_SAMPLE, dtype=jnp.int32)
  counters = state.counters._replace(stalls=state.counters.stalls + due)
  keeps_SxK = jnp.where(f.stage_SxK == WAIT_PRELUDE, f.wait_SxK, 0)
  f = f._replace(wait_SxK=jnp.where(waits_SxK, f.wait_SxK + 1, keeps_SxK))
  return state._replace(in_flight=f, counters=counters), output


def _coda(shape: EngineShape, params, gate, state: State, rows: Batch, final_B):
  """What rows skipped is filled, then lens and coda; (state, hidden_BxD)."""
  c, f, R = shape.config, state.in_flight, shape.config.loops
  position_B = jnp.where(rows.live_B, rows.of(f.position_SxK), 0)
  x_Bx1xD = rows.of(f.x_SxKxD)[:, None]
  context = context_of(shape, position_B)
  kv_pools, counters = state.kv_pools, state.counters
  if shape.fills:
    # In one pass: each row once for every loop but the first.
    again = lambda t_B: jnp.tile(t_B, R - 1)
    fills = Batch(again(rows.slot_B), again(rows.k_B), again(final_B))
    loop_B = jnp.repeat(jnp.arange(1, R, dtype=jnp.int32), len(final_B))
    fills = fills._replace(live_B=fills.live_B & (fills.of(f.loop_SxK) <= loop_B))

    def fill(carry):
      # Of what is carried, nothing is computed before it is wanted.
      block_kvs, x_Bx1xD = carry
      kvs = fills.paged_kvs(block_kvs, shape.layout.block, loop_B[:, None])
      kvs = passes.fill_pass(c, params, x_Bx1xD, loop_B, context_of(shape, again(position_B)), kvs)
      return pools_of(kvs), x_Bx1xD

    any_fills = jnp.any(fills.live_B)
    carry = kv_pools.block, fills.of(f.x_SxKxD)[:, None]
    kv_pools = kv_pools._replace(block=run_if(any_fills, fill, carry)[0])
    counters = counters._replace(fill_passes=counters.fill_passes + any_fills)
  zero_Bx1 = jnp.zeros_like(rows.slot_B)[:, None]
  kvs = rows.paged_kvs(kv_pools.coda, shape.layout.coda, zero_Bx1)
  x_Bx1xD = score_lib.through_lens(gate, x_Bx1xD, rows.of(f.loop_SxK)[:, None])
  hidden_Bx1xD, kvs = passes.run_coda(c, params, x_Bx1xD, context, kvs)
  kv_pools = kv_pools._replace(coda=pools_of(kvs))
  state = state._replace(kv_pools=kv_pools, counters=counters)
  return state, hidden_Bx1xD[:, 0]


def _head(shape: EngineShape, params, slot_params, state: State, rows: Batch, final_B, hidden_BxD):
  """LM head and sampling; (token_B, the output of `_logprobs`).

  Where no row is final, all rows draft among the draft vocabulary.
  """
  read = lambda params: lm_head.logits_by_column(shape.config, params, hidden_BxD, shape.dtype)

  def full():
    logits_VxB = read(params)
    token_B = _token(shape, slot_params, state, rows, logits_VxB)
    return token_B, _logprobs(shape, slot_params, rows, logits_VxB, token_B)

  def draft():
    token_B = _token(shape, slot_params, state, rows, read(params['draft']))
    return token_B, _no_logprobs(shape, rows)

  if 'draft' not in params:
    return full()
  return jax.lax.cond(jnp.any(final_B), full, draft)


def _token(shape: EngineShape, slot_params, state: State, rows: Batch, logits_VxB):
  """Samples a token from each row by its own rules, among the first V'.

  The logits are the same whether or not another row wants more than the most
  likely token; so is, then, the token.
  """
  slot_B = rows.slot_B
  of_rows = lambda tree: jax.tree.map(lambda t: jnp.asarray(t)[slot_B], tree)
  sampling, penalties = of_rows(slot_params.sampling), of_rows(slot_params.penalties)
  ahead_B = rows.of(state.in_flight.position_SxK) - state.base_S[slot_B]
  count_B = state.count_S[slot_B] + ahead_B
  wants_B = sampling.temperature_B > 0
  if state.seen is not None:
    wants_B |= (penalties.presence_B != 0) | (penalties.frequency_B != 0)
    wants_B |= penalties.repetition_B != 1
  restricts_B = jnp.asarray(slot_params.restricts_S)[slot_B]
  if state.masks is not None:
    wants_B |= restricts_B

  def by_rules():
    # All tokens have their random numbers, whichever can be sampled.
    rest = ((0, shape.config.vocab_size - logits_VxB.shape[0]), (0, 0))
    logits_BxV = jnp.pad(logits_VxB, rest, constant_values=-jnp.inf).T
    if state.seen is not None:
      counts_BxV = _counts_before(state, rows)
      prompt_BxV = state.seen.prompt_SxV[slot_B]
      logits_BxV = penalize(logits_BxV, penalties, counts_BxV, prompt_BxV)
    if state.masks is not None:
      restricted_BxV = _restrict(slot_params, state, slot_B, logits_BxV, count_B)
      logits_BxV = jnp.where(restricts_B[:, None], restricted_BxV, logits_BxV)
    return sample(logits_BxV, sampling, count_B)

  return jax.lax.cond(
    jnp.any(rows.live_B & wants_B), by_rules, lambda: lm_head.likeliest(logits_VxB)
  )


def _restrict(slot_params, state: State, slot_B, logits_BxV, count_B):
  """Logits with the bias and the mask of their slots; -inf for what may not be sampled."""
  masks = state.masks
  assert masks is not None
  B, V = logits_BxV.shape
  bits_BxWx32 = masks.bits_SxW[slot_B][:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]
  bits_BxV = (bits_BxWx32 & 1).reshape(B, -1)[:, :V]
  constrained_B = jnp.asarray(slot_params.constrained_S)[slot_B]
  allowed_BxV = ~constrained_B[:, None] | (bits_BxV == 1)
  ends_BxE = jnp.asarray(slot_params.ends_SxE)[slot_B]
  early_B = count_B < jnp.asarray(slot_params.min_tokens_S)[slot_B]
  ends_BxE = jnp.where(early_B[:, None] & (ends_BxE >= 0), ends_BxE, V)
  allowed_BxV = allowed_BxV.at[jnp.arange(B)[:, None], ends_BxE].set(False, mode='drop')
  logits_BxV = logits_BxV.astype(jnp.float32) + masks.bias_SxV[slot_B]
  return jnp.where(allowed_BxV, logits_BxV, -jnp.inf)


def _counts_before(state: State, rows: Batch):
  """How often each token was sampled up to each row's own, drafts included."""
  f, slot_B = state.in_flight, rows.slot_B
  assert state.seen is not None
  counts_BxV = state.seen.counts_SxV[slot_B]
  position_BxK = f.position_SxK[slot_B]
  drafted_BxK = (f.stage_SxK[slot_B] != EMPTY) & (position_BxK > state.base_S[slot_B][:, None])
  drafted_BxK &= position_BxK <= rows.of(f.position_SxK)[:, None]
  rows_Bx1 = jnp.arange(slot_B.shape[0])[:, None]
  return counts_BxV.at[rows_Bx1, f.token_SxK[slot_B]].add(drafted_BxK.astype(jnp.int32))


def _logprobs(shape: EngineShape, slot_params, rows: Batch, logits_VxB, token_B):
  """Log-probabilities of the rows' tokens and of the likeliest ones.

  Returns:
    logprob_B, top_token_BxA, top_logprob_BxA; three Nones where the plan
    tells none, zeros where no request asks.
  """
  if shape.logprobs < 0:
    return None, None, None
  A = shape.logprobs

  def logprobs_of():
    log_p_BxV = jax.nn.log_softmax(logits_VxB.T, -1)
    top_logprob_BxA, top_BxA = jax.lax.top_k(log_p_BxV, max(A, 1))
    logprob_B = jnp.take_along_axis(log_p_BxV, token_B[:, None], 1)[:, 0]
    return logprob_B, top_BxA.astype(jnp.int32)[:, :A], top_logprob_BxA[:, :A]

  asked_B = jnp.asarray(slot_params.logprobs_S)[rows.slot_B]
  return jax.lax.cond(
    jnp.any(rows.live_B & asked_B), logprobs_of, lambda: _no_logprobs(shape, rows)
  )


def _no_logprobs(shape: EngineShape, rows: Batch):
  """What `_logprobs` returns where nobody asked."""
  if shape.logprobs < 0:
    return None, None, None
  zero_BxA = jnp.zeros((rows.slot_B.shape[0], shape.logprobs))
  return jnp.zeros(len(zero_BxA)), zero_BxA.astype(jnp.int32), zero_BxA


def _commit(shape: EngineShape, slot_params, state: State, rows: Batch, final_B, token_B):
  """Commits sampled tokens: ends sequences, verifies drafts, starts successors."""
  S, K = shape.slots, shape.tokens_per_slot
  f, base_S = state.in_flight, state.base_S
  slots_S = jnp.arange(S)
  final_S = Batch(rows.slot_B, rows.k_B, final_B).put(jnp.zeros((S, K), bool), True)
  sampled_SxK = rows.put(jnp.full((S, K), -1, jnp.int32), token_B)
  k_S, next_S = base_S % K, (base_S + 1) % K
  got_S = jnp.any(final_S, 1)
  token_S = jnp.where(got_S, sampled_SxK[slots_S, k_S], -1)
  loops_S = jnp.where(got_S, f.loop_SxK[slots_S, k_S], -1)
  count_S = state.count_S + got_S
  ended_S = jnp.any(token_S[:, None] == slot_params.ends_SxE, 1)
  ended_S = got_S & (ended_S | (count_S >= slot_params.max_new_tokens_S))

  younger_SxK = f.position_SxK > base_S[:, None]
  drafted_S, accepted_S = speculate.verify(f, base_S, got_S, token_S)
  # The token itself is done, or goes on to fill its missing loops.
  fills_S = jnp.zeros(S, bool)
  if shape.kv == 'exact_fill':
    fills_S = got_S & (f.loop_SxK[slots_S, k_S] < shape.config.loops)
  of_base_SxK = jnp.arange(K)[None, :] == k_S[:, None]
  stage_SxK = f.stage_SxK
  stage_SxK = jnp.where(
    got_S[:, None] & of_base_SxK, jnp.where(fills_S[:, None], IN_BLOCK, EMPTY), stage_SxK
  )
  rejected_S = got_S & ~accepted_S
  stage_SxK = jnp.where(rejected_S[:, None] & younger_SxK, EMPTY, stage_SxK)
  stage_SxK = jnp.where(ended_S[:, None], EMPTY, stage_SxK)
  f = f._replace(
    stage_SxK=stage_SxK,
    wants_draft_SxK=f.wants_draft_SxK & ~(got_S[:, None] & of_base_SxK),
    fills_SxK=jnp.where(got_S[:, None] & of_base_SxK, fills_S[:, None], f.fills_SxK),
  )
  new = Batch(slots_S, next_S, rejected_S & ~ended_S)
  f = speculate.start(f, new, token_S, base_S + 1)
  revised_S = jnp.zeros(S, bool)
  if shape.lossless:
    # What followed a rejected draft is dropped, and so are its own drafts.
    kept = rows._replace(live_B=rows.live_B & ~rejected_S[rows.slot_B])
    f, revised_S = speculate.take(shape, kept, final_B, token_B, f)
  n = state.counters
  add = lambda total, flags: total + jnp.sum(flags, dtype=jnp.int32)
  depth_SxR = loops_S[:, None] == 1 + jnp.arange(shape.config.loops)[None, :]
  seen = state.seen
  if seen is not None:
    add_S = got_S.astype(jnp.int32)
    seen = seen._replace(counts_SxV=seen.counts_SxV.at[slots_S, token_S].add(add_S))
  masks = state.masks
  if masks is not None:
    held_S = masks.held_S | (got_S & jnp.asarray(slot_params.constrained_S))
    masks = masks._replace(held_S=held_S)
  state = state._replace(
    seen=seen,
    masks=masks,
    live_S=state.live_S & ~ended_S,
    base_S=base_S + got_S,
    count_S=count_S,
    in_flight=f,
    counters=n._replace(
      sampled_tokens=add(n.sampled_tokens, rows.live_B),
      sampler_steps=n.sampler_steps + 1,
      draft_tokens=add(n.draft_tokens, drafted_S),
      num_accepted=add(n.num_accepted, accepted_S),
      num_revised=add(n.num_revised, revised_S),
      depths_R=n.depths_R + jnp.sum(depth_SxR, 0, dtype=jnp.int32),
    ),
  )
  return state, token_S, loops_S
