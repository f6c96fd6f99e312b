"""The kernels of libraries equal `attend_causal`: splash interpreted, cuDNN's interface by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt import sharding
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.models import transformer
from rrt.models.init import init_params
from rrt.ops import flash_attention as flash

B, L, H, G, Dh = 2, 256, 4, 2, 16


def arrays(seed=0, dtype=jnp.float32, batch=B, length=L):
  """Queries, keys, values, positions and segments of packed rows."""
  rng = np.random.default_rng(seed)
  make = lambda heads: jnp.asarray(0.5 * rng.normal(size=(batch, length, heads, Dh)), dtype)
  positions = np.tile(np.arange(length), (batch, 1))
  first = rng.integers(length // 4, length // 2, (batch, 1))
  segments = 1 + (positions >= first)
  positions = np.where(segments == 2, positions - first, positions)
  return make(H), make(G), make(G), jnp.asarray(positions), jnp.asarray(segments)


def value_and_grads(run, q, k, v):
  weight = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
  loss = lambda *qkv: jnp.sum(run(*qkv).astype(jnp.float32) * weight)
  return run(q, k, v), jax.grad(loss, (0, 1, 2))(q, k, v)


def assert_same(run, segments, *, window=0, cap=None):
  q, k, v, positions, segment_ids = arrays()
  segment_ids = segment_ids if segments else None
  if not segments:
    positions = jnp.tile(jnp.arange(L), (B, 1))
  with flash.using('xla'):
    plain = lambda q, k, v: flash.attend_batch(
      q, k, v, positions, segment_ids, window=jnp.asarray(window), windows=(window,), cap=cap
    )
    want = value_and_grads(plain, q, k, v)
  got = value_and_grads(lambda *qkv: run(*qkv, segment_ids, window=window), q, k, v)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('cap', [None, 5.0])
@pytest.mark.parametrize('window', [0, 100, 300])
@pytest.mark.parametrize('segments', [False, True])
def test_splash(segments, window, cap):
  run = functools.partial(flash.splash, cap=cap, interpret=True)
  assert_same(run, segments, window=window, cap=cap)


@pytest.mark.parametrize('window', [0, 100])
@pytest.mark.parametrize('segments', [False, True])
def test_the_interface_of_cudnn(segments, window):
  run = functools.partial(flash.dot_product, implementation='xla')
  assert_same(run, segments, window=window)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [{'fsdp': 4, 'tensor': 2}, {'data': 2, 'fsdp': 4}], ids=str)
def test_splash_on_a_mesh(sizes):
  q, k, v, _, segments = arrays(batch=8, length=128)
  run = functools.partial(flash.splash, window=0, interpret=True)
  alone = run(q, k, v, segments)
  with jax.set_mesh(sharding.make_mesh(sizes)):
    got = jax.jit(run)(q, k, v, segments)
  np.testing.assert_allclose(got, alone, atol=1e-5)


def test_a_traced_window_picks_its_kernel(monkeypatch):
  q, k, v, positions, segments = arrays()
  monkeypatch.setattr(
    flash, 'dot_product', functools.partial(flash.dot_product, implementation='xla')
  )
  monkeypatch.setattr(flash, '_fits', lambda *_: True)

  @functools.partial(jax.jit, static_argnames='kind')
  def run(window, kind):
    with flash.using(kind):
      return flash.attend_batch(q, k, v, positions, segments, window=window, windows=(7, 0, 64, 7))

  for window in (0, 7, 64):
    got, want = run(window, kind='cudnn'), run(window, kind='xla')
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_a_kernel_cannot_take_goes_another_way():
  q, k, v, positions, segments = arrays(length=100)
  plain = flash.attend_batch(q, k, v, positions, segments)
  for kind in ('splash', 'cudnn'):  # 100 is no multiple of 128; float32.
    with flash.using(kind):
      got = flash.attend_batch(q, k, v, positions, segments)
    np.testing.assert_array_equal(got, plain)
  rows = jnp.asarray([3, 0])
  with flash.using('splash'):  # A window a row.
    q, k, v, positions, segments = arrays()
    flash.attend_batch(q, k, v, positions, segments, window=rows, windows=(0, 3))


def test_the_choice(monkeypatch):
  assert flash.chosen() == 'xla'
  monkeypatch.setenv('RRT_ATTENTION', 'splash')
  assert flash.chosen() == 'splash'
  with flash.using('xla'):
    assert flash.chosen() == 'xla'
  monkeypatch.setenv('RRT_ATTENTION', 'flash')
  with pytest.raises(InputError, match='attention='):
    flash.chosen()


@pytest.mark.parametrize('windows', [(), (64, 0, 64, 0)], ids=['global', 'two windows'])
def test_a_training_step_lowers_for_a_tpu(windows):
  """Without one: forward and backward are the kernel's, one for each window."""
  config = ModelConfig(
    family='llama',
    vocab_size=64,
    d_model=32,
    d_ff=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_layers=2,
    loops=2,
    max_context=256,
    windows=windows,
  )
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

  def loss(params, tokens_BxL):
    segments_BxL = jnp.ones_like(tokens_BxL)
    out = transformer.forward(config, params, tokens_BxL, segment_ids_BxL=segments_BxL)
    return jnp.sum(out.hidden_BxLxD)

  tokens_BxL = jax.ShapeDtypeStruct((2, 256), jnp.int32)
  with flash.using('splash'):
    traced = jax.jit(jax.grad(loss)).trace(params, tokens_BxL)
  program = traced.lower(lowering_platforms=('tpu',)).as_text()
  kernels = program.count('stablehlo.custom_call @tpu_custom_call')
  assert kernels == 2 * max(len(set(windows)), 1), kernels
