"""The best child for a number of parameters, found without training.

`candidates` lists children of a size: layers deleted and refitted, loops that start
closed with a low-rank term where a layer went (thin layers), and a block shared
by all loops as `rrt.convert.calibrate` ties it. Each is converted on a part of
the calibration text and scored on rows that no fit has seen; the nearest to the
parent wins. Training moves them closer together (docs/results/equal_parameters.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import time
from typing import Any

from rrt.config import ModelConfig
from rrt.convert import drop, size
from rrt.convert.plan import ConvertConfig, plan, recommended
from rrt.models.count import count_params

DEFAULT_PARAMS = '0.75x'  # What a conversion without a shape aims at.
MOST_TOKENS = 4096  # Calibration tokens of a scored candidate.
CLOSED = 'gain:start=0,components=all'
# Attention has more of a layer's effect a parameter than the MLP: its low-rank
# terms are twice as wide.
THIN = {'q': 2, 'k': 2, 'v': 2, 'o': 2, 'gate': 1, 'up': 1, 'down': 1}
EVEN = dict.fromkeys(THIN, 1)
SHARES = {'attention first': THIN, 'even': EVEN}
# Layers that are thin beyond those that the size asks for, and their ranks' proportions:
# few, since a candidate takes most of a minute.
_THIN_SHAPES = ((0, ('even',)), (1, ('attention first', 'even')), (2, ('attention first',)))


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A child that was considered.

  Attributes:
    kind: 'deleted', 'thin' or 'tied'.
    name: in words.
    convert: how it is made.
    params: unique parameters.
    layers_run: its depth.
    nats: cross-entropy on held-out calibration text; None before it is scored.
    seconds: of its conversion.
  """

  kind: str
  name: str
  convert: ConvertConfig
  params: int
  layers_run: int
  nats: float | None = None
  seconds: float = 0.0


def candidates(
  parent: ModelConfig,
  params: int,
  starts: Callable[[int], list[int]],
  convert: ConvertConfig,
  layers_run: int | None = None,
) -> list[Candidate]:
  """The children of a size that are worth scoring.

  Args:
    parent: the parent's config.
    params: unique parameters, at most.
    starts: (count of layers) to first layers of runs that are cheap to delete,
      the cheapest first.
    convert: further settings, carried over.
    layers_run: the most layers that a token may pass; None for the parent's.
  """
  L = parent.depth
  # Deletions that the compute asks for, and those that the size asks for.
  free = max(L - layers_run, 0) if layers_run else 0
  least = max(size.deletions(params, parent), 1)
  found = []
  for kind, name, ranks, fields in (
    *_deleted(max(least, free), L, starts),
    *_thin(least, free, L, starts),
    *_tied(free, L, starts),
  ):
    made = convert.replace(params=None, layers_run=None, **fields)
    if ranks:
      rank = fill(parent, made, ranks, params)
      if rank is None:
        continue
      made, name = made.replace(rank=rank), f'{name}, rank {_in_words(rank)}'
    config = plan(parent, made)
    count = count_params(config).unique
    if count <= params and (layers_run is None or config.depth <= layers_run):
      found.append(Candidate(kind, name, made, count, config.depth))
  return found


# Kind, name, proportions of ranks and fields of a candidate.
_Made = Iterator[tuple[str, str, dict[str, int], dict[str, Any]]]


def _run(starts: Callable[[int], list[int]], count: int) -> tuple[int, ...]:
  """The run of layers that is cheapest to delete."""
  first = starts(count)[0] if count else 0
  return tuple(range(first, first + count))


def _deleted(count: int, depth: int, starts: Callable[[int], list[int]]) -> _Made:
  """The two runs that are cheapest to delete, refitted around."""
  for start in starts(count)[:2] if count < depth else ():
    gone = tuple(range(start, start + count))
    name = f'{drop.in_words(gone)} deleted'
    yield 'deleted', name, {}, dict(drop=gone, refit='around', loops=1)


