"""Where arrays are on a mesh: parameters, batches, and the way back to the host."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from rrt import sharding as sharding_lib
from rrt.config import ModelConfig
from rrt.models.init import boxed_params


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
