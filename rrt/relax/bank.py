"""Banks of the parent's own MLPs: whole ones, or cut into segments of hidden units.

    y = sum_e gate_e(x, loop) down_e (act(gate_e x) * up_e x)

An MLP is a sum over its hidden units, so that the segments of a loop's own MLP, each with a gate
of 1, are that MLP: the child starts as its parent. The first loop's segments are the shared MLP's
units; the bank holds those of the other loops. Tokens go through whole MLPs of both alone where they
are many; otherwise the shared MLP is computed for all.

`Bank` has whole MLPs (M = 1), one a token. `Pool` has fine-grained segments and sigmoid scores, in
the manner of DeepSeekMoE (arXiv 2401.06066).

B batch, L length, T = B L tokens, D model, F hidden units, S = F / M units of a segment, P
positions, R loops, E experts, X = E - M of them in the bank, k experts a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.ops import expert_parallel
from rrt.ops.activation import activate
from rrt.ops.grouped_matmul import Joined
from rrt.relax.base import Aux, Leaf, Leaves, Place
from rrt.relax.hosts import MLP, Host, hosts_of
from rrt.relax.positioned import Positioned
from rrt.relax.routed import Chosen, Routed

_MANY = 256  # Tokens from which each goes through its own MLP alone.


@dataclasses.dataclass(frozen=True)
class Bank(Routed, Positioned):
  """The MLPs of all loops at some layers of the block; see `Routed` for the router's fields.

  Attributes:
    positions: layers of the block, counted from 0.
    segments: M, parts of an MLP; must divide its hidden units.
    always: so many of the first loop's segments are taken by every token, in every loop; the
      others begin without as many of their own.
    experts: E, segments of all loops together; 0 for R M. Fewer come from `rrt.convert.banks`.
    capacity: in training an expert takes so many times an even load of a device's choices, and
      drops the rest; None drops nothing. Decoding never does.
  """

  kind: ClassVar[str] = 'bank'
  unmergeable: ClassVar[str] = 'each token chooses its experts'
  states: ClassVar[tuple[str, ...]] = ('bank_balance', 'bank_start', 'bank_temperature')

  segments: int = 1
  always: int = 0
  capacity: float | None = None

  def total(self, host: Host) -> int:
    """E."""
    return self.experts or host.loops * self.segments

  def count_experts(self, host: Host) -> int:
    return self.total(host) - self.always

  def own(self, host: Host) -> int:
    return self.segments - self.always

  def group(self, host: Host):
    return (jnp.arange(self.total(host)) // self.segments)[self.always :]

  def hosts(self, config) -> tuple[Host, ...]:
    biased = set(config.biases) & {'gate', 'up', 'down'}
    if biased or config.weights != 'float' or config.num_experts:
      what = 'biases in MLPs' if biased else f'weights={config.weights!r}'
      if config.num_experts:
        what = 'a parent that has experts of its own'
      raise InputError(f'{self.kind}: a bank of MLPs does not go with {what}.')
    return super().hosts(config)

  def check(self, hosts: tuple[Host, ...]) -> None:
    Positioned.check(self, hosts)
    (host,) = hosts
    M = self.segments
    if not isinstance(M, int) or M < 1 or host.units % M:
      raise InputError(
        f'{self.kind}.segments={M!r}: must divide the {host.units} hidden units of an MLP.'
      )
    E = self.total(host)
    if not isinstance(E, int) or E < M:
      raise InputError(
        f'{self.kind}.experts={self.experts!r}: must be {M} or more, the segments of the shared MLP.'
      )
    if not isinstance(self.always, int) or not 0 <= self.always < M:
      raise InputError(
        f'{self.kind}.always={self.always!r}: must be 0 or more, below segments={M}.'
      )
    if self.by == 'loop':
      raise InputError(f"{self.kind}.by='loop': tokens choose here; take 'both' or 'token'.")
    number = isinstance(self.capacity, (int, float)) and not isinstance(self.capacity, bool)
    if self.capacity is not None and not (number and 0 < self.capacity < 1e6):
      raise InputError(
        f'{self.kind}.capacity={self.capacity!r}: must be above 0, or none, which drops nothing.'
      )
    self.check_router(hosts)

  def leaves(self, host: Host) -> dict[str, Leaf]:
    P, X = len(self.positions), self.total(host) - self.segments
    D, S = host.d_in, host.units // self.segments
    normal = nn.initializers.normal
    into, out = (None, 'expert', 'embed', 'mlp'), (None, 'expert', 'mlp', 'embed')
    found = {f'{self.kind}_up': Leaf((P, X, D, S), into, normal(D**-0.5))}
    if host.gated:
      found[f'{self.kind}_gate'] = Leaf((P, X, D, S), into, normal(D**-0.5))
    found[f'{self.kind}_down'] = Leaf((P, X, S, D), out, normal(host.units**-0.5))
    return found | {
      name: Leaf((P, *leaf.shape), (None, *leaf.axes), _repeated(leaf.init))
      for name, leaf in self.router_leaves(host).items()
    }

  def start(self, host: Host):
    """Until `adopt` opens them, all loops have the first's segments: the shared MLP."""
    first_E = (self.group(host) == 0).astype(jnp.float32)
    return self.prior * jnp.broadcast_to(first_E[None], (host.loops, len(first_E)))

  def adopts(self, name: str, layer: int) -> bool:
    return not self.experts and name in ('gate', 'up', 'down') and layer in self.positions

  def adopt(self, params: Leaves, name: str, position, target_IxO) -> None:
    loop, layer = position
    M, m = self.segments, self.positions.index(layer)
    # [I, M S] or [M S, O], as [M, I, S] or [M, S, O].
    if name == 'down':
      parts = target_IxO.reshape(M, -1, target_IxO.shape[1])
    else:
      parts = target_IxO.reshape(target_IxO.shape[0], M, -1).swapaxes(0, 1)
    params[f'{self.kind}_{name}'][m, (loop - 1) * M : loop * M] = parts
    for prior in (f'{self.kind}_prior', f'{self.kind}_start'):
      if prior in params:
        experts_E = np.arange(params[prior].shape[-1]) + self.always
        params[prior][m, loop] = self.prior * (experts_E // M == loop)

  def choose_at(self, params: Leaves, x, place: Place, m, host: Host) -> Chosen:
    """`choose` at position m, experts counted with those that every token takes."""
    router = self.router_leaves(host)
    chosen = self.choose({name: params[name][m] for name in router}, x, place, host)
    gate_BxLxE = jnp.pad(chosen.gate_BxLxE, ((0, 0), (0, 0), (self.always, 0)), constant_values=1.0)
    return chosen._replace(gate_BxLxE=gate_BxLxE, index_BxLxk=chosen.index_BxLxk + self.always)

  def apply_hidden(self, params: Leaves, x, h, place: Place, host: Host):
    def gated(m, params, x, h, place):
      gate_BxLxM = self.choose_at(params, x, place, m, host).gate_BxLxE[..., : self.segments]
      gate_BxLxF = jnp.repeat(gate_BxLxM, host.units // self.segments, axis=-1)
      return h * gate_BxLxF.astype(h.dtype)

    args = (params, x, h, place)
    return self.at_position(place.layer, args, gated, lambda params, x, h, place: h)

  def read(self, params: Leaves, x, y, place: Place, m, host: Host):
    chosen = self.choose_at(params, x, place, m, host)
    M, X = self.segments, self.total(host) - self.segments
    if not X:
      return y, chosen.aux
    leaf = lambda name: params[f'{self.kind}_{name}'][m].astype(x.dtype)
    # The shared MLP's segments count as none.
    index_BxLxk = jnp.where(chosen.index_BxLxk < M, X, chosen.index_BxLxk - M)
    kernels = {name: leaf(name) for name in MLP if name != 'gate' or host.gated}
    out, aux = self._dispatch(kernels, x, index_BxLxk, chosen, place, host)
    return y + out, aux

  def replaces_mlp(self, config, tokens: int) -> bool:
    """Of whole MLPs each token needs its own alone, which pays where tokens are many."""
    if self.segments > 1 or self.capacity or tokens < _MANY or expert_parallel.devices() > 1:
      return False
    linears = [h for h in hosts_of(config, 'linear') if h.name in MLP]
    others = [r for r in config.relax if r.site == 'linear']
    return all(r.is_absent(h, n) for r in others for h in linears for n in self.positions)

  def apply_mlp(self, params: Leaves, x, kernels: Leaves, dense, place: Place, host: Host):
    def here(m, params, x, kernels, place):
      chosen = self.choose_at(params, x, place, m, host)
      rest = {name: params[f'{self.kind}_{name}'][m].astype(x.dtype) for name in kernels}
      first = {name: kernel.astype(x.dtype) for name, kernel in kernels.items()}
      joined = Joined(first, rest)
      y, aux = self._dispatch(joined, x, chosen.index_BxLxk, chosen, place, host)
      return y, aux

    args = (params, x, kernels, place)
    elsewhere = lambda params, x, kernels, place: (dense(x, place), self.nothing(place, host))
    return self.at_position(place.layer, args, here, elsewhere)

  def _dispatch(self, kernels: Any, x, index_BxLxk, chosen: Chosen, place: Place, host: Host):
    """The weighted sum of the chosen experts, E and above for none; and Aux."""
    B, L, D = x.shape
    flat = lambda t: t.reshape(B * L, -1)
    tokens = flat(x), flat(index_BxLxk), flat(chosen.weight_BxLxk)
    # Decoding drops nothing.
    capacity = self.capacity or 0.0 if place.key is not None else 0.0
    run = lambda kernels, x, product, _: self._mlps(kernels, x, product, host)
    out_TxD, dropped = expert_parallel.apply(run, kernels, *tokens, capacity)
    aux = chosen.aux
    if aux.routes:
      aux = aux._replace(routes={**aux.routes, 'dropped': dropped})
    return out_TxD.reshape(B, L, D), aux

  def _mlps(self, kernels: Leaves, x, product, host: Host):
    """Gated or plain MLPs of several experts, by a product of their own."""
    hidden = activate(product(x, kernels['gate' if host.gated else 'up']), host.activation)
    if host.gated:
      hidden *= product(x, kernels['up'])
    return product(hidden, kernels['down'])

  def nothing(self, place: Place, host: Host) -> Aux:
    if self.by == 'loop' or jnp.ndim(place.loop):
      return Aux()
    E, R = self.count_experts(host), host.loops
    zeros = {'load': jnp.zeros((R, E)), 'prob': jnp.zeros((E,)), 'z': jnp.zeros(())}
    if self.total(host) > self.segments:
      zeros['dropped'] = jnp.zeros(())
    return Aux(routes=zeros)

  def balance(self, routes, host: Host) -> Aux:
    routes = self._at_positions(routes)
    found = super().balance(routes, host)
    if 'dropped' in routes:
      found = found._replace(stats={**found.stats, 'dropped': jnp.mean(routes['dropped'])})
    return found

  def after_step(self, params: Leaves, routes, host: Host) -> Leaves:
    return super().after_step(params, self._at_positions(routes), host)

  def _at_positions(self, routes):
    return {name: value[jnp.asarray(self.positions)] for name, value in routes.items()}


@dataclasses.dataclass(frozen=True)
class Pool(Bank):
  """A `Bank` of fine-grained segments, chosen by sigmoid scores."""

  kind: ClassVar[str] = 'pool'
  states: ClassVar[tuple[str, ...]] = ('pool_balance', 'pool_start', 'pool_temperature')

  segments: int = 8
  score: str = 'sigmoid'
  balance_by: str = 'bias'


def _repeated(init):
  """An initializer of one position's array, for all positions."""
  return lambda key, shape, dtype=jnp.float32: jnp.broadcast_to(init(key, shape[1:], dtype), shape)
