"""The engine: continuous depth-wise batching of many sequences.

    engine = Engine(rrt.load('runs/child'), slots=32, context=512)
    for done in engine.generate(['The sea is', 'Once'], max_new_tokens=40):
      print(done.text)

The host admits requests to free slots and processes the output of one device
call while the next one runs; the device schedules tokens (`step.py`). Prompts are
prefilled in chunks (`prefill.py`), with `prefill_tokens` of them between two calls.
The output of a sequence depends on its prompt and its settings, never on the rest
of the batch.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.exits import gate as gate_lib
from rrt.exits import score as score_lib
from rrt.infer import generate as generate_lib
from rrt.infer.detokenize import Completion, Detokenizer
from rrt.infer.engine import speculate
from rrt.infer.engine.config import EngineConfig, check_fit, with_changes
from rrt.infer.engine.prefill import Group, Prefiller
from rrt.infer.engine.prompt_scores import score_prompt
from rrt.infer.engine.request import Request, empty_table, logprobs_of, with_request
from rrt.infer.engine.restrict import Restrictions
from rrt.infer.engine.state import init_state, insert_sequence, remove_sequences
from rrt.infer.engine.step import call
from rrt.infer.sampling import SamplingParams
from rrt.models.params import cast, transpose_kernels
from rrt.models.stack import unstack
from rrt.relax.trees import prepare_all

if TYPE_CHECKING:
  from rrt.model import LanguageModel

_CHUNK = 512  # Tokens of one prefill launch where the calls need not wait for it.


class Engine:
  """A model, its slots, and the queue in front of them.

  Attributes:
    shape: what the device step is compiled for.
    context: tokens of a sequence, prompt included.
    ends: tokens that end a sequence.
    waiting: requests without a slot, first come first.
    running: requests by slot, those included whose prompts are being prefilled.

  Example:
    >>> engine = rrt.Engine(model, slots=8, context=512)
    >>> engine.generate(['The sea is', 'Once'], max_new_tokens=20)[0].text
  """

  def __init__(
    self, model: LanguageModel, config: EngineConfig | None = None, arrays: Any = None, **changes
  ):
    """Allocates the cache.

    Args:
      model: what `rrt.load` gives.
      config: how to run; keyword arguments change single fields. The gate
        'stored' is the one kept with the model, with its threshold.
      arrays: of another gate; see `rrt.exits.score.score`.

    Raises:
      InputError: an option that cannot work, or a cache that does not fit.
    """
    config = with_changes(config or EngineConfig(), changes)
    if config.gate == 'stored':
      config, arrays = config.with_stored_gate(model)
    self.config = config
    fixed = model.config.for_length(config.context or model.config.max_context)
    if fixed is not model.config:
      model = dataclasses.replace(model, config=fixed)
    if arrays is None and (config.lossless or config.gate == 'change'):
      arrays = gate_lib.stored_lens(model)
    gate_lib.check_arrays(config.gate, arrays, model.config)
    self.shape = config.shape(model.config)
    self.context = config.context or model.config.max_context
    self._tokenizer = model.tokenizer
    check_fit(self.shape)
    params = unstack(model.params)
    if config.weight_dtype:
      params = cast(params, config.weight_dtype)
    params = cast(params, config.dtype)
    params = transpose_kernels(prepare_all(model.config, params, config.relax_layout))
    self._params = speculate.with_draft_head(self.shape, params)
    self._gate = score_lib.on_device(arrays, config.dtype)
    eos = () if self._tokenizer is None else self._tokenizer.eos_ids
    self.ends = frozenset(int(e) for e in eos)
    self._state = _init(self.shape)
    self._counters = jax.device_get(self._state.counters)
    self._totals = jax.tree.map(lambda n: n.astype(np.int64), self._counters)
    self._pending: collections.deque = collections.deque()
    self._threshold = gate_lib.NEVER if config.threshold is None else config.threshold
    self._table = empty_table(config.slots, len(self.ends))
    self._cancelled = np.zeros(config.slots, bool)
    self.waiting: collections.deque[Request] = collections.deque()
    self.running: list[Request | None] = [None] * config.slots
    self._prefiller = Prefiller(self.shape, self._params, config.prefill_tokens or _CHUNK)
    self._groups: collections.deque[Group] = collections.deque()
    self._entering: set[Request] = set()  # Those of the groups.
    self._restrictions = Restrictions(self.shape, self._tokenizer)

  def submit(self, request: Request) -> Request:
    """Queues a request; raises as `check` does."""
    self.check(request)
    self.waiting.append(request)
    return request

  def check(self, request: Request) -> None:
    """Raises InputError for a request that this engine cannot run."""
    config = self.shape.config
    if request.finish or request.tokens:
      raise InputError('This request has run, or was cancelled.')
    request.check(self.shape)
    if not request.prompt:
      raise InputError('A request needs a prompt of a token or more.')
    total = len(request.prompt) + request.params.max_new_tokens
    if total > self.context:
      raise InputError(
        f'A prompt of {len(request.prompt)} tokens and {request.params.max_new_tokens} new '
        f'ones exceed the context of {self.context}; shorten one of them.'
      )
    if not 0 <= min(request.prompt) <= max(request.prompt) < config.vocab_size:
      raise InputError(f'Token ids must lie in 0..{config.vocab_size - 1}.')
    if request.params.constrained and request.constraint is None:
      request.constraint = self._restrictions.constraint(request.params)

  def ends_of(self, params: SamplingParams) -> frozenset[int]:
    """The tokens that end a request with these parameters."""
    return (frozenset() if params.ignore_eos else self.ends) | frozenset(params.stop_token_ids)

  def cancel(self, request: Request) -> None:
    """Ends a request; its slot is free at the next step."""
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
    """Whether requests wait or run, or output is not processed yet."""
    return bool(self.waiting or self._pending or any(self.running))

  def step(self) -> list[Request]:
    """Admits requests, prefills, dispatches a device call, processes the previous one's output.

    Returns:
      The requests that got tokens or ended.
    """
    if self._cancelled.any():
      self._state = _remove(self._state, jnp.asarray(self._cancelled))
      # A new array: the device may still read the old one.
      self._cancelled = np.zeros_like(self._cancelled)
    self._admit()
    self._prefill()
    self._state = self._restrictions.send(self._state)
    if self._live:
      self._state, output, counters = _call(
        self.shape, self._params, self._gate, self._table, self._state
      )
      self._pending.append((list(self.running), output, counters))
    # One call's output is processed while the next one runs, but for requests whose next
    # mask depends on it.
    waits = any(r is not None and r.constraint is not None for r in self.running)
    changed: list[Request] = []
    while len(self._pending) > int(self._live and not waits):
      changed += self._process_output()
    return list(dict.fromkeys(changed))

  def run(
    self, requests: Iterable[Request], progress: Callable[[int, int], None] | None = None
  ) -> list[Request]:
    """Runs requests to their ends.

    Args:
      requests: to submit; raises as `check` does, before any is.
      progress: called after each turn with the tokens sampled and the most that
        there will be.
    """
    done = list(requests)
    for request in done:
      self.check(request)
    self.waiting += done
    while self.busy:
      self.step()
      if progress is not None:
        progress(sum(len(r.tokens) for r in done), sum(r.params.max_new_tokens for r in done))
    return done

  def generate(
    self,
    prompts,
    params: SamplingParams | None = None,
    stream: Callable[[int, str], None] | None = None,
    chat: bool = False,
    **changes,
  ) -> list[Completion]:
    """Continues each prompt; as `rrt.complete`, with this engine's slots.

    Args:
      prompts: a text, texts, or lists of token ids.
      params: how to sample; keyword arguments change single fields.
      stream: called with (index of the prompt, new text) as text comes.
      chat: prompts are messages of a user; put them in the chat template.

    Raises:
      InputError: a setting or prompt that cannot work; nothing was run.
    """
    params = (params or SamplingParams()).replace(**changes)
    params.check()
    ids = generate_lib.encode_prompts(self._tokenizer, prompts, chat)
    bounded = dataclasses.replace(self.shape.config, max_context=self.context)
    generate_lib.check_prompts(bounded, ids)
    params.check_for(len(ids), self._tokenizer)
    seeds = params.seeds(range(len(ids)))
    show = stream or (lambda i, text: None)
    ends = tuple(self.ends_of(params))
    requests, texts = [], []
    for i, (prompt, seed) in enumerate(zip(ids, seeds, strict=True)):
      allowed = min(params.max_new_tokens, self.context - len(prompt))
      text = Detokenizer.of(params, self._tokenizer, prompt, ends, i, show)
      own = params.replace(max_new_tokens=allowed, seed=seed)
      requests.append(Request(prompt, own, detokenizer=text))
      texts.append(text)
    self.run(requests)
    return [
      text.finish(
        len(r.prompt), 'length' if r.params.max_new_tokens == params.max_new_tokens else 'context'
      )
      for r, text in zip(requests, texts, strict=True)
    ]

  def warm(self, longest: int | None = None) -> None:
    """Compiles all programs for prompts of up to `longest` tokens; None for the context's.

    Call it before the first request.
    """
    longest = min(self.context if longest is None else longest, self.context) - 1
    for shape in self._prefiller.shapes(longest):
      # With the prompt's last token.
      prompt = [0] * (min(shape.size, longest - 1) + 1)
      self.run([Request.of(prompt, 1, ignore_eos=True) for _ in range(shape.rows)])
    self.run([Request.of([0], 1, ignore_eos=True)])
    self._state = _remove(self._state, jnp.zeros(self.config.slots, bool))

  def figures(self) -> dict[str, Any]:
    """The device's counters as numbers; see `state.Counters`."""
    return {name: np.asarray(value).tolist() for name, value in self._totals._asdict().items()}

  def _process_output(self) -> list[Request]:
    """Appends the output of the oldest pending call to its requests."""
    running, *out = self._pending.popleft()
    before = self._counters
    output, self._counters = jax.device_get(out)
    # The device counts modulo 2^32.
    self._totals = jax.tree.map(
      lambda total, new, old: total + (new.astype(np.int64) - old) % 2**32,
      self._totals,
      self._counters,
      before,
    )
    changed = []
    for slot, request in enumerate(running):
      if request is None or request.finish:
        continue
      new = output.token_S[:, slot] >= 0
      tokens = [int(t) for t in output.token_S[new, slot]]
      request.tokens += tokens
      request.loops += [int(n) for n in output.loops_S[new, slot]]
      if request.params.logprobs is not None:
        request.logprobs += logprobs_of(output, new, slot, request.params.logprobs)
      if tokens and tokens[-1] in self.ends_of(request.params):
        request.finish = 'end'
      elif len(request.tokens) >= request.params.max_new_tokens:
        request.finish = 'length'
      if request.detokenizer is not None:
        for token in tokens:
          request.detokenizer.extend([token])
        if request.detokenizer.stopped:
          request.finish = 'stop'
          self._cancelled[slot] = self.running[slot] is request
      if request.finish and self.running[slot] is request:
        self.running[slot] = None
      self._restrictions.came(slot, request, tokens)
      if tokens:
        changed.append(request)
    return changed

  @property
  def _live(self) -> bool:
    """Whether a sequence is past its prefill."""
    return any(r is not None and r not in self._entering for r in self.running)

  def _admit(self) -> None:
    """Gives free slots to waiting requests."""
    free = [slot for slot, running in enumerate(self.running) if running is None]
    while free and self.waiting:
      group = self._prefiller.take(self.waiting, free)
      for slot, request in zip(group.slots, group.requests, strict=True):
        self.running[slot] = request
        self._entering.add(request)
        self.waiting.popleft()
        free.remove(slot)
      self._groups.append(group)

  def _prefill(self) -> None:
    """Runs prefill launches: `prefill_tokens` of them, all if no sequence waits for it."""
    budget, spent = self.config.prefill_tokens, 0
    while self._groups and (budget is None or spent < budget or not self._live):
      group = self._groups[0]
      gone = all(r.finish for r in group.requests)
      if not (gone or group.complete):
        spent += self._prefiller.launch(group)
      if gone or group.complete:
        self._groups.popleft()
        for row, request in enumerate(group.requests):
          self._entering.discard(request)
          if not request.finish:
            cache = self._prefiller.row(group, row)
            self._insert(group.slots[row], request, cache, group.shape.size)

  def _insert(self, slot: int, request: Request, cache, size: int) -> None:
    """Starts a sequence whose prompt, without its last token, is in a cache of `size`."""
    if request.scores_prompt:
      count = request.params.logprobs or 0
      request.prompt_scores = score_prompt(self.shape, self._params, request.prompt, count)
    ends = self.ends_of(request.params)
    self._table = with_request(
      self._table, slot, request, self._threshold, self.shape.lossless, ends
    )
    self._state = self._restrictions.enter(self._state, slot, request)
    prompt_L = None
    if self.shape.penalties or self.shape.lookup:
      # Its size follows the cache's, so that few shapes compile.
      size = 1 if cache is None else min(size + 1, self.context)
      prompt_L = np.full(size, self.shape.config.vocab_size, np.int32)
      prompt_L[: len(request.prompt)] = request.prompt
    self._state = _insert(
      self.shape,
      self._state,
      jnp.int32(slot),
      jnp.int32(request.prompt[-1]),
      jnp.int32(len(request.prompt) - 1),
      cache,
      prompt_L,
    )


_init = jax.jit(init_state, static_argnames=('shape',))
_call = jax.jit(call, static_argnames=('shape',), donate_argnames=('state',))
_insert = jax.jit(insert_sequence, static_argnames=('shape',), donate_argnames=('state',))
_remove = jax.jit(remove_sequences, donate_argnames=('state',))
