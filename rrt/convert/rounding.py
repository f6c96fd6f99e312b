"""Shared weights that are rounded while relaxations are fitted to what rounding leaves.

Rounding a finished child leaves its low-rank terms fitted to weights that are no longer
there. Here the shared weight is rounded first and the terms are fitted to the rest, in
turns (LoftQ, arXiv 2310.08659, with one base for R targets): terms to the rounded
weight, the weight to what the terms leave, again rounded. The best turn is kept, by
`sum_b ||x_b (W_b - merged_b)||^2`.

R loops, I inputs, O outputs.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from rrt.convert.weights import ChildWeights, energy
from rrt.ops import least_squares
from rrt.ops.quantize import dense

TURNS = 5


def round_shared(
  weights: ChildWeights, name: str, layer: int, cs_RxIxI, ws_RxIxO, turns: int = TURNS
) -> list[float]:
  """Rounds one shared weight of the block, in turns with its relaxations.

  Args:
    weights: the child's, with the weight to begin from in `shared`; the rounded one
      takes its place.
    name: of the linear.
    layer: of the block.
    cs_RxIxI: covariances of each loop's inputs; None for the identity.
    ws_RxIxO: the weights that the loops stand for.
    turns: how often the weight is fitted again.

  Returns:
    The error before the first turn, and after each.
  """
  R = len(ws_RxIxO)
  errors: list[float] = []
  best = None
  for _ in range(turns + 1):
    codes = weights.round(name, layer)
    rounded_IxO = jnp.asarray(weights.shared[name][layer])
    rests, error = [], 0.0
    for r in range(R):
      c_IxI = None if cs_RxIxI is None else cs_RxIxI[r]
      merged_IxO = weights.fit(name, (r, layer), ws_RxIxO[r], c_IxI)
      error += energy(np.asarray(ws_RxIxO[r] - merged_IxO), c_IxI)
      rests.append(ws_RxIxO[r] - (merged_IxO - rounded_IxO))
    if best is None or error < best[0]:
      best = error, codes
    errors.append(error)
    rests_RxIxO = jnp.stack([jnp.asarray(rest) for rest in rests])
    mean_IxO = rests_RxIxO.mean(0)
    if cs_RxIxI is not None:
      mean_IxO = least_squares.weighted_mean(cs_RxIxI, rests_RxIxO)
    weights.shared[name][layer] = mean_IxO
  assert best is not None
  weights.codes[name][layer] = best[1]
  weights.shared[name][layer] = np.asarray(dense(best[1]))
  return errors
