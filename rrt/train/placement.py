"""Where arrays are on a mesh: parameters, batches, and the way back to the host."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from rrt import sharding as sharding_lib
from rrt.config import ModelConfig
from rrt.models.init import boxed_params
from rrt.ops.matmul import GatheredKernel


def place(tree, shardings):
  """Puts arrays (numpy or jax) on the mesh with the given shardings.

  Every process must hold the same values.
  """

  def one(x, s):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, s, lambda i: x[i])

  return jax.tree.map(one, tree, shardings)


def param_shardings(config: ModelConfig, mesh) -> Any:
  """The sharding of each parameter of a model."""
  boxed = jax.eval_shape(lambda: boxed_params(config, jax.random.key(0)))
  return sharding_lib.shardings(boxed, mesh)


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
  boxed = jax.eval_shape(lambda: boxed_params(config, jax.random.key(0)))['block']

  def one(path, box, x):
    if not isinstance(box, nn.LogicallyPartitioned) or x.dtype != jnp.float32:
      return x
    whole = sharding_lib.gather(x, box.names, dtype)
    return GatheredKernel(jax.lax.stop_gradient(whole), x) if path[-1].key == 'kernel' else whole

  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree_util.tree_map_with_path(one, boxed, block, is_leaf=is_box)


def to_mesh(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
  """The rows of all processes as global arrays, split over data and fsdp."""
  rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  _, parts = sharding_lib.row_groups(mesh)
  whole = lambda v: (v.shape[0] * parts, *v.shape[1:])
  return {k: jax.make_array_from_process_local_data(rows, v, whole(v)) for k, v in batch.items()}


def to_host(params: dict[str, Any], mesh) -> dict[str, Any]:
  """Whole numpy arrays, on every process."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  whole = jax.jit(lambda x: x, out_shardings=everywhere)

  def one(path, x):
    if jax.process_count() == 1:
      return np.array(x)  # A copy: numpy must not look into buffers that jax may reuse.
    if 'layers' not in [getattr(k, 'key', None) for k in path]:
      return np.array(whole(x))
    # Layer by layer: no device holds more than one layer besides its share.
    return np.stack([np.array(whole(x[i])) for i in range(x.shape[0])])

  return jax.tree_util.tree_map_with_path(one, params)
