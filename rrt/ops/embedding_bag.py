"""Weighted sums of looked-up rows, which never hold all the rows that they read.

A memory layer reads J rows of D numbers for each of T tokens. Gathered, these are T J D numbers,
gigabytes where the layer's input and output are megabytes. Here a few rows a token are read at a
time, forward and backward; what is kept for the backward pass are the indices and weights.

`bag` sums rows, `dots` multiplies each with the token's own vector (PEER's first half); each is
what the other's backward pass does. On a mesh with fsdp above 1 the columns of a table are
sharded over it: indices are gathered, each device sums its own columns for all tokens, and an
all-to-all gives every token its row (Berges et al., arXiv 2412.09764, section 3.2).

T tokens, J rows a token, N rows of the table, D columns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from rrt.ops.backend import backend
from rrt.ops.mesh_axes import row_axes

# Tokens that are worked on at a time: one row each is held, and their sums stay in a cache.
_SLAB = 256


def bag(values_NxD, index_TxJ, weight_TxJ):
  """sum_j weight[t, j] * values[index[t, j]]: [T, D] in the dtype of the values.

  Sums are float32. The gradient of the values is dense, float32 while it is summed.

  Args:
    values_NxD: the table.
    index_TxJ: int32 rows; the same row may occur several times.
    weight_TxJ: their weights.
  """
  return _by_columns(_bag, True, values_NxD, index_TxJ, weight_TxJ)


def dots(values_NxD, index_TxJ, x_TxD):
  """values[index[t, j]] . x[t]: float32 [T, J].

  Args:
    values_NxD: the table.
    index_TxJ: int32 rows.
    x_TxD: a vector a token.
  """
  return _by_columns(_dots, False, values_NxD, index_TxJ, x_TxD)


def _by_columns(local, is_bag: bool, values_NxD, index_TxJ, other):
  """`local` on each device's columns of the table, or on the whole table."""
  sizes = jax.sharding.get_abstract_mesh().shape
  group = sizes.get('fsdp', 1)
  if group == 1:
    return local(values_NxD, index_TxJ, other)
  of_token = PartitionSpec(row_axes(), None)
  gather = functools.partial(jax.lax.all_gather, axis_name='fsdp', axis=0, tiled=True)

  def run(values, index, other):
    out = local(values, gather(index), gather(other) if is_bag else _columns(other))
    if is_bag:
      return jax.lax.all_to_all(out, 'fsdp', split_axis=0, concat_axis=1, tiled=True)
    return jax.lax.psum_scatter(out, 'fsdp', scatter_dimension=0, tiled=True)

  def _columns(x_TxD):
    """All tokens of the group, this device's columns: the inverse of the all-to-all above."""
    return jax.lax.all_to_all(x_TxD, 'fsdp', split_axis=1, concat_axis=0, tiled=True)

  specs = (PartitionSpec(None, 'fsdp'), of_token, of_token)
  return jax.shard_map(run, in_specs=specs, out_specs=of_token, check_vma=False)(
    values_NxD, index_TxJ, other
  )


