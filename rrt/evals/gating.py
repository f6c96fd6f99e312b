"""Fitting an exit gate to a model and its threshold to a promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rrt.errors import InputError
from rrt.evals import depth, every_loop
from rrt.evals.threshold import choose
from rrt.exits import fit as fit_lib
from rrt.exits import gate as gate_lib
from rrt.exits import tune_lens
from rrt.infer.engine.engine import Engine, Request

if TYPE_CHECKING:
  from rrt.model import LanguageModel

_T = TypeVar('_T')
SHARES = tuple(i / 20 for i in range(1, 20))


def fit_gate(
  model: LanguageModel,
  rows: Sequence[Sequence[int]],
  *,
  kind: str = 'learned',
  lens: bool = True,
  lens_epochs: int = 0,
  kv: str = 'propagate',
  agreement: float | None = None,
  loss: float | None = None,
  confidence: float = 0.95,
  ridge: float = fit_lib.RIDGE,
  batch: int = 4,
  shares: Sequence[float] = SHARES,
  progress: Callable[[int], None] | None = None,
) -> tuple[gate_lib.Gate, list[depth.Point]]:
  """A gate that keeps a promise on half of some rows, fitted on the others.

  Thresholds are tried from the most careful on, until one fails.

  Args:
    model: of two loops or more, in cycle order.
    rows: at least 8 rows of tokens, from `perplexity.make_rows`.
    kind: 'learned' or 'change'.
    lens: whether to fit one too; see `rrt.exits.fit.fit_lens`.
    lens_epochs: for how many it is then tuned; see `lens.tune_lens`.
    kv: what the loops that a token skipped keep of it.
    agreement: promised share of tokens that are as at full depth; a learned
      gate then learns which tokens are.
    loss: or promised nats a token lost against full depth; it then learns
      exp(-KL), which tells a token that loses little from one that loses much.
    confidence: of the promise.
    ridge: penalty of the regression.
    batch: rows in one pass.
    shares: thresholds tried, by the share of tokens that they let go.
    progress: called with the number of tokens after each pass; there are
      `work` at most.

  Returns:
    The gate, its threshold `NEVER` where nothing keeps the promise, and
    all that was tried.

  Raises:
    InputError: the model has no exits, or the rows are too few.
  """
  every_loop.check(model.config)
  if (agreement is None) == (loss is None):
    raise InputError('Give either an agreement or a loss to promise.')
  if lens_epochs < 0 or (lens_epochs and not lens):
    raise InputError(f'lens_epochs={lens_epochs}: must be 0 or more, and 0 without a lens.')
  fitting, judging = split(rows)
  arrays = None
  if lens or kind == 'learned':
    read = functools.partial(every_loop.read_static, model, batch=batch, progress=progress)
    tune = functools.partial(_fit_lens, model, epochs=lens_epochs, progress=progress)
    arrays = _fit(fitting, read, kind, tune if lens else None, ridge, loss is not None)
  static = every_loop.read_static(model, judging, arrays, batch=batch, progress=progress)
  points: list[depth.Point] = []
  chosen = None
  for share in sorted(shares):
    points += depth.curve(
      model, static, [kind], arrays, kv=kv, shares=[share], batch=batch, progress=progress
    )
    best = choose(points, agreement=agreement, loss=loss, confidence=confidence)
    if best is None or best[0] is not points[-1]:
      break
    chosen = best
  promise: dict[str, Any] = {
    'agreement': agreement,
    'loss': loss,
    'confidence': confidence,
    'tokens': int(static.scored_NxL.sum()),
    'bound': chosen and chosen[1],
    'mean_loops': chosen[0].mean_loops if chosen else model.config.loops,
  }
  threshold = chosen[0].threshold if chosen else gate_lib.NEVER
  return gate_lib.Gate(kind, threshold, arrays, kv, promise), points


def continued(
  model: LanguageModel,
  rows: Sequence[Sequence[int]],
  share: float,
  slots: int = 16,
  progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
  """Rows of which a share goes on, after its first quarter, as the model would.

  The lossless mode guesses what the model itself writes, which repeats itself
  more than the text that it was trained on.

  Args:
    model: continues greedily, at full depth.
    rows: of tokens, as many as `split` asks for; none empty.
    share: of the rows that are continued, rounded up, drawn at random from
      those that fit and from those that judge.
    slots: rows at once.
    progress: called now and then with the tokens written and of how many.

  Returns:
    All rows, in their order and of their lengths.

  Raises:
    InputError: the rows are too few.
  """
  rng = np.random.default_rng(0)
  requests = {}
  for half in split(range(len(rows))):
    for i in rng.permutation(half)[: math.ceil(round(share * len(half), 6))]:
      kept = max(len(rows[i]) // 4, 1)
      if kept < len(rows[i]):
        prompt = list(map(int, rows[i][:kept]))
        requests[i] = Request.of(prompt, len(rows[i]) - kept, ignore_eos=True)
  if requests:
    longest = max(len(rows[i]) for i in requests)
    engine = Engine(model, slots=slots, context=longest)
    engine.run(requests.values(), progress)
  found = [list(map(int, row)) for row in rows]
  for i, request in requests.items():
    found[i] = list(request.prompt) + request.tokens
  return found


def split(rows: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
  """The rows that fit a gate and those that judge it; raises InputError."""
  if len(rows) < 8:
    raise InputError(
      f'{len(rows)} rows of text are too few: half of them judge the gate, '
      'and at least 8 are needed. Give more text or a smaller context.'
    )
  return rows[::2], rows[1::2]


def _fit(rows, read, kind: str, fit_lens, ridge: float, by_loss: bool) -> dict[str, Any]:
  """Lens and gate, where they are asked for.

  What a token's exit is worth is judged, for the gate, with a lens that was
  fitted on the other half of the rows.
  """
  halves = [read(half, fitting=True) for half in (rows[::2], rows[1::2])]
  states = [h.states_RxNxLxD[:, h.scored_NxL] for h in halves]
  arrays: dict[str, Any] = {}
  if fit_lens:
    arrays |= fit_lens(halves)
    if kind == 'learned':
      halves = [read(rows[i::2], fit_lens(halves[1 - i : 2 - i]), fitting=True) for i in (0, 1)]
  if kind == 'learned':
    target = [
      (np.exp(-h.divergence_RxNxL) if by_loss else h.right_RxNxL)[:, h.scored_NxL] for h in halves
    ]
    arrays |= fit_lib.fit(np.concatenate(states, 1)[:-1], np.concatenate(target, 1), ridge)
  return arrays


def _fit_lens(model, halves, *, epochs: int, progress) -> dict[str, Any]:
  """By least squares, then tuned."""
  scored = [h.scored_NxL for h in halves]
  states = [h.states_RxNxLxD for h in halves]
  pairs = zip(states, scored, strict=True)
  arrays: dict[str, Any] = fit_lib.fit_lens(np.concatenate([x[:, s] for x, s in pairs], 1))
  if not epochs:
    return arrays
  return tune_lens.tune_lens(
    model,
    arrays,
    np.concatenate(states, 1),
    np.concatenate(scored),
    epochs=epochs,
    progress=progress,
  )


def work(
  rows: Sequence[Sequence[int]],
  kind: str,
  lens: bool = True,
  shares: Sequence[float] = SHARES,
  tuning: int = 0,
) -> int:
  """Tokens that `fit_gate` reads at most.

  `tuning` is how often a lens is tuned on each: epochs times loops but one.
  """
  judging = sum(map(len, rows[1::2]))
  passes = (lens or kind == 'learned') + (lens and kind == 'learned')
  scored = sum(len(r) - 1 for r in rows[1::2])
  tuned = tuning * (1 + (kind == 'learned')) * sum(map(len, rows[::2]))
  fitting = passes * sum(map(len, rows[::2])) + tuned
  return fitting + judging + len(shares) * scored
