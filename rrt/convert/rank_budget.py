"""Distributes a budget of low-rank parameters over positions and matrices."""

from collections.abc import Mapping
import itertools

import numpy as np

from rrt.config import ModelConfig
from rrt.errors import InputError

STEP = 8  # Ranks are multiples of this, or the whole matrix.


def check(budget: int | None, rank: object) -> None:
  """Raises InputError unless a budget is a count, given instead of a rank."""
  if budget is None:
    return
  if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
    raise InputError(f'budget={budget!r}: must be a number of parameters, 0 or more.')
  if rank:
    raise InputError('rank and budget are both given; choose one of them.')


def spend(
  config: ModelConfig, spectra: Mapping[str, np.ndarray], budget: int
) -> dict[str, np.ndarray]:
  """Gives each position and matrix its rank, greedily.

  A step of rank costs (in + out) parameters a direction and regains the
  squared singular values it keeps, as a share of the matrix's own energy.
  Singular values fall, so taking the best step next is optimal up to the
  last one.

  Args:
    config: the child's.
    spectra: component -> singular values of what the shared weight lacks at
      each position, relative to the norm of the position's own weight,
      [R, N, K], falling.
    budget: how many parameters of low-rank terms to spend, at most.

  Returns:
    Ranks by component, int [R, N].
  """
  R, N = config.loops, config.block_layers
  steps = []  # (worth a parameter, cost, component, loop, layer, rank)
  for name, (d_in, d_out) in config.shapes().items():
    full = min(d_in, d_out)
    edges = [*range(0, full, STEP), full]
    for r, n in np.ndindex(R, N):
      energy = spectra[name][r, n] ** 2
      for low, high in itertools.pairwise(edges):
        cost = (high - low) * (d_in + d_out)
        worth = float(energy[low:high].sum()) / cost
        if worth > 0:  # What regains nothing is not bought.
          steps.append((-worth, low, cost, name, r, n, high))
  ranks = {name: np.zeros((R, N), int) for name in spectra}
  left = budget
  for _, low, cost, name, r, n, high in sorted(steps):
    if cost <= left and ranks[name][r, n] == low:
      ranks[name][r, n] = high
      left -= cost
  return ranks
