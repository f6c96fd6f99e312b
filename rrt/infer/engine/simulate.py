"""The engine's schedule without the model: how many passes a workload takes.

`schedule` repeats what `rrt.infer.engine.step` decides on the device and what
`rrt.infer.engine.engine` decides on the host, for one token a slot at a time, and
counts the passes; `seconds` prices them with measured times. What a policy
would gain on a machine is then known before anything is built for it.

The paper's throughput is such a simulation with three simplifications: the
batch is always full, only the block takes time, and all exits are the
oracle's. `paper_rate` is that one.

S slots, R loops, M samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np

from rrt.errors import InputError


@dataclasses.dataclass(frozen=True)
class Policy:
  """What decides a schedule; the fields are those of `EngineShape`.

  Attributes:
    slots: S.
    loops: R.
    max_sampled_tokens: M, tokens that one pass of coda and head, or of the prelude, takes.
    min_sampled_tokens: such a pass waits for so many tokens, or all that live.
    steps: block steps of a call.
    page: positions of a page of the cache.
    fills: whether a sample first fills the loops that its tokens skipped.
  """

  slots: int
  loops: int
  max_sampled_tokens: int
  min_sampled_tokens: int
  steps: int
  page: int = 128
  fills: bool = False

  @classmethod
  def of(cls, shape) -> Policy:
    """That of an engine's plan.

    Raises:
      InputError: a slot of the plan may have several in-flight tokens.
    """
    if shape.tokens_per_slot > 1:
      raise InputError(
        'Only schedules of one token a slot are simulated, not the lossless mode nor exact_fill.'
      )
    return cls(
      shape.slots,
      shape.config.loops,
      shape.max_sampled_tokens,
      shape.min_sampled_tokens,
      shape.steps,
      shape.page,
      shape.fills,
    )


@dataclasses.dataclass
class Passes:
  """What ran.

  Attributes:
    tokens: sampled.
    calls: of the device.
    steps: block steps.
    block_pages: the same by the pages that attention walked over, [pages + 1].
    sampler_pages, prelude_pages: passes of coda and head and of the prelude,
      likewise.
    fill_passes: samples that filled the loops which their tokens skipped.
    batch_tokens: tokens that block steps ran.
    stalls: tokens that waited a step for a pass of coda and head or of the
      prelude.
    prompts: lengths of what was prefilled.
  """

  tokens: int = 0
  calls: int = 0
  steps: int = 0
  fill_passes: int = 0
  batch_tokens: int = 0
  stalls: int = 0
  block_pages: list[int] = dataclasses.field(default_factory=list)
  sampler_pages: list[int] = dataclasses.field(default_factory=list)
  prelude_pages: list[int] = dataclasses.field(default_factory=list)
  prompts: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of what a schedule is made of.

  Attributes:
    block, sampler, prelude: of one pass, given the pages that it walks over.
    prefill: of a prompt, given its tokens.
    fill: of filling what the tokens of a sample skipped.
    call: that a call takes besides.
  """

  block: Callable[[int], float]
  sampler: Callable[[int], float]
  prelude: Callable[[int], float]
  prefill: Callable[[int], float]
  fill: float = 0.0
  call: float = 0.0


_EMPTY, _ENTER, _RUN, _DUE = range(4)


def schedule(
  policy: Policy, work: Sequence[tuple[int, int]], depth_SxT: np.ndarray | None = None
) -> Passes:
  """Counts the passes of an offline drain: all requests wait at the start.

  Args:
    policy: how they are batched.
    work: (tokens of the prompt, tokens of the answer) of each request.
    depth_SxT: after how many loops the t-th token of a slot leaves (its
      columns are used in turns); None for full depth.
  """
  S, R, M = policy.slots, policy.loops, policy.max_sampled_tokens
  if depth_SxT is None:
    depth_SxT = np.full((S, 1), R)
  found = Passes()
  waiting = list(reversed(work))
  stage, loop, wait, position, count, room = np.zeros((6, S), int)
  taken = np.zeros(S, bool)  # As the host knows it.
  ended_before = np.zeros(S, bool)  # Not read yet.

  def pages(rows) -> int:
    return int(position[rows].max()) // policy.page + 1

  def first(rows) -> np.ndarray:
    rows = np.flatnonzero(rows)
    return rows[np.argsort(-wait[rows], kind='stable')][:M]

  def run_prelude() -> None:
    rows = first(stage == _ENTER)
    if not len(rows):
      return
    found.prelude_pages.append(pages(rows))
    stage[rows], loop[rows], wait[rows] = _RUN, 0, 0
    waits = stage == _ENTER
    wait[waits] += 1
    found.stalls += int(waits.sum())

  while waiting or taken.any():
    for s in np.flatnonzero(~taken):
      if waiting:
        prompt, room[s] = waiting.pop()
        if prompt > 1:
          found.prompts.append(prompt - 1)
        stage[s], loop[s], wait[s], count[s] = _ENTER, 0, 0, 0
        position[s], taken[s] = prompt - 1, True
    found.calls += 1
    run_prelude()
    ended = np.zeros(S, bool)
    for _ in range(policy.steps):
      if not stage.any():
        break
      runs = stage == _RUN
      found.steps += 1
      found.batch_tokens += int(runs.sum())
      found.block_pages.append(pages(runs) if runs.any() else 0)
      loop[runs] += 1
      due = depth_SxT[np.arange(S), count % depth_SxT.shape[1]]
      stage[runs & (loop >= np.minimum(due, R))] = _DUE
      is_due = stage == _DUE
      if is_due.sum() >= min(policy.min_sampled_tokens, np.count_nonzero(stage)):
        rows = first(is_due)
        if len(rows):
          found.sampler_pages.append(pages(rows))
          if policy.fills:
            found.fill_passes += bool((loop[rows] < R).any())
          found.tokens += len(rows)
          count[rows] += 1
          position[rows] += 1
          over = count[rows] >= room[rows]
          stage[rows] = np.where(over, _EMPTY, _ENTER)
          wait[rows] = 0
          ended[rows[over]] = True
      late = stage == _DUE
      found.stalls += int(late.sum())
      wait[late] += 1
      run_prelude()
    # The host reads a call after it has launched the next one.
    taken &= ~ended_before
    ended_before = ended
  return found


def seconds(passes: Passes, times: Times) -> float:
  """What the passes take."""
  return (
    sum(map(times.block, passes.block_pages))
    + sum(map(times.sampler, passes.sampler_pages))
    + sum(map(times.prelude, passes.prelude_pages))
    + sum(map(times.prefill, passes.prompts))
    + times.fill * passes.fill_passes
    + times.call * passes.calls
  )


def paper_rate(block_ms: float, mean_loops: float, full: float = 1.0) -> float:
  """Tokens a second as the paper's section 3.8 and appendix K count them.

  Args:
    block_ms: milliseconds a token and loop at the largest batch (table K.1;
      of a vanilla model all its layers are one loop).
    mean_loops: of a token, by the oracle.
    full: share of the batch that is in use.
  """
  if not (block_ms > 0 and mean_loops > 0 and math.isfinite(block_ms)):
    raise InputError('Times and depths must be positive numbers.')
  return full * 1000 / (block_ms * mean_loops)
