"""Meshes on devices that lie on a torus, in one slice or several: none of them need be there."""

import dataclasses
import itertools

from jax.experimental import mesh_utils
import pytest

from rrt import sharding
from rrt.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
  """What jax asks of a TPU to place it."""

  id: int
  coords: tuple[int, int, int]
  slice_index: int
  device_kind: str
  platform: str = 'tpu'
  core_on_chip: int = 0
  process_index: int = 0


def torus(kind, x, y, z=1, slice_index=0):
  places = itertools.product(range(z), range(y), range(x))
  return [Chip(i, (a, b, c), slice_index, kind) for i, (c, b, a) in enumerate(places)]


def test_tensor_over_half_of_a_torus_axis():
  """Of 4 x 4 chips no axis has two: it is split, and jax's own default refuses."""
  chips = torus('TPU v6 lite', 4, 4)
  with pytest.raises(NotImplementedError):
    mesh_utils.create_device_mesh((1, 8, 1, 2), chips)
  mesh = sharding.make_mesh({'fsdp': 8, 'tensor': 2}, chips)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 8, 'expert': 1, 'tensor': 2}
  assert {c.id for c in mesh.devices.ravel()} == set(range(16))
  for one, other in mesh.devices.reshape(8, 2):
    assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


def test_slices_lie_along_data():
  chips = torus('TPU v6 lite', 2, 2) + torus('TPU v6 lite', 2, 2, slice_index=1)
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 2}, chips)
  slices = [{c.slice_index for c in row.ravel()} for row in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]
  with pytest.raises(InputError, match='2 slices, between which only data'):
    sharding.make_mesh({'fsdp': 8}, chips)
