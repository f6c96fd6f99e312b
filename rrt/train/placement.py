"""Where arrays are on a mesh: parameters, batches, and the way back to the host."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from rrt import sharding as sharding_lib
from rrt.checkpoints.safetensors import rows_per_chunk
from rrt.config import ModelConfig
from rrt.models.init import abstract_boxed
from rrt.ops.matmul import GatheredKernel
from rrt.ops.mesh_axes import ROWS
from rrt.pieces import Pieces, pieces
from rrt.tree import flatten


def place(tree, shardings):
  """Copies arrays (numpy, jax or `Pieces`) to the mesh with the given shardings.

  Every process must have the same values, and makes its own shards alone: of `Pieces` it
  holds these and one piece at a time.
  """
  return jax.tree.map(_place_one, tree, shardings)


def _place_one(x, sharding):
  indices = sharding.addressable_devices_indices_map(tuple(x.shape))
  bounds_of = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, x.shape, strict=True))
    for device, index in indices.items()
  }
  # Devices may hold the same part.
  by_range = {
    bounds: np.empty([b - a for a, b in bounds], x.dtype) for bounds in set(bounds_of.values())
  }
  for start, rows in pieces(x):
    for bounds, part in by_range.items():
      if not bounds:
        part[...] = rows
        continue
      (first, last), *rest = bounds
      a, b = max(first, start), min(last, start + len(rows))
      if a < b:
        inner = tuple(slice(*bound) for bound in rest)
        part[a - first : b - first] = rows[(slice(a - start, b - start), *inner)]
  # Never a view of numpy's memory: the train state is donated.
  shards = [
    jax.device_put(by_range[bounds], device, may_alias=False)
    for device, bounds in bounds_of.items()
  ]
  return jax.make_array_from_single_device_arrays(tuple(x.shape), sharding, shards)


def param_shardings(config: ModelConfig, mesh) -> Any:
  """The sharding of each parameter of a model."""
  return sharding_lib.shardings(abstract_boxed(config), mesh)


def gather_block(config: ModelConfig, block: dict[str, Any], dtype) -> dict[str, Any]:
  """The block's parameters in the compute dtype, gathered over fsdp once for all loops.

  Without it every layer is gathered in every loop, forward and backward. Gradients go
  back to the shards they belong to, in float32. Call it inside `jax.set_mesh`.

  Args:
    config: of the model; loops of 1 or an fsdp axis of 1 leave the block as it is.
    block: `params['block']`.
    dtype: of the computation.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  if sizes.get('fsdp', 1) == 1 or config.loops == 1:
    return block
  boxed = abstract_boxed(config)['block']

  def one(path, box, x):
    if not isinstance(box, nn.LogicallyPartitioned) or x.dtype != jnp.float32:
      return x
    if 'values' in box.names:  # Looked up by columns; see `rrt.ops.embedding_bag`.
      return x
    whole = sharding_lib.gather(x, box.names, dtype)
    return GatheredKernel(jax.lax.stop_gradient(whole), x) if path[-1].key == 'kernel' else whole

  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree_util.tree_map_with_path(one, boxed, block, is_leaf=is_box)


def to_mesh(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
  """The rows of all processes as global arrays, split over data, fsdp and expert."""
  rows = NamedSharding(mesh, PartitionSpec(ROWS))
  _, parts = sharding_lib.row_groups(mesh)
  whole = lambda v: (v.shape[0] * parts, *v.shape[1:])
  return {k: jax.make_array_from_process_local_data(rows, v, whole(v)) for k, v in batch.items()}


def to_host(params: dict[str, Any], mesh) -> dict[str, Any]:
  """The arrays on the host: numpy's, or of several processes `Pieces`.

  A piece is a layer, or some rows of another array. It is gathered when it is read, by all
  processes together: each must read the same pieces in the same order (`drain`).
  """
  everywhere = NamedSharding(mesh, PartitionSpec())
  rows = jax.jit(
    lambda x, start, count: jax.lax.dynamic_slice_in_dim(x, start, count),
    static_argnums=2,
    out_shardings=everywhere,
  )

  def one(path, x):
    if jax.process_count() == 1:
      return np.array(x)  # A copy: numpy must not look into buffers that jax may reuse.
    if not x.ndim or 4 * x.size <= sharding_lib.WHOLE:
      return np.array(jax.jit(lambda x: x, out_shardings=everywhere)(x))
    layers = 'layers' in [getattr(k, 'key', None) for k in path]
    step = 1 if layers else rows_per_chunk(x.shape, 4 * x.size // x.shape[0])
    read = lambda start, stop: np.array(rows(x, start, stop - start))
    return Pieces(x.shape, x.dtype, read, step)

  return jax.tree_util.tree_map_with_path(one, params)


def drain(params: dict[str, Any]) -> None:
  """Takes part in the reading of `Pieces` by the process that saves them."""
  for leaf in flatten(params).values():
    if isinstance(leaf, Pieces):
      for _ in pieces(leaf):
        pass
