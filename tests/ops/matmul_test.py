"""Products and their gradients are the plain ones, in either form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.ops import matmul


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_are_the_automatic_ones(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 5, 7)).astype(dtype)
  kernel = jax.random.normal(keys[1], (7, 3))
  dy = jax.random.normal(keys[2], (2, 5, 3)).astype(dtype)
  plain = lambda x, kernel: x @ kernel.astype(x.dtype)
  y, vjp = jax.vjp(matmul.matmul, x, kernel)
  wanted, wanted_vjp = jax.vjp(plain, x, kernel)
  np.testing.assert_array_equal(y, wanted)
  tolerance = 1e-5 if dtype == 'float32' else 0.1
  for a, b in zip(vjp(dy), wanted_vjp(dy), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)


def test_sums_are_cut_where_they_must_be_exact():
  rng = np.random.default_rng(1)
  x32 = jnp.asarray(rng.standard_normal((1, 64, 1536)), jnp.float32)
  kernel32 = jnp.asarray(rng.standard_normal((1536, 8)), jnp.float32)
  exact = np.asarray(x32, np.float64) @ np.asarray(kernel32, np.float64)

  def error(precision):
    with jax.default_matmul_precision(precision):
      found = jax.jit(lambda x, k: matmul.matmul(x, k))(x32, kernel32)
    return np.sqrt(np.mean((np.asarray(found, np.float64) - exact) ** 2))

  assert error('highest') < error(None)
  with jax.default_matmul_precision('highest'):
    pieces = str(jax.make_jaxpr(matmul.matmul)(x32, kernel32))
  assert pieces.count('dot_general') == 8


def test_float32_asks_for_float32_unless_told_otherwise():
  x, kernel = jnp.ones((1, 2, 4)), jnp.ones((4, 3))

  def asked():
    with matmul.float32_is_float32(jnp.float32):
      return str(jax.make_jaxpr(matmul.matmul)(x, kernel))

  assert 'HIGHEST' in asked()
  with jax.default_matmul_precision('tensorfloat32'):
    assert 'HIGHEST' not in asked()
  with matmul.float32_is_float32(jnp.bfloat16):
    assert matmul.precision() is None


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('lead', [(3, 1), (2, 5), (4,), (matmul.FEW + 1, 1)])
def test_transposed_kernels_give_the_same_products(lead, dtype):
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.standard_normal((*lead, 7)), dtype)
  kernel = jnp.asarray(rng.standard_normal((7, 6)), dtype)
  transpose_kernels = matmul.TransposedKernel(kernel.T)
  assert transpose_kernels.shape == kernel.shape
  as32 = lambda a: np.asarray(a, np.float32)
  near = {'atol': 1e-5} if dtype == 'float32' else {'atol': 0.02, 'rtol': 0.02}
  close = lambda a, b: np.testing.assert_allclose(as32(a), as32(b), **near)
  product = jax.jit(matmul.matmul)
  close(product(x, transpose_kernels), x @ kernel)
  close(product(x, matmul.slice_columns(transpose_kernels, 2, 3)), x @ kernel[:, 2:5])


@pytest.mark.parametrize('rows', [3, matmul.FEW + 1])
def test_transposed_kernels_round_alike_from_either_side(rows):
  """What follows a product reads bfloat16, whichever factor the kernel is.

  All sums are whole and exact in float32, and bfloat16 cannot hold them.
  """
  rng = np.random.default_rng(3)
  x, kernel = rng.integers(-8, 9, (1, rows, 64)), rng.integers(-8, 9, (64, 6))
  transpose_kernels = matmul.TransposedKernel(jnp.asarray(kernel.T, jnp.bfloat16))
  product = jax.jit(lambda x: matmul.matmul(x, transpose_kernels).astype(jnp.float32))
  sums = jnp.asarray(x @ kernel, jnp.float32)
  wanted = sums.astype(jnp.bfloat16).astype(jnp.float32)
  assert (wanted != sums).any()
  np.testing.assert_array_equal(product(jnp.asarray(x, jnp.bfloat16)), wanted)


def test_transposed_kernels_have_short_sums_too():
  x, transpose_kernels = jnp.ones((1, 2, 1536)), matmul.TransposedKernel(jnp.ones((8, 1536)))
  with jax.default_matmul_precision('highest'):
    pieces = str(jax.make_jaxpr(matmul.matmul)(x, transpose_kernels))
  assert pieces.count('dot_general') == 8


def test_named_matrices_are_transposed_and_nothing_else():
  kernel = np.arange(6.0).reshape(2, 3)
  params = {'layers_0': {'q': {'kernel': kernel, 'scale': kernel}}}
  transpose_kernels = matmul.transpose_named(params, ('kernel',))['layers_0']['q']
  np.testing.assert_array_equal(transpose_kernels['kernel'].kernel_FxD, kernel.T)
  assert transpose_kernels['scale'] is kernel


@pytest.mark.parametrize(
  'flags, transposed', [('avx2', True), ('avx512f', False), ('avx512f amx_bf16', True)]
)
def test_the_machine_tells_whether_kernels_are_transposed(monkeypatch, flags, transposed):
  monkeypatch.setattr(matmul.Path, 'read_text', lambda path: f'flags : sse {flags}')
  monkeypatch.setattr(matmul.Path, 'exists', lambda path: True)
  matmul._avx512_alone.cache_clear()
  try:
    assert matmul.prefers_transposed() == transposed
  finally:
    matmul._avx512_alone.cache_clear()


@pytest.mark.parametrize(
  'lead, left',
  [
    ((3, 1), True),
    ((matmul.FEW + 1, 1), True),
    ((matmul.FEW + 1,), True),
    ((1, matmul.FEW), True),
    ((1, matmul.FEW + 1), False),
  ],
)
def test_long_prompts_alone_are_the_left_factor(lead, left):
  transposed = matmul.TransposedKernel(jnp.ones((8, 4)))
  jaxpr = str(jax.make_jaxpr(matmul.matmul)(jnp.ones((*lead, 4)), transposed))
  assert ('optimization_barrier' in jaxpr) == left


@pytest.mark.parametrize('gathered', [False, True])
def test_gradients_of_float32_kernels_are_summed_in_float32(gathered):
  """In a bfloat16 computation too: not rounded to it on the way."""
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.normal(size=(2, 40, n)), jnp.bfloat16) for n in (8, 6))
  stored = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
  whole = stored.astype(jnp.bfloat16)

  def product(stored):
    kernel = matmul.GatheredKernel(whole, stored) if gathered else stored
    return jnp.sum((matmul.matmul(x, kernel) * dy).astype(jnp.float32))

  got = jax.grad(product)(stored)
  wide = lambda t: np.asarray(t, np.float64).reshape(80, -1)
  want = wide(x).T @ wide(dy)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  rounded = want.astype(jnp.bfloat16).astype(np.float64)
  assert np.abs(rounded - want).max() > 1e-3  # What a sum in bfloat16 would be off by.


def test_gathered_kernels_are_the_kernels():
  rng = np.random.default_rng(0)
  x, stored = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 8), (8, 6)))
  of = lambda kernel: lambda x: jnp.sum(matmul.matmul(x, kernel) ** 2)
  kernel = matmul.GatheredKernel(stored, stored)
  for plain, gathered in zip(
    jax.value_and_grad(of(stored))(x), jax.value_and_grad(of(kernel))(x), strict=True
  ):
    np.testing.assert_allclose(plain, gathered, rtol=1e-6)
