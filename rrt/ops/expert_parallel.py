"""Tokens to their experts and back: on one device, or over the mesh axis `expert`.

Each device of `expert` holds some of the experts and some of the rows. Tokens travel in slots, as
many an expert as its capacity; those beyond it are dropped and counted. The exchange is an
all-to-all of slots filled up with zeros, which runs on every backend, or by `RRT_EXPERT_EXCHANGE` a
ragged one of the tokens alone, for TPUs and GPUs: XLA has none for CPUs.

T tokens, D model, K choices a token, E experts, C slots of an expert, P devices of the axis.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rrt.ops import grouped_matmul as groups
from rrt.ops.choice import Choice
from rrt.ops.grouped_matmul import sorted_by
from rrt.ops.mesh_axes import row_axes, row_count

CHOICE = Choice(
  'expert exchange', 'RRT_EXPERT_EXCHANGE', ('auto', 'padded', 'ragged'), lambda: 'padded'
)
using, chosen = CHOICE.using, CHOICE.chosen


def devices() -> int:
  """On the axis `expert` of the mesh in use."""
  return jax.sharding.get_abstract_mesh().shape.get('expert', 1)


def slots(tokens: int, choices: int, experts: int, capacity: float) -> int:
  """C, for the tokens of one device.

  Args:
    tokens, choices, experts: T, K and E.
    capacity: multiple of an even load; 0 for as many slots as no choice can overflow.
  """
  if not capacity:
    return tokens
  return min(tokens, math.ceil(capacity * tokens * choices / experts))


def apply(
  run: Callable[..., Any],
  kernels: Any,
  x_TxD,
  index_TxK,
  weight_TxK,
  capacity: float = 0.0,
  extra: Any = (),
):
  """The weighted sum of the experts' outputs, and the share of choices that was dropped.

  Args:
    run: (kernels, rows, product, extra) -> rows; product(rows, w) multiplies each expert's rows by
      its own matrix of w, [E, I, O]. It keeps no traced value.
    kernels: tree of arrays with a leading axis of experts, [E, ...].
    x_TxD: tokens.
    index_TxK: int32 experts; E and above for none.
    weight_TxK: of each choice.
    capacity: as for `slots`.
    extra: integers for `run`.
  """
  if devices() == 1 and not capacity:
    return dropless(run, kernels, x_TxD, index_TxK, weight_TxK, extra), jnp.zeros(())
  if devices() == 1:
    stay = lambda x: x
    return _padded(run, kernels, x_TxD, index_TxK, weight_TxK, capacity, stay, stay, extra)
  rows = row_axes()
  of_token = PartitionSpec(rows, None)
  there = lambda x: jax.lax.all_to_all(x, 'expert', split_axis=0, concat_axis=1, tiled=True)
  back = lambda x: jax.lax.all_to_all(x, 'expert', split_axis=1, concat_axis=0, tiled=True)

  def on_device(kernels, x, index, weight):
    if chosen() == 'ragged':
      out, dropped = _ragged(run, kernels, x, index, weight, capacity, extra)
    else:
      out, dropped = _padded(run, kernels, x, index, weight, capacity, there, back, extra)
    return out, jax.lax.pmean(dropped, rows)

  of_expert = jax.tree.map(lambda k: PartitionSpec('expert', *(None,) * (k.ndim - 1)), kernels)
  sizes = jax.sharding.get_abstract_mesh().shape
  if x_TxD.shape[0] % row_count(sizes):
    raise ValueError(f'{x_TxD.shape[0]} tokens do not split over {dict(sizes)}.')
  return jax.shard_map(
    on_device,
    in_specs=(of_expert, of_token, of_token, of_token),
    out_specs=(of_token, PartitionSpec()),
    check_vma=False,
  )(kernels, x_TxD, index_TxK, weight_TxK)


def dropless(run: Callable[..., Any], kernels: Any, x_TxD, index_TxK, weight_TxK, extra: Any = ()):
  """`apply` with all experts on every device: choices sorted by expert, nothing dropped.

  Every device of a mesh sorts its own rows: sorting must not cross devices.
  """
  E, K = groups.count(kernels), index_TxK.shape[1]

  def on_rows(kernels, x_TxD, index_TxK, weight_TxK):
    # Choices of no expert come behind all groups, where products are zero.
    order_N, sizes = sorted_by(jnp.minimum(index_TxK, E).reshape(-1), E + 1)
    out_NxO = _by_expert(run, kernels, x_TxD[order_N // K], sizes[:E], extra)
    # Back in the order of tokens: a sum over choices, no scatter.
    out_TxKxO = out_NxO[jnp.argsort(order_N)].reshape(*index_TxK.shape, -1)
    return jnp.sum(out_TxKxO * weight_TxK[..., None].astype(out_NxO.dtype), 1)

  count = row_count(jax.sharding.get_abstract_mesh().shape)
  if count == 1 or x_TxD.shape[0] % count:
    return on_rows(kernels, x_TxD, index_TxK, weight_TxK)
  of_token = PartitionSpec(row_axes(), None)
  return jax.shard_map(
    on_rows,
    in_specs=(PartitionSpec(), of_token, of_token, of_token),
    out_specs=of_token,
    check_vma=False,
  )(kernels, x_TxD, index_TxK, weight_TxK)


def _by_expert(run, kernels, x_NxD, sizes_E, extra):
  """`run` on rows that are sorted by expert."""
  if groups.chosen() == 'tiles':
    one = lambda own, x, extra: run(own, x, lambda rows, w: rows @ w[0], extra)
    return groups.by_tile(one, kernels, x_NxD, sizes_E, extra)
  kernels = groups.put_together(kernels)
  return run(kernels, x_NxD, lambda x, w: groups.grouped_matmul(x, w, sizes_E), extra)


def _padded(run, kernels, x_TxD, index_TxK, weight_TxK, capacity, there, back, extra):
  """`apply` on one device's tokens; `there` and `back` exchange slots, [E, C, D]."""
  (T, D), K = x_TxD.shape, index_TxK.shape[1]
  E = jax.tree.leaves(kernels)[0].shape[0] * devices()
  C = slots(T, K, E, capacity)
  expert_N = index_TxK.reshape(-1)
  slot_N, fits_N = _slots_of(expert_N, E, C)
  token_N = jnp.arange(T * K) // K
  # What has no slot goes to one behind the last, which is dropped.
  place_N = jnp.where(fits_N, expert_N * C + slot_N, E * C)
  sent = jnp.zeros((E * C, D), x_TxD.dtype).at[place_N].set(x_TxD[token_N], mode='drop')
  got = back(run(kernels, there(sent.reshape(E, C, D)), jnp.matmul, extra))
  out = got.reshape(E * C, got.shape[-1])
  weight_N = jnp.where(fits_N, weight_TxK.reshape(-1), 0.0).astype(x_TxD.dtype)
  got_NxD = out[jnp.minimum(place_N, E * C - 1)] * weight_N[:, None]
  wanted = expert_N < E
  dropped = 1.0 - jnp.sum(fits_N) / jnp.maximum(jnp.sum(wanted), 1)
  return jnp.sum(got_NxD.reshape(T, K, out.shape[-1]), 1), dropped


