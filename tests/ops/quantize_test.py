"""Codes of 8 and 4 bits: rounding, packing, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.ops import quantize
from rrt.ops.matmul import matmul

qwix = pytest.importorskip('qwix')


def matrix(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parts(kind, w):
  """Group by group: (values, what they became), [groups, g, O]."""
  found = np.asarray(quantize.dense(quantize.quantize(w, kind)))
  group = quantize.group_of(w.shape[-2])
  return (t.reshape(-1, group, t.shape[-1]) for t in (w, found))


@pytest.mark.parametrize('kind', quantize.KINDS)
def test_the_error_is_at_most_half_a_step(kind):
  w = matrix(192, 40)
  codes = quantize.quantize(w, kind)
  before, after = parts(kind, w)
  step = np.asarray(codes['step'])[:, None, :]
  # The widest gap of NF4 is between its lowest two quantiles.
  half = {'int8': 0.5, 'int4': 0.5, 'nf4': (1 - 0.6961928) / 2}[kind]
  assert (np.abs(before - after) <= half * step * (1 + 1e-4)).all()  # Of float32, in steps.
  assert np.abs(before - after).max() > 0.3 * half * step.min()


@pytest.mark.parametrize('kind', quantize.KINDS)
@pytest.mark.parametrize('shape', [(128, 20), (3, 128, 20), (2, 3, 74, 5)])
def test_packed_codes_are_qwix_codes(kind, shape):
  w = matrix(*shape)
  axis, rest = len(shape) - 2, [i for i in range(len(shape)) if i != len(shape) - 2]
  group = quantize.group_of(shape[-2])
  qtype = 'nf4' if kind == 'nf4' else jnp.dtype(kind)
  wanted = qwix.quantize(jnp.asarray(w), qtype, channelwise_axes=rest, tiled_axes={axis: group})
  codes = quantize.quantize(w, kind)
  assert {k: v.shape for k, v in codes.items()} == quantize.shapes(shape, kind)
  assert codes[kind].dtype == (jnp.int8 if kind == 'int8' else jnp.uint8)
  np.testing.assert_array_equal(quantize.dense(codes), qwix.dequantize(wanted))


def test_nf4_keeps_values_of_its_codebook():
  w = np.asarray(quantize.dense(quantize.quantize(matrix(64, 8), 'nf4')))
  again = np.asarray(quantize.dense(quantize.quantize(w, 'nf4')))
  np.testing.assert_allclose(again, w, rtol=1e-6)


def test_bytes_of_a_weight():
  w = matrix(640, 30)
  size = lambda kind: sum(v.nbytes for v in quantize.quantize(w, kind).values()) / w.size
  assert size('int8') == 1 + 4 / 64
  assert size('int4') == size('nf4') == 0.5 + 4 / 64


@pytest.mark.parametrize('size, group', [(576, 64), (1536, 64), (74, 37), (20, 20), (131, 1)])
def test_groups(size, group):
  assert quantize.group_of(size) == group


def test_rows_of_a_table():
  table = matrix(50, 128)
  codes = quantize.quantize(table, 'int8', axis=-1)
  tokens = np.array([[3, 0], [49, 3]])
  found = quantize.dense(quantize.rows(codes, tokens))
  np.testing.assert_array_equal(found, np.asarray(quantize.dense(codes))[tokens])


def test_an_odd_number_of_inputs_has_no_pairs():
  with pytest.raises(InputError, match='odd'):
    quantize.quantize(matrix(33, 4), 'nf4')
  quantize.quantize(matrix(33, 4), 'int8')


@pytest.mark.parametrize('kind', quantize.KINDS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_products_and_their_gradients(kind, dtype):
  codes, x = quantize.quantize(matrix(64, 12), kind), jnp.asarray(matrix(2, 5, 64, seed=1), dtype)
  kernel = quantize.dense(codes, x.dtype)
  loss = lambda x, kernel: jnp.sum(jnp.sin(matmul(x, kernel).astype(jnp.float32)))
  np.testing.assert_array_equal(matmul(x, codes), matmul(x, kernel))
  found = jax.grad(loss)(x, codes)
  np.testing.assert_array_equal(found, jax.grad(loss)(x, kernel))