@jax.custom_vjp
def _bag(values_NxD, index_TxJ, weight_TxJ):
  if backend() == 'tpu' and kernel_takes(values_NxD):
    from rrt.ops.embedding_bag_kernel import sum_rows

    return sum_rows(values_NxD, index_TxJ, weight_TxJ)

  def one_slab(index_txJ, weight_txJ):
    def add(j, y_txD):
      row_txD = values_NxD[_column(index_txJ, j)].astype(jnp.float32)
      return y_txD + _column(weight_txJ, j)[:, None].astype(jnp.float32) * row_txD

    zeros_txD = jnp.zeros((index_txJ.shape[0], values_NxD.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, index_txJ.shape[1], add, zeros_txD).astype(values_NxD.dtype)

  return _by_slabs(one_slab, index_TxJ, weight_TxJ)


def _bag_fwd(values_NxD, index_TxJ, weight_TxJ):
  return _bag(values_NxD, index_TxJ, weight_TxJ), (values_NxD, index_TxJ, weight_TxJ)


def _bag_bwd(saved, dy_TxD):
  values_NxD, index_TxJ, weight_TxJ = saved
  d_values_NxD = _scatter(values_NxD, index_TxJ, weight_TxJ, dy_TxD)
  d_weight_TxJ = _dots(values_NxD, index_TxJ, dy_TxD).astype(weight_TxJ.dtype)
  return d_values_NxD, _no_gradient(index_TxJ), d_weight_TxJ


_bag.defvjp(_bag_fwd, _bag_bwd)


@jax.custom_vjp
def _dots(values_NxD, index_TxJ, x_TxD):
  def one_slab(index_txJ, x_txD):
    def put(j, out_txJ):
      row_txD = values_NxD[_column(index_txJ, j)].astype(jnp.float32)
      got_t = jnp.sum(row_txD * x_txD.astype(jnp.float32), 1)
      return jax.lax.dynamic_update_index_in_dim(out_txJ, got_t, j, 1)

    zeros_txJ = jnp.zeros(index_txJ.shape, jnp.float32)
    return jax.lax.fori_loop(0, index_txJ.shape[1], put, zeros_txJ)

  return _by_slabs(one_slab, index_TxJ, x_TxD)


def _dots_fwd(values_NxD, index_TxJ, x_TxD):
  return _dots(values_NxD, index_TxJ, x_TxD), (values_NxD, index_TxJ, x_TxD)


def _dots_bwd(saved, ds_TxJ):
  values_NxD, index_TxJ, x_TxD = saved
  d_values_NxD = _scatter(values_NxD, index_TxJ, ds_TxJ, x_TxD)
  d_x_TxD = _bag(values_NxD, index_TxJ, ds_TxJ).astype(x_TxD.dtype)
  return d_values_NxD, _no_gradient(index_TxJ), d_x_TxD


_dots.defvjp(_dots_fwd, _dots_bwd)


def kernel_takes(values_NxD) -> bool:
  """Whether a row can be copied by itself on a TPU: whole vectors, of 32-bit numbers."""
  return values_NxD.shape[1] % 128 == 0 and values_NxD.dtype == jnp.float32


def _scatter(values_NxD, index_TxJ, weight_TxJ, dy_TxD):
  """sum over (t, j) with index[t, j] = n of weight[t, j] * dy[t]: [N, D]."""

  def one_slab(d_NxD, slab):
    index_txJ, weight_txJ, dy_txD = slab

    def add(j, d_NxD):
      row_txD = _column(weight_txJ, j)[:, None].astype(jnp.float32) * dy_txD.astype(jnp.float32)
      return d_NxD.at[_column(index_txJ, j)].add(row_txD)

    return jax.lax.fori_loop(0, index_txJ.shape[1], add, d_NxD), None

  zeros_NxD = jnp.zeros(values_NxD.shape, jnp.float32)
  slabs = _slabs(index_TxJ), _slabs(weight_TxJ), _slabs(dy_TxD)
  return jax.lax.scan(one_slab, zeros_NxD, slabs)[0].astype(values_NxD.dtype)


def _by_slabs(one_slab, *arrays):
  """A function of some tokens, over all of them."""
  out = jax.lax.map(lambda parts: one_slab(*parts), tuple(map(_slabs, arrays)))
  return out.reshape(-1, *out.shape[2:])


def _slabs(x):
  """[T, ...] in equal parts of at most `_SLAB` tokens, or whole where T has no such divisor."""
  T = x.shape[0]
  size = next((n for n in range(min(_SLAB, T), _SLAB // 8, -1) if T % n == 0), T)
  return x.reshape(T // size, size, *x.shape[1:])


def _column(x_txJ, j):
  return jax.lax.dynamic_index_in_dim(x_txJ, j, 1, keepdims=False)


def _no_gradient(index_TxJ) -> Any:
  return np.zeros(index_TxJ.shape, jax.dtypes.float0)
