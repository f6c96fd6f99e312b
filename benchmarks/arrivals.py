"""Requests that arrive one by one: waits, rhythm and goodput of a contender.

Open loop: when a request comes does not depend on how the others fare. The
times between two are exponential (a Poisson process), the same for all. A
contender is a function that takes the requests with their times and returns,
for each, the times at which its tokens could be read.

The names are those of vLLM's benchmark: TTFT, time to the first token; TPOT,
time of each further token of a request; ITL, time between two tokens that can
be read; goodput, requests a second whose TTFT and TPOT keep the limits.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import json
import time
import urllib.request

import numpy as np

from benchmarks import hugging_face

Work = Sequence[tuple[list[int], int]]
Contender = Callable[[Work, np.ndarray], list[list[float]]]


def times_of(count: int, rate: float) -> np.ndarray:
  """When each request comes, in seconds from the start."""
  return np.cumsum(np.random.default_rng(2).exponential(1 / rate, count))


def engine(runner) -> Contender:
  """Our engine."""
  from rrt.infer.engine.engine import Request

  def run(work, at):
    requests = [Request.of(p, n, ignore_eos=True) for p, n in work]
    index = {id(r): i for i, r in enumerate(requests)}
    seen: list[list[float]] = [[] for _ in work]
    began, sent = time.perf_counter(), 0
    while sent < len(work) or runner.busy:
      now = time.perf_counter() - began
      while sent < len(work) and at[sent] <= now:
        runner.submit(requests[sent])
        sent += 1
      if not runner.busy:
        time.sleep(max(at[sent] - now, 0))
        continue
      for request in runner.step():
        now = time.perf_counter() - began
        i = index[id(request)]
        seen[i] += [now] * (len(request.tokens) - len(seen[i]))
    return seen

  return run


def static_batches(generate, slots: int) -> Contender:
  """`generate` on whoever waits, as soon as the batch before has ended."""

  def run(work, at):
    seen: list[list[float]] = [[] for _ in work]
    began, sent = time.perf_counter(), 0
    while sent < len(work):
      now = time.perf_counter() - began
      if at[sent] > now:
        time.sleep(at[sent] - now)
        continue
      last = sent
      while last < len(work) and last - sent < slots and at[last] <= now:
        last += 1
      part = work[sent:last]
      steps: list[float] = []

      def note(steps=steps):
        steps.append(time.perf_counter() - began)

      generate(part, note)
      for i, (_, n) in zip(range(sent, last), part, strict=True):
        seen[i] = steps[:n]
      sent = last
    return seen

  return run


def continuous(run_manager) -> Contender:
  """Transformers' continuous batching, streaming."""

  def run(work, at):
    seen: list[list[float]] = [[] for _ in work]
    index: dict[str, int] = {}
    with run_manager() as manager:
      began, sent, done = time.perf_counter(), 0, 0
      while done < len(work):
        now = time.perf_counter() - began
        while sent < len(work) and at[sent] <= now:
          prompt, count = work[sent]
          name = manager.add_request(prompt, max_new_tokens=count, streaming=True)
          index[name], sent = sent, sent + 1
        result = hugging_face.result_of(manager, timeout=0.002)
        if result is None:
          continue
        i, now = index[result.request_id], time.perf_counter() - began
        seen[i] += [now] * (len(result.generated_tokens) - len(seen[i]))
        done += result.is_finished()
    return seen

  return run


def llama(server) -> Contender:
  """llama.cpp's server, streaming."""

  def one(prompt, count, at, began):
    time.sleep(max(began + at - time.perf_counter(), 0))
    request = urllib.request.Request(
      f'{server.url}/completion',
      json.dumps(server.ask(prompt, count) | {'stream': True}).encode(),
      {'Content-Type': 'application/json'},
    )
    seen = []
    with urllib.request.urlopen(request) as answer:
      for line in answer:
        if line.startswith(b'data:'):
          now = time.perf_counter() - began
          seen += [now] * len(json.loads(line[5:]).get('tokens', ()))
    return seen

  def run(work, at):
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(work)) as pool:
      jobs = [pool.submit(one, p, n, t, began) for (p, n), t in zip(work, at, strict=True)]
      return [job.result() for job in jobs]

  return run


def summary(seen: list[list[float]], at: np.ndarray, ttft: float, tpot: float) -> dict[str, float]:
  """Medians and tails of one run.

  Args:
    seen: times of each request's tokens.
    at: when each came.
    ttft, tpot: limits of goodput, seconds.
  """
  first = np.array([s[0] for s in seen]) - at
  each = np.array([(s[-1] - s[0]) / max(len(s) - 1, 1) for s in seen])
  between = np.concatenate([np.diff(s) for s in seen])
  whole = max(s[-1] for s in seen)
  kept = (first <= ttft) & (each <= tpot)
  p = lambda values, share: float(np.percentile(values, share))
  return {
    'ttft_p50': p(first, 50),
    'ttft_p99': p(first, 99),
    'tpot_p50': p(each, 50),
    'tpot_p99': p(each, 99),
    'itl_p50': p(between, 50),
    'itl_p99': p(between, 99),
    'tokens_per_second': sum(map(len, seen)) / whole,
    'requests_per_second': len(seen) / whole,
    'goodput': float(kept.sum()) / whole,
  }
