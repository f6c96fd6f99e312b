"""The meshes of a topology on which a recipe fits, and the largest batch of each."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType

from rrt import sharding
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.planner.memory import Memory, train_memory
from rrt.planner.program import train_program
from rrt.planner.topology import Topology
from rrt.train.recipe import Recipe

MOST_TENSOR = 8  # Chips that are near each other.
_MOST_ROWS = 512


class Found(NamedTuple):
  """A mesh, and its largest batch.

  Attributes:
    mesh: chips by axis.
    rows: of a chip in a (micro)batch; 0 where not even one fits.
    memory: with so many rows, or with one.
  """

  mesh: dict[str, int]
  rows: int
  memory: Memory


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """A mesh without devices."""
  shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
  return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def analytic(
  recipe: Recipe, parent: ModelConfig, child: ModelConfig, sizes: dict[str, int], tiles: bool
) -> Memory:
  """Bytes on one chip of a mesh.

  Raises:
    InputError: the mesh does not divide the model or the batch.
  """
  mesh = abstract_mesh(sizes)
  for config in (child, parent):
    sharding.check_mesh(config, mesh, recipe.batch // recipe.accumulate)
  return train_memory(train_program(recipe, parent, child, mesh), tiles)


def meshes(count: int) -> Iterator[dict[str, int]]:
  """All meshes of so many chips; those that send least come first."""
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  for tensor in (n for n in divisors if n <= MOST_TENSOR):
    for fsdp in (n for n in divisors if count // tensor % n == 0):
      yield {'data': count // tensor // fsdp, 'fsdp': fsdp, 'tensor': tensor}


def search(
  recipe: Recipe, parent: ModelConfig, child: ModelConfig, topology: Topology
) -> list[Found]:
  """The largest batch of each mesh that divides the model, the most rows first.

  A step takes any number of microbatches of so many rows (`accumulate`).
  """
  tiles = topology.kind.platform == 'tpu'
  found = []
  for sizes in meshes(topology.count):

    def of(rows: int, sizes=sizes) -> Memory:
      chips = sizes['data'] * sizes['fsdp']
      one = dataclasses.replace(recipe, batch=rows * chips, accumulate=1, mesh=sizes)
      return analytic(one, parent, child, sizes, tiles)

    try:
      memory = of(1)
    except InputError:
      continue
    rows = 0
    while memory.peak <= topology.room and rows < _MOST_ROWS:
      rows = max(2 * rows, 1)
      best, memory = memory, of(2 * rows)
    found.append(Found(sizes, rows, best if rows else memory))
  # Of equal batches the mesh that sends least.
  return sorted(found, key=lambda f: -f.rows * f.mesh['data'] * f.mesh['fsdp'])