def _thin(least: int, free: int, depth: int, starts: Callable[[int], list[int]]) -> _Made:
  """Closed loops in the place of as many layers as the size asks for, and of a few more."""
  gone, kept = _run(starts, free), depth - free
  for more, shares in _THIN_SHAPES:
    thin = least + more - free
    shape = _closed_shape(kept, thin)
    if thin < 1 or shape is None:
      continue
    block, loops = shape
    start = min(max(starts(least)[0] - more // 2, block), kept - thin)
    coda = kept - start - thin
    fields: dict[str, Any] = dict(prelude=start - block, block=block, loops=loops, coda=coda)
    fields |= dict(drop=gone, relax=(CLOSED,))
    name = f'{start}-{start + thin - 1} thin'
    name += f', {drop.in_words(gone)} deleted' if gone else ''
    for label in shares:
      yield 'thin', f'{name}, {label}', SHARES[label], fields


def _tied(free: int, depth: int, starts: Callable[[int], list[int]]) -> _Made:
  """The middle half shared by two loops."""
  prelude, coda = recommended(depth - free, 2)
  fields = dict(prelude=prelude, coda=coda, loops=2, drop=_run(starts, free))
  yield 'tied', 'middle half tied', EVEN, fields


def _closed_shape(depth: int, thin: int) -> tuple[int, int] | None:
  """(block, loops) of `thin` closed positions behind as few shared layers as fit."""
  for loops in range(2, depth + 1):
    block, rest = divmod(thin, loops - 1)
    if not rest and block and block + thin <= depth:
      return block, loops
  return None


def fill(parent: ModelConfig, convert: ConvertConfig, shares: dict[str, int], params: int):
  """The largest ranks in these proportions that `params` pays for; None for none."""
  closed = bool(convert.relax)

  def ranks(r: int) -> dict[str, Any]:
    ahead = (0,) * (1 if closed else convert.loops)
    of = lambda k: (*ahead, *(k * r,) * (convert.loops - 1)) if closed else k * r
    return {name: of(k) for name, k in shares.items()}

  fits = lambda r: count_params(plan(parent, convert.replace(rank=ranks(r)))).unique <= params
  if not fits(1):
    return None
  low, high = 1, parent.d_ff
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return ranks(low)


def _in_words(rank: dict[str, Any]) -> str:
  last = lambda r: r[-1] if isinstance(r, tuple) else r
  q, up = last(rank['q']), last(rank['up'])
  return str(q) if q == up else f'{q} and {up}'


def between(params: int, parent: ModelConfig) -> list[int]:
  """Sizes from `params` to the parent's, for the picture of the frontier."""
  whole = count_params(parent).unique
  return [params + (whole - params) * third // 3 for third in (1, 2)]


def deleted(found: list[Candidate]) -> list[Candidate]:
  """The first of the candidates with deleted layers, which are scored fastest."""
  return [c for c in found if c.kind == 'deleted'][:1]


def score_all(
  found: list[Candidate],
  score: Callable[[ConvertConfig], float],
  progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
  """The candidates with their scores, in the same order.

  Args:
    found: from `candidates`.
    score: converts, and returns nats on held-out text.
    progress: called with (candidates done, candidates in all).
  """
  scored = []
  for i, candidate in enumerate(found):
    start = time.monotonic()
    nats = score(candidate.convert)
    seconds = time.monotonic() - start
    scored.append(dataclasses.replace(candidate, nats=nats, seconds=seconds))
    if progress:
      progress(i + 1, len(found))
  return scored


def nearest(scored: list[Candidate]) -> Candidate:
  """The candidate with the lowest cross-entropy; of equals the one that runs fewer layers."""
  return min(scored, key=lambda c: (c.nats, c.layers_run))


def rows(considered: list[Candidate]) -> list[list[Any]]:
  """Cells for a table: child, unique parameters, layers run, nats; the nearest first."""
  ordered = sorted(considered, key=lambda c: (c.params, -(c.nats or 0.0)), reverse=True)
  return [[c.name, c.params, c.layers_run, c.nats] for c in ordered]
