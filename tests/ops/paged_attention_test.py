"""Kernels that read live pages against XLA's loop over pages."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.models import pages
from rrt.ops import paged_attention
from rrt.ops.backend import compiling_for
from tests.command import environment
from tests.models.configs import gemma3, llama
from tests.models.pages_test import LENGTHS, filled

LIBTPU = os.environ.get('RRT_TEST_LIBTPU', '')
CASES = {'global': (llama(), (0, 1, 2), 0, None), 'window': (gemma3(), (1, 1, 1), 1, 3)}


def attend(kind: str, q, kvs, window, cap, monkeypatch):
  """By XLA, or by one of the kernels, interpreted."""
  used = []
  if kind != 'xla':
    kernel = getattr(paged_attention, f'_{kind}')
    record = lambda *args, **kwargs: used.append(kind) or kernel(*args, **kwargs)
    monkeypatch.setattr(paged_attention, '_mosaic', record)
  position = jnp.asarray(LENGTHS - 1)[:, None]
  window = None if window is None else jnp.asarray(window)
  with paged_attention.using('xla' if kind == 'xla' else 'pallas'):
    out = jax.jit(lambda q, kvs: pages.attend(q, kvs, position, window, cap))(q, kvs)
  assert used == [kind] * (kind != 'xla')
  return out


@pytest.mark.parametrize('kind', ['mosaic', 'triton'])
@pytest.mark.parametrize('dtype', ['float32', 'int8'])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('cap', [None, 5.0])
def test_a_kernel_equals_the_loop(kind, dtype, case, cap, monkeypatch):
  config, loops, layer, window = CASES[case]
  q, _, _, kvs, _ = filled(config, loops, dtype, layer)
  want = attend('xla', q, kvs, window, cap, monkeypatch)
  got = attend(kind, q, kvs, window, cap, monkeypatch)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('kind', ['mosaic', 'triton'])
def test_other_pages_are_not_read(kind, monkeypatch):
  """Pages of no live row hold NaN, which a product with zero would keep."""
  q, _, _, kvs, _ = filled(llama(), (0, 1, 2))
  want = attend('xla', q, kvs, None, None, monkeypatch)
  C = kvs.kv_pool.v_PxGxCxDh.shape[2]
  live = {
    int(base) + c
    for base, n in zip(kvs.base_BxW[:, 0], LENGTHS, strict=True)
    for c in range((n - 1) // C + 1)
  }
  dead = np.array([p not in live for p in range(kvs.kv_pool.v_PxGxCxDh.shape[0])])
  spoil = lambda x: jnp.where(dead.reshape(-1, 1, 1, 1), jnp.nan, x)
  pool = kvs.kv_pool._replace(
    k_PxGxDhxC=spoil(kvs.kv_pool.k_PxGxDhxC), v_PxGxCxDh=spoil(kvs.kv_pool.v_PxGxCxDh)
  )
  got = attend(kind, q, kvs._replace(kv_pool=pool), None, None, monkeypatch)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('kind', ['mosaic', 'triton'])
def test_a_dead_row_is_zero_and_changes_no_other(kind, monkeypatch):
  q, _, _, kvs, _ = filled(llama(), (0, 1, 2))
  want = attend(kind, q, kvs, None, None, monkeypatch)
  base = kvs.base_BxW.at[2].set(kvs.kv_pool.v_PxGxCxDh.shape[0])
  got = attend(kind, q, kvs._replace(base_BxW=base), None, None, monkeypatch)
  np.testing.assert_array_equal(got[:2], want[:2])
  assert not np.asarray(got[2]).any() and np.asarray(want[2]).any()


def test_the_choice_is_by_backend_and_can_be_overridden(monkeypatch):
  assert paged_attention.chosen() == 'xla'
  with compiling_for('tpu'):
    assert paged_attention.chosen() == 'pallas'
    monkeypatch.setenv('RRT_PAGED_ATTENTION', 'xla')
    assert paged_attention.chosen() == 'xla'
  with pytest.raises(InputError, match=r"paged attention='flash': must be one of"):
    with paged_attention.using('flash'):
      pass


def shapes(dtype):
  """Arguments of `pages.attend` for a pool of 200 pages of 64, three groups of three heads."""
  of = jax.ShapeDtypeStruct
  kv = [of((200, 3, 64, 64), dtype)] * 2
  steps = [of((200, 3, 64), jnp.float32)] * 2 if dtype == jnp.int8 else [None, None]
  row = of((8, 1), jnp.int32)
  kvs = pages.PagedKV(pages.KVPool(*kv, *steps), row, row)
  return of((8, 1, 9, 64), jnp.bfloat16), kvs, row, of((8,), jnp.int32)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32, jnp.int8])
def test_the_gpu_kernel_lowers_to_triton(dtype):
  with compiling_for('gpu'), paged_attention.using('pallas'):
    traced = jax.jit(lambda *args: pages.attend(*args, 30.0)).trace(*shapes(dtype))
    assert '__gpu$xla.gpu.triton' in traced.lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason='no libtpu; make test installs it')
def test_the_tpu_kernel_compiles_and_copies_no_pool():
  """In a process of its own: libtpu is loaded once, by its path."""
  code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rrt.models import pages
from rrt.ops.backend import compiling_for
from rrt.planner import topology
from tests.ops.paged_attention_test import shapes

mesh = Mesh(np.array(topology.devices(topology.parse('v5e:2x2'))[:1]), ('x',))
one = NamedSharding(mesh, PartitionSpec())
for dtype in (jnp.bfloat16, jnp.float32, jnp.int8):
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes(dtype)
  )
  with compiling_for('tpu'):
    program = jax.jit(lambda *args: pages.attend(*args, 30.0)).trace(*args)
    program = program.lower(lowering_platforms=('tpu',)).compile()
  assert 'tpu_custom_call' in program.as_text(), dtype
  memory = program.memory_analysis()
  assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 20, memory
print('compiled')
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=False,
    env=environment() | {'TPU_LIBRARY_PATH': os.path.abspath(LIBTPU)},
  )
  assert done.stdout.endswith('compiled\n'), done.stderr
