"""Aligns the hidden units of tied MLPs before their weights are shared.

An MLP is invariant to permutations of its hidden units, a gated one also to negating
the up and down weights of a unit together. Corresponding units of two layers
need not have the same index, so that a mean of both would mix unrelated units.
Here the units of each later layer are permuted to match those of the first;
what the parent computes is unchanged.

I inputs, O outputs of the MLP, F hidden units.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np


def match_units(
  first: dict[str, Any], other: dict[str, Any], c_IxI, power_first_F, power_other_F
) -> tuple[np.ndarray, np.ndarray]:
  """Which unit of one MLP stands for each of another's.

  Units resemble each other if their gate and up weights give like values on
  the inputs that they get, and what they send down, at the size that it
  usually has, points the same way. Each of the three counts as a share of
  its matrix's energy; the assignment is the best one overall.

  Args:
    first, other: 'up' [I, F] and 'down' [F, O] of each, and 'gate' [I, F] of gated ones.
    c_IxI: covariance of the MLP's inputs, over both layers.
    power_first_F, power_other_F: mean squares of the hidden units.

  Returns:
    (order_F, sign_F): unit `order[i]` of `other`, times `sign[i]`, stands at
    unit i of `first`.
  """
  from scipy import optimize  # Comes with jax; slow to import.

  def alike(a_IxF, b_IxF, weighted_IxF):
    return np.asarray(weighted_IxF.T @ b_IxF / jnp.maximum(jnp.sum(weighted_IxF * a_IxF), 1e-30))

  gated = 'gate' in first
  reads = {
    name: alike(first[name], other[name], c_IxI @ first[name])
    for name in ('gate', 'up')
    if name in first
  }
  sent = first['down'] * jnp.sqrt(power_first_F)[:, None]
  others = other['down'] * jnp.sqrt(power_other_F)[:, None]
  down_FxF = alike(sent.T, others.T, sent.T)
  signed_FxF = reads['up'] + down_FxF
  score_FxF = reads['gate'] + np.abs(signed_FxF) if gated else signed_FxF
  _, order_F = optimize.linear_sum_assignment(score_FxF, maximize=True)
  chosen_F = signed_FxF[np.arange(len(order_F)), order_F]
  negated_F = (chosen_F < 0) & gated
  return order_F, np.where(negated_F, -1.0, 1.0).astype(np.float32)


def reorder(mlp: dict[str, Any], order_F, sign_F) -> dict[str, Any]:
  """The same MLP with its units in another order, some negated."""
  kernel = lambda name: mlp[name]['kernel']
  bias = lambda name, sign_F: (
    {'bias': mlp[name]['bias'][order_F] * sign_F} if 'bias' in mlp[name] else {}
  )
  gate = {}
  if 'gate' in mlp:
    gate = {'gate': {'kernel': kernel('gate')[:, order_F], **bias('gate', 1.0)}}
  return {
    **mlp,
    **gate,
    'up': {'kernel': kernel('up')[:, order_F] * sign_F[None, :], **bias('up', sign_F)},
    'down': {**mlp['down'], 'kernel': kernel('down')[order_F] * sign_F[:, None]},
  }
