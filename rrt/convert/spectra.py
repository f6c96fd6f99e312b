"""What shared weights would lack on the calibration text, by singular values.

R loops, N block layers, I inputs and O outputs of a linear.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert.activations import LayerActivations, Stream, kernel_of, sites, with_norms
from rrt.convert.calibrate import ALL_STEPS, CalibrationConfig
from rrt.convert.weights import TINY
from rrt.ops import least_squares


def whitened(
  activations: LayerActivations,
  child: ModelConfig,
  streams: dict[int, Stream],
  norms: Callable[[int], dict[str, Any]],
  steps: CalibrationConfig = ALL_STEPS,
) -> dict[str, np.ndarray]:
  """What a weighted mean would lack at each position, for `rank_budget.spend`.

  Returns:
    component -> whitened singular values relative to the norm of the
    position's own output, [R, N, K].
  """
  R, N = child.loops, child.block_layers
  found = {name: np.zeros((R, N, min(shape))) for name, shape in child.shapes().items()}
  for n in range(N):
    depths = [child.depth_of(r, n) for r in range(R)]
    if steps.permute_units:
      activations.align(depths[0], depths[1:], streams)
    layers = [with_norms(activations.config, activations.layer(d), norms(d)) for d in depths]
    for site, names in sites(activations.config).items():
      cs_RxIxI = jnp.stack(
        [
          least_squares.damp(activations.covariance(site, layer, d, streams[d]), steps.ridge)
          for d, layer in zip(depths, layers, strict=True)
        ]
      )
      for name in names:
        ws_RxIxO = jnp.stack([kernel_of(layer, name) for layer in layers])
        mean_IxO = least_squares.weighted_mean(cs_RxIxI, ws_RxIxO)
        for r in range(R):
          sigma_K = least_squares.spectrum(cs_RxIxI[r], ws_RxIxO[r] - mean_IxO)[0]
          power = jnp.sum((cs_RxIxI[r] @ ws_RxIxO[r]) * ws_RxIxO[r])
          size = jnp.sqrt(jnp.maximum(power, TINY))
          found[name][r, n] = np.asarray(sigma_K / size)
  return found
