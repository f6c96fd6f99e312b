"""Attention: runs of queries, and a cache that is known to be empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.models import transformer
from rrt.models.cache import as_empty, init_cache
from rrt.ops import attention
from tests.models import configs


def qkv(length, groups=2, heads=4, size=8):
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, *shape: jax.random.normal(key, shape)
  return (
    draw(keys[0], 2, length, heads, size),
    draw(keys[1], 2, groups, size, length),
    draw(keys[2], 2, groups, length, size),
    draw(keys[3], 2, length, heads, size),
  )


@pytest.mark.parametrize('length', [1, 63, 64, 65, 200, 521])
@pytest.mark.parametrize('window', [None, 50])
def test_runs_of_queries_change_nothing(length, window):
  q, k, v, dy = qkv(length)
  at = jnp.tile(jnp.arange(length), (2, 1))
  mask = attention.visible(at, at, window)
  # Packed documents: the second row holds two.
  document = jnp.where(at < length // 3, 1, 2).at[0].set(1)
  mask &= document[:, :, None] == document[:, None, :]

  def run(attend):
    y, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    return y, *vjp(dy)

  for a, b in zip(run(attention.attend_causal), run(attention.attend), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('length', [5, 12])
@pytest.mark.parametrize('name', ['gemma3-cycle', 'llama-sequence'])
def test_an_empty_cache_is_written_as_any_cache_is(scan, length, name):
  c = configs.CONFIGS[name]
  params = configs.perturbed(c)
  tokens = jax.random.randint(jax.random.key(1), (2, length), 0, c.vocab_size)
  cache = init_cache(c, 2, 10, scan=scan)  # Shorter than the longer prompt.

  def run(cache):
    return transformer.forward(c, params, tokens, cache=cache, scan=scan)

  known, unknown = run(as_empty(cache)), run(cache)
  assert jax.tree.structure(known.cache) == jax.tree.structure(unknown.cache)
  fits = min(length, 10)
  np.testing.assert_allclose(
    known.hidden_BxLxD[:, :fits], unknown.hidden_BxLxD[:, :fits], atol=1e-5
  )
  for a, b in zip(jax.tree.leaves(known.cache), jax.tree.leaves(unknown.cache), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.any(np.asarray(a) != 0)
