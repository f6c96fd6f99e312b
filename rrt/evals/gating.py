"""Fitting an exit gate to a model and its threshold to a promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rrt.errors import InputError
from rrt.evals import depth
from rrt.infer import gates

if TYPE_CHECKING:
  from rrt.pretrained import LanguageModel

_SHARES = tuple(i / 20 for i in range(1, 20))


def fit_gate(
  model: LanguageModel,
  rows: Sequence[Sequence[int]],
  *,
  kind: str = 'learned',
  kv: str = 'write_ahead',
  agreement: float | None = None,
  loss: float | None = None,
  confidence: float = 0.95,
  ridge: float = 1.0,
  batch: int = 4,
  shares: Sequence[float] = _SHARES,
  progress: Callable[[int], None] | None = None,
) -> tuple[gates.Gate, list[depth.Point]]:
  """A gate that keeps a promise on half of some rows, fitted on the others.

  Args:
    model: of two loops or more, in cycle order.
    rows: at least 8 rows of tokens, from `perplexity.make_rows`.
    kind: 'learned' or 'change'.
    kv: what the loops that a token skipped keep of it.
    agreement: promised share of tokens that are as at full depth.
    loss: or promised nats a token lost against full depth.
    confidence: of the promise.
    ridge: penalty of the regression.
    batch: rows in one pass.
    shares: thresholds tried, by the share of tokens that they let go.
    progress: called with the number of tokens after each pass; there are
      `work(rows, kind, shares)` in all.

  Returns:
    The gate, its threshold `gates.NEVER` where nothing keeps the promise, and
    all that was tried.

  Raises:
    InputError: the model has no exits, or the rows are too few.
  """
  depth.check(model.config)
  if (agreement is None) == (loss is None):
    raise InputError('Give either an agreement or a loss to promise.')
  fitting, judging = rows[::2], rows[1::2]
  if len(judging) < 4:
    raise InputError(
      f'{len(rows)} rows of text are too few: half of them judge the gate, '
      'and at least 8 are needed. Give more text or a smaller context.'
    )
  arrays = None
  if kind == 'learned':
    seen = depth.read_static(
      model, fitting, batch=batch, states=True, progress=progress
    )
    assert seen.states_RxNxLxD is not None
    arrays = gates.fit(
      seen.states_RxNxLxD[:, seen.scored_NxL],
      seen.right_RxNxL[:, seen.scored_NxL], ridge,
    )  # fmt: skip
  static = depth.read_static(
    model, judging, arrays, batch=batch, progress=progress
  )
  points = depth.curve(
    model, static, [kind], arrays, kv=kv, shares=shares, batch=batch,
    progress=progress,
  )  # fmt: skip
  chosen = gates.choose(
    points, agreement=agreement, loss=loss, confidence=confidence
  )
  promise: dict[str, Any] = {
    'agreement': agreement, 'loss': loss, 'confidence': confidence,
    'tokens': int(static.scored_NxL.sum()),
    'bound': chosen and chosen[1],
    'mean_loops': chosen[0].mean_loops if chosen else model.config.loops,
  }  # fmt: skip
  threshold = chosen[0].threshold if chosen else gates.NEVER
  return gates.Gate(kind, threshold, arrays, kv, promise), points


def work(
  rows: Sequence[Sequence[int]], kind: str, shares: Sequence[float] = _SHARES
) -> int:
  """Tokens that `fit_gate` reads in all."""
  judging = sum(map(len, rows[1::2]))
  fitting = sum(map(len, rows[::2])) if kind == 'learned' else 0
  scored = sum(len(r) - 1 for r in rows[1::2])
  return fitting + judging + len(shares) * scored
