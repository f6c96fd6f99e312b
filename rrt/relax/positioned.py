"""Relaxations of the MLP at some layers of the block, whose parameters lie beside the block.

M positions, N layers of the block.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.relax.base import Aux, Leaves, Place, Relaxation
from rrt.relax.hosts import Host


@dataclasses.dataclass(frozen=True)
class Positioned(Relaxation):
  """A relaxation of the MLP at some layers of the block.

  Attributes:
    positions: layers of the block, counted from 0.
  """

  site: ClassVar[str] = 'mlp'
  pooled: ClassVar[bool] = True

  positions: tuple[int, ...] = (0,)

  def check(self, hosts: tuple[Host, ...]) -> None:
    layers = hosts[0].layers
    known = isinstance(self.positions, tuple) and len(set(self.positions)) == len(self.positions)
    if not known or not self.positions or not all(p in range(layers) for p in self.positions):
      raise InputError(
        f'{self.kind}.positions={self.positions!r}: must be layers of the block, each once, from '
        f'0 to {layers - 1}.'
      )

  def read(self, params: Leaves, x, y, place: Place, m, host: Host):
    """(the MLP's output y relaxed, Aux) at position m, an int or int scalar."""
    raise NotImplementedError

  def nothing(self, place: Place, host: Host) -> Aux:
    """What `read` returns beside y, for a layer that is no position: zeros."""
    raise NotImplementedError

  def apply_at(self, params: Leaves, x, y, place: Place, host: Host):
    return self.at_position(
      place.layer,
      (params, x, y, place),
      lambda m, params, x, y, place: self.read(params, x, y, place, m, host),
      lambda params, x, y, place: (y, self.nothing(place, host)),
    )

  def at_position(self, layer, args: tuple[Any, ...], here, elsewhere):
    """here(m, *args) if a layer is position m, else elsewhere(*args)."""
    if isinstance(layer, int):
      if layer in self.positions:
        return here(self.positions.index(layer), *args)
      return elsewhere(*args)
    positions_M = jnp.asarray(self.positions)

    def either(layer, *args):
      return jax.lax.cond(
        jnp.any(positions_M == layer),
        lambda: here(jnp.argmax(positions_M == layer), *args),
        lambda: elsewhere(*args),
      )

    # What a branch keeps for the backward pass a scan would stack by layer, the pool with it.
    return jax.checkpoint(either, prevent_cse=False)(layer, *args)
