"""Further sweeps of the calibration, until the child comes no nearer."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import numpy as np

from rrt.convert.activations import LayerActivations, Stream
from rrt.convert.calibrate import CalibrationConfig, Sweep, calibrate
from rrt.convert.weights import ChildWeights


def calibrate_in_sweeps(
  activations: LayerActivations,
  make: Callable[[], ChildWeights],
  streams: dict[int, Stream],
  start: int,
  h_BxLxD: np.ndarray,
  *,
  sweeps: int,
  steps: CalibrationConfig,
  progress: Callable[[int], None],
) -> ChildWeights:
  """Fits children in turn, each to what the one before it left, until they come no nearer.

  Args:
    make: a child's weights, to be filled.
    sweeps: at most so many.

  The others are those of `calibrate`; `streams` stay where there are several sweeps.

  Returns:
    The weights of the best sweep.
  """
  again = sweeps > 1

  def run(sweep: Sweep) -> tuple[ChildWeights, Sweep]:
    weights, wanted = make(), dict(streams) if again else streams
    args = activations, weights, wanted, start, h_BxLxD
    calibrate(*args, steps=steps, sweep=sweep, progress=progress)
    return weights, dataclasses.replace(sweep, before=None)

  best, last = run(Sweep(records=again))
  for _ in range(1, sweeps):
    weights, found = run(Sweep(last, records=True))
    if found.gap >= last.gap:
      break
    best, last = weights, found
  return best
