"""Serving many sequences at once: continuous depth-wise batching.

    engine = Engine(rrt.load('runs/child'), slots=32)
    for done in engine.generate(['The sea is', 'Once'], Sampler(max_tokens=40)):
      print(done.text)

The device decides what runs (`rrt.infer.lanes`); the host admits sequences to
free slots between two calls and reads what a call drew while the next one
runs. The tokens of a sequence depend on its prompt and its settings alone, not
on what shares the batch with it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.infer import decode, exits, lanes, rules
from rrt.models import pages
from rrt.models.cache import init_cache
from rrt.models.stack import unstack

if TYPE_CHECKING:
  from rrt.pretrained import LanguageModel

KV_POLICIES = ('own', 'write_ahead', 'propagate', 'exact_fill')
_CHUNK = 512  # Tokens of one prefill.
_NEVER = 2.0  # A threshold that no score reaches.


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
    gate: 'none', 'learned', 'change' or 'replay'; see `rrt.infer.exits`.
    threshold: of the gate, for requests that name none.
    lossless: speculate on tokens after `draft_loop` loops; the text is that
      of full depth.
    draft_loop: loops before a guess.
    lanes: tokens that one block step runs; None for one a slot, R in the
      lossless mode and with 'exact_fill'. Fewer lanes than tokens: guesses
      wait first.
    draws: tokens that coda, head and prelude take in one step; None for all.
    pool: draw when so many tokens are due, or all; None for all at full
      depth, at once elsewhere.
    steps: block steps of one call; the host looks in between.
    page: positions of a page of the cache.
    dtype: 'float32' or 'bfloat16'.
  """

  slots: int = 8
  context: int | None = None
  kv: str = 'own'
  gate: str = 'none'
  threshold: float = _NEVER
  lossless: bool = False
  draft_loop: int = 1
  lanes: int | None = None
  draws: int | None = None
  pool: int | None = None
  steps: int = 8
  page: int = 64
  dtype: str = 'float32'

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
    need(self.kv in KV_POLICIES, 'kv', f'must be one of {KV_POLICIES}')
    exits.check_kind(self.gate)
    need(
      self.dtype in decode.DTYPES, 'dtype', f'must be one of {decode.DTYPES}'
    )
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
    if self.lossless:
      need(self.gate == 'none', 'gate', 'the lossless mode takes no gate')
      need(self.kv == 'own', 'kv', "the lossless mode is 'own'")
      need(
        self.draft_loop < config.loops, 'draft_loop',
        f'must be below the {config.loops} loops of the model',
      )  # fmt: skip

  def plan(self, config) -> lanes.Plan:
    """What the device step is compiled for."""
    self.check(config)
    context = self.context or config.max_context
    several = self.lossless or (self.kv == 'exact_fill' and self.gate != 'none')
    flights = config.loops if several else 1
    most = self.slots * flights
    at_once = self.lossless or self.gate != 'none'
    pool = self.pool or (1 if at_once else self.slots)
    draws = min(self.draws or most, most)
    return lanes.Plan(
      config=config,
      layout=pages.make_layout(config, self.slots, context, self.page),
      page=self.page, slots=self.slots,
      lanes=min(self.lanes or most, most) if several else self.slots,
      draws=draws, pool=min(pool, draws), flights=flights, steps=self.steps,
      kv=self.kv, gate=self.gate, lossless=self.lossless,
      draft_loop=self.draft_loop, dtype=self.dtype,
    )  # fmt: skip


