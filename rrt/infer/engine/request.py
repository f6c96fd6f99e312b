"""What a sequence asks for, and the table of it that the device reads."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
from numbers import Integral, Real

import numpy as np

from rrt.errors import InputError
from rrt.infer.detokenize import Text
from rrt.infer.engine.state import EngineShape, Requests, SamplerOutput
from rrt.infer.generate import Settings
from rrt.infer.sampling import Penalties, Sampling

_LARGE = 1e30  # Far from where float32 ends.


@dataclasses.dataclass(eq=False)
class Request:
  """A sequence on its way through the engine.

  Attributes:
    prompt: token ids.
    room: tokens to draw at most.
    temperature, top_k, top_p, min_p, seed: as for `rrt.complete`.
    presence, frequency, repetition: penalties; see `rules.Penalties`.
    logprobs: alternatives to tell log-probabilities of; None for none.
    ignore_end: go on through end tokens.
    threshold: of the exit gate; None for the engine's.
    lossless: whether to speculate, at full depth, rather than to leave early;
      None is the engine's way, and no where a threshold is given.
    tokens: what was drawn.
    loops: after how many loops each token was drawn.
    logprobs_of: of each token, if asked: its log-probability and the likeliest
      tokens with theirs, before penalties and sampling.
    text: what writes the tokens as text and finds stop strings, if anything.
    finish: '' while it runs; 'end', 'stop', 'length' or 'cancelled'.
  """

  prompt: Sequence[int]
  room: int
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  ignore_end: bool = False
  threshold: float | None = None
  lossless: bool | None = None
  presence: float = 0.0
  frequency: float = 0.0
  repetition: float = 1.0
  logprobs: int | None = None
  tokens: list[int] = dataclasses.field(default_factory=list)
  loops: list[int] = dataclasses.field(default_factory=list)
  logprobs_of: list[tuple[float, list[tuple[int, float]]]] = dataclasses.field(default_factory=list)
  text: Text | None = None
  finish: str = ''

  def check(self, plan: EngineShape) -> None:
    """Raises InputError for what this engine cannot do."""
    if not isinstance(self.room, Integral) or self.room < 1:
      raise InputError(f'room={self.room!r}: must be whole, 1 or more.')
    if not isinstance(self.seed, Integral):
      raise InputError(f'seed={self.seed!r}: must be whole.')
    Settings(
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      min_p=self.min_p,
      seed=self.seed,
    ).check()
    for field in 'presence', 'frequency', 'repetition':
      value = getattr(self, field)
      if not isinstance(value, Real) or not abs(value) < _LARGE:
        raise InputError(f'{field}={value!r}: must be a finite number.')
    if self.threshold is not None and not (
      isinstance(self.threshold, Real) and not math.isnan(self.threshold)
    ):
      raise InputError(f'threshold={self.threshold!r}: must be a number.')
    penal = self.presence, self.frequency, self.repetition
    if penal != (0, 0, 1) and not plan.penalties:
      raise InputError('Penalties need an engine with penalties=True.')
    if self.repetition <= 0:
      raise InputError(f'repetition={self.repetition}: must be above 0; 1 is none.')
    if self.threshold is not None and plan.gate == 'none':
      raise InputError('threshold: needs an engine with a gate.')
    if self.lossless and not plan.lossless:
      raise InputError('lossless: needs an engine with lossless=True.')
    if self.logprobs is not None and not (
      isinstance(self.logprobs, Integral) and 0 <= self.logprobs <= plan.logprobs
    ):
      raise InputError(
        f'logprobs={self.logprobs}: this engine tells up to {plan.logprobs} (-1: none).'
      )


def empty_table(slots: int) -> Requests:
  """The table of an engine without requests."""
  f = functools.partial(np.zeros, slots)
  sampling = Sampling(f(np.float32), f(np.int32), f(np.float32), f(np.float32), f(np.uint32))
  penalties = Penalties(f(np.float32), f(np.float32), np.ones(slots, np.float32))
  return Requests(f(np.int32), f(bool), f(np.float32), sampling, penalties, f(bool), f(bool))


def with_request(
  table: Requests, slot: int, request: Request, threshold: float, lossless: bool
) -> Requests:
  """A new table, as the old one may still be on its way to the device.

  Args:
    table: the old one.
    slot: whose row is written.
    request: what goes there.
    threshold, lossless: of the engine.
  """
  if request.threshold is not None:
    threshold, lossless = request.threshold, False
  if request.lossless is not None:
    lossless = request.lossless

  def put(array_S, value):
    array_S = np.array(array_S)
    array_S[slot] = value
    return array_S

  r, s = request, table.sampling
  sampling = Sampling(
    put(s.temperature_B, r.temperature),
    put(s.top_k_B, r.top_k),
    put(s.top_p_B, r.top_p),
    put(s.min_p_B, r.min_p),
    put(s.seed_B, r.seed),
  )
  p = table.penalties
  penalties = Penalties(
    put(p.presence_B, r.presence),
    put(p.frequency_B, r.frequency),
    put(p.repetition_B, r.repetition),
  )
  return Requests(
    put(table.max_new_tokens_S, r.room),
    put(table.ends_S, not r.ignore_end),
    put(table.threshold_S, threshold),
    sampling,
    penalties,
    put(table.logprobs_S, r.logprobs is not None),
    put(table.lossless_S, lossless),
  )


def logprobs_of(drawn: SamplerOutput, new_I, slot: int, count: int):
  """Log-probabilities of one slot's new tokens."""
  own, top, top_own = (drawn.logprob_S, drawn.top_token_SxA, drawn.top_logprob_SxA)
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
