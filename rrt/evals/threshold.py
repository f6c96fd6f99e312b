"""Calibrates the threshold of a gate so that a quality target is met."""

from __future__ import annotations

from collections.abc import Sequence
import math
import statistics
from typing import TYPE_CHECKING

import numpy as np

from rrt.errors import InputError

if TYPE_CHECKING:
  from rrt.evals.depth import Point


def choose(
  points: Sequence[Point],
  *,
  agreement: float | None = None,
  loss: float | None = None,
  confidence: float = 0.95,
) -> tuple[Point, float] | None:
  """The most aggressive threshold whose confidence bound meets the target.

  Points are tried from the most careful on, and the first that cannot be
  shown to keep the promise ends the search; so the confidence holds for the
  chosen one although many were tried (Learn-then-Test, arXiv 2110.01052).
  Tokens of a row are not independent, so the bound is a one-sided t interval
  over rows. It holds as far as rows are independent pieces of one kind of
  text and thresholds are not chosen by them; rows that follow each other in a
  text, and thresholds at their quantiles, are near to that and not it.

  Args:
    points: of one gate.
    agreement: promised share of tokens that equal full depth's.
    loss: or promised nats a token above full depth.
    confidence: of the bound.

  Returns:
    The point and its bound (a lower one of the agreement, an upper one of
    the loss); None where not even the most careful keeps the promise.
  """
  if (agreement is None) == (loss is None):
    raise InputError('Give either an agreement or a loss to promise.')
  best = None
  for point in sorted(points, key=lambda p: -p.threshold):
    if agreement is not None:
      bound = lower_bound(point.row_agreement, confidence)
      kept = bound >= agreement
    else:
      bound = -lower_bound([-v for v in point.row_lost], confidence)
      kept = bound <= (loss or 0.0)
    if not kept:
      break
    best = (point, bound)
  return best


def lower_bound(values: Sequence[float], confidence: float) -> float:
  """One-sided lower bound of the mean of independent values.

  Student's t through its normal approximation (Abramowitz and Stegun
  26.7.5).
  """
  n = len(values)
  if n < 2:
    return -math.inf
  mean = float(np.mean(values))
  error = float(np.std(values, ddof=1)) / math.sqrt(n)
  z, v = statistics.NormalDist().inv_cdf(confidence), n - 1
  t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
  return mean - t * error