@dataclasses.dataclass(eq=False)
class Request:
  """A sequence on its way through the engine.

  Attributes:
    prompt: token ids.
    room: tokens to draw at most.
    temperature, top_k, top_p, min_p, seed: as for `rrt.complete`.
    ignore_end: go on through end tokens.
    threshold: of the exit gate; None for the engine's.
    tokens: what was drawn.
    loops: after how many loops each token was drawn.
    finish: '' while it runs; 'end', 'length' or 'cancelled'.
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
  tokens: list[int] = dataclasses.field(default_factory=list)
  loops: list[int] = dataclasses.field(default_factory=list)
  finish: str = ''


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Engine:
  """A model, its slots, and the queue in front of them.

  Attributes:
    plan: what the device step is compiled for.
    waiting: requests without a slot, first come first.
    running: requests by slot.
  """

  def __init__(
    self, model: LanguageModel, options: Options | None = None,
    arrays: Any = None, **changes,
  ):  # fmt: skip
    """Allocates the cache.

    Args:
      model: what `rrt.load` gives.
      options: how to run; keyword arguments change single fields.
      arrays: of the exit gate; see `rrt.infer.exits.score`.

    Raises:
      InputError: an option that cannot work, or a cache that does not fit.
    """
    options = dataclasses.replace(options or Options(), **changes)
    self.options = options
    self.plan = options.plan(model.config)
    self.context = options.context or model.config.max_context
    self._tokenizer = model.tokenizer
    check_fit(self.plan)
    self._params = decode.cast(unstack(model.params), options.dtype)
    self._gate = jax.tree.map(jnp.asarray, arrays)
    eos = () if self._tokenizer is None else self._tokenizer.eos_ids
    self._ends = frozenset(int(e) for e in eos)
    self._end_E = jnp.asarray(sorted(self._ends) or [-1], jnp.int32)
    self._state = _init(self.plan)
    self._pending: collections.deque = collections.deque()
    self._table = _empty_requests(options.slots)
    self._cancelled = np.zeros(options.slots, bool)
    self.waiting: collections.deque[Request] = collections.deque()
    self.running: list[Request | None] = [None] * options.slots

  def submit(self, request: Request) -> Request:
    """Queues a request.

    Raises:
      InputError: it does not fit the context, or has wrong tokens.
    """
    config = self.plan.config
    total = len(request.prompt) + request.room
    if not request.prompt or request.room < 1:
      raise InputError('A request needs a prompt and room for a token.')
    if total > self.context:
      raise InputError(
        f'A prompt of {len(request.prompt)} tokens and {request.room} new '
        f'ones exceed the context of {self.context}; shorten one of them.'
      )
    if not 0 <= min(request.prompt) <= max(request.prompt) < config.vocab_size:
      raise InputError(f'Token ids must lie in 0..{config.vocab_size - 1}.')
    self.waiting.append(request)
    return request

  def cancel(self, request: Request) -> None:
    """Ends a request; its slot is free at the next turn."""
    if request.finish:
      return
    request.finish = 'cancelled'
    if request in self.waiting:
      self.waiting.remove(request)
      return
    for slot, running in enumerate(self.running):
      if running is request:
        self._cancelled[slot] = True
        self.running[slot] = None

  @property
  def busy(self) -> bool:
    """Whether anything waits, runs or is still to be read."""
    return bool(self.waiting or self._pending or any(self.running))

  def turn(self) -> list[Request]:
    """Admits, launches a call, reads the call before.

    Returns:
      The requests that got tokens or ended.
    """
    if self._cancelled.any():
      self._state = _drop(self._state, jnp.asarray(self._cancelled))
      self._cancelled[:] = False
    self._admit()
    if any(self.running):
      self._state, drawn = _call(
        self.plan, self._params, self._gate, self._table, self._end_E,
        self._state,
      )  # fmt: skip
      self._pending.append((list(self.running), drawn))
    if not self._pending or (len(self._pending) == 1 and any(self.running)):
      return []
    return self._read()

  def run(self, requests: Iterable[Request]) -> list[Request]:
    """Runs requests to their ends."""
    done = [self.submit(r) for r in requests]
    while self.busy:
      self.turn()
    return done

  def figures(self) -> dict[str, Any]:
    """The device's counters as numbers; see `lanes.Counters`."""
    return {
      name: np.asarray(value).tolist()
      for name, value in self._state.counters._asdict().items()
    }

  def _read(self) -> list[Request]:
    """Hands out what the oldest unread call drew."""
    running, drawn = self._pending.popleft()
    token_IxS, loops_IxS = jax.device_get(drawn)
    changed = []
    for slot, request in enumerate(running):
      if request is None or request.finish:
        continue
      new = token_IxS[:, slot] >= 0
      tokens = [int(t) for t in token_IxS[new, slot]]
      request.tokens += tokens
      request.loops += [int(n) for n in loops_IxS[new, slot]]
      if tokens and not request.ignore_end and tokens[-1] in self._ends:
        request.finish = 'end'
      elif len(request.tokens) >= request.room:
        request.finish = 'length'
      if request.finish:
        self.running[slot] = None
      if tokens:
        changed.append(request)
    return changed

  def _admit(self) -> None:
    """Prefills waiting requests into free slots."""
    for slot, running in enumerate(self.running):
      if running is None and self.waiting:
        request = self.waiting.popleft()
        self.running[slot] = request
        self._table = _set_request(
          self._table, slot, request, self.options.threshold
        )
        cache = self._prefill(request.prompt[:-1])
        self._state = _admit(
          self.plan, self._state, jnp.int32(slot),
          jnp.int32(request.prompt[-1]), jnp.int32(len(request.prompt) - 1),
          cache,
        )  # fmt: skip

  def _prefill(self, tokens: Sequence[int]):
    """The cache of one row after its prompt; None for none."""
    if not len(tokens):
      return None
    plan = self.plan
    static = decode.Static(plan.config, plan.config.loops, plan.dtype)
    size = decode.bucket(len(tokens), self.context)
    cache = init_cache(plan.config, 1, size, plan.dtype)
    last_1xD = jnp.zeros((1, plan.config.d_model), plan.dtype)
    length_1 = jnp.asarray([len(tokens)], jnp.int32)
    for start in range(0, len(tokens), _CHUNK):
      part = tokens[start : start + _CHUNK]
      width = decode.bucket(len(part), size - start)
      tokens_1xL = np.zeros((1, width), np.int32)
      tokens_1xL[0, : len(part)] = part
      last_1xD, cache = decode.extend(
        self._params, cache, last_1xD, jnp.asarray(tokens_1xL),
        jnp.int32(start) if start else None, length_1, static=static,
      )  # fmt: skip
    return cache


