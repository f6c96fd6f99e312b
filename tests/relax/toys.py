"""Relaxations for the contract test alone: one a site, and one that couples rows.

They show what the contract allows besides linears: auxiliary losses and
statistics, leaves shared by all loops, parameters beside the layers.
"""

import dataclasses
from typing import ClassVar

from flax import linen as nn
import jax.numpy as jnp

from rrt.relax.base import NO_AUX, Aux, Leaf, Relaxation
from rrt.relax.hosts import at_loop
from rrt.relax.registry import register


@register
@dataclasses.dataclass(frozen=True)
class Shift(Relaxation):
  """A vector a loop added to the outputs of q and down."""

  kind: ClassVar[str] = 'shift'
  site: ClassVar[str] = 'linear'
  unmergeable: ClassVar[str] = 'untied linears of these families have no biases'

  def leaves(self, host):
    if host.name not in ('q', 'down'):
      return {}
    shape, axes = (host.loops, host.d_out), ('loops', host.axes[1])
    return {'shift': Leaf(shape, axes, nn.initializers.zeros)}

  def apply(self, params, x, y, loop, host):
    return y + at_loop(params['shift'], loop, y.ndim).astype(y.dtype), NO_AUX


@register
@dataclasses.dataclass(frozen=True)
class Bottleneck(Relaxation):
  """A bottleneck beside the MLP, its input matrix shared by all loops."""

  kind: ClassVar[str] = 'bottleneck'
  site: ClassVar[str] = 'mlp'
  unmergeable: ClassVar[str] = 'it adds a second MLP'

  width: int = 3
  coefficient: float = 0.5

  def leaves(self, host):
    D, R, W = host.d_in, host.loops, self.width
    axes = host.axes
    return {
      'bottleneck_in': Leaf((D, W), (axes[0], None), nn.initializers.normal(0.1)),
      'bottleneck_out': Leaf((R, W, D), ('loops', None, axes[1]), nn.initializers.zeros),
    }

  def apply(self, params, x, y, loop, host):
    h_BxLxW = jnp.tanh(x @ params['bottleneck_in'].astype(x.dtype))
    out = params['bottleneck_out'][loop].astype(x.dtype)
    form = 'blw,bwd->bld' if jnp.ndim(loop) else 'blw,wd->bld'
    active_BxLxW = jnp.square(h_BxLxW.astype(jnp.float32))
    aux = Aux(
      {'size': self.coefficient * jnp.mean(active_BxLxW)},
      {'usage': jnp.mean(active_BxLxW, (0, 1)), 'mean': jnp.mean(active_BxLxW)},
    )
    return y + jnp.einsum(form, h_BxLxW, out), aux


@register
@dataclasses.dataclass(frozen=True)
class KvGain(Relaxation):
  """A gain a loop on keys and values."""

  kind: ClassVar[str] = 'kvgain'
  site: ClassVar[str] = 'kv'
  decay: ClassVar[bool] = False
  unmergeable: ClassVar[str] = 'a test'

  def leaves(self, host):
    shape, axes = (host.loops, host.d_out), ('loops', host.axes[1])
    return {name: Leaf(shape, axes, nn.initializers.ones) for name in ('kvgain_k', 'kvgain_v')}

  def apply(self, params, x, y, loop, host):
    def scaled(heads, table):
      flat = heads.reshape(*heads.shape[:2], -1)
      return (flat * at_loop(table, loop, 3).astype(flat.dtype)).reshape(heads.shape)

    return (scaled(y[0], params['kvgain_k']), scaled(y[1], params['kvgain_v'])), NO_AUX


@register
@dataclasses.dataclass(frozen=True)
class Skip(Relaxation):
  """Adds a share of the block's input to its output, by loop and channel."""

  kind: ClassVar[str] = 'skip'
  site: ClassVar[str] = 'block'
  unmergeable: ClassVar[str] = 'an untied model has no path around several layers'

  def leaves(self, host):
    return {'skip': Leaf((host.loops, host.d_in), ('loops', 'norm'), nn.initializers.zeros)}

  def apply(self, params, x, y, loop, host):
    share = at_loop(params['skip'], loop, y.ndim).astype(y.dtype)
    return y + share * x, Aux({}, {'share': jnp.mean(jnp.abs(share.astype(jnp.float32)))})


@register
@dataclasses.dataclass(frozen=True)
class Crowd(Relaxation):
  """Subtracts a share of the batch's mean: rows depend on each other."""

  kind: ClassVar[str] = 'crowd'
  site: ClassVar[str] = 'linear'
  row_independent: ClassVar[bool] = False
  unmergeable: ClassVar[str] = 'it needs the other rows of the batch'

  def leaves(self, host):
    if host.name != 'o':
      return {}
    return {'crowd': Leaf((host.loops, 1), ('loops', None), nn.initializers.zeros)}

  def apply(self, params, x, y, loop, host):
    share = at_loop(params['crowd'], loop, y.ndim).astype(y.dtype)
    return y - share * jnp.mean(y, 0, keepdims=True), NO_AUX
