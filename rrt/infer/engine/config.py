"""`EngineConfig`: checked, and turned into the shape a step is compiled for."""

from __future__ import annotations

import dataclasses
import difflib
import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import jax

from rrt.errors import InputError
from rrt.exits import gate as gate_lib
from rrt.exits import score as score_lib
from rrt.infer.engine.state import EngineShape
from rrt.models import count, pages
from rrt.models.params import DTYPES
from rrt.relax.base import LAYOUTS

if TYPE_CHECKING:
  from rrt.model import LanguageModel

KV_POLICIES = ('full', 'write_ahead', 'propagate', 'exact_fill')
# Rows that cost little more than one, on a CPU and on accelerators.
_FEW_CPU, _FEW = 8, 128
_MANY = 16  # Slots, from which a pass on a CPU costs by its rows alone.
_TILE = 8  # Rows that a CPU's products take at once; 11 take as long as 16.
_LEAST_BFLOAT16 = 4  # For one row XLA's CPU backend converts each kernel anew.


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How an engine runs.

  Attributes:
    slots: sequences at once.
    context: tokens of a sequence, prompt included; None for the model's.
    kv: keys and values of the loops that an early exit skips (KV policy):
      'full': there are none, every token runs all loops.
      'write_ahead': copies of those of the loop in which the token left.
      'propagate': projections, in each skipped loop, of the state in which it
        left (CALM's state propagation).
      'exact_fill': the token runs the skipped loops later, beside its
        successors: exact, and no work is saved.
    gate: 'none', 'learned', 'change' or 'replay' (see `rrt.exits.score`), or
      'stored': the one kept with the model.
    threshold: of the gate, for requests that name none; above 1 no token
      leaves early. None takes the stored gate's; other gates need one.
    lossless: speculative decoding: early loops draft, all loops verify; the
      output is that of full depth. With a gate, each request chooses.
    draft_loop: loops before the first draft token; later loops draft again.
    draft_vocab: first tokens of the vocabulary among which drafts are made
      when a launch has no final token to sample; byte-pair vocabularies begin
      with the frequent ones. Never changes the output.
    lookup: prompt lookup: where the last so many tokens stand in the sequence
      before, the token that followed them is the draft; 0 for never, and not
      for requests with a temperature. Never changes the output.
    max_batch_tokens: tokens of one block step, between one and R a slot, where
      a slot may have several in token (lossless, 'exact_fill'). None is R a
      slot; in the lossless mode one a slot, but at least 8 on a CPU and 128 on
      accelerators, which cost little more than one. Drafts use what tokens of
      running sequences leave, so that speculation ends as slots fill.
    max_sampled_tokens: tokens of one launch of coda, head and prelude; None
      for a default by machine: as many as a block step, on a CPU with many
      slots and a gate about as many as leave in one step.
    min_sampled_tokens: the sampler waits for so many tokens, or for all there
      are. None for a default by machine: all slots at full depth; with a gate
      1, or three quarters of the slots where prelude, coda and head are larger
      than the block. On a CPU with many slots: the tokens that a step releases
      at full depth; with large ends all at full depth and half of
      `max_sampled_tokens` with a gate. The lossless mode does not wait.
    mean_loops: expected loops a token, which sizes `max_sampled_tokens` on a
      CPU; None is the stored gate's, or all.
    steps: block steps of one device call; the host schedules in between.
    prefill_tokens: tokens of prompts that are prefilled between two calls while sequences
      run, in launches of as many; a prompt that is longer is cut. None prefills all prompts
      that have a slot at once: the highest throughput, and running sequences wait.
    page: positions of a page of the cache, at least one a loop.
    dtype: 'float32' or 'bfloat16', of weights and computation.
    kv_dtype: of the cache, 'int8' too; None for the same.
    weight_dtype: 'bfloat16' rounds the weights to it and goes on computing in
      `dtype`, which is the fastest on a CPU; None rounds nothing.
    relax_layout: of per-loop factors, for rows at several loops. 'wide'
      computes the products of all loops and masks the others, with dense
      matmuls; 'grouped' sorts the rows by loop (`rrt.ops.grouped_matmul`); 'auto'
      leaves it to the relaxation.
    penalties: whether requests may ask for penalties, for which the tokens of
      each slot are counted.
    masks: whether requests may bias and restrict their tokens (`logit_bias`,
      `min_tokens`, `structured_outputs`, ...), for which each slot has a mask.
    logprobs: how many alternatives requests may ask log-probabilities of; -1
      for none at all.
  """

  slots: int = 8
  context: int | None = None
  kv: str = 'full'
  gate: str = 'none'
  threshold: float | None = None
  lossless: bool = False
  draft_loop: int = 1
  draft_vocab: int = 4096
  lookup: int = 3
  max_batch_tokens: int | None = None
  max_sampled_tokens: int | None = None
  min_sampled_tokens: int | None = None
  mean_loops: float | None = None
  steps: int = 8
  prefill_tokens: int | None = None
  page: int = 128
  dtype: str = 'float32'
  kv_dtype: str | None = None
  weight_dtype: str | None = None
  relax_layout: str = 'auto'
  penalties: bool = False
  masks: bool = False
  logprobs: int = -1

  def check(self, config) -> None:
    """Raises InputError for the first option that cannot work."""

    def need(ok: bool, field: str, why: str) -> None:
      if not ok:
        raise InputError(f'{field}={getattr(self, field)!r}: {why}.')

    for field in ('slots', 'steps', 'page', 'draft_loop', 'draft_vocab'):
      need(_whole(getattr(self, field)), field, 'must be a whole number, 1 up')
    for field in (
      'context',
      'max_batch_tokens',
      'max_sampled_tokens',
      'min_sampled_tokens',
      'prefill_tokens',
    ):
      value = getattr(self, field)
      need(value is None or _whole(value), field, 'must be a whole number, 1 up')
    need(
      self.lookup in range(17) and not isinstance(self.lookup, bool),
      'lookup',
      'must lie in 0 (never) to 16',
    )
    need(
      isinstance(self.logprobs, int) and -1 <= self.logprobs <= 100,
      'logprobs',
      'must lie in -1 (none) to 100',
    )
    need(self.kv in KV_POLICIES, 'kv', f'must be one of {KV_POLICIES}')
    score_lib.check_kind(self.gate)
    for field in ('dtype', 'kv_dtype', 'weight_dtype'):
      value = getattr(self, field) or self.dtype
      allowed = (*DTYPES, 'int8') if field == 'kv_dtype' else DTYPES
      need(value in allowed, field, f'must be one of {allowed}')
    need(self.relax_layout in LAYOUTS, 'relax_layout', f'must be one of {LAYOUTS}')
    longest = config.max_context
    need(
      self.context is None or self.context <= longest,
      'context',
      f'the model was made for {longest} tokens',
    )
    if config.loops > 1 and config.order != 'cycle':
      raise InputError(
        f'order={config.order!r}: tokens at different loops can share a '
        'launch in the cycle order only; convert with order=cycle, or export '
        'the model and serve it untied.'
      )
    for relaxation in config.relax:
      if not relaxation.row_independent:
        raise InputError(
          f'relax: {relaxation.kind!r} couples the rows of a batch, so that a token would '
          'depend on the sequences beside it; use rrt.complete or rrt generate.'
        )
    need(
      self.gate == 'none' or self.kv != 'full',
      'kv',
      "tokens that leave early need another policy: 'write_ahead', 'propagate' or 'exact_fill'",
    )
    need(self.gate == 'none' or self.threshold is not None, 'threshold', 'a gate needs one')
    number = isinstance(self.threshold, Real) and math.isfinite(self.threshold)
    need(self.threshold is None or number, 'threshold', 'must be a finite number')
    # Drafts are written ahead of what windowed pages must still hold.
    need(
      self.page >= config.loops, 'page', f'must be at least the {config.loops} loops of the model'
    )
    need(
      self.mean_loops is None or 1 <= self.mean_loops <= config.loops,
      'mean_loops',
      f'must lie in 1 to {config.loops}',
    )
    most = self.slots * (config.loops if self.several else 1)
    need(
      self.max_batch_tokens is None or self.slots <= self.max_batch_tokens <= most,
      'max_batch_tokens',
      f'must lie in {self.slots} (slots) to {most}',
    )
    if self.lossless:
      need(
        self.kv != 'exact_fill',
        'kv',
        'the lossless mode has its own tokens in the lanes that this needs',
      )
      need(
        self.draft_loop < config.loops,
        'draft_loop',
        f'must be below the {config.loops} loops of the model',
      )

  def with_stored_gate(self, model: LanguageModel) -> tuple[EngineConfig, Any]:
    """These options with the gate that is kept with a model, and its arrays.

    Raises:
      InputError: the model has none.
    """
    gate = gate_lib.stored(model)
    if gate is None:
      raise InputError("gate='stored': this model has no gate; rrt fit-gate fits one.")
    kv = gate.kv if self.kv == 'full' else self.kv
    threshold, mean_loops = self.threshold, self.mean_loops
    if threshold is None:
      threshold = gate.threshold
      mean_loops = mean_loops or gate.calibration.get('mean_loops')
    options = dataclasses.replace(
      self, gate=gate.kind, threshold=threshold, kv=kv, mean_loops=mean_loops
    )
    return options, gate.arrays

  @property
  def several(self) -> bool:
    """Whether a slot may have several in-flight tokens."""
    return self.lossless or (self.kv == 'exact_fill' and self.gate != 'none')

  def shape(self, config) -> EngineShape:
    """What the device step is compiled for."""
    self.check(config)
    context = self.context or config.max_context
    tokens_per_slot = config.loops if self.several else 1
    most = self.slots * tokens_per_slot
    max_batch_tokens = self.max_batch_tokens or most
    if self.lossless and not self.max_batch_tokens:
      few = _FEW_CPU if jax.default_backend() == 'cpu' else _FEW
      max_batch_tokens = min(max(self.slots, few), most)
    max_sampled_tokens, min_sampled_tokens = self._sampled_tokens(config, max_batch_tokens)
    max_sampled_tokens = min(max_sampled_tokens, most)
    slow_row = jax.default_backend() == 'cpu' and self.dtype == 'bfloat16'
    names = {f.name for f in dataclasses.fields(EngineShape)}
    same = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
    return EngineShape(
      **same
      | {
        'config': config,
        'layout': pages.make_cache_layout(config, self.slots, context, self.page),
        'context': context,
        'max_batch_tokens': max_batch_tokens,
        'max_sampled_tokens': max_sampled_tokens,
        'min_sampled_tokens': min(min_sampled_tokens, max_sampled_tokens),
        'tokens_per_slot': tokens_per_slot,
        'least_rows': _LEAST_BFLOAT16 if slow_row else 1,
        'draft_vocab': min(self.draft_vocab, config.vocab_size),
        'lookup': self.lookup if self.lossless else 0,
        'kv_dtype': self.kv_dtype or self.dtype,
      }
    )

  def _sampled_tokens(self, config, max_batch_tokens: int) -> tuple[int, int]:
    """`max_sampled_tokens` and `min_sampled_tokens` where they are None."""
    loops = config.loops
    max_sampled_tokens, min_sampled_tokens = max_batch_tokens, self.slots
    layer = count.linears(config)
    ends = config.prelude_layers + config.coda_layers
    ends += config.vocab_size * config.d_model / layer
    large_ends = ends > config.block_layers
    if self.several:
      min_sampled_tokens = 1
    elif self.gate != 'none':
      # Weights are read once a launch: large ends are launched rarely.
      min_sampled_tokens = 3 * self.slots // 4 if large_ends else 1
    by_rows = jax.default_backend() == 'cpu' and self.slots >= _MANY
    if by_rows and loops > 1 and self.kv != 'exact_fill':
      mean = loops if self.several else self.mean_loops or loops
      if self.gate == 'none':
        # A head of all slots costs little more than one of few: it waits for
        # the tokens that a step sends out. Layers beside it: all in step.
        max_sampled_tokens = self.slots
        min_sampled_tokens = self.slots if large_ends else self.slots // loops
      elif large_ends and self.dtype == 'bfloat16':
        max_sampled_tokens, min_sampled_tokens = self.slots, self.slots // 2
      elif large_ends:
        # Tokens that wait cost less than empty rows: few rows, well filled.
        max_sampled_tokens = math.ceil(2 * self.slots / (loops + mean))
        min_sampled_tokens = max_sampled_tokens // 2
      else:
        max_sampled_tokens = math.ceil(self.slots / mean)
      max_sampled_tokens = _TILE * math.ceil(max_sampled_tokens / _TILE)
    max_sampled_tokens = self.max_sampled_tokens or max_sampled_tokens
    return max_sampled_tokens, self.min_sampled_tokens or max(
      min(min_sampled_tokens, max_sampled_tokens), 1
    )


def with_changes(config: EngineConfig, changes: dict[str, Any]) -> EngineConfig:
  """The configuration with some fields changed; raises InputError for unknown ones."""
  names = [f.name for f in dataclasses.fields(EngineConfig)]
  for name in changes:
    if name not in names:
      near = difflib.get_close_matches(name, names, 1)
      hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(names)}.'
      raise InputError(f'{name}: an engine has no such option; {hint}')
  return dataclasses.replace(config, **changes)


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_fit(shape: EngineShape) -> None:
  """Raises InputError where the cache would not fit the device."""
  need = pages.layout_bytes(shape.config, shape.layout, shape.page, shape.kv_dtype)
  free = free_bytes()
  if free is not None and need > free:
    gib = 2**30
    raise InputError(
      f'A cache for {shape.slots} slots takes {need / gib:.2f} GiB and '
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
