"""Requests, and the per-slot parameters that the device reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
import dataclasses
import functools
import math
from numbers import Integral, Real

import numpy as np

from rrt.errors import InputError
from rrt.infer.constraints import Constraint
from rrt.infer.detokenize import Detokenizer
from rrt.infer.engine.state import EngineShape, SamplerOutput, SlotParams
from rrt.infer.sampling import MOST_STOP_IDS, PenaltyArrays, SamplingArrays, SamplingParams


@dataclasses.dataclass(eq=False)
class Request:
  """A sequence on its way through the engine.

  Attributes:
    prompt: token ids.
    params: how to sample, one seed; stop strings are the detokenizer's.
    threshold: of the exit gate; None for the engine's.
    lossless: whether to speculate, at full depth, rather than to leave early;
      None is the engine's way, and no where a threshold is given.
    detokenizer: writes the tokens as text and finds stop strings, if any.
    tokens: the output so far.
    loops: after how many loops each token was sampled.
    logprobs: of each token, if asked: its log-probability and the likeliest
      tokens with theirs, before penalties and sampling.
    finish: '' while it runs; 'end', 'stop', 'length' or 'cancelled'.
    constraint: of `params`, made by `Engine.check`.
    scores_prompt: whether `prompt_scores` is wanted, with `params.logprobs` alternatives.
    prompt_scores: of the prompt's tokens but the first, as `logprobs`.

  Example:
    >>> engine.run([rrt.Request.of([1, 2, 3], 20, temperature=0.8, seed=1)])[0].tokens
  """

  prompt: Sequence[int]
  params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
  threshold: float | None = None
  lossless: bool | None = None
  detokenizer: Detokenizer | None = None
  tokens: list[int] = dataclasses.field(default_factory=list)
  loops: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[tuple[float, list[tuple[int, float]]]] = dataclasses.field(default_factory=list)
  finish: str = ''
  constraint: Constraint | None = None
  scores_prompt: bool = False
  prompt_scores: list[tuple[float, list[tuple[int, float]]]] | None = None

  @classmethod
  def of(
    cls,
    prompt: Sequence[int],
    *args,
    threshold: float | None = None,
    lossless: bool | None = None,
    **params,
  ) -> Request:
    """A request from the arguments of `SamplingParams`, first `max_new_tokens`."""
    return cls(prompt, SamplingParams(*args, **params), threshold, lossless)

  def check(self, shape: EngineShape) -> None:
    """Raises InputError for what this engine cannot do."""
    p = self.params
    if not isinstance(p.seed, Integral):
      raise InputError(f'seed={p.seed!r}: must be whole; a request has one.')
    p.check()
    if self.threshold is not None and not (
      isinstance(self.threshold, Real) and not math.isnan(self.threshold)
    ):
      raise InputError(f'threshold={self.threshold!r}: must be a number.')
    if p.penalizes and not shape.penalties:
      raise InputError('Penalties need an engine with penalties=True.')
    if self.threshold is not None and shape.gate == 'none':
      raise InputError('threshold: needs an engine with a gate.')
    if self.lossless and not shape.lossless:
      raise InputError('lossless: needs an engine with lossless=True.')
    if p.restricts and not shape.masks:
      raise InputError('Restrictions of tokens need an engine with masks=True.')
    vocab = shape.config.vocab_size
    for name in ('stop_token_ids', 'logit_bias', 'allowed_token_ids'):
      for token in getattr(p, name) or ():
        if not 0 <= token < vocab:
          raise InputError(f'{name}: the token {token} lies outside of 0..{vocab - 1}.')
    if self.lossless and p.constrained:
      raise InputError('lossless: not with structured outputs or bad words.')
    if p.logprobs is not None and p.logprobs > shape.logprobs:
      raise InputError(
        f'logprobs={p.logprobs}: this engine returns up to {shape.logprobs} (-1: none).'
      )


def empty_table(slots: int, ends: int) -> SlotParams:
  """The table of an engine without requests; `ends`: end tokens of the model."""
  f = functools.partial(np.zeros, slots)
  sampling = SamplingArrays(f(np.float32), f(np.int32), f(np.float32), f(np.float32), f(np.uint32))
  penalties = PenaltyArrays(f(np.float32), f(np.float32), np.ones(slots, np.float32))
  ends_SxE = np.full((slots, ends + MOST_STOP_IDS), -1, np.int32)
  rest = f(bool), f(bool), f(bool), f(bool), f(np.int32)
  return SlotParams(f(np.int32), ends_SxE, f(np.float32), sampling, penalties, *rest)


def with_request(
  table: SlotParams,
  slot: int,
  request: Request,
  threshold: float,
  lossless: bool,
  ends: Collection[int],
) -> SlotParams:
  """A new table, as the old one may still be on its way to the device.

  Args:
    table: the old one.
    slot: whose row is written.
    request: what goes there.
    threshold, lossless: of the engine.
    ends: tokens that end the request.
  """
  if request.threshold is not None:
    threshold, lossless = request.threshold, False
  if request.lossless is not None:
    lossless = request.lossless
  # A draft could not know the masks of later tokens.
  lossless = lossless and not request.params.constrained

  def put(array_S, value):
    array_S = np.array(array_S)
    array_S[slot] = value
    return array_S

  params, s = request.params, table.sampling
  sampling = SamplingArrays(
    put(s.temperature_B, params.temperature),
    put(s.top_k_B, params.top_k),
    put(s.top_p_B, params.top_p),
    put(s.min_p_B, params.min_p),
    put(s.seed_B, params.seed),
  )
  p = table.penalties
  penalties = PenaltyArrays(
    put(p.presence_B, params.presence_penalty),
    put(p.frequency_B, params.frequency_penalty),
    put(p.repetition_B, params.repetition_penalty),
  )
  return SlotParams(
    put(table.max_new_tokens_S, params.max_new_tokens),
    put(table.ends_SxE, [*ends, *[-1] * (table.ends_SxE.shape[1] - len(ends))]),
    put(table.threshold_S, threshold),
    sampling,
    penalties,
    put(table.logprobs_S, params.logprobs is not None),
    put(table.lossless_S, lossless),
    put(table.restricts_S, params.restricts),
    put(table.constrained_S, params.constrained),
    put(table.min_tokens_S, params.min_tokens),
  )


def logprobs_of(output: SamplerOutput, new_I, slot: int, count: int):
  """Log-probabilities of one slot's new tokens."""
  own, top, top_own = (output.logprob_S, output.top_token_SxA, output.top_logprob_SxA)
  if own is None or top is None or top_own is None:
    return []
  return [
    (
      float(own[i, slot]),
      [
        (int(t), float(p))
        for t, p in zip(top[i, slot, :count], top_own[i, slot, :count], strict=True)
      ],
    )
    for i in np.flatnonzero(new_I)
  ]
