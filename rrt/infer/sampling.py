"""`SamplingParams`, and sampling the next token of each row by its own parameters.

Top-k, top-p and min-p keep the tokens above a threshold of the row. Thresholds are
found by bisection over the 32 bits of the logits, without a sort: a sort of a
vocabulary of 50 thousand costs more than a small model's decode step.

B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer

Array = jax.Array | np.ndarray
_LARGE = 1e30  # Far from where float32 ends.
MOST_STOP_IDS = 16  # of a request


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """Sampling parameters of a request, with vLLM's names.

  Attributes:
    max_new_tokens: maximum number of new tokens.
    temperature: 0 is greedy; above, logits are divided by it and sampled.
    top_k: sample from the k most likely tokens only; 0 is all.
    top_p: of those, from the fewest that hold this much probability.
    min_p: of those, from the ones at least this times as likely as the most
      likely one.
    seed: of the first prompt, the others count up; or one for each.
    stop: strings that end a completion at their first occurrence.
    ignore_eos: continue after end tokens.
    presence_penalty, frequency_penalty, repetition_penalty: see
      `PenaltyArrays`; of the engine alone.
    logprobs: alternatives to return log-probabilities of; None for none at
      all. Of the engine alone, as all that follow.
    min_tokens: no end token and no stop string before so many tokens.
    stop_token_ids: further tokens that end a completion.
    include_stop: whether the text keeps the stop string that ended it.
    logit_bias: added to the logits of tokens, by id.
    allowed_token_ids: no other tokens are sampled; None for all.
    bad_words: texts that are not written.
    structured_outputs: what the text must be: see `constraints.grammar_of`.

  Example:
    >>> SamplingParams(max_new_tokens=40, temperature=0.8, top_p=0.95, stop=('END',))
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int | Sequence[int] = 0
  stop: tuple[str, ...] = ()
  ignore_eos: bool = False
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  repetition_penalty: float = 1.0
  logprobs: int | None = None
  min_tokens: int = 0
  stop_token_ids: tuple[int, ...] = ()
  include_stop: bool = False
  logit_bias: Mapping[int, float] | None = None
  allowed_token_ids: Sequence[int] | None = None
  bad_words: tuple[str, ...] = ()
  structured_outputs: Mapping[str, Any] | None = None

  def replace(self, **changes) -> SamplingParams:
    """A copy with some fields changed; a single stop string needs no tuple."""
    stop = changes.get('stop', self.stop)
    changes['stop'] = (stop,) if isinstance(stop, str) else tuple(stop)
    return dataclasses.replace(self, **changes)

  @property
  def penalizes(self) -> bool:
    """Whether any penalty is set."""
    penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
    return penalties != (0, 0, 1)

  @property
  def constrained(self) -> bool:
    """Whether a constraint on the host restricts its tokens."""
    return bool(self.structured_outputs or self.bad_words)

  @property
  def restricts(self) -> bool:
    """Whether the tokens that may be sampled are restricted or biased."""
    some = self.logit_bias or self.allowed_token_ids is not None or self.min_tokens
    return bool(some or self.constrained)

  def check(self) -> None:
    """Raises InputError for the first invalid field."""

    def need(ok: bool, field: str, why: str) -> None:
      if not ok:
        raise InputError(f'{field}={getattr(self, field)!r}: must be {why}.')

    def number(field, low, high) -> bool:
      value = getattr(self, field)
      return isinstance(value, Real) and low <= value <= high < math.inf

    def whole(field, low) -> bool:
      value = getattr(self, field)
      return isinstance(value, Integral) and low <= int(value) < 2**31

    need(whole('max_new_tokens', 1), 'max_new_tokens', '1 or more')
    hot = number('temperature', 0, _LARGE)
    need(hot, 'temperature', 'a finite number, 0 (greedy) or above')
    need(whole('top_k', 0), 'top_k', '0 (all tokens) or more')
    some = number('top_p', 0, 1) and self.top_p > 0
    need(some, 'top_p', 'above 0 and at most 1 (all tokens)')
    need(number('min_p', 0, 1), 'min_p', 'from 0 (all tokens) to 1')
    need(all(self.stop), 'stop', 'texts of at least one character')
    seeds = list(np.atleast_1d(np.asarray(self.seed, object)))
    whole_seeds = all(isinstance(s, Integral) and 0 <= int(s) < 2**32 for s in seeds)
    need(whole_seeds, 'seed', 'whole, from 0 to 2**32 - 1')
    for field in ('presence_penalty', 'frequency_penalty'):
      need(number(field, -_LARGE, _LARGE), field, 'a finite number')
    finite = number('repetition_penalty', 0, _LARGE) and self.repetition_penalty > 0
    need(finite, 'repetition_penalty', 'a finite number above 0; 1 is none')
    need(self.logprobs is None or whole('logprobs', 0), 'logprobs', 'whole, 0 or more, or none')
    few = whole('min_tokens', 0) and self.min_tokens <= self.max_new_tokens
    need(few, 'min_tokens', 'whole, from 0 to max_new_tokens')
    ids = lambda some: all(isinstance(i, Integral) and not isinstance(i, bool) for i in some)
    stops = ids(self.stop_token_ids) and len(self.stop_token_ids) <= MOST_STOP_IDS
    need(stops, 'stop_token_ids', f'up to {MOST_STOP_IDS} token ids')
    bias = self.logit_bias or {}
    good = ids(bias) and all(isinstance(v, Real) and abs(v) <= _LARGE for v in bias.values())
    need(good, 'logit_bias', 'finite numbers by token id')
    only = self.allowed_token_ids
    need(only is None or (bool(only) and ids(only)), 'allowed_token_ids', 'at least one token id')
    need(all(w.strip() for w in self.bad_words), 'bad_words', 'texts of at least one character')

  def check_for(self, prompts: int, tokenizer: Tokenizer | None) -> None:
    """Raises InputError for fields that do not fit the prompts or the model."""
    if not isinstance(self.seed, int | np.integer) and len(self.seed) != prompts:
      raise InputError(
        f'seed has {len(self.seed)} values for {prompts} prompts; give one for each, or one in all.'
      )
    if self.stop and tokenizer is None:
      raise InputError('stop needs a model with a tokenizer.')

  def arrays(self, rows: range) -> SamplingArrays | None:
    """The settings of some of the prompts; None is greedy."""
    if not self.temperature:
      return None
    n = len(rows)
    return SamplingArrays(
      np.full(n, self.temperature, np.float32),
      np.full(n, self.top_k, np.int32),
      np.full(n, self.top_p, np.float32),
      np.full(n, self.min_p, np.float32),
      np.array(self.seeds(rows), np.uint32),
    )

  def seeds(self, rows: range) -> list[int]:
    """The seed of some of the prompts."""
    if isinstance(self.seed, int | np.integer):
      return [(int(self.seed) + i) % 2**32 for i in rows]
    return [self.seed[i] for i in rows]


