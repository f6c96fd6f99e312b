"""RoPE, norms, windows and the low-rank product against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.config import Rope
from rrt.models.layers import Linear, apply_rope, rms_norm, rope_frequencies
from rrt.ops.attention import attend, visible
from rrt.ops.matmul import FEW, TransposedKernel
from rrt.relax.lora import low_rank, low_rank_wide, widen
from tests.models.configs import llama


def test_rope_rotates_by_position_times_frequency():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 3, 1, 8)).astype(np.float32)
  freq = 100.0 ** (-np.arange(4) / 4)
  angle = np.arange(3)[:, None] * freq
  z = x[..., :4] + 1j * x[..., 4:]
  z = z * np.exp(1j * angle)[None, :, None, :]
  got = apply_rope(jnp.asarray(x), jnp.cos(angle)[None], jnp.sin(angle)[None])
  np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-5)
  np.testing.assert_allclose(rope_frequencies(Rope(base=100.0), 8), freq, rtol=1e-6)


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
  plain = rope_frequencies(Rope(base=5e5), 128)
  rope = Rope(base=5e5, scaling='llama3', factor=8.0, original_context=8192)
  scaled = np.asarray(rope_frequencies(rope, 128))
  wavelength = 2 * np.pi / np.asarray(plain)
  np.testing.assert_allclose(scaled[wavelength < 2048], plain[wavelength < 2048], rtol=1e-6)
  np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
  between = (wavelength > 2048) & (wavelength < 8192)
  assert between.any()
  assert (scaled[between] < plain[between]).all()
  assert (scaled[between] > plain[between] / 8).all()


def test_linear_scaling_divides_all_frequencies():
  plain = rope_frequencies(Rope(), 16)
  scaled = rope_frequencies(Rope(scaling='linear', factor=4.0), 16)
  np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


@pytest.mark.parametrize('unit_offset', [False, True])
def test_rms_norm_gains(unit_offset):
  x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
  gain = np.linspace(-1, 2, 8).astype(np.float32)
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  expected = expected * (gain + unit_offset)
  got = rms_norm(jnp.asarray(x), jnp.asarray(gain)[None, None], 1e-6, unit_offset)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_window_counts_the_token_itself():
  at = jnp.arange(5)[None]
  mask = np.asarray(visible(at, at, jnp.int32(2)))[0]
  np.testing.assert_array_equal(mask, np.tri(5, dtype=bool) & ~np.tri(5, k=-2, dtype=bool))
  everything = np.asarray(visible(at, at, jnp.int32(0)))[0]
  np.testing.assert_array_equal(everything, np.tri(5, dtype=bool))


def test_grouped_attention_equals_repeated_heads():
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (2, 5, 6, 4))
  k, v = (jax.random.normal(key, (2, 5, 2, 4)) for key in keys[1:])
  mask = jnp.broadcast_to(jnp.tri(5, dtype=bool)[None], (2, 5, 5))
  got = attend(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask)
  k3, v3 = np.repeat(k, 3, 2), np.repeat(v, 3, 2)
  logits = np.einsum('blhd,bshd->bhls', q, k3)
  logits = np.where(np.asarray(mask)[:, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  np.testing.assert_allclose(got, np.einsum('bhls,bshd->blhd', weights, v3), atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('length', [4, FEW])
@pytest.mark.parametrize('form', ['by loop', 'wide', 'turned'])
def test_low_rank_by_row_equals_merged_weights(form, length, dtype):
  rng = np.random.default_rng(2)
  rounded = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  x, a, b = rounded(3, length, 6), rounded(2, 6, 3), rounded(2, 3, 5)
  loops = np.array([1, 0, 1])

  @jax.jit
  def product(x, loop):
    if form == 'by loop':
      return low_rank(x, a, b, loop, 0.5)
    factors = widen(a, b)
    if form == 'turned':
      factors = [TransposedKernel(f.T) for f in factors]
    return low_rank_wide(x, *factors, loop, 2, 0.5)

  as32 = lambda x: np.asarray(x, np.float32)
  near = {'atol': 1e-5} if dtype == 'float32' else {'atol': 0.1, 'rtol': 0.02}
  got = product(x, jnp.asarray(loops))
  assert got.dtype == dtype
  for row, loop in enumerate(loops):
    w = 0.5 * as32(a[loop]) @ as32(b[loop])
    np.testing.assert_allclose(as32(got[row]), as32(x[row]) @ w, **near)
    alone = product(x[row : row + 1], int(loop))
    np.testing.assert_allclose(as32(alone[0]), as32(got[row]), **near)


def test_a_turned_kernel_of_another_shape_is_refused():
  config = llama()
  linear = Linear(config, 'up')
  d_in, d_out = config.shapes()['up']
  x = jnp.ones((1, 2, d_in))
  run = lambda kernel: linear.apply({'params': {'kernel': TransposedKernel(kernel)}}, x)
  assert run(jnp.ones((d_out, d_in))).shape == (1, 2, d_out)
  with pytest.raises(ValueError, match='up: a kernel of'):
    run(jnp.ones((d_in, d_out)))
