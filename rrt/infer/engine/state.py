"""The engine's state on the device: slots, in-flight tokens, KV cache.

A sequence has a *slot*. It has one in-flight token, or up to R where younger
tokens run beside older ones (lossless mode, exact fill): number k of a slot is
the token whose position is k modulo K.

S slots, K in-flight tokens a slot, R loops, D model, B rows of a batch, I steps
of a call.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.infer.constraints import words
from rrt.infer.sampling import Array, PenaltyArrays, SamplingArrays
from rrt.models import pages

# Stages of an in-flight token.
EMPTY, WAIT_PRELUDE, IN_BLOCK, WAIT_SAMPLE = range(4)
LAST = jnp.int32(2**30)  # Sorts behind every token.


@dataclasses.dataclass(frozen=True)
class EngineShape:
  """What a step is compiled for.

  Attributes:
    config: the model's shape, of cycle order.
    layout: where the cache keeps each layer and loop.
    page: positions of a page.
    slots: S.
    context: C, tokens of a sequence.
    max_batch_tokens: N, tokens that one block step runs, at most S * K.
    max_sampled_tokens: M, tokens of one launch of the sampler.
    min_sampled_tokens: the sampler waits for this many tokens, or for all there are.
    tokens_per_slot: K; 1, or R for 'exact_fill' and lossless.
    steps: of one call.
    least_rows: of a launch; unused rows are padding.
    kv: what the loops that a token skipped keep of it; see `EngineConfig`.
    gate: kind of exit gate.
    lossless: whether requests may draft after `draft_loop` loops and verify
      after all.
    draft_loop: loops before the first draft.
    draft_vocab: tokens among which a draft is made.
    lookup: tokens that prompt lookup matches in the text before, to draft what
      follows them; 0 for none.
    dtype: of the computation.
    kv_dtype: of the cache.
    penalties: whether requests may ask for penalties.
    masks: whether requests may bias and restrict their tokens.
    logprobs: how many alternatives requests may ask log-probabilities of; -1
      for none at all.
  """

  config: ModelConfig
  layout: pages.CacheLayout
  page: int
  slots: int
  context: int
  max_batch_tokens: int
  max_sampled_tokens: int
  min_sampled_tokens: int
  tokens_per_slot: int
  steps: int
  least_rows: int = 1
  kv: str = 'full'
  gate: str = 'none'
  lossless: bool = False
  draft_loop: int = 1
  draft_vocab: int = 4096
  lookup: int = 0
  dtype: str = 'float32'
  kv_dtype: str = 'float32'
  penalties: bool = False
  masks: bool = False
  logprobs: int = -1

  @property
  def fills(self) -> bool:
    """Whether the sampler first fills the loops that its tokens skipped."""
    return self.kv == 'propagate' and self.gate != 'none'


class SlotParams(NamedTuple):
  """Parameters of the sequence in each slot.

  Attributes:
    max_new_tokens_S: tokens that it may sample.
    ends_SxE: the tokens that end it; -1 for none.
    threshold_S: of its exit gate.
    sampling, penalties: as in `SamplingParams`.
    logprobs_S: whether log-probabilities are returned.
    lossless_S: whether it speculates and takes no exits.
    restricts_S: whether its `masks` apply.
    constrained_S: whether it waits for a new mask after each token.
    min_tokens_S: no token of `ends_SxE` before so many.
  """

  max_new_tokens_S: Array
  ends_SxE: Array
  threshold_S: Array
  sampling: SamplingArrays
  penalties: PenaltyArrays
  logprobs_S: Array
  lossless_S: Array
  restricts_S: Array
  constrained_S: Array
  min_tokens_S: Array


class Masks(NamedTuple):
  """What sequences may sample next.

  Attributes:
    bias_SxV: added to the logits; -inf for what may never be sampled.
    bits_SxW: uint32, a bit a token: whether it may be sampled next.
    held_S: bool, whether the slot waits for its next mask.
  """

  bias_SxV: jax.Array
  bits_SxW: jax.Array
  held_S: jax.Array


class SeenTokens(NamedTuple):
  """Which tokens each sequence has.

  Attributes:
    counts_SxV: how often each was sampled.
    prompt_SxV: bool, whether it is in the prompt.
  """

  counts_SxV: jax.Array
  prompt_SxV: jax.Array


class InFlightTokens(NamedTuple):
  """Tokens in flight.

  Attributes:
    stage_SxK: EMPTY, WAIT_PRELUDE, IN_BLOCK or WAIT_SAMPLE.
    token_SxK: its id.
    position_SxK: where it stands in its sequence.
    loop_SxK: how many loops it has run.
    wait_SxK: steps it has waited for the sampler or the prelude.
    wants_draft_SxK: whether its successor is to be drafted.
    fills_SxK: whether its successor is sampled and only its missing keys and
      values are computed.
    stay_SxK: probability of not having left, by a gate that adds it up.
    x_SxKxD: the residual stream.
  """

  stage_SxK: jax.Array
  token_SxK: jax.Array
  position_SxK: jax.Array
  loop_SxK: jax.Array
  wait_SxK: jax.Array
  wants_draft_SxK: jax.Array
  fills_SxK: jax.Array
  stay_SxK: jax.Array
  x_SxKxD: jax.Array


class Counters(NamedTuple):
  """What happened since the engine began.

  Attributes:
    steps: block steps.
    batch_tokens: tokens that block steps ran (lanes in use).
    stalls: steps that tokens waited for the sampler or the prelude: for a row
      of the batch, for `min_sampled_tokens`, or, drafts, for the oldest token.
      Waiting for a block step is not counted.
    sampled_tokens: rows of the sampler, drafts included.
    sampler_steps: steps in which the sampler ran.
    fill_passes: steps that filled the loops which their tokens skipped
      (`propagate`).
    draft_tokens: draft tokens that were verified.
    num_accepted: of those, the ones that full depth sampled too.
    num_revised: draft tokens that a deeper loop replaced before.
    depths_R: tokens by the loop after which they were sampled.
  """

  steps: jax.Array
  batch_tokens: jax.Array
  stalls: jax.Array
  sampled_tokens: jax.Array
  sampler_steps: jax.Array
  fill_passes: jax.Array
  draft_tokens: jax.Array
  num_accepted: jax.Array
  num_revised: jax.Array
  depths_R: jax.Array


class State(NamedTuple):
  """All that a step reads and writes.

  Attributes:
    live_S: whether the slot has a sequence that goes on.
    base_S: position of the oldest token whose successor is not sampled yet.
    count_S: how many tokens are sampled.
    in_flight: in-flight tokens.
    kv_pools: the cache.
    counters: statistics.
    seen: tokens by slot; None without penalties.
    masks: of the next tokens; None without masks.
    text_SxC: tokens by position, those in flight included; None without
      lookup.
  """

  live_S: jax.Array
  base_S: jax.Array
  count_S: jax.Array
  in_flight: InFlightTokens
  kv_pools: pages.KVPools
  counters: Counters
  seen: SeenTokens | None
  masks: Masks | None
  text_SxC: jax.Array | None

  @property
  def ready_S(self) -> jax.Array:
    """Live slots that wait for nothing from the host."""
    return self.live_S if self.masks is None else self.live_S & ~self.masks.held_S


class SamplerOutput(NamedTuple):
  """What a step drew, by slot; of a call with a leading axis of steps.

  Attributes:
    token_S: -1 where nothing was sampled.
    loops_S: after how many loops; -1 where nothing was sampled.
    logprob_S: log-probability of the token, before penalties and sampling;
      None where the plan tells none, 0 where the request asked for none.
    top_token_SxA, top_logprob_SxA: the most likely tokens, likewise.
  """

  token_S: jax.Array
  loops_S: jax.Array
  logprob_S: jax.Array | None
  top_token_SxA: jax.Array | None
  top_logprob_SxA: jax.Array | None


def empty_output(shape: EngineShape) -> SamplerOutput:
  """The output of a step in which the sampler did not run."""
  none_S = jnp.full(shape.slots, -1, jnp.int32)
  if shape.logprobs < 0:
    return SamplerOutput(none_S, none_S, None, None, None)
  zero_SxA = jnp.zeros((shape.slots, shape.logprobs))
  tokens_SxA = zero_SxA.astype(jnp.int32)
  return SamplerOutput(none_S, none_S, jnp.zeros(shape.slots), tokens_SxA, zero_SxA)


def init_state(shape: EngineShape) -> State:
  """All slots free."""
  S, K, R = shape.slots, shape.tokens_per_slot, shape.config.loops
  zero = jnp.zeros((), jnp.int32)
  table = jnp.zeros((S, K), jnp.int32)
  off = jnp.zeros((S, K), bool)
  x = jnp.zeros((S, K, shape.config.d_model), shape.dtype)
  seen = None
  if shape.penalties:
    none_SxV = jnp.zeros((S, shape.config.vocab_size), jnp.int32)
    seen = SeenTokens(none_SxV, none_SxV.astype(bool))
  masks = None
  if shape.masks:
    vocab = shape.config.vocab_size
    bits_SxW = jnp.zeros((S, words(vocab)), jnp.uint32)
    masks = Masks(jnp.zeros((S, vocab)), bits_SxW, jnp.zeros(S, bool))
  text_SxC = None
  if shape.lookup:
    text_SxC = jnp.zeros((S, shape.context), jnp.int32)
  return State(
    jnp.zeros(S, bool),
    jnp.zeros(S, jnp.int32),
    jnp.zeros(S, jnp.int32),
    InFlightTokens(table, table, table, table, table, off, off, jnp.ones((S, K)), x),
    pages.init_pools(shape.config, shape.layout, shape.page, shape.kv_dtype),
    Counters(zero, zero, zero, zero, zero, zero, zero, zero, zero, jnp.zeros(R, jnp.int32)),
    seen,
    masks,
    text_SxC,
  )


def insert_sequence(
  shape: EngineShape, state: State, slot, token, position, cache, prompt_L
) -> State:
  """Puts a sequence into a slot.

  Args:
    shape: the engine's.
    state: its state; the slot is overwritten.
    slot: int scalar.
    token: the prompt's last token.
    position: its position; the cache holds the tokens before it.
    cache: of one row, from prefilling the prompt without its last token;
      None where the prompt has one token.
    prompt_L: the prompt's tokens, padded with V; None without penalties and
      lookup.
  """
  f = state.in_flight
  k = position % shape.tokens_per_slot
  f = f._replace(
    stage_SxK=f.stage_SxK.at[slot].set(EMPTY).at[slot, k].set(WAIT_PRELUDE),
    token_SxK=f.token_SxK.at[slot, k].set(token),
    position_SxK=f.position_SxK.at[slot, k].set(position),
    loop_SxK=f.loop_SxK.at[slot, k].set(0),
    wait_SxK=f.wait_SxK.at[slot, k].set(0),
    wants_draft_SxK=f.wants_draft_SxK.at[slot].set(False),
    fills_SxK=f.fills_SxK.at[slot].set(False),
  )
  kv_pools = state.kv_pools
  if cache is not None:
    put = lambda kv_pool, page_range, loop, kv: pages.insert(
      kv_pool, page_range, loop, slot, kv, position
    )
    block = list(kv_pools.block)
    for r, kvs in enumerate(cache.block):
      for n, kv in enumerate(kvs):
        block[n] = put(block[n], shape.layout.block[n], r, kv)
    ends = [
      tuple(put(s, g, 0, kv) for s, g, kv in zip(*part, strict=True))
      for part in (
        (kv_pools.prelude, shape.layout.prelude, cache.prelude),
        (kv_pools.coda, shape.layout.coda, cache.coda),
      )
    ]
    kv_pools = pages.KVPools(ends[0], tuple(block), ends[1])
  seen = state.seen
  if seen is not None:
    seen = SeenTokens(
      seen.counts_SxV.at[slot].set(0),
      seen.prompt_SxV.at[slot].set(False).at[slot, prompt_L].set(True, mode='drop'),
    )
  masks = state.masks
  if masks is not None:
    masks = masks._replace(held_S=masks.held_S.at[slot].set(False))
  text_SxC = state.text_SxC
  if text_SxC is not None:
    text_SxC = text_SxC.at[slot, : prompt_L.shape[0]].set(prompt_L)
  return state._replace(
    live_S=state.live_S.at[slot].set(True),
    base_S=state.base_S.at[slot].set(position),
    count_S=state.count_S.at[slot].set(0),
    in_flight=f,
    kv_pools=kv_pools,
    seen=seen,
    masks=masks,
    text_SxC=text_SxC,
  )


def set_bias(state: State, slot, bias_V) -> State:
  """Sets what a slot's sequence adds to its logits."""
  assert state.masks is not None
  bias_SxV = state.masks.bias_SxV.at[slot].set(bias_V)
  return state._replace(masks=state.masks._replace(bias_SxV=bias_SxV))


def set_bits(state: State, new_S, bits_SxW) -> State:
  """Sets the tokens that some slots may sample next, and lets these go on."""
  assert state.masks is not None
  masks = state.masks
  bits_SxW = jnp.where(new_S[:, None], bits_SxW, masks.bits_SxW)
  return state._replace(masks=masks._replace(bits_SxW=bits_SxW, held_S=masks.held_S & ~new_S))


def remove_sequences(state: State, gone_S) -> State:
  """Ends the sequences of some slots."""
  f = state.in_flight
  stage_SxK = jnp.where(gone_S[:, None], EMPTY, f.stage_SxK)
  return state._replace(live_S=state.live_S & ~gone_S, in_flight=f._replace(stage_SxK=stage_SxK))