_init = jax.jit(lanes.init_state, static_argnames=('plan',))
_call = jax.jit(
  lanes.call, static_argnames=('plan',), donate_argnames=('state',)
)
_admit = jax.jit(
  lanes.admit, static_argnames=('plan',), donate_argnames=('state',)
)
_drop = jax.jit(lanes.drop, donate_argnames=('state',))


def _empty_requests(slots: int) -> lanes.Requests:
  f = functools.partial(np.zeros, slots)
  return lanes.Requests(
    f(np.int32), f(bool), f(np.float32),
    rules.Sampling(
      f(np.float32), f(np.int32), f(np.float32), f(np.float32), f(np.uint32)
    ),
  )  # fmt: skip


def _set_request(
  table: lanes.Requests, slot: int, request: Request, threshold: float
) -> lanes.Requests:
  """A new table, as the old one may still be on its way to the device."""
  if request.threshold is not None:
    threshold = request.threshold
  values = lanes.Requests(
    request.room, not request.ignore_end, threshold,
    rules.Sampling(
      request.temperature, request.top_k, request.top_p, request.min_p,
      request.seed,
    ),
  )  # fmt: skip

  def put(array_S, value):
    array_S = array_S.copy()
    array_S[slot] = value
    return array_S

  return jax.tree.map(put, table, values)


def check_fit(plan: lanes.Plan) -> None:
  """Raises InputError where the cache would not fit the device."""
  need = pages.layout_bytes(plan.config, plan.layout, plan.page, plan.dtype)
  free = free_bytes()
  if free is not None and need > free:
    gib = 2**30
    raise InputError(
      f'A cache for {plan.slots} slots takes {need / gib:.2f} GiB and '
      f'{free / gib:.2f} GiB are free; ask for fewer slots or a shorter '
      'context.'
    )


def free_bytes() -> int | None:
  """Memory that the device has left; None where it does not tell."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  try:
    with open('/proc/meminfo') as f:
      lines = dict(line.split(':', 1) for line in f)
    return int(lines['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None


