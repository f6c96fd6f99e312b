"""How an engine runs, checked before it does."""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.errors import InputError
from rrt.infer import decode, exits
from rrt.infer.flights import Plan
from rrt.models import pages

KV_POLICIES = ('own', 'write_ahead', 'propagate', 'exact_fill')


@dataclasses.dataclass(frozen=True)
class Options:
  """How an engine runs.

  Attributes:
    slots: sequences at once.
    context: tokens of a sequence, prompt included; None for the model's.
    kv: what the loops that a token skipped keep of it.
      'own': nothing; tokens go through all loops.
      'write_ahead': the keys and values of the loop in which it left.
      'propagate': the projections, in each skipped loop, of the state in
        which it left (CALM).
      'exact_fill': the token goes on through the skipped loops beside its
        successors, so that nothing is missing and no work is saved.
    gate: 'none', 'learned', 'change' or 'replay' (see `rrt.infer.exits`), or
      'stored': the one kept with the model.
    threshold: of the gate, for requests that name none; above 1 no token
      leaves early. None is the stored gate's own, and for others needed.
    lossless: speculate on tokens after `draft_loop` loops; the text is that
      of full depth.
    draft_loop: loops before a guess.
    lanes: tokens that one block step runs, where a slot may have several (in
      the lossless mode and with 'exact_fill'): from one a slot to R a slot,
      which is the default. With fewer lanes than tokens guesses wait first.
    draws: tokens that coda, head and prelude take in one step; None for all.
    pool: draw when so many tokens are due, or all; None for all at full
      depth, at once elsewhere.
    steps: block steps of one call; the host looks in between.
    page: positions of a page of the cache, at least one a loop.
    dtype: 'float32' or 'bfloat16', of weights and computation.
    kv_dtype: of the cache; None for the same.
    penalties: whether requests may ask for penalties, for which the tokens of
      each slot are counted.
    logprobs: how many alternatives requests may ask log-probabilities of; -1
      for none at all.
  """

  slots: int = 8
  context: int | None = None
  kv: str = 'own'
  gate: str = 'none'
  threshold: float | None = None
  lossless: bool = False
  draft_loop: int = 1
  lanes: int | None = None
  draws: int | None = None
  pool: int | None = None
  steps: int = 8
  page: int = 128
  dtype: str = 'float32'
  kv_dtype: str | None = None
  penalties: bool = False
  logprobs: int = -1

  def check(self, config) -> None:
    """Raises InputError for the first option that cannot work."""

    def need(ok: bool, field: str, why: str) -> None:
      if not ok:
        raise InputError(f'{field}={getattr(self, field)!r}: {why}.')

    for field in ('slots', 'steps', 'page', 'draft_loop'):
      need(_whole(getattr(self, field)), field, 'must be a whole number, 1 up')
    for field in ('context', 'lanes', 'draws', 'pool'):
      value = getattr(self, field)
      need(
        value is None or _whole(value), field, 'must be a whole number, 1 up'
      )
    need(
      isinstance(self.logprobs, int) and -1 <= self.logprobs <= 100, 'logprobs',
      'must lie in -1 (none) to 100',
    )  # fmt: skip
    need(self.kv in KV_POLICIES, 'kv', f'must be one of {KV_POLICIES}')
    exits.check_kind(self.gate)
    for field in ('dtype', 'kv_dtype'):
      value = getattr(self, field) or self.dtype
      need(value in decode.DTYPES, field, f'must be one of {decode.DTYPES}')
    longest = config.max_context
    need(
      self.context is None or self.context <= longest, 'context',
      f'the model was made for {longest} tokens',
    )  # fmt: skip
    if config.loops > 1 and config.order != 'cycle':
      raise InputError(
        f'order={config.order!r}: tokens at different loops can share a '
        'launch in the cycle order only; convert with order=cycle, or export '
        'the model and serve it untied.'
      )
    need(
      self.gate == 'none' or self.kv != 'own', 'kv',
      "tokens that leave early need another policy: 'write_ahead', "
      "'propagate' or 'exact_fill'",
    )  # fmt: skip
    need(
      self.gate == 'none' or self.threshold is not None, 'threshold',
      'a gate needs one',
    )  # fmt: skip
    # Guesses are written ahead of what windowed pages must still hold.
    need(
      self.page >= config.loops, 'page',
      f'must be at least the {config.loops} loops of the model',
    )  # fmt: skip
    most = self.slots * (config.loops if self.several else 1)
    need(
      self.lanes is None or self.slots <= self.lanes <= most, 'lanes',
      f'must lie in {self.slots} (slots) to {most}',
    )  # fmt: skip
    if self.lossless:
      need(self.gate == 'none', 'gate', 'the lossless mode takes no gate')
      need(self.kv == 'own', 'kv', "the lossless mode is 'own'")
      need(
        self.draft_loop < config.loops, 'draft_loop',
        f'must be below the {config.loops} loops of the model',
      )  # fmt: skip

  @property
  def several(self) -> bool:
    """Whether a slot may have several tokens under way."""
    return self.lossless or (self.kv == 'exact_fill' and self.gate != 'none')

  def plan(self, config) -> Plan:
    """What the device step is compiled for."""
    self.check(config)
    context = self.context or config.max_context
    flights = config.loops if self.several else 1
    most = self.slots * flights
    at_once = self.lossless or self.gate != 'none'
    pool = self.pool or (1 if at_once else self.slots)
    draws = min(self.draws or most, most)
    return Plan(
      config=config,
      layout=pages.make_layout(config, self.slots, context, self.page),
      page=self.page, slots=self.slots,
      lanes=self.lanes or most,
      draws=draws, pool=min(pool, draws), flights=flights, steps=self.steps,
      kv=self.kv, gate=self.gate, lossless=self.lossless,
      draft_loop=self.draft_loop, dtype=self.dtype,
      kv_dtype=self.kv_dtype or self.dtype, penalties=self.penalties,
      logprobs=self.logprobs,
    )  # fmt: skip


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1
