"""Lossless mode: drafts tokens after early loops, verifies them at full depth.

A token that has run `draft_loop` loops samples a draft of its successor, which
starts at once; every further loop drafts again, and the last one samples the
token itself. Where that differs from the draft in token, the draft and what
follows it are dropped and replaced: the output equals that of full depth token
for token, greedy and sampled.

A launch without a final token reads only the rows of the head for the first
`draft_vocab` tokens. Where the last `lookup` tokens stand in the sequence
before, the token that followed them is the draft instead (prompt lookup).

S slots, K in-flight tokens a slot, B rows of a batch, C context.
"""

import jax.numpy as jnp

from rrt.infer.engine.batch import Batch
from rrt.infer.engine.state import EMPTY, LAST, WAIT_PRELUDE, EngineShape, InFlightTokens, State
from rrt.models import lm_head

UNKNOWN = -1


def wanted(shape: EngineShape, slot_params, state: State, final_SxK):
  """Tokens whose successor is to be drafted now, bool [S, K]."""
  f = state.in_flight
  next_SxK = jnp.roll(f.stage_SxK, -1, 1)
  wants_draft_SxK = f.wants_draft_SxK & (f.stage_SxK != EMPTY) & ~final_SxK
  follows_SxK = jnp.roll(f.position_SxK, -1, 1) == f.position_SxK + 1
  redraft_SxK = wants_draft_SxK & (next_SxK != EMPTY) & follows_SxK
  freed_SxK = (next_SxK == EMPTY) | jnp.roll(final_SxK, -1, 1)
  draft_SxK = wants_draft_SxK & freed_SxK
  # Nothing is drafted past max_new_tokens.
  ahead_SxK = f.position_SxK - state.base_S[:, None]
  number_SxK = state.count_S[:, None] + ahead_SxK + 1
  draft_SxK &= number_SxK < slot_params.max_new_tokens_S[:, None]
  # Drafts use rows of the batch that would be empty.
  free = shape.max_batch_tokens - jnp.sum(f.stage_SxK != EMPTY)
  rank_SxK = jnp.cumsum(draft_SxK.reshape(-1)).reshape(draft_SxK.shape)
  draft_SxK &= rank_SxK <= free
  return draft_SxK | redraft_SxK


def with_draft_head(shape: EngineShape, params):
  """The parameters with the rows of the head that drafts are made of."""
  if not shape.lossless or shape.draft_vocab == shape.config.vocab_size:
    return params
  draft = lm_head.first_tokens(shape.config, params, shape.draft_vocab)
  return {**params, 'draft': draft}


def from_text(shape: EngineShape, slot_params, state: State, rows: Batch):
  """The token that followed the rows' last `lookup` tokens before, int [B].

  Where they stand several times, the last one counts. UNKNOWN where they do
  not, where the row's request samples at random, and without lookup.
  """
  unknown_B = jnp.full(rows.slot_B.shape, UNKNOWN, jnp.int32)
  if state.text_SxC is None:
    return unknown_B
  text_BxC = state.text_SxC[rows.slot_B]
  position_B = rows.of(state.in_flight.position_SxK)
  at_1xC = jnp.arange(text_BxC.shape[1])[None, :]
  same_BxC = (at_1xC < position_B[:, None]) & (at_1xC >= shape.lookup - 1)
  for back in range(shape.lookup):
    at_Bx1 = jnp.maximum(position_B - back, 0)[:, None]
    token_Bx1 = jnp.take_along_axis(text_BxC, at_Bx1, 1)
    same_BxC &= jnp.roll(text_BxC, back, 1) == token_Bx1
  last_B = jnp.max(jnp.where(same_BxC, at_1xC, -1), 1)
  next_B = jnp.take_along_axis(text_BxC, last_B[:, None] + 1, 1)[:, 0]
  temperature_B = jnp.asarray(slot_params.sampling.temperature_B)[rows.slot_B]
  known_B = (last_B >= 0) & (temperature_B == 0)
  return jnp.where(known_B, next_B, unknown_B)