class SamplingArrays(NamedTuple):
  """Sampling parameters of each row, on the device.

  Attributes:
    temperature_B: float; 0 takes the most likely token and ignores the rest.
    top_k_B: int; keep the k most likely tokens; 0 keeps all.
    top_p_B: float; of those, keep the fewest that hold this much probability.
    min_p_B: float; of those, keep the ones at least this times as likely as
      the most likely one.
    seed_B: uint32; a row's tokens depend on its seed and on how many tokens
      it has, not on the batch.
  """

  temperature_B: Array
  top_k_B: Array
  top_p_B: Array
  min_p_B: Array
  seed_B: Array


def greedy(logits_BxV):
  """The most likely token of each row, int [B]."""
  return jnp.argmax(logits_BxV, -1).astype(jnp.int32)


def sample(logits_BxV, sampling: SamplingArrays, step_B):
  """Samples one token a row, int [B].

  Args:
    logits_BxV: float.
    sampling: the rows' settings.
    step_B: int; number of tokens that each row has sampled.
  """
  # What XLA flushes to 0 is 0.
  hot_B = sampling.temperature_B >= jnp.finfo(jnp.float32).tiny
  heat_B = jnp.where(hot_B, sampling.temperature_B, 1.0)
  # From the largest down, so that no small temperature overflows.
  logits_BxV = logits_BxV.astype(jnp.float32)
  top_Bx1 = jnp.max(logits_BxV, -1, keepdims=True)
  scaled_BxV = (logits_BxV - top_Bx1) / heat_B[:, None]
  kept_BxV = keep_top_k(scaled_BxV, sampling.top_k_B)
  kept_BxV = keep_top_p(kept_BxV, sampling.top_p_B)
  kept_BxV = keep_min_p(kept_BxV, sampling.min_p_B)
  sampled_B = jax.vmap(_sample_categorical)(kept_BxV, sampling.seed_B, step_B)
  return jnp.where(hot_B, sampled_B, greedy(logits_BxV))


