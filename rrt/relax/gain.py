"""Per-loop gains: y = (x W + earlier relaxations) * g[loop], a vector a loop.

A gain of zero at o and down makes a looped layer add nothing to the residual
stream: what deleting the layer at that position does is one of its values. With
`start=0` every loop but the first begins there: the shared weight is the first
loop's own, later loops are what their low-rank terms make of them, and training
opens the gains.

I inputs, O outputs, R loops, N layers.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import chex
from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.relax.base import NO_AUX, Fitted, Leaf, Leaves, Relaxation
from rrt.relax.hosts import LINEAR_AXES, Host, at_loop


@dataclasses.dataclass(frozen=True)
class Gain(Relaxation):
  """A gain a loop on every output channel of some linears.

  It multiplies what the relaxations before it in `ModelConfig.relax` give,
  so that it stands behind `Lora`. It costs R x O parameters a linear.

  Attributes:
    components: the linears that have it; 'all' for the seven.
    start: its value in the loops after the first, where a conversion begins. 1
      fits it instead. With another value it is a gain on the shared product
      alone, in front of `Lora`, and stays at 1 in the first loop.
  """

  kind: ClassVar[str] = 'gain'
  site: ClassVar[str] = 'linear'
  decay: ClassVar[bool] = False
  of_experts: ClassVar[bool] = True

  components: tuple[str, ...] = ('o', 'down')
  start: float = 1.0

  def __post_init__(self):
    if self.components in ('all', ('all',)):
      object.__setattr__(self, 'components', tuple(LINEAR_AXES))

  @property
  def leads(self) -> bool:
    return self.start != 1.0

  def check(self, hosts: tuple[Host, ...]) -> None:
    if not self.components or len(set(self.components)) < len(self.components):
      raise InputError(
        f'gain.components={self.components!r}: must name one linear or more, each once.'
      )
    for name in self.components:
      if name not in LINEAR_AXES:
        raise InputError(
          f'gain.components names {name!r}; the linears are {", ".join(LINEAR_AXES)}.'
        )

    if isinstance(self.start, bool) or not -1e3 < float(self.start) < 1e3:
      raise InputError(f'gain.start={self.start!r}: must be a finite number.')

  def leaves(self, host: Host) -> dict[str, Leaf]:
    if host.name not in self.components:
      return {}
    shape, axes = (host.loops, host.d_out), ('loops', host.axes[1])
    return {'gain': Leaf(shape, axes, self._init)}

  def _init(self, key, shape, dtype=jnp.float32):
    return nn.initializers.ones(key, shape, dtype).at[1:].set(self.start)

  def apply(self, params: Leaves, x, y, loop, host: Host):
    chex.assert_shape(params['gain'], (host.loops, y.shape[-1]))
    return y * at_loop(params['gain'], loop, y.ndim).astype(y.dtype), NO_AUX

  def apply_experts(self, params: Leaves, x, y, loop, product, host: Host):
    gain_ExRxO = params['gain'].astype(y.dtype)
    if jnp.ndim(loop):
      return y * product(loop.astype(y.dtype), gain_ExRxO)
    # A product with a column of ones gives each row the gain of its own expert.
    return y * product(jnp.ones((*y.shape[:-1], 1), y.dtype), gain_ExRxO[:, loop, None])

  def merge(self, base_IxO: np.ndarray, params: Leaves, position, host: Host):
    loop, layer = position
    gain_O = np.asarray(params['gain'][layer, loop], np.float64)
    return base_IxO * gain_O[None, :]

  def term(self, params: Leaves, host: Host):
    return 'gain', {'gain': np.asarray(params['gain'], np.float32)}

  def closes(self, host: Host) -> bool:
    return self.start == 0 and host.name in self.components

  def tie(self, cs_RxIxI, ws_RxIxO, layer: int, host: Host):
    """At a start of 0 the shared weight serves the first loop alone."""
    return ws_RxIxO[0] if self.start == 0 else None

  def fit(self, base_IxO, target_IxO, c_IxI, position, host: Host) -> Fitted:
    """Weighted least squares, channel by channel.

    With v and w a channel's columns of base and target, and C the covariance
    of the inputs, g = (v^T C w) / (v^T C v).
    """
    if self.leads:
      loop, _ = position
      gain_O = jnp.full(host.d_out, self.start if loop else 1.0)
      return Fitted({'gain': gain_O}, base_IxO * gain_O[None, :])
    cv_IxO = base_IxO if c_IxI is None else c_IxI @ base_IxO
    power_O = jnp.sum(base_IxO * cv_IxO, 0)
    cross_O = jnp.sum(target_IxO * cv_IxO, 0)
    # A channel that is zero stays so whatever its gain.
    gain_O = jnp.where(power_O > 0, cross_O / jnp.where(power_O > 0, power_O, 1.0), 1.0)
    return Fitted({'gain': gain_O}, base_IxO * gain_O[None, :])

  def square_norm(self, params: Leaves, host: Host):
    """The squared distance of all gains from 1."""
    return jnp.sum((params['gain'] - 1.0) ** 2, (0, 2))
