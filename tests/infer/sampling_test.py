"""The sampling rules against numpy, and their seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.infer.sampling import SamplingArrays, keep_min_p, keep_top_k, keep_top_p, sample

V = 301


@pytest.fixture
def logits_BxV():
  return 3 * np.random.default_rng(0).standard_normal((4, V)).astype(np.float32)


def sampling(b, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None):
  full = lambda v, t: jnp.full((b,), v, t)
  seeds = range(b) if seeds is None else seeds
  return SamplingArrays(
    full(temperature, jnp.float32),
    full(top_k, jnp.int32),
    full(top_p, jnp.float32),
    full(min_p, jnp.float32),
    jnp.asarray(list(seeds), jnp.uint32),
  )


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


@pytest.mark.parametrize('k', [1, 7, V, 10 * V])
def test_top_k_keeps_the_k_largest(logits_BxV, k):
  got = np.asarray(keep_top_k(logits_BxV, jnp.full((4,), k)))
  for row, kept in zip(logits_BxV, got, strict=True):
    want = np.sort(row)[::-1][:k]
    np.testing.assert_array_equal(np.sort(kept[kept > -np.inf])[::-1], want)


@pytest.mark.parametrize('p', [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits_BxV, p):
  got = np.asarray(keep_top_p(logits_BxV, jnp.full((4,), p, jnp.float32)))
  for row, kept in zip(logits_BxV, got, strict=True):
    prob = softmax(row.astype(np.float64))
    order = np.argsort(-prob)
    count = int(np.searchsorted(np.cumsum(prob[order]), p) + 1)
    assert set(np.flatnonzero(kept > -np.inf)) == set(order[:count])


@pytest.mark.parametrize('p', [0.01, 0.5, 1.0])
def test_min_p_is_relative_to_the_most_likely(logits_BxV, p):
  got = np.asarray(keep_min_p(logits_BxV, jnp.full((4,), p, jnp.float32)))
  for row, kept in zip(logits_BxV, got, strict=True):
    prob = softmax(row)
    want = np.flatnonzero(np.log(prob / prob.max()) >= np.log(np.float32(p)))
    assert set(np.flatnonzero(kept > -np.inf)) == set(want)


def test_rules_that_are_off_keep_everything(logits_BxV):
  x = jnp.asarray(logits_BxV)
  np.testing.assert_array_equal(keep_top_k(x, jnp.zeros(4, int)), x)
  np.testing.assert_array_equal(keep_top_p(x, jnp.ones(4)), x)
  np.testing.assert_array_equal(keep_min_p(x, jnp.zeros(4)), x)


def test_each_row_has_its_own_settings(logits_BxV):
  got = keep_top_k(logits_BxV, jnp.asarray([1, 2, 0, 5]))
  assert np.sum(np.asarray(got) > -np.inf, -1).tolist() == [1, 2, V, 5]


def test_temperature_zero_and_top_k_one_are_greedy(logits_BxV):
  step = jnp.zeros(4, jnp.int32)
  want = np.argmax(logits_BxV, -1)
  for s in (sampling(4, temperature=0.0), sampling(4, top_k=1)):
    np.testing.assert_array_equal(sample(logits_BxV, s, step), want)


def test_seeds_repeat_and_rows_do_not_depend_on_the_batch(logits_BxV):
  step = jnp.arange(4)
  whole = sample(logits_BxV, sampling(4), step)
  again = sample(logits_BxV, sampling(4), step)
  np.testing.assert_array_equal(whole, again)
  for i in range(4):
    alone = sample(logits_BxV[i : i + 1], sampling(1, seeds=[i]), step[i : i + 1])
    assert alone[0] == whole[i]
  other = sample(logits_BxV, sampling(4, seeds=range(10, 14)), step)
  assert np.any(np.asarray(other) != np.asarray(whole))


def test_frequencies_follow_the_kept_distribution():
  logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
  n = 4000
  s = sampling(n, top_p=0.9)
  drawn = sample(jnp.repeat(logits, n, 0), s, jnp.zeros(n, jnp.int32))
  share = np.bincount(np.asarray(drawn), minlength=4) / n
  np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_rules_compile_without_a_sort(logits_BxV):
  text = (
    jax.jit(sample)
    .lower(jnp.asarray(logits_BxV), sampling(4, top_k=3), jnp.zeros(4, int))
    .as_text()
  )
  assert 'sort' not in text


def test_tiny_temperatures_take_the_most_likely_token():
  logits_BxV = jnp.array([[10.0, 30.0, 20.0, 5.0]] * 4)
  for p in (1.0, 0.9):
    sampling = SamplingArrays(
      np.array([1e-30, 1e-38, 1.2e-38, 1e-44], np.float32),
      np.zeros(4, np.int32),
      np.full(4, p, np.float32),
      np.zeros(4, np.float32),
      np.arange(4, dtype=np.uint32),
    )
    drawn = sample(logits_BxV, sampling, jnp.zeros(4, jnp.int32))
    assert drawn.tolist() == [1] * 4