def _sample_categorical(logits_V, seed, step):
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.random.categorical(key, logits_V).astype(jnp.int32)


class PenaltyArrays(NamedTuple):
  """Penalties of repeated tokens, by row; 0, 0 and 1 have no effect.

  Attributes:
    presence_B: subtracted from the logit of each token sampled so far.
    frequency_B: subtracted once for each time that it was sampled.
    repetition_B: logits above 0 of tokens of prompt and completion are divided by
      it, those below multiplied (Keskar et al., arXiv 1909.05858).
  """

  presence_B: Array
  frequency_B: Array
  repetition_B: Array


def penalize(logits_BxV, penalties: PenaltyArrays, counts_BxV, prompt_BxV):
  """Applies penalties to logits, float32.

  Args:
    logits_BxV: float.
    penalties: of the rows.
    counts_BxV: how often each token was sampled.
    prompt_BxV: bool, whether it is in the prompt.
  """
  logits_BxV = logits_BxV.astype(jnp.float32)
  again_BxV = prompt_BxV | (counts_BxV > 0)
  factor_Bx1 = penalties.repetition_B[:, None]
  harder_BxV = jnp.where(logits_BxV > 0, logits_BxV / factor_Bx1, logits_BxV * factor_Bx1)
  logits_BxV = jnp.where(again_BxV, harder_BxV, logits_BxV)
  cost_BxV = penalties.frequency_B[:, None] * counts_BxV
  cost_BxV += penalties.presence_B[:, None] * (counts_BxV > 0)
  return logits_BxV - cost_BxV


def keep_top_k(logits_BxV, k_B):
  """-inf below the k-th largest logit; ties with it stay; k = 0 keeps all."""
  order_BxV = _order(logits_BxV)
  one_BxV = jnp.ones_like(logits_BxV)
  bar_B = _threshold(order_BxV, one_BxV, k_B.astype(jnp.float32))
  bar_B = jnp.where(k_B > 0, bar_B, 0)
  return jnp.where(order_BxV >= bar_B[:, None], logits_BxV, -jnp.inf)


def keep_top_p(logits_BxV, p_B):
  """-inf outside the fewest top tokens with probability p; p = 1 keeps all.

  Tokens as likely as the last one that is kept stay too.
  """
  order_BxV = _order(logits_BxV)
  bar_B = _threshold(order_BxV, jax.nn.softmax(logits_BxV, -1), p_B)
  bar_B = jnp.where(p_B < 1, bar_B, 0)
  return jnp.where(order_BxV >= bar_B[:, None], logits_BxV, -jnp.inf)


def keep_min_p(logits_BxV, p_B):
  """-inf where the probability is under p times the largest; 0 keeps all."""
  top_Bx1 = jnp.max(logits_BxV, -1, keepdims=True)
  bar_Bx1 = top_Bx1 + jnp.log(p_B)[:, None]
  return jnp.where(logits_BxV >= bar_Bx1, logits_BxV, -jnp.inf)


def _order(x):
  """uint32 that compare as the float32 x do."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order_BxV, weight_BxV, need_B):
  """The largest t with a weight of at least `need` at order >= t, [B].

  0, which keeps everything, where all of the weight is not enough.
  """

  def set_bit(i, t_B):
    trial_B = t_B | (jnp.uint32(1) << jnp.uint32(31 - i))
    above_BxV = order_BxV >= trial_B[:, None]
    weight_B = jnp.sum(jnp.where(above_BxV, weight_BxV, 0), -1)
    return jnp.where(weight_B >= need_B, trial_B, t_B)

  start_B = jnp.zeros(need_B.shape, jnp.uint32)
  return jax.lax.fori_loop(0, 32, set_bit, start_B)
