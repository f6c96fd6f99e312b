"""Fits an exit gate and calibrates its threshold to a quality target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from rrt import console
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
  progress: Callable[[int], None] | Literal['bar'] | None = 'bar',
) -> tuple[gate_lib.Gate, list[depth.Point]]:
  """Fits a gate on half of the rows and calibrates its threshold on the others.

  Thresholds are tested from the most conservative on, until one misses the
  target.

  Args:
    model: of two loops or more, in cycle order.
    rows: at least 8 rows of tokens, from `perplexity.make_rows`.
    kind: 'learned' or 'change'.
    lens: whether to fit one too; see `rrt.exits.fit.fit_lens`.
    lens_epochs: epochs of tuning it; see `rrt.exits.tune_lens.tune_lens`.
    kv: cache policy for the loops that a token skipped.
    agreement: target: top-1 agreement with full depth. The learned gate then
      regresses on whether the top token agrees.
    loss: or target: nats a token lost against full depth. The learned gate then
      regresses on exp(-KL).
    confidence: of the target's bound.
    ridge: penalty of the regression.
    batch: rows in one pass.
    shares: thresholds to test, as shares of tokens that leave.
    progress: called with the number of tokens after each pass, `work` at most;
      'bar' shows them on stderr, None shows nothing.

  Returns:
    The gate, with the threshold `NEVER` if none meets the target, and all
    points that were measured.

  Raises:
    InputError: the model has no exits, or the rows are too few.
  """
  every_loop.check(model.config)
  if (agreement is None) == (loss is None):
    raise InputError('Give either agreement or loss as the target.')
  if lens_epochs < 0 or (lens_epochs and not lens):
    raise InputError(f'lens_epochs={lens_epochs}: must be 0 or more, and 0 without a lens.')
  fitting, judging = split(rows)
  with contextlib.ExitStack() as stack:
    tell: Callable[[int], None] | None = None if progress == 'bar' else progress
    if progress == 'bar':
      tuning = lens_epochs * (model.config.loops - 1)
      total = work(rows, kind, lens, shares, tuning)
      tell = stack.enter_context(console.Progress(total, 'calibrate', 'tokens')).update
    arrays = None
    if lens or kind == 'learned':
      read = functools.partial(every_loop.read_static, model, batch=batch, progress=tell)
      tune = functools.partial(_fit_lens, model, epochs=lens_epochs, progress=tell)
      arrays = _fit(fitting, read, kind, tune if lens else None, ridge, loss is not None)
    static = every_loop.read_static(model, judging, arrays, batch=batch, progress=tell)
    points: list[depth.Point] = []
    chosen = None
    for share in sorted(shares):
      points += depth.curve(
        model, static, [kind], arrays, kv=kv, shares=[share], batch=batch, progress=tell
      )
      best = choose(points, agreement=agreement, loss=loss, confidence=confidence)
      if best is None or best[0] is not points[-1]:
        break
      chosen = best
  calibration: dict[str, Any] = {
    'agreement': agreement,
    'loss': loss,
    'confidence': confidence,
    'tokens': int(static.scored_NxL.sum()),
    'bound': chosen and chosen[1],
    'mean_loops': chosen[0].mean_loops if chosen else model.config.loops,
  }
  threshold = chosen[0].threshold if chosen else gate_lib.NEVER
  return gate_lib.Gate(kind, threshold, arrays, kv, calibration), points


def continued(
  model: LanguageModel,
  rows: Sequence[Sequence[int]],
  share: float,
  slots: int = 16,
  progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
  """Replaces a share of the rows by the model's continuation of their first quarter.

  The lossless mode drafts tokens of the model's own output, which repeats itself
  more than the training text; a gate for it is fitted on such rows.

  Args:
    model: continues greedily, at full depth.
    rows: of tokens, as many as `split` needs; none empty.
    share: of rows to continue, rounded up, chosen at random in the fitting half
      and in the calibration half.
    slots: rows decoded at once.
    progress: called with the tokens generated so far and their total.

  Returns:
    All rows, with order and lengths unchanged.

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
  """Splits rows into (fitting, calibration); InputError if they are too few."""
  if len(rows) < 8:
    raise InputError(
      f'{len(rows)} rows of text are too few: half of them judge the gate, '
      'and at least 8 are needed. Give more text or a smaller context.'
    )
  return rows[::2], rows[1::2]


def _fit(rows, read, kind: str, fit_lens, ridge: float, by_loss: bool) -> dict[str, Any]:
  """Fits the lens and the gate that are asked for.

  The gate's regression targets are computed with a lens that was fitted on the
  other half of the rows (cross-fitting).
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
  """Fits a lens by least squares, then tunes it."""
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
  """Maximum number of tokens that `fit_gate` processes.

  `tuning` is epochs * (R - 1), the passes of tuning the lens over each token.
  """
  judging = sum(map(len, rows[1::2]))
  passes = (lens or kind == 'learned') + (lens and kind == 'learned')
  scored = sum(len(r) - 1 for r in rows[1::2])
  tuned = tuning * (1 + (kind == 'learned')) * sum(map(len, rows[::2]))
  fitting = passes * sum(map(len, rows[::2])) + tuned
  return fitting + judging + len(shares) * scored