def remember(shape: EngineShape, state: State) -> State:
  """Writes the in-flight tokens into the text that prompt lookup searches."""
  if state.text_SxC is None:
    return state
  f = state.in_flight
  slot_Sx1 = jnp.arange(shape.slots)[:, None]
  at_SxK = jnp.where(f.stage_SxK == EMPTY, shape.context, f.position_SxK)
  text_SxC = state.text_SxC.at[slot_Sx1, at_SxK].set(f.token_SxK, mode='drop')
  return state._replace(text_SxC=text_SxC)


def verify(f: InFlightTokens, base_S, got_S, token_S):
  """Compares drafts with the tokens that full depth sampled.

  Args:
    f: the in-flight tokens.
    base_S: position of the token whose successor was sampled.
    got_S: bool, whether the slot's successor was sampled.
    token_S: the sampled successor.

  Returns:
    (drafted_S, accepted_S): whether a draft of it is in flight, and is the same.
  """
  S, K = f.stage_SxK.shape
  at = jnp.arange(S), (base_S + 1) % K
  drafted_S = got_S & (f.stage_SxK[at] != EMPTY) & (f.position_SxK[at] > base_S)
  return drafted_S, drafted_S & (f.token_SxK[at] == token_S)


def take(shape: EngineShape, rows: Batch, final_B, token_B, f: InFlightTokens):
  """Starts drafts of tokens that are still in flight; (tokens, revised_S).

  A draft that differs from the one in flight, which a loop before made, drops
  it and what is younger.
  """
  after_B, position_B = (rows.k_B + 1) % shape.tokens_per_slot, rows.of(f.position_SxK)
  behind_B = rows.slot_B, after_B
  asked_B = rows.live_B & ~final_B & (rows.of(f.stage_SxK) != EMPTY)
  f = f._replace(wants_draft_SxK=rows._replace(live_B=asked_B).put(f.wants_draft_SxK, False))
  flies_B = asked_B & (f.stage_SxK[behind_B] != EMPTY)
  flies_B &= f.position_SxK[behind_B] == position_B + 1
  revises_B = flies_B & (f.token_SxK[behind_B] != token_B)
  # A launch without a final token samples among `draft_vocab` tokens only.
  could_B = f.token_SxK[behind_B] < shape.draft_vocab
  revises_B &= could_B | jnp.any(final_B)
  # The oldest revision of a slot counts; younger tokens are dropped.
  cut_S = jnp.full(shape.slots, LAST).at[rows.slot_B].min(jnp.where(revises_B, position_B, LAST))
  gone_SxK = f.position_SxK > cut_S[:, None]
  f = f._replace(stage_SxK=jnp.where(gone_SxK, EMPTY, f.stage_SxK))
  starts_B = asked_B & (position_B <= cut_S[rows.slot_B])
  starts_B &= f.stage_SxK[behind_B] == EMPTY
  return (start(f, Batch(*behind_B, starts_B), token_B, position_B + 1), cut_S < LAST)


def start(f: InFlightTokens, rows: Batch, token_B, position_B) -> InFlightTokens:
  """New tokens, which wait for the prelude."""
  return f._replace(
    stage_SxK=rows.put(f.stage_SxK, jnp.full_like(token_B, WAIT_PRELUDE)),
    token_SxK=rows.put(f.token_SxK, token_B),
    position_SxK=rows.put(f.position_SxK, position_B),
    loop_SxK=rows.put(f.loop_SxK, jnp.zeros_like(token_B)),
    wait_SxK=rows.put(f.wait_SxK, jnp.zeros_like(token_B)),
    wants_draft_SxK=rows.put(f.wants_draft_SxK, jnp.zeros_like(rows.live_B)),
    fills_SxK=rows.put(f.fills_SxK, jnp.zeros_like(rows.live_B)),
  )
