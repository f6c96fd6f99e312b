"""Weighted sums of looked-up rows against einsums over gathered ones."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt import sharding
from rrt.ops import embedding_bag
from rrt.ops.embedding_bag_kernel import sum_rows, sum_rows_gpu
from tests.command import environment

LIBTPU = os.environ.get('RRT_TEST_LIBTPU', '')


def example(T=20, J=6, N=50, D=24):
  keys = jax.random.split(jax.random.key(0), 4)
  values = jax.random.normal(keys[0], (N, D))
  index = jax.random.randint(keys[1], (T, J), 0, N)
  index = index.at[:, 0].set(index[:, 1])  # A row that a token reads twice.
  return values, index, jax.random.normal(keys[2], (T, J)), jax.random.normal(keys[3], (T, D))


def bag(values, index, weight):
  return jnp.einsum('tj,tjd->td', weight, values[index])


def dots(values, index, x):
  return jnp.einsum('td,tjd->tj', x, values[index])


def both(f, values, index, other):
  """Values and gradients of a function that is not linear in either."""
  loss = lambda values, other: jnp.sum(jnp.sin(f(values, index, other)))
  return f(values, index, other), *jax.grad(loss, (0, 1))(values, other)


# 600 tokens are worked on in two parts, 521 in one.
@pytest.mark.parametrize('T', [20, 600, 521])
def test_values_and_gradients_are_those_of_einsums(T):
  values, index, weight, x = example(T)
  for ours, plain, other in ((embedding_bag.bag, bag, weight), (embedding_bag.dots, dots, x)):
    for got, want in zip(
      both(ours, values, index, other), both(plain, values, index, other), strict=True
    ):
      np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-5)


def test_bfloat16_values_are_summed_in_float32():
  values, index, weight, _ = example()
  half = values.astype(jnp.bfloat16)
  got = embedding_bag.bag(half, index, weight)
  want = bag(half.astype(jnp.float32), index, weight)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_forward_and_backward_hold_no_gathered_rows():
  """Below 8 T D bytes; the gathered rows alone would be 4 T J D."""
  T, J, N, D = 1024, 64, 4096, 256
  of = jax.ShapeDtypeStruct

  def step(values, index, weight, dy):
    return jax.value_and_grad(
      lambda *a: jnp.vdot(embedding_bag.bag(a[0], index, a[1]), dy), (0, 1)
    )(values, weight)

  args = of((N, D), 'float32'), of((T, J), 'int32'), of((T, J), 'float32'), of((T, D), 'float32')
  memory = jax.jit(step).lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 8 * T * D


@pytest.mark.parametrize('kernel', [sum_rows, sum_rows_gpu])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('T', 'J', 'D'), [(20, 6, 128), (8, 16, 24), (3, 1, 128)])
def test_a_kernel_equals_the_loop(kernel, dtype, T, J, D):
  values, index, weight, _ = example(T, J, D=D)
  if J == 1:
    index, weight = index[:, :1], weight[:, :1]
  values = values.astype(dtype)
  got = kernel(values, index, weight, interpret=True)
  want = embedding_bag.bag(values, index, weight)
  np.testing.assert_allclose(
    got.astype(jnp.float32), want.astype(jnp.float32), atol=1e-5 if dtype == 'float32' else 0.05
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_gpu_kernel_lowers_to_triton(dtype):
  of = jax.ShapeDtypeStruct
  args = of((64, 576), dtype), of((16, 12), 'int32'), of((16, 12), 'float32')
  lowered = jax.jit(sum_rows_gpu).trace(*args).lower(lowering_platforms=('cuda',))
  assert '__gpu$xla.gpu.triton' in lowered.as_text()


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'data': 2, 'fsdp': 4}, {'data': 2, 'fsdp': 2}])
def test_columns_over_a_mesh_equal_one_device(sizes):
  """Gradients too; every device holds its columns alone."""
  sizes = sizes | {'tensor': 8 // int(np.prod(list(sizes.values())))}
  values, index, weight, x = example(16)
  mesh = sharding.make_mesh(sizes)
  spec = sharding.spec(('slots', 'values'))
  columns = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
  assert columns.addressable_shards[0].data.shape == (50, 24 // sizes['fsdp'])
  for ours, plain, other in ((embedding_bag.bag, bag, weight), (embedding_bag.dots, dots, x)):
    want = both(plain, values, index, other)
    with jax.set_mesh(mesh):
      run = jax.jit(lambda values, other, f=ours: both(f, values, index, other))
      got = run(columns, other)
      text = run.lower(columns, other).compile().as_text()
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=1e-5)
    assert got[1].sharding.is_equivalent_to(columns.sharding, 2)
    assert 'all-to-all' in text


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason='no libtpu; make test installs it')
def test_the_kernel_compiles_for_tpus():
  """In a process of its own: libtpu is loaded once, by its path."""
  code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rrt.ops import embedding_bag
from rrt.ops.backend import compiling_for
from rrt.planner import topology

mesh = Mesh(np.array(topology.devices(topology.parse('v5e:2x2'))[:1]), ('x',))
one = NamedSharding(mesh, PartitionSpec())
of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
args = of((1 << 16, 1024), 'float32'), of((2048, 128), 'int32'), of((2048, 128), 'float32')
with compiling_for('tpu'):
  program = jax.jit(embedding_bag.bag).trace(*args).lower(lowering_platforms=('tpu',)).compile()
assert 'tpu_custom_call' in program.as_text()
memory = program.memory_analysis()
assert memory.temp_size_in_bytes < 4 * 2048 * 1024, memory
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