def _ragged(run, kernels, x_TxD, index_TxK, weight_TxK, capacity, extra):
  """`apply` on one device's tokens; only those that have a slot travel.

  A device receives its experts' tokens by expert, those of one expert by device: the order in
  which they are multiplied.
  """
  (T, D), K, P = x_TxD.shape, index_TxK.shape[1], devices()
  own = jax.tree.leaves(kernels)[0].shape[0]
  E = own * P
  C = slots(T, K, E, capacity)
  expert_N = index_TxK.reshape(-1)
  _, fits_N = _slots_of(expert_N, E, C)
  order_N, sizes = sorted_by(jnp.where(fits_N, expert_N, E), E + 1)
  token_N = order_N // K
  exclusive = lambda x, axis: jnp.cumsum(x, axis) - x
  counts_PxE = jax.lax.all_gather(sizes[:E], 'expert')
  me = jax.lax.axis_index('expert')
  mine = lambda x_PxE: jax.lax.dynamic_slice_in_dim(x_PxE, me * own, own, 1).reshape(-1)
  total_E = jnp.sum(counts_PxE, 0)
  base_E = exclusive(total_E.reshape(P, own), 1).reshape(E)
  at_PxE = base_E[None] + exclusive(counts_PxE, 0)  # In the receiver's rows.
  from_PxE = exclusive(counts_PxE, 1)  # In the sender's.
  rows = min(own * P * C, T * K * P)
  got_NxD = jax.lax.ragged_all_to_all(
    x_TxD[token_N],
    jnp.zeros((rows, D), x_TxD.dtype),
    from_PxE[me],
    counts_PxE[me],
    at_PxE[me],
    mine(counts_PxE),
    axis_name='expert',
  )
  sizes_own = jax.lax.dynamic_slice_in_dim(total_E, me * own, own)
  out_NxD = _by_expert(run, kernels, got_NxD, sizes_own, extra)
  out_NxD = jax.lax.ragged_all_to_all(
    out_NxD,
    jnp.zeros((T * K, out_NxD.shape[1]), x_TxD.dtype),
    mine(at_PxE),
    mine(counts_PxE),
    mine(from_PxE),
    counts_PxE[me],
    axis_name='expert',
  )
  weight_N = jnp.where(fits_N, weight_TxK.reshape(-1), 0.0)[order_N].astype(x_TxD.dtype)
  zeros_TxO = jnp.zeros((T, out_NxD.shape[1]), x_TxD.dtype)
  out_TxD = zeros_TxO.at[token_N].add(out_NxD * weight_N[:, None])
  return out_TxD, 1.0 - jnp.sum(fits_N) / jnp.maximum(jnp.sum(expert_N < E), 1)


def _slots_of(expert_N, experts: int, capacity: int):
  """(the slot of each choice among its expert's, whether there is one): first come, first served."""
  own_NxE = jax.nn.one_hot(expert_N, experts, dtype=jnp.int32)
  slot_N = jnp.sum((jnp.cumsum(own_NxE, 0) - 1) * own_NxE, -1)
  return slot_N, (expert_N < experts) & (slot_N < capacity)
