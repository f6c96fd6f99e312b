"""The axes of a device mesh over which the rows of a batch are split."""

from collections.abc import Mapping
import math

import jax

ROWS = ('data', 'fsdp', 'expert')


def row_axes() -> tuple[str, ...]:
  """Those that the mesh in use has."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(axis for axis in ROWS if axis in sizes)


def row_count(sizes: Mapping[str, int]) -> int:
  """Into how many parts they split the rows."""
  return math.prod(sizes.get(axis, 1) for axis in ROWS)
