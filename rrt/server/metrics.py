"""Prometheus metrics, under vLLM's names where vLLM has the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from rrt.infer.engine.state import EngineShape

TIMES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'


# Counters of the engine that are exported as they are.
_COUNTERS = (
  'steps',
  'batch_tokens',
  'stalls',
  'sampled_tokens',
  'draft_tokens',
  'num_accepted',
  'num_revised',
)


class Histogram:
  """Counts of values by bucket."""

  def __init__(self, bounds: Sequence[float]):
    self.bounds = bounds
    self.counts = [0] * (len(bounds) + 1)
    self.total = 0.0

  def add(self, value: float, times: int = 1) -> None:
    """Counts a value."""
    self.counts[int(np.searchsorted(self.bounds, value))] += times
    self.total += value * times

  def lines(self, name: str) -> list[str]:
    """Lines of the text exposition format."""
    found, below = [f'# TYPE {name} histogram'], 0
    for bound, count in zip((*self.bounds, '+Inf'), self.counts, strict=True):
      below += count
      found.append(f'{name}_bucket{{le="{bound}"}} {below}')
    return [*found, f'{name}_sum {self.total}', f'{name}_count {below}']


class Metrics:
  """All metrics; the engine's thread writes them, handlers count refusals."""

  def __init__(self, shape: EngineShape):
    self._shape = shape
    self.refused = 0
    self._prompt_tokens = 0
    self._generation_tokens = 0
    self._finished: dict[str, int] = {}
    self._running = self._waiting = 0
    self._used = 0.0
    self._engine: dict[str, Any] = {}
    self._ttft, self._gap = Histogram(TIMES), Histogram(TIMES)
    self._whole = Histogram(TIMES)

  def note(self, ticket, event, now: float) -> None:
    """Records the new tokens, times and end of a request."""
    if event.tokens and not ticket.first:
      ticket.first = now
      self._prompt_tokens += len(ticket.request.prompt)
      self._ttft.add(now - ticket.arrived)
      if event.tokens > 1:
        self._gap.add(0.0, event.tokens - 1)
    elif event.tokens:
      # The tokens of one call come together: the first of them was waited for.
      self._gap.add(now - ticket.last)
      self._gap.add(0.0, event.tokens - 1)
    if event.tokens:
      ticket.last = now
    self._generation_tokens += event.tokens
    if event.finish:
      reason = event.finish
      self._finished[reason] = self._finished.get(reason, 0) + 1
      self._whole.add(now - ticket.arrived)

  def look(self, engine) -> None:
    """Records the engine's gauges after a step."""
    running = [r for r in engine.running if r is not None]
    self._running, self._waiting = len(running), len(engine.waiting)
    tokens = sum(len(r.prompt) + len(r.tokens) for r in running)
    self._used = tokens / (engine.context * self._shape.slots)
    self._engine = engine.figures()

  def text(self) -> str:
    """All metrics in Prometheus' text exposition format."""
    lines: list[str] = []

    def put(name, kind, value, labels=''):
      if labels == '' or not any(s.startswith(f'# TYPE {name} ') for s in lines):
        lines.append(f'# TYPE {name} {kind}')
      lines.append(f'{name}{labels} {value}')

    put('vllm:num_requests_running', 'gauge', self._running)
    put('vllm:num_requests_waiting', 'gauge', self._waiting)
    put('vllm:kv_cache_usage_perc', 'gauge', self._used)
    put('vllm:prompt_tokens_total', 'counter', self._prompt_tokens)
    put('vllm:generation_tokens_total', 'counter', self._generation_tokens)
    for reason, count in sorted(self._finished.items()):
      label = f'{{finished_reason="{reason}"}}'
      put('vllm:request_success_total', 'counter', count, label)
    put('rrt:requests_refused_total', 'counter', self.refused)
    lines += self._ttft.lines('vllm:time_to_first_token_seconds')
    lines += self._gap.lines('vllm:inter_token_latency_seconds')
    lines += self._whole.lines('vllm:e2e_request_latency_seconds')
    e = self._engine
    if e:
      depths = e['depths_R']
      for loops, count in enumerate(depths, 1):
        put('rrt:tokens_by_loops_total', 'counter', count, f'{{loops="{loops}"}}')
      tokens = max(sum(depths), 1)
      mean = sum(i * n for i, n in enumerate(depths, 1)) / tokens
      put('rrt:mean_exit_depth', 'gauge', mean)
      for name in _COUNTERS:
        put(f'rrt:{name}_total', 'counter', e[name])
      room = max(e['steps'], 1) * self._shape.max_batch_tokens
      put('rrt:batch_occupancy', 'gauge', e['batch_tokens'] / room)
      room = max(e['sampler_steps'], 1) * self._shape.max_sampled_tokens
      put('rrt:sampler_occupancy', 'gauge', e['sampled_tokens'] / room)
    return '\n'.join(lines) + '\n'
