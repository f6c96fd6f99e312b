"""Prometheus metrics: vLLM's names, labels and reasons where vLLM has the metric.

So vLLM's Grafana board shows this server; metrics of our own begin with `rrt:`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rrt import console
from rrt.errors import InputError

try:
  import prometheus_client
  from prometheus_client import core
except ImportError as e:
  raise InputError(
    'Serving needs prometheus_client: pip install "relaxed-recursive-transformers[serve]".'
  ) from e

if TYPE_CHECKING:
  from rrt.infer.engine.state import EngineShape

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
TIMES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
# Our finish reasons as vLLM's.
_MOST_NAMED = 64  # Unknown fields in the log.
REASONS = {'end': 'stop', 'stop': 'stop', 'length': 'length', 'cancelled': 'abort'}

# Counters of the engine that are exported as they are, with their help.
_COUNTERS = {
  'steps': 'Steps of the block.',
  'batch_tokens': 'Tokens that the steps of the block carried.',
  'stalls': 'Steps in which a token waited for the sampler.',
  'sampled_tokens': 'Tokens that went through coda and head.',
  'draft_tokens': 'Draft tokens of the lossless mode.',
  'num_accepted': 'Draft tokens that full depth confirmed.',
  'num_revised': 'Draft tokens that full depth replaced.',
}


class Metrics:
  """All metrics of a server; thread-safe.

  Attributes:
    running, waiting: requests in slots and in the queue, after the last engine step.
  """

  def __init__(self, shape: EngineShape, name: str = ''):
    """`name`: the model's for clients, the label `model_name`."""
    self._shape, self._name = shape, name
    self._engine: dict[str, Any] = {}
    self._named: set[str] = set()
    self.running = self.waiting = 0
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(_EngineCollector(self))

    def make(kind, metric, text, labels=(), **options):
      made = kind(metric, text, ('model_name', *labels), registry=self._registry, **options)
      return made if labels else made.labels(name)

    counter, gauge = prometheus_client.Counter, prometheus_client.Gauge
    seconds = lambda metric, text: make(prometheus_client.Histogram, metric, text, buckets=TIMES)
    lengths = lambda metric, text: make(prometheus_client.Histogram, metric, text, buckets=LENGTHS)
    self._running = make(gauge, 'vllm:num_requests_running', 'Requests that have a slot.')
    self._waiting = make(gauge, 'vllm:num_requests_waiting', 'Requests that wait for a slot.')
    self._used = make(gauge, 'vllm:kv_cache_usage_perc', 'Used share of the KV cache, 0 to 1.')
    self._prompt = make(counter, 'vllm:prompt_tokens', 'Prompt tokens that were processed.')
    self._generation = make(counter, 'vllm:generation_tokens', 'Tokens that were generated.')
    self._finished = make(
      counter, 'vllm:request_success', 'Finished requests by reason.', ['finished_reason']
    )
    self._refused = make(counter, 'rrt:requests_refused', 'Requests refused with status 429.')
    self._ignored = make(counter, 'rrt:unknown_fields', 'Fields of requests that no API knows.')
    self._ttft = seconds('vllm:time_to_first_token_seconds', 'From arrival to the first token.')
    self._gap = seconds('vllm:inter_token_latency_seconds', 'Between tokens of a request.')
    self._whole = seconds('vllm:e2e_request_latency_seconds', 'From arrival to the last token.')
    self._queue = seconds('vllm:request_queue_time_seconds', 'From arrival to a slot.')
    self._prefill = seconds('vllm:request_prefill_time_seconds', 'From a slot to the first token.')
    self._decode = seconds('vllm:request_decode_time_seconds', 'From the first token to the last.')
    self._prompts = lengths('vllm:request_prompt_tokens', 'Prompt tokens of a request.')
    self._generations = lengths('vllm:request_generation_tokens', 'New tokens of a request.')
    self._most = lengths('vllm:request_params_max_tokens', 'max_tokens of a request.')

  def refuse(self, count: int) -> None:
    """Counts requests that found no place."""
    self._refused.inc(count)

  def ignore(self, names: list[str]) -> None:
    """Counts fields that no API knows; the log has each name once."""
    for name in names:
      self._ignored.inc()
      if len(self._named) < _MOST_NAMED:
        self._named.add(name)
        console.note(f'a request has the field {name[:64]!r}, which no API knows; it is ignored')

  def note(self, ticket, event, now: float) -> None:
    """Records the new tokens, times and end of a request."""
    if event.tokens:
      waited = 0.0
      if not ticket.first:
        ticket.first = now
        self._prompt.inc(len(ticket.request.prompt))
        self._ttft.observe(now - ticket.arrived)
        self._queue.observe(ticket.admitted - ticket.arrived)
        self._prefill.observe(now - ticket.admitted)
      else:
        waited = now - ticket.last
        self._gap.observe(waited)
      # The tokens of one call come together: the first of them was waited for.
      for _ in range(event.tokens - 1):
        self._gap.observe(0.0)
      ticket.last = now
      self._generation.inc(event.tokens)
    if event.finish:
      request = ticket.request
      self._finished.labels(self._name, REASONS[event.finish]).inc()
      self._whole.observe(now - ticket.arrived)
      if ticket.first:
        self._decode.observe(now - ticket.first)
      self._prompts.observe(len(request.prompt))
      self._generations.observe(len(request.tokens))
      self._most.observe(request.params.max_new_tokens)

  def look(self, engine) -> None:
    """Records the engine's gauges after a step."""
    running = [r for r in engine.running if r is not None]
    self.running, self.waiting = len(running), len(engine.waiting)
    self._running.set(self.running)
    self._waiting.set(self.waiting)
    tokens = sum(len(r.prompt) + len(r.tokens) for r in running)
    self._used.set(tokens / (engine.context * self._shape.slots))
    self._engine = engine.figures()

  def text(self) -> str:
    """All metrics in Prometheus' text exposition format."""
    return prometheus_client.generate_latest(self._registry).decode()


class _EngineCollector:
  """The engine's own counters, read when they are asked for."""

  def __init__(self, metrics: Metrics):
    self._metrics = metrics

  def collect(self):
    """Yields the metrics; none before the first step."""
    m = self._metrics
    e, shape, name = m._engine, m._shape, [m._name]
    if not e:
      return
    by_loops = core.CounterMetricFamily(
      'rrt:tokens_by_loops', 'Tokens by the loops that they ran.', labels=['model_name', 'loops']
    )
    for loops, count in enumerate(e['depths_R'], 1):
      by_loops.add_metric([*name, str(loops)], count)
    yield by_loops
    for key, text in _COUNTERS.items():
      family = core.CounterMetricFamily(f'rrt:{key}', text, labels=['model_name'])
      family.add_metric(name, e[key])
      yield family
    tokens = max(sum(e['depths_R']), 1)
    mean = sum(i * n for i, n in enumerate(e['depths_R'], 1)) / tokens
    batch = e['batch_tokens'] / (max(e['steps'], 1) * shape.max_batch_tokens)
    sampler = e['sampled_tokens'] / (max(e['sampler_steps'], 1) * shape.max_sampled_tokens)
    for key, text, value in (
      ('mean_exit_depth', 'Mean loops of a token.', mean),
      ('batch_occupancy', 'Used share of the tokens of a step, 0 to 1.', batch),
      ('sampler_occupancy', 'Used share of the rows of coda and head, 0 to 1.', sampler),
    ):
      gauge = core.GaugeMetricFamily(f'rrt:{key}', text, labels=['model_name'])
      gauge.add_metric(name, value)
      yield gauge
