"""Low-rank terms of clusters of inputs: who gets which is decided by what a weight gets wrong.

With C terms of rank r, one a token, a token computes as much as with one term of rank r and has C
times as many parameters. One term of rank C r that all tokens take is better still, on any
inputs: the outputs of all clusters lie in C r directions, and of all sets of C r directions the
whitened SVD has those that leave the least error.

T tokens, I inputs, O outputs, C clusters, r rank of a cluster's term.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rrt.ops import least_squares

_DIRECTIONS = 16  # Of the errors, in which tokens are compared.


class Clustered(NamedTuple):
  """Low-rank terms and the router to them: y = x A_c B_c, c the largest of x W_r + bias.

  Attributes:
    router_IxC, bias_C: of the logits.
    a_CxIxr, b_CxrxO: the factors.
  """

  router_IxC: jax.Array
  bias_C: jax.Array
  a_CxIxr: jax.Array
  b_CxrxO: jax.Array

  def __call__(self, x_TxI):
    """The mixture's output, [T, O]."""
    own_TxC = _own(x_TxI, self.router_IxC, self.bias_C)
    inner_TxCxr = jnp.einsum('ti,cir->tcr', x_TxI, self.a_CxIxr) * own_TxC[..., None]
    return jnp.einsum('tcr,cro->to', inner_TxCxr, self.b_CxrxO)


def fit(x_TxI, rest_IxO, clusters: int, rank: int, ridge: float = 1e-2) -> Clustered:
  """Clusters tokens by their errors x rest, and gives each cluster a term of its own.

  The router is fitted to the clusters by logistic regression on the inputs; an expert's term is
  the whitened SVD under the covariance of the inputs that the router sends to it.

  Args:
    x_TxI: inputs.
    rest_IxO: what the shared weight lacks.
    clusters: C.
    rank: r.
    ridge: shrinkage of covariances towards their diagonals.
  """
  label_T = k_means(x_TxI @ rest_IxO, clusters)
  router_IxC, bias_C = logistic_regression(x_TxI, label_T, clusters)
  own_TxC = _own(x_TxI, router_IxC, bias_C)
  terms = []
  for c in range(clusters):
    covariance_IxI = (x_TxI * own_TxC[:, c : c + 1]).T @ x_TxI / x_TxI.shape[0]
    terms.append(
      least_squares.low_rank(least_squares.damp(covariance_IxI, ridge), rest_IxO, rank, rank)[:2]
    )
  a_CxIxr, b_CxrxO = (jnp.stack(t) for t in zip(*terms, strict=True))
  return Clustered(router_IxC, bias_C, a_CxIxr, b_CxrxO)


def _own(x_TxI, router_IxC, bias_C):
  """1 for the cluster of each token, [T, C]."""
  logits_TxC = x_TxI @ router_IxC + bias_C[None]
  return jax.nn.one_hot(jnp.argmax(logits_TxC, -1), bias_C.shape[0], dtype=x_TxI.dtype)


def k_means(points_TxO, clusters: int, rounds: int = 20, seed: int = 0):
  """The cluster of each point, int [T], by direction: how far from zero it lies does not count."""
  length_Tx1 = jnp.linalg.norm(points_TxO, axis=-1, keepdims=True)
  points_TxO = points_TxO / jnp.maximum(length_Tx1, 1e-30)
  _, _, right_KxO = jnp.linalg.svd(points_TxO[: 4 * points_TxO.shape[1]], full_matrices=False)
  points_TxK = points_TxO @ right_KxO[:_DIRECTIONS].T
  keys_C = jax.random.split(jax.random.key(seed), clusters)
  center_CxK = points_TxK[jax.random.randint(keys_C[0], (1,), 0, len(points_TxK))]
  for key in keys_C[1:]:  # k-means++: the further from those before, the likelier.
    gap_TxCxK = points_TxK[:, None] - center_CxK[None]
    far_T = jnp.min(jnp.sum(gap_TxCxK**2, -1), -1)
    new = jax.random.categorical(key, jnp.log(far_T + 1e-20))
    center_CxK = jnp.concatenate([center_CxK, points_TxK[new][None]])

  def nearest(center_CxK):
    square_C = jnp.sum(center_CxK**2, -1)
    return jnp.argmin(square_C[None] - 2 * points_TxK @ center_CxK.T, -1)

  def step(center_CxK, _):
    own_TxC = jax.nn.one_hot(nearest(center_CxK), clusters)
    size_Cx1 = jnp.sum(own_TxC, 0)[:, None]
    mean_CxK = own_TxC.T @ points_TxK / jnp.maximum(size_Cx1, 1.0)
    return jnp.where(size_Cx1 > 0, mean_CxK, center_CxK), None

  center_CxK, _ = jax.lax.scan(step, center_CxK, length=rounds)
  return nearest(center_CxK)


@functools.partial(jax.jit, static_argnames=('classes', 'steps'))
def logistic_regression(x_TxI, label_T, classes: int, steps: int = 200, decay: float = 1e-3):
  """(weights [I, C], biases [C]) of a classifier of the inputs, which need no scaling."""
  mean_I, spread_I = jnp.mean(x_TxI, 0), jnp.std(x_TxI, 0) + 1e-6
  z_TxI = (x_TxI - mean_I[None]) / spread_I[None]
  optimizer = optax.adam(0.05)
  start = jnp.zeros((x_TxI.shape[1], classes)), jnp.zeros((classes,))

  def loss(params):
    logits_TxC = z_TxI @ params[0] + params[1][None]
    nll_T = optax.softmax_cross_entropy_with_integer_labels(logits_TxC, label_T)
    return jnp.mean(nll_T) + decay * jnp.sum(params[0] ** 2)

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
  weight_IxC = params[0] / spread_I[:, None]
  return weight_IxC, params[1] - mean_I @ weight_IxC


def improves(found: Clustered, x_TxI, rest_IxO, plain_IxO) -> bool:
  """Whether the mixture's outputs are nearer to x rest than x plain is, by a hundredth.

  In sum, and for the mean token relative to its own size: a few tokens of huge activations
  outweigh all others in the sum.
  """
  want_TxO = x_TxI @ rest_IxO
  size_T = jnp.maximum(jnp.sum(want_TxO**2, -1), 1e-30)
  mine_T, plain_T = (
    jnp.sum((y_TxO - want_TxO) ** 2, -1) for y_TxO in (found(x_TxI), x_TxI @ plain_IxO)
  )
  better = lambda a, b: bool(jnp.sum(a) < 0.99 * jnp.sum(b))
  return better(mine_T, plain_T) and better(mine_T / size_T, plain_T / size_T)
