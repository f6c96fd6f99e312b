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

  Points are tested from the most conservative on, up to the first whose bound
  misses the target; this fixed sequence keeps the confidence valid for the chosen
  one although several were tested (Learn-then-Test, arXiv 2110.01052). Tokens of
  a row are not independent, so the bound is a one-sided t interval over rows. It
  assumes that rows are independent samples of one distribution and that
  thresholds do not depend on them; consecutive rows of a text, and thresholds at
  their quantiles, satisfy both only approximately.

  Args:
    points: of one gate.
    agreement: target: top-1 agreement with full depth.
    loss: or target: nats a token above full depth.
    confidence: of the bound.

  Returns:
    The point and its bound (a lower one of the agreement, an upper one of the
    loss); None if not even the most conservative meets the target.
  """
  if (agreement is None) == (loss is None):
    raise InputError('Give either agreement or loss as the target.')
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
  """One-sided lower confidence bound of the mean of independent values.

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
