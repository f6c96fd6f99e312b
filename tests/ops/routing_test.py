"""Routers: choice, weights, losses and balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.ops import routing


def logits(tokens=64, experts=6, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, experts)), jnp.float32)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize('k', [1, 2, 6])
def test_softmax_before_and_behind_top_k(k):
  x = logits()
  order = np.argsort(-np.asarray(x), -1, kind='stable')[:, :k]
  chosen = np.take_along_axis(np.asarray(x), order, -1)
  behind = routing.route(x, k)
  np.testing.assert_array_equal(behind.index_Txk, order)
  np.testing.assert_allclose(behind.gate_Txk, softmax(chosen), atol=1e-6)
  before = routing.route(x, k, normalise='all')
  want = np.take_along_axis(softmax(np.asarray(x)), order, -1)
  np.testing.assert_allclose(before.gate_Txk, want, atol=1e-6)
  # They differ by the chosen probabilities' sum alone.
  total = want.sum(-1, keepdims=True)
  np.testing.assert_allclose(before.gate_Txk / total, behind.gate_Txk, atol=1e-6)


def test_sigmoid_scores():
  x = logits()
  plain = routing.route(x, 2, 'sigmoid', 'none')
  score = 1 / (1 + np.exp(-np.asarray(x)))
  want = np.take_along_axis(score, np.asarray(plain.index_Txk), -1)
  np.testing.assert_allclose(plain.gate_Txk, want, atol=1e-6)
  chosen = routing.route(x, 2, 'sigmoid', 'chosen')
  np.testing.assert_allclose(chosen.gate_Txk, want / want.sum(-1, keepdims=True), atol=1e-6)
  np.testing.assert_allclose(np.sum(plain.prob_TxE, -1), 1.0, atol=1e-5)


def test_dense_gates_hold_the_chosen_weights():
  routes = routing.route(logits(), 2)
  gates = np.asarray(routing.dense_gates(routes))
  assert ((gates > 0).sum(-1) == 2).all()
  np.testing.assert_allclose(gates.sum(-1), 1.0, atol=1e-6)
  np.testing.assert_array_equal(
    np.take_along_axis(gates, np.asarray(routes.index_Txk), -1), routes.gate_Txk
  )


def test_padding_does_not_count():
  index_Txk = jnp.asarray([[0, 1], [0, 1], [2, 3]])
  real_T = jnp.asarray([True, True, False])
  np.testing.assert_allclose(routing.load(index_Txk, 4, real_T), [0.5, 0.5, 0.0, 0.0])
  np.testing.assert_allclose(routing.load(index_Txk, 4), np.full(4, [2, 2, 1, 1]) / 6, atol=1e-6)
  x = logits(3)
  np.testing.assert_allclose(
    routing.z_loss(x, real_T), np.mean(np.log(np.exp(np.asarray(x[:2])).sum(-1)) ** 2), rtol=1e-5
  )
  np.testing.assert_allclose(routing.mean(x, real_T), np.mean(x[:2], 0), atol=1e-6)


def test_the_switch_loss_is_one_where_both_are_uniform():
  uniform = jnp.full((8,), 1 / 8)
  np.testing.assert_allclose(routing.switch_loss(uniform, uniform), 1.0, rtol=1e-6)
  one = jnp.zeros((8,)).at[3].set(1.0)
  np.testing.assert_allclose(routing.switch_loss(one, one), 8.0, rtol=1e-6)
  # The load comes from a choice, which has no gradient.
  to_load = jax.grad(lambda load: routing.switch_loss(load, uniform))(uniform)
  np.testing.assert_array_equal(to_load, 0.0)


def test_the_z_loss_makes_logits_smaller():
  x = logits() * 10
  for _ in range(100):
    x -= 0.5 * jax.grad(routing.z_loss)(x)
  logz = jax.nn.logsumexp
  assert float(jnp.mean(logz(x, -1) ** 2)) < 0.2 * float(jnp.mean(logz(logits() * 10, -1) ** 2))


def test_the_bias_balances_a_skewed_router_and_has_no_gradient():
  rng = np.random.default_rng(0)
  skew_E = jnp.linspace(-1.0, 1.0, 8)[None]
  bias_E = jnp.zeros((8,))
  step = jax.jit(
    lambda x, bias: routing.load(routing.route(x, 2, 'sigmoid', 'chosen', bias).index_Txk, 8)
  )
  batch = lambda: jnp.asarray(rng.normal(size=(2048, 8)), jnp.float32) + skew_E
  first = step(batch(), bias_E)
  assert float(8 * first.max() - 1) > 0.5
  loads = []
  for i in range(500):
    found = step(batch(), bias_E)
    bias_E = routing.balanced(bias_E, found, 0.003)
    if i >= 450:
      loads.append(found)
  assert float(8 * jnp.mean(jnp.stack(loads), 0).max() - 1) < 0.1
  gates = lambda bias: jnp.sum(routing.route(logits(8, 8), 2, 'sigmoid', 'chosen', bias).gate_Txk)
  np.testing.assert_array_equal(jax.grad(gates)(bias_E), 0.0)
  # A bias changes the choice, not a chosen expert's weight.
  moved = routing.route(logits(8, 8), 8, 'sigmoid', 'none', bias_E)
  score = jax.nn.sigmoid(logits(8, 8))
  np.testing.assert_allclose(
    moved.gate_Txk, jnp.take_along_axis(score, moved.index_Txk, -1), atol=1e-6
  )


def test_mutual_information():
  apart = jnp.asarray([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
  np.testing.assert_allclose(routing.mutual_information(apart), np.log(2), rtol=1e-5)
  same = jnp.full((2, 4), 0.25)
  np.testing.assert_allclose(routing.mutual_information(same), 0.0, atol=1e-6)


def test_noise_is_of_the_key():
  x, spread = logits(), jnp.zeros((64, 6))
  one, two = (routing.noisy(x, spread, jax.random.key(i)) for i in (0, 1))
  assert float(jnp.std(one - x)) == pytest.approx(np.log(2), rel=0.15)  # softplus(0)
  assert not np.array_equal(one, two)
  np.testing.assert_array_equal(one, routing.noisy(x, spread, jax.random.key(0)))
