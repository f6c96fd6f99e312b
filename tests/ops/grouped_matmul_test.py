"""Grouped products against a loop over the groups, in every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.ops import grouped_matmul as ops
from rrt.ops.backend import compiling_for

SIZES = {
  'even': [50, 50, 50, 50],
  'empty groups': [0, 130, 0, 70],
  'one group': [0, 0, 0, 200],
  'rows behind': [3, 60, 1, 100],
  'no rows': [0, 0, 0, 0],
}


def case(name, rows=200, i=12, o=9, seed=0):
  rng = np.random.default_rng(seed)
  sizes = np.asarray(SIZES[name], np.int32)
  x = rng.normal(size=(rows, i)).astype(np.float32)
  w = rng.normal(size=(len(sizes), i, o)).astype(np.float32)
  return x, w, sizes


def looped(x, w, sizes):
  """One product a group."""
  y, first = jnp.zeros((x.shape[0], w.shape[2])), 0
  for e, size in enumerate(sizes):
    y = y.at[first : first + size].set(x[first : first + size] @ w[e])
    first += size
  return y


@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('kind', ['dense', 'ragged_dot', 'tiles'])
def test_equals_the_loop_with_its_gradients(kind, name):
  x, w, sizes = case(name)
  weight = np.random.default_rng(1).normal(size=(200, 9)).astype(np.float32)
  want, pull = jax.vjp(lambda x, w: looped(x, w, sizes), x, w)

  @jax.jit
  def run(x, w, sizes):
    got, back = jax.vjp(lambda x, w: ops.grouped_matmul(x, w, sizes), x, w)
    return got, *back(jnp.asarray(weight))

  with ops.using(kind):
    got, dx, dw = run(x, w, jnp.asarray(sizes))
  np.testing.assert_allclose(got, want, atol=1e-5)
  for a, b in zip((dx, dw), pull(jnp.asarray(weight)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('rows', [1, 5, 64, 129])
def test_tiles_of_any_number_of_rows(rows):
  rng = np.random.default_rng(rows)
  x, w = rng.normal(size=(rows, 4)), rng.normal(size=(3, 4, 5))
  cuts = np.sort(rng.integers(0, rows + 1, 2))
  sizes = np.diff([0, *cuts, rows]).astype(np.int32)
  x, w = x.astype(np.float32), w.astype(np.float32)
  with ops.using('tiles'):
    got = ops.grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes))
  np.testing.assert_allclose(got, looped(x, w, sizes), atol=1e-5)


def test_sorted_by_is_stable():
  index = jnp.asarray([2, 0, 2, 1, 0])
  order, sizes = ops.sorted_by(index, 4)
  np.testing.assert_array_equal(order, [1, 4, 3, 0, 2])
  np.testing.assert_array_equal(sizes, [2, 1, 2, 0])


def test_the_backend_chooses(monkeypatch):
  monkeypatch.delenv('RRT_GROUPED_MATMUL', raising=False)
  assert ops.chosen() == 'tiles'
  for name, kind in (('tpu', 'gmm'), ('gpu', 'ragged_dot')):
    with compiling_for(name):
      assert ops.chosen() == kind
  monkeypatch.setenv('RRT_GROUPED_MATMUL', 'dense')
  assert ops.chosen() == 'dense'
  monkeypatch.setenv('RRT_GROUPED_MATMUL', 'fast')
  with pytest.raises(InputError, match="grouped matmul='fast': must be one of auto, dense"):
    ops.chosen()


def test_tiles_do_the_work_of_their_rows_alone():
  """XLA counts a loop's body once: tile by tile the operations do not grow with the groups."""
  flops = {}
  for groups in (2, 16):
    x, w = jnp.zeros((1024, 64)), jnp.zeros((groups, 64, 64))
    for kind in ('tiles', 'dense'):
      with ops.using(kind):
        program = jax.jit(lambda *a: ops.grouped_matmul(*a)).lower(
          x, w, jnp.zeros((groups,), jnp.int32)
        )
      flops[kind, groups] = program.compile().cost_analysis()['flops']
  assert flops['tiles', 16] < 1.2 * flops['tiles', 2]
  assert flops['dense', 16] > 6 * flops['dense', 2]
