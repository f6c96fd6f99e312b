"""Routers of mixtures of experts: which experts a token takes, with what weight, and balance.

All in float32. T tokens, E experts, k experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

SCORES = ('softmax', 'sigmoid')
NORMALISE = ('chosen', 'all', 'none')


class Routes(NamedTuple):
  """The experts of each token.

  Attributes:
    index_Txk: int32, best first; of equal ones the lowest.
    gate_Txk: float32.
    prob_TxE: scores of all experts, which sum to 1.
  """

  index_Txk: jax.Array
  gate_Txk: jax.Array
  prob_TxE: jax.Array


def route(logits_TxE, k: int, score='softmax', normalise='chosen', bias_E=None) -> Routes:
  """Chooses the top k experts.

  Args:
    logits_TxE: float32.
    k: experts a token.
    score: 'softmax', or 'sigmoid' of each expert by itself.
    normalise: 'chosen' divides by the sum of the chosen scores (softmax behind top-k, as
      Mixtral); 'all' leaves the scores' sum over all experts at 1 (softmax before top-k, as
      Switch); 'none' leaves sigmoids as they are.
    bias_E: added to the scores for the choice alone (arXiv 2408.15664).
  """
  score_TxE = jax.nn.softmax(logits_TxE) if score == 'softmax' else jax.nn.sigmoid(logits_TxE)
  total_Tx1 = jnp.sum(score_TxE, -1, keepdims=True)
  by_TxE = score_TxE if bias_E is None else score_TxE + bias_E[None]
  _, index_Txk = jax.lax.top_k(jax.lax.stop_gradient(by_TxE), k)
  if normalise == 'chosen' and score == 'softmax':  # As softmax of the chosen logits: no 0 / 0.
    gate_Txk = jax.nn.softmax(jnp.take_along_axis(logits_TxE, index_Txk, -1))
  else:
    gate_Txk = jnp.take_along_axis(score_TxE, index_Txk, -1)
    if normalise == 'chosen':
      gate_Txk /= jnp.maximum(jnp.sum(gate_Txk, -1, keepdims=True), 1e-20)
    elif normalise == 'all':
      gate_Txk /= jnp.maximum(total_Tx1, 1e-20)
  return Routes(index_Txk, gate_Txk, score_TxE / jnp.maximum(total_Tx1, 1e-20))


def dense_gates(routes: Routes):
  """The weights of all experts, zero for those not chosen, [T, E]."""
  E = routes.prob_TxE.shape[-1]
  chosen_TxkxE = jax.nn.one_hot(routes.index_Txk, E, dtype=jnp.float32)
  return jnp.sum(chosen_TxkxE * routes.gate_Txk[..., None], 1)


def load(index_Txk, experts: int, real_T=None):
  """The share of all choices that each expert has, [E]; padding does not count.

  Args:
    index_Txk: chosen experts.
    experts: E.
    real_T: bool, tokens that are no padding; None for all.
  """
  T, k = index_Txk.shape
  weight_T = jnp.ones((T,)) if real_T is None else real_T.astype(jnp.float32)
  counts_E = jnp.zeros((experts,)).at[index_Txk].add(jnp.broadcast_to(weight_T[:, None], (T, k)))
  return counts_E / jnp.maximum(k * jnp.sum(weight_T), 1.0)


def mean(values_Tx, real_T=None):
  """The mean over tokens that are no padding."""
  if real_T is None:
    return jnp.mean(values_Tx, 0)
  weight = real_T.astype(jnp.float32).reshape(-1, *(1,) * (values_Tx.ndim - 1))
  return jnp.sum(values_Tx * weight, 0) / jnp.maximum(jnp.sum(weight), 1.0)


def switch_loss(load_E, prob_E):
  """E sum_e load_e prob_e over the last axis: 1 where both are uniform (arXiv 2101.03961)."""
  return load_E.shape[-1] * jnp.sum(jax.lax.stop_gradient(load_E) * prob_E, -1)


def z_loss(logits_TxE, real_T=None):
  """The mean squared log-partition function (ST-MoE, arXiv 2202.08906)."""
  return mean(jax.nn.logsumexp(logits_TxE, -1) ** 2, real_T)


def noisy(logits_TxE, spread_TxE, key):
  """Logits with normal noise of softplus(spread) (Shazeer et al., arXiv 1701.06538)."""
  return logits_TxE + jax.random.normal(key, logits_TxE.shape) * jax.nn.softplus(spread_TxE)


def balanced(bias_E, load_E, rate: float):
  """The next loss-free bias: up for experts below the mean load, down above (arXiv 2408.15664)."""
  mean_load = jnp.mean(load_E, -1, keepdims=True)
  return bias_E + rate * jnp.sign(mean_load - load_E)


def mutual_information(load_RxE):
  """Of loop and expert in nats, over the last two axes; loops weigh alike where they ran."""
  joint = load_RxE / jnp.maximum(jnp.sum(load_RxE, (-2, -1), keepdims=True), 1e-20)
  loops, experts = jnp.sum(joint, -1, keepdims=True), jnp.sum(joint, -2, keepdims=True)
  ratio = joint / jnp.maximum(loops * experts, 1e-20)
  return jnp.sum(jnp.where(joint > 0, joint * jnp.log(jnp.maximum(ratio, 1e-20)), 0.0), (-2, -1))
