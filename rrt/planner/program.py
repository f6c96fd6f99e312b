"""The programs that a plan is about, with abstract arguments: nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rrt.config import ModelConfig
from rrt.models.init import abstract_params
from rrt.ops.backend import compiling_for
from rrt.ops.mesh_axes import ROWS
from rrt.train import step as step_lib
from rrt.train.placement import param_shardings
from rrt.train.recipe import Recipe
from rrt.train.setup import make_step
from rrt.train.teacher import arranged, in_dtype


@dataclasses.dataclass(frozen=True)
class TrainProgram:
  """A train step and what it is called with.

  Attributes:
    spec: its static part.
    state, teacher, batch: shapes, dtypes and shardings.
    mesh: of devices, or abstract.
  """

  spec: step_lib.Step
  state: step_lib.TrainState
  teacher: dict[str, Any]
  batch: dict[str, Any]
  mesh: Any

  def lower(self, platform: str):
    """The program for a platform, traced and not compiled."""
    shardings = jax.tree.map(lambda x: x.sharding, self.state)
    step = step_lib.jit_step(self.spec, self.mesh, shardings)
    with jax.set_mesh(self.mesh), compiling_for(platform):
      traced = step.trace(self.state, self.teacher, self.batch)
      return traced.lower(lowering_platforms=(platform,))


def train_program(
  recipe: Recipe, parent: ModelConfig | None, child: ModelConfig, mesh
) -> TrainProgram:
  """The train step of a recipe.

  Args:
    recipe: the settings.
    parent: its shape; None without distillation.
    child: its shape.
    mesh: of devices, or abstract.
  """
  params = abstract_params(child)
  spec = make_step(recipe, child, params)
  teacher: dict[str, Any] = {}
  if parent is not None and recipe.loss.distillation:
    spec, teacher = _with_teacher(spec, parent, params, mesh)
  rows = NamedSharding(mesh, PartitionSpec(ROWS))
  of = lambda dtype: jax.ShapeDtypeStruct((recipe.batch, recipe.length), dtype, sharding=rows)
  names = ('tokens', 'targets', 'segment_ids', 'positions')
  batch = {name: of(jnp.int32) for name in names} | {'weights': of(jnp.float32)}
  if recipe.teacher_cache and teacher:
    K, D = recipe.loss.top_k, parent.d_model if parent else 0
    shape = (recipe.batch, recipe.length, K or D)
    wide = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    spec = dataclasses.replace(spec, cached=True)
    batch |= (
      {'teacher_ids': wide(jnp.int32), 'teacher_log_p': wide(jnp.float32)}
      if K
      else {'teacher_hidden': wide(spec.dtype)}
    )
  return TrainProgram(spec, step_lib.abstract_state(spec, mesh), teacher, batch, mesh)


def _with_teacher(spec: step_lib.Step, parent: ModelConfig, child: Any, mesh):
  """As `rrt.train.teacher.with_teacher`, of shapes.

  Frozen outer layers count as shared with the parent: a conversion leaves them as they are.
  """
  _, frozen = step_lib.split(child, spec.trained)
  config, _ = arranged(parent, {'block': {}}, spec.config, frozen)
  flat = traverse_util.flatten_dict(abstract_params(config), sep='/')
  same = lambda k, x: k in frozen and frozen[k].shape == x.shape and not k.startswith('block/')
  shared = frozenset(k for k, x in flat.items() if same(k, x))
  where = traverse_util.flatten_dict(param_shardings(config, mesh), sep='/')
  own = {
    k: jax.ShapeDtypeStruct(x.shape, in_dtype(k, x, spec.dtype), sharding=where[k])
    for k, x in flat.items()
    if k not in shared
  }
  return dataclasses.replace(spec, teacher_config=config, shared=shared), own


def local_bytes(tree: Any) -> int:
  """Bytes of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
