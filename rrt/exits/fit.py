"""Fits exit gates (logistic regression) and lenses (least squares).

N tokens, D model, E = D + 1, R loops.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  pass


RIDGE = 30.0  # Penalty of a gate's regression.


def fit_lens(states_RxNxD: np.ndarray, ridge: float = 0.01) -> dict[str, np.ndarray]:
  """Affine maps from each loop's output to the last one's.

  Least squares, each token weighted by the inverse size of its target, since
  a norm follows and a few tokens have states a hundred times as large.

  Args:
    states_RxNxD: the block's outputs after every loop.
    ridge: added to the second moments, as a share of each.

  Returns:
    `lens_kernel` [R - 1, D, D] and `lens_bias` [R - 1, D]: what is added is
    x @ kernel + bias.
  """
  last_NxD = states_RxNxD[-1].astype(np.float64)
  weight_Nx1 = np.sqrt((last_NxD**2).mean(1, keepdims=True) + 1e-12) ** -1
  kernels, biases = [], []
  for x_NxD in states_RxNxD[:-1].astype(np.float64):
    one_Nx1 = np.ones((len(x_NxD), 1))
    x_NxE = np.concatenate([x_NxD, one_Nx1], 1) * weight_Nx1
    moments_ExE = x_NxE.T @ x_NxE
    moments_ExE += np.diag(ridge * np.diag(moments_ExE) + 1e-9)
    wanted_ExD = x_NxE.T @ ((last_NxD - x_NxD) * weight_Nx1)
    map_ExD = np.linalg.solve(moments_ExE, wanted_ExD)
    kernels.append(map_ExD[:-1])
    biases.append(map_ExD[-1])
  return {'lens_kernel': np.array(kernels, np.float32), 'lens_bias': np.array(biases, np.float32)}


def fit(
  states_RxNxD: np.ndarray, target_RxN: np.ndarray, ridge: float = RIDGE
) -> dict[str, np.ndarray]:
  """Logistic regressions on states, one a loop.

  Args:
    states_RxNxD: the block's outputs after each loop but the last.
    target_RxN: what a score should be, in 0..1: whether the most likely token
      is that of full depth, or exp(-nats lost).
    ridge: weight of the squared kernel against the sum of losses.

  Returns:
    `kernel` [R - 1, D] and `bias` [R - 1].
  """
  kernels, biases = [], []
  for states_NxD, target_N in zip(states_RxNxD, target_RxN, strict=True):
    unit = states_NxD / np.maximum(np.linalg.norm(states_NxD, axis=1, keepdims=True), 1e-6)
    D = unit.shape[1]
    weights = _logistic(unit * D**0.5, target_N.astype(np.float64), ridge)
    kernels.append(weights[:-1])
    biases.append(weights[-1])
  return {'kernel': np.array(kernels, np.float32), 'bias': np.array(biases, np.float32)}


def _logistic(x_NxD: np.ndarray, y_N: np.ndarray, ridge: float) -> np.ndarray:
  """Kernel and, at the end, bias of a ridge logistic regression (Newton)."""
  x = np.concatenate([x_NxD, np.ones((len(x_NxD), 1), x_NxD.dtype)], 1)
  x = x.astype(np.float64)
  penalty = np.full(x.shape[1], ridge)
  penalty[-1] = 1e-6
  share = min(max(y_N.mean(), 1e-4), 1 - 1e-4)
  w = np.zeros(x.shape[1])
  w[-1] = math.log(share / (1 - share))

  def loss(w):
    z = x @ w
    return np.sum(np.logaddexp(0, z) - y_N * z) + 0.5 * np.sum(penalty * w**2)

  now = loss(w)
  for _ in range(50):
    p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
    slope = x.T @ (p - y_N) + penalty * w
    curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
    step = np.linalg.solve(curvature, slope)
    size = 1.0
    while loss(w - size * step) > now and size > 1e-6:
      size /= 2
    w -= size * step
    before, now = now, loss(w)
    if before - now < 1e-6 * len(y_N):
      break
  return w
