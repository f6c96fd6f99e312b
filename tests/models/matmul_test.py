"""The matrix product's own gradient is the automatic one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.models.matmul import matmul


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_are_the_automatic_ones(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 5, 7)).astype(dtype)
  kernel = jax.random.normal(keys[1], (7, 3))
  dy = jax.random.normal(keys[2], (2, 5, 3)).astype(dtype)
  plain = lambda x, kernel: x @ kernel.astype(x.dtype)
  y, vjp = jax.vjp(matmul, x, kernel)
  wanted, wanted_vjp = jax.vjp(plain, x, kernel)
  np.testing.assert_array_equal(y, wanted)
  tolerance = 1e-5 if dtype == 'float32' else 0.1
  for a, b in zip(vjp(dy), wanted_vjp(dy), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance
    )
