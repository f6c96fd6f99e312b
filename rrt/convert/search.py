"""The best child for a number of parameters, found without training.

`search` lists children of a size: layers deleted and refitted, loops that start
closed with a low-rank term where a layer went (thin layers), and a block shared
by all loops as `rrt.convert.calibrate` ties it. Each is converted on a part of
the calibration text and scored on rows that no fit has seen; the nearest to the
parent wins. Training moves them closer together (docs/convert.md has the table).
"""

from __future__ import annotations

from collections.abc import Callable
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
  least = max(size.deletions(params, parent), 1)
  free = max(L - layers_run, 0) if layers_run else 0  # Deletions that compute asks for.
  found: list[Candidate] = []

  def add(kind: str, name: str, ranks: Any = None, **fields: Any) -> None:
    made = convert.replace(params=None, layers_run=None, **fields)
    if ranks is not None:
      rank = fill(parent, made, ranks, params)
      if rank is None:
        return
      made = made.replace(rank=rank)
      name = f'{name}, rank {_in_words(rank)}'
    config = plan(parent, made)
    count = count_params(config).unique
    if count <= params and (layers_run is None or config.depth <= layers_run):
      found.append(Candidate(kind, name, made, count, config.depth))

  count = max(least, free)
  if count < L:
    for start in starts(count)[:2]:
      run = tuple(range(start, start + count))
      add('deleted', f'{drop.in_words(run)} deleted', drop=run, refit='around', loops=1)
  for more in (0, 1, 2, 4):
    thin = least + more - free
    shape = _closed_shape(L - free, thin)
    if thin < 1 or shape is None:
      continue
    gone_count, block, loops = free, *shape
    gone: tuple[int, ...] = ()
    if gone_count:
      first = starts(gone_count)[0]
      gone = tuple(range(first, first + gone_count))
    start = min(max(starts(least)[0] - more // 2, block), L - free - thin)
    arranged = dict(
      prelude=start - block, block=block, loops=loops, coda=L - free - start - thin, drop=gone
    )
    words = f'{start}-{start + thin - 1} thin' + (
      f', {drop.in_words(gone)} deleted' if gone else ''
    )
    for label, ranks in (('attention first', THIN), ('even', EVEN)):
      add('thin', f'{words}, {label}', ranks, relax=(CLOSED,), **arranged)
  prelude, coda = recommended(L - free, 2)
  gone = tuple(range(starts(free)[0], starts(free)[0] + free)) if free else ()
  add('tied', 'middle half tied', EVEN, prelude=prelude, coda=coda, loops=2, drop=gone)
  return found


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


def one_of_each(found: list[Candidate]) -> list[Candidate]:
  """The first deleted and the first thin candidate."""
  first = {c.kind: c for c in reversed(found)}
  return [first[kind] for kind in ('deleted', 'thin') if kind in first]


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
