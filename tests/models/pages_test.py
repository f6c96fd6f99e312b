"""The paged cache against dense attention over the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.models import pages
from rrt.models.cache import KV
from rrt.ops import attention
from tests.models.configs import gemma3, llama

G, M, DH, PAGE = 2, 2, 6, 4
LENGTHS = np.array([1, 9, 22])


def dense(q, k, v, window):
  """Attention of the last token of each sequence, one after the other."""
  outs = []
  for row, n in enumerate(LENGTHS):
    mask = attention.visible(jnp.asarray([[n - 1]]), jnp.arange(n)[None], jnp.asarray(window))
    outs.append(
      attention.attend(q[row : row + 1], k[row : row + 1, :, :, :n], v[row : row + 1, :, :n], mask)
    )
  return jnp.concatenate(outs)


def filled(config, loop_of_row, dtype='float32', layer=0):
  """A store whose slots were prefilled but for the last token of each."""
  layout = pages.make_cache_layout(config, len(LENGTHS), 24, PAGE)
  page_range = layout.block[layer]
  keys = jax.random.split(jax.random.key(0), 3)
  k = jax.random.normal(keys[0], (3, G, DH, 24))
  v = jax.random.normal(keys[1], (3, G, 24, DH))
  q = jax.random.normal(keys[2], (3, 1, G * M, DH))
  kv_pool = pages.init_pools(config, layout, PAGE, dtype).block[layer]
  # What another sequence left behind.
  kv_pool = jax.tree.map(lambda t: t + jnp.ones((), t.dtype), kv_pool)
  for row, n in enumerate(LENGTHS):
    kv = KV(k[row : row + 1], v[row : row + 1])
    kv_pool = pages.insert(kv_pool, page_range, loop_of_row[row], row, kv, n - 1)
  last = LENGTHS - 1
  rows = np.arange(3)
  loop_Bx1 = jnp.asarray(loop_of_row)[:, None]
  paged_kvs = pages.PagedKV(
    kv_pool, *page_range.rows(jnp.asarray(rows), loop_Bx1, jnp.ones(3, bool))
  )
  new = lambda t: jnp.asarray(t)[:, None]
  paged_kvs = pages.write(paged_kvs, new(k[rows, :, :, last]), new(v[rows, :, last]), new(last))
  return q, k, v, paged_kvs, page_range


@pytest.mark.parametrize('loops', [(0, 1, 2), (2, 2, 0)])
def test_attention_equals_dense_attention(loops):
  q, k, v, paged_kvs, _ = filled(llama(), loops)
  position = jnp.asarray(LENGTHS - 1)[:, None]
  got = pages.attend(q, paged_kvs, position)
  np.testing.assert_allclose(got, dense(q, k, v, 0), atol=1e-5)


def test_windows_keep_a_few_pages_and_lose_nothing():
  # Layer 1 of this block is global in loops 1 and 3, and has a window in 2.
  config = gemma3()
  windows = [config.windows[d] for d in config.block_depths()[:, 1]]
  for loop, window in enumerate(windows):
    q, k, v, paged_kvs, page_range = filled(config, (loop,) * 3, layer=1)
    assert page_range.count[loop] == (2 if window else 6)
    position = jnp.asarray(LENGTHS - 1)[:, None]
    got = pages.attend(q, paged_kvs, position, jnp.asarray(window))
    np.testing.assert_allclose(got, dense(q, k, v, window), atol=1e-5)
  assert windows == [0, 3, 0]


def test_a_row_does_not_depend_on_the_others():
  q, _, _, paged_kvs, _ = filled(llama(), (0, 1, 2))
  position = jnp.asarray(LENGTHS - 1)[:, None]
  together = pages.attend(q, paged_kvs, position)
  for row in range(3):
    # The other rows are dead: the walk ends with this row's last page.
    alone = jnp.arange(3)[:, None] == row
    base = jnp.where(alone, paged_kvs.base_BxW, paged_kvs.kv_pool.v_PxGxCxDh.shape[0])
    got = pages.attend(q, paged_kvs._replace(base_BxW=base), position)
    np.testing.assert_array_equal(got[row], together[row])


def test_bfloat16_is_kept_bit_for_bit():
  q, k, v, paged_kvs, _ = filled(llama(), (0, 1, 2), 'bfloat16')
  assert paged_kvs.kv_pool.k_PxGxDhxC.dtype == jnp.uint16
  rounded = lambda t: t.astype(jnp.bfloat16).astype(jnp.float32)
  position = jnp.asarray(LENGTHS - 1)[:, None]
  got = pages.attend(q, paged_kvs, position)
  np.testing.assert_allclose(got, dense(q, rounded(k), rounded(v), 0), atol=1e-5)


def test_bytes_are_those_of_the_arrays():
  config = gemma3()
  layout = pages.make_cache_layout(config, 5, 24, PAGE)
  for dtype in ('float32', 'bfloat16'):
    kv_pools = pages.init_pools(config, layout, PAGE, dtype)
    size = sum(x.nbytes for x in jax.tree.leaves(kv_pools))
    assert size == pages.layout_bytes(config, layout, PAGE, dtype)


@pytest.mark.parametrize('loops', [(0, 1, 2), (2, 2, 0)])
def test_int8_is_near_dense_attention(loops):
  """And equal to that over keys and values rounded the same way."""
  q, k, v, paged_kvs, _ = filled(llama(), loops, 'int8')
  assert paged_kvs.kv_pool.k_PxGxDhxC.dtype == jnp.int8
  got = pages.attend(q, paged_kvs, jnp.asarray(LENGTHS - 1)[:, None])
  assert 1e-4 < np.abs(got - dense(q, k, v, 0)).max() < 0.05
  of = lambda t, axis: (lambda codes, step: codes * jnp.expand_dims(step, axis))(
    *pages.rounded(t, axis)
  )
  np.testing.assert_allclose(got, dense(q, of(k, 2), of(v, 3), 0), atol=1e-5)


def test_int8_of_zeros_and_bytes():
  codes, step = pages.rounded(jnp.zeros((2, 3)), -1)
  assert not codes.any() and not step.any()
  config = llama()
  layout = pages.make_cache_layout(config, 3, 24, PAGE)
  kv_pools = pages.init_pools(config, layout, PAGE, 'int8')
  size = sum(t.nbytes for t in jax.tree.leaves(kv_pools))
  assert pages.layout_bytes(config, layout, PAGE, 'int8') == size
  assert size < 0.5 * pages.layout_bytes(config, layout, PAGE, 'float32')
