"""Clusters of tokens by their errors: found where there are some, left where there are none."""

import jax.numpy as jnp
import numpy as np

from rrt.ops import clusters, least_squares


def plain(x, rest, rank):
  c = least_squares.damp(jnp.asarray(x.T @ x / len(x)), 1e-2)
  a, b, _ = least_squares.low_rank(c, jnp.asarray(rest), rank, rank)
  return a @ b


def apart(tokens=2000, seed=0):
  """Two kinds of inputs in different subspaces, whose errors lie in different ones too."""
  rng = np.random.default_rng(seed)
  kind = rng.integers(0, 2, tokens)
  bases = rng.normal(size=(2, 3, 16))
  bases[0, :, 8:], bases[1, :, :8] = 0.0, 0.0
  # Far from zero, so that the kind shows in the input and in the error.
  x = np.einsum('tk,tki->ti', 3.0 + rng.normal(size=(tokens, 3)), bases[kind])
  return x.astype(np.float32), kind


def test_errors_of_two_kinds_are_told_apart():
  x, kind = apart()
  rng = np.random.default_rng(1)
  rest = np.zeros((16, 12), np.float32)
  rest[:8, :6], rest[8:, 6:] = rng.normal(size=(8, 6)), rng.normal(size=(8, 6))
  label = np.asarray(clusters.k_means(jnp.asarray(x @ rest), 2))
  weight, bias = clusters.logistic_regression(jnp.asarray(x), jnp.asarray(kind), 2)
  right = np.mean(np.argmax(x @ np.asarray(weight) + np.asarray(bias), -1) == kind)
  assert right > 0.99
  assert len(set(label)) == 2


def gaps(x, rest, found, rank):
  """Errors on the last tokens: of the clusters' terms, of one of their rank, of one of all ranks."""
  want = x[1500:] @ rest
  gap = lambda y: float(np.sum((np.asarray(y) - want) ** 2))
  one, whole = (x[1500:] @ np.asarray(plain(x[:1500], rest, r)) for r in (rank, 2 * rank))
  return gap(found(jnp.asarray(x[1500:]))), gap(one), gap(whole)


def test_terms_of_clusters_beat_one_of_their_rank_and_not_one_of_all_ranks():
  x, _ = apart()
  rest = np.random.default_rng(2).normal(size=(16, 12)).astype(np.float32)
  found = clusters.fit(jnp.asarray(x[:1500]), jnp.asarray(rest), 2, 3)
  mine, one, whole = gaps(x, rest, found, 3)
  assert mine < 0.1 * one and whole < 0.1 * one
  assert clusters.improves(found, jnp.asarray(x[1500:]), rest, plain(x[:1500], rest, 3))
  assert not clusters.improves(found, jnp.asarray(x[1500:]), rest, rest)


def test_one_term_of_all_ranks_is_the_best_on_the_tokens_it_is_fitted_to():
  """Whatever the router: what it chooses from lies in as many directions."""
  rng = np.random.default_rng(0)
  for seed in range(5):
    x, _ = apart(400, seed)
    x += rng.normal(size=x.shape).astype(np.float32)
    rest = rng.normal(size=(16, 12)).astype(np.float32)
    found = clusters.fit(jnp.asarray(x), jnp.asarray(rest), 2, 3, ridge=1e-6)
    c = jnp.asarray(x.T @ x / len(x))
    a, b, _ = least_squares.low_rank(c, jnp.asarray(rest), 6, 6)
    gap = lambda y, x=x, rest=rest: float(np.sum((np.asarray(y) - x @ rest) ** 2))
    assert gap(x @ np.asarray(a @ b)) < 1.001 * gap(found(jnp.asarray(x)))


def test_one_kind_of_tokens_is_not_improved():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2000, 16)).astype(np.float32)
  rest = np.outer(rng.normal(size=16), rng.normal(size=12)).astype(np.float32)
  found = clusters.fit(jnp.asarray(x[:1500]), jnp.asarray(rest), 2, 1)
  assert not clusters.improves(found, jnp.asarray(x[1500:]), rest, plain(x[:1500], rest, 1))
