"""Tokens travel to their experts: with enough slots nothing is lost, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt import sharding
from rrt.ops import expert_parallel

MESHES = [{'expert': 4, 'data': 2}, {'expert': 2, 'fsdp': 2, 'tensor': 2}, {'expert': 8}]


def case(tokens=32, choices=2, experts=8, seed=0):
  """Some choices are of no expert."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  index = np.stack([rng.permutation(experts + 2)[:choices] for _ in range(tokens)])
  return (
    {'w': normal(experts, 6, 6)},
    normal(tokens, 6),
    jnp.asarray(index),
    normal(tokens, choices),
  )


def run(kernels, x, product, _):
  return jnp.tanh(product(x, kernels['w']))


def exchanged(operand, output, begin, sizes, at, received, *, axis_name):
  """What XLA has no program for on CPUs: every device sees all operands and takes its slices."""
  gather = lambda x: jax.lax.all_gather(x, axis_name)
  operands, begins, ats, all_sizes = map(gather, (operand, begin, at, sizes))
  P = operands.shape[0]
  slices = begin.shape[0] // P
  me = jax.lax.axis_index(axis_name)
  for source in range(P):
    for j in range(slices):
      i = me * slices + j
      row = jnp.arange(output.shape[0])
      inside = (row >= ats[source, i]) & (row < ats[source, i] + all_sizes[source, i])
      from_row = jnp.clip(row - ats[source, i] + begins[source, i], 0, operand.shape[0] - 1)
      output = jnp.where(inside[:, None], operands[source][from_row], output)
  # The sizes that a device expects are those it is sent.
  sent = all_sizes.reshape(P, P, slices)[:, me].reshape(-1)
  return jnp.where(jnp.all(sent == received), output, jnp.nan)


def looped(kernels, x, index, weight):
  """Token by token."""
  E = kernels['w'].shape[0]
  out = []
  for t in range(x.shape[0]):
    y = jnp.zeros((6,))
    for k in range(index.shape[1]):
      if int(index[t, k]) < E:
        y += weight[t, k] * jnp.tanh(x[t] @ kernels['w'][int(index[t, k])])
    out.append(y)
  return jnp.stack(out)


def gradients(apply, args):
  kernels, x, index, weight = args
  out, pull = jax.vjp(lambda *a: apply(a[0], a[1], index, a[2]), kernels, x, weight)
  return out, pull(jnp.ones_like(out))


def test_one_device_equals_the_loop():
  args = case()
  want = gradients(looped, args)
  got = gradients(lambda *a: expert_parallel.apply(run, *a)[0], args)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  assert float(expert_parallel.apply(run, *args)[1]) == 0.0


@pytest.mark.parametrize('sizes', MESHES, ids=str)
@pytest.mark.parametrize('exchange', ['padded', 'ragged'])
def test_a_mesh_equals_one_device(sizes, exchange, monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', exchanged)
  args = case()
  want = gradients(lambda *a: expert_parallel.apply(run, *a)[0], args)
  mesh = sharding.make_mesh(sizes)

  @jax.jit
  def both(*args):
    return gradients(lambda *a: expert_parallel.apply(run, *a)[0], args)

  with jax.set_mesh(mesh), expert_parallel.using(exchange):
    got = both(*args)
    text = both.lower(*args).compile().as_text()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  assert ('all-to-all' in text) == (exchange == 'padded')


@pytest.mark.parametrize('capacity', [0.5, 1.0, 2.0])
def test_what_has_no_slot_is_dropped_and_counted(capacity):
  kernels, x, index, weight = case(tokens=40, choices=2, experts=4)
  out, dropped = expert_parallel.apply(run, kernels, x, index, weight, capacity)
  slots = expert_parallel.slots(40, 2, 4, capacity)
  assert slots == min(40, int(np.ceil(capacity * 20)))
  used, kept, wanted = np.zeros(4, int), np.zeros(index.shape, bool), 0
  for t in range(40):
    for k in range(2):
      e = int(index[t, k])
      if e < 4:
        wanted += 1
        kept[t, k] = used[e] < slots
        used[e] += 1
  np.testing.assert_allclose(dropped, 1 - kept.sum() / wanted, atol=1e-6)
  want = looped(kernels, x, index, jnp.where(kept, weight, 0.0))
  np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize('exchange', ['padded', 'ragged'])
def test_drops_of_a_mesh_are_those_of_its_devices(exchange, monkeypatch):
  """Each device has slots for its own tokens."""
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', exchanged)
  kernels, x, index, weight = case(tokens=64, choices=1, experts=4)
  mesh = sharding.make_mesh({'expert': 4, 'data': 2})
  with jax.set_mesh(mesh), expert_parallel.using(exchange):
    run_all = jax.jit(lambda *a: expert_parallel.apply(run, *a, 1.0))
    out, dropped = run_all(kernels, x, index, weight)
  parts = [slice(8 * i, 8 * i + 8) for i in range(8)]
  alone = [expert_parallel.apply(run, kernels, x[p], index[p], weight[p], 1.0)[1] for p in parts]
  np.testing.assert_allclose(dropped, np.mean(alone), atol=1e-6)
  each = [expert_parallel.apply(run, kernels, x[p], index[p], weight[p], 1.0)[0] for p in parts]
  np.testing.assert_allclose(out, np.concatenate(each), atol=1e-5)


@pytest.mark.parametrize('tokens', [32, 3])
def test_each_device_sorts_its_own_rows(tokens):
  """Three tokens do not split over the rows: they run as they are."""
  args = case(tokens)
  want = gradients(looped, args)
  sizes = {'data': 4, 'tensor': 2}
  both = jax.jit(lambda *a: gradients(lambda *b: expert_parallel.dropless(run, *b), a))
  with jax.set_mesh(sharding.make_mesh(sizes)):
    got = both(*args)
    text = both.lower(*args).compile().as_text()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  assert 'all-to-all' not in text
