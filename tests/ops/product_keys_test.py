"""Product-key lookup against a search over all keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.ops import product_keys


def searched(first, second, k):
  """The k best of all n^2 keys, and their scores."""
  n = first.shape[-1]
  full = first[..., :, None] + second[..., None, :]
  score, index = jax.lax.top_k(full.reshape(*first.shape[:-1], n * n), k)
  return index, score


@pytest.mark.parametrize(('n', 'k'), [(64, 8), (16, 32), (7, 49), (5, 3), (1, 1)])
@pytest.mark.parametrize('tied', [False, True])
def test_the_lookup_equals_a_search_over_all_keys(n, k, tied):
  keys = jax.random.split(jax.random.key(n), 2)
  first, second = (jax.random.normal(key, (40, 2, n)) for key in keys)
  if tied:  # Few different scores: most of the k-th places are shared.
    first, second = (jnp.asarray(np.round(x) + 0.0) for x in (first, second))  # No -0.
  index, score = product_keys.nearest_by_score(first, second, k)
  want, scores = searched(first, second, k)
  np.testing.assert_array_equal(jnp.sort(index), jnp.sort(want))
  np.testing.assert_array_equal(jnp.sort(score), jnp.sort(scores))
  full = (first[..., :, None] + second[..., None, :]).reshape(40, 2, n * n)
  np.testing.assert_array_equal(jnp.take_along_axis(full, index, -1), score)


def test_the_pairs_are_those_that_can_win():
  assert len(product_keys.candidate_pairs(32, 1024)) == 119
  assert len(product_keys.candidate_pairs(9, 3)) == 9
  rng = np.random.default_rng(0)
  for k in (1, 2, 7, 32):
    kept = {tuple(p) for p in product_keys.candidate_pairs(k, 40)}
    for _ in range(20):
      a, b = (np.sort(rng.normal(size=40))[::-1] for _ in range(2))
      best = np.argsort(-(a[:, None] + b[None]).reshape(-1), kind='stable')[:k]
      assert {divmod(int(i), 40) for i in best} <= kept


def test_queries_meet_the_keys_of_their_head():
  keys = jax.random.split(jax.random.key(0), 2)
  q_TxHx2xK = jax.random.normal(keys[0], (6, 3, 2, 4))
  keys_2xHxnxK = jax.random.normal(keys[1], (2, 3, 5, 4))
  index, score = product_keys.nearest(q_TxHx2xK, keys_2xHxnxK, 2)
  for t, h in np.ndindex(6, 3):
    halves = [np.asarray(keys_2xHxnxK[s, h] @ q_TxHx2xK[t, h, s]) for s in range(2)]
    full = (halves[0][:, None] + halves[1][None]).reshape(-1)
    want = np.argsort(-full)[:2]
    assert set(np.asarray(index[t, h]).tolist()) == set(want.tolist())
    np.testing.assert_allclose(np.sort(score[t, h]), np.sort(full[want]), rtol=1e-5)


def test_scores_have_gradients_and_indices_none():
  q = jax.random.normal(jax.random.key(0), (3, 1, 2, 4))
  k = jax.random.normal(jax.random.key(1), (2, 1, 6, 4))
  loss = lambda q, k: jnp.sum(product_keys.nearest(q, k, 3)[1] ** 2)
  for got in jax.grad(loss, (0, 1))(q, k):
    assert np.isfinite(got).all() and np.abs(got).max() > 0
