"""What relaxations with experts share: a router by token and loop, and its balance.

    logits = x W_r + temperature * prior[loop]

W_r starts at zero and the prior at `prior` for the loop's own group of experts, so that every
loop begins with its own. Balance is pooled over the loops: experts that belong to one loop cost
nothing as long as all loops together use all of them.

B batch, L length, T = B L tokens, D inputs, N layers, R loops, E experts, k experts a token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.ops import routing
from rrt.relax.base import NO_AUX, Aux, Leaf, Leaves, Place, Relaxation
from rrt.relax.hosts import Host, at_loop

BY = ('both', 'token', 'loop')
BALANCE = ('none', 'switch', 'bias')


class Chosen(NamedTuple):
  """The experts of each token.

  Attributes:
    gate_BxLxE: float32, zero for experts that are not chosen.
    index_BxLxk: int32.
    weight_BxLxk: float32, their gates.
    aux: for the balance; nothing for rows at several loops.
  """

  gate_BxLxE: jax.Array
  index_BxLxk: jax.Array
  weight_BxLxk: jax.Array
  aux: Aux


@dataclasses.dataclass(frozen=True)
class Routed(Relaxation):
  """A mixture of experts that all loops share.

  Attributes:
    experts: E, a multiple of the loops; 0 for one a loop.
    topk: k, experts a token; 0 for as many as a loop has of its own, -1 for all.
    by: who chooses: 'both' token and loop, the 'token' alone, the 'loop' alone (without a router).
    score: 'softmax' or 'sigmoid'.
    normalise: 'chosen', 'all' or 'none'; see `rrt.ops.routing.route`.
    prior: of the loop's own experts, in logits, at the start.
    anneal: training steps over which the prior goes to zero; 0 leaves it to be learned.
    noise: learned noise in training (noisy top-k).
    balance_by: 'none', 'switch' (auxiliary loss) or 'bias' (loss-free).
    aux_loss, z_loss: coefficients of the auxiliary loss and the router's z-loss.
    bias_rate: step of the loss-free bias.
  """

  experts: int = 0
  topk: int = 0
  by: str = 'both'
  score: str = 'softmax'
  normalise: str = 'chosen'
  prior: float = 10.0
  anneal: int = 0
  noise: bool = False
  balance_by: str = 'switch'
  aux_loss: float = 0.01
  z_loss: float = 0.001
  bias_rate: float = 0.001

  def count_experts(self, host: Host) -> int:
    """E."""
    return self.experts or host.loops

  def own(self, host: Host) -> int:
    """Experts that a loop begins with."""
    return self.count_experts(host) // host.loops

  def taken(self, host: Host) -> int:
    """k."""
    if self.topk == 0:
      return self.own(host)
    return self.count_experts(host) if self.topk < 0 else self.topk

  def group(self, host: Host):
    """The loop that each expert belongs to at the start, [E]."""
    return jnp.arange(self.count_experts(host)) // self.own(host)

  def check(self, hosts: tuple[Host, ...]) -> None:
    R = hosts[0].loops
    if not isinstance(self.experts, int) or self.experts < 0 or self.experts % R:
      raise InputError(
        f'{self.kind}.experts={self.experts!r}: must be a multiple of the {R} loops, or 0 for one '
        'a loop.'
      )
    self.check_router(hosts)

  def check_router(self, hosts: tuple[Host, ...]) -> None:
    """Raises InputError for a field of the router's that cannot work."""

    def need(ok, name, why):
      if not ok:
        raise InputError(f'{self.kind}.{name}={getattr(self, name)!r}: {why}.')

    whole = lambda n: isinstance(n, int) and not isinstance(n, bool)
    E = self.count_experts(hosts[0])
    need(
      whole(self.topk) and -1 <= self.topk <= E,
      'topk',
      f'must lie in 1 to {E}, the number of experts; 0 for those of a loop, -1 for all',
    )
    for name, known in (
      ('by', BY),
      ('score', routing.SCORES),
      ('normalise', routing.NORMALISE),
      ('balance_by', BALANCE),
    ):
      need(getattr(self, name) in known, name, f'must be one of {", ".join(known)}')
    sigmoids = self.score == 'sigmoid' or self.normalise != 'none'
    need(sigmoids, 'normalise', "'none' is for score=sigmoid")
    need(whole(self.anneal) and self.anneal >= 0, 'anneal', 'must be 0 or more steps')
    for name in ('prior', 'aux_loss', 'z_loss', 'bias_rate'):
      value = getattr(self, name)
      need(isinstance(value, (int, float)) and 0 <= value < math.inf, name, 'must be 0 or more')

  def router_leaves(self, host: Host) -> dict[str, Leaf]:
    """The router's parameters on a host."""
    D, R, E = host.d_in, host.loops, self.count_experts(host)
    zeros = nn.initializers.zeros
    found: dict[str, Leaf] = {}
    if self.by != 'loop':
      found['router'] = Leaf((D, E), (host.axes[0], None), zeros)
      if self.noise:
        found['noise'] = Leaf((D, E), (host.axes[0], None), zeros)
      if self.balance_by == 'bias':
        found['balance'] = Leaf((E,), (None,), zeros)
    if self.by == 'both':
      start = lambda key, shape, dtype=jnp.float32: self.start(host).astype(dtype)
      found['start' if self.anneal else 'prior'] = Leaf((R, E), ('loops', None), start)
      if self.anneal:
        found['temperature'] = Leaf((1,), (None,), nn.initializers.ones)
    return {f'{self.kind}_{name}': leaf for name, leaf in found.items()}

  def start(self, host: Host):
    """The prior at the start, [R, E]."""
    own_RxE = self.group(host)[None] == jnp.arange(host.loops)[:, None]
    return self.prior * own_RxE.astype(jnp.float32)

  def choose(self, params: Leaves, x_BxLxD, place: Place, host: Host) -> Chosen:
    """The experts of each token.

    Args:
      params: the leaves.
      x_BxLxD: the host's input.
      place: where.
      host: where.
    """
    B, L, D = x_BxLxD.shape
    E, leaf = self.count_experts(host), lambda name: params[f'{self.kind}_{name}']
    real_T = None if place.real_BxL is None else place.real_BxL.reshape(-1)
    x_TxD = x_BxLxD.reshape(-1, D).astype(jnp.float32)
    logits_TxE = jnp.zeros((B * L, E))
    if self.by != 'loop':
      highest = jax.lax.Precision.HIGHEST
      logits_TxE += jnp.dot(x_TxD, leaf('router'), precision=highest)
      if self.noise and place.key is not None:
        spread_TxE = jnp.dot(x_TxD, leaf('noise'), precision=highest)
        key = place.key
        for own in (place.loop, place.layer, zlib.crc32(host.path.encode())):
          key = jax.random.fold_in(key, own)
        logits_TxE = routing.noisy(logits_TxE, spread_TxE, key)
    if self.by != 'token':
      if self.by == 'loop':
        prior_RxE = self.start(host)
      else:
        prior_RxE = leaf('start') * leaf('temperature')[None] if self.anneal else leaf('prior')
      prior_BxLxE = jnp.broadcast_to(at_loop(prior_RxE, place.loop, 3), (B, L, E))
      logits_TxE += prior_BxLxE.reshape(-1, E)
    bias_E = leaf('balance') if f'{self.kind}_balance' in params else None
    k = self.taken(host)
    routes = routing.route(logits_TxE, k, self.score, self.normalise, bias_E)
    # So that the loop's own experts begin with a gate of 1.
    scale = 1 / jax.nn.sigmoid(self.prior) if self.normalise == 'none' else min(k, self.own(host))
    routes = routes._replace(gate_Txk=routes.gate_Txk * scale)
    aux = NO_AUX
    if not jnp.ndim(place.loop) and self.by != 'loop':
      load_E = routing.load(routes.index_Txk, E, real_T)
      loop_R = (jnp.arange(host.loops) == place.loop).astype(jnp.float32)
      aux = Aux(
        routes={
          'load': loop_R[:, None] * load_E[None],
          'prob': routing.mean(routes.prob_TxE, real_T),
          'z': routing.z_loss(logits_TxE, real_T),
        }
      )
    shaped = lambda a: a.reshape(B, L, -1)
    return Chosen(
      shaped(routing.dense_gates(routes)), shaped(routes.index_Txk), shaped(routes.gate_Txk), aux
    )

  def sites(self, host: Host) -> int:
    """Hosts of the model that have a router of this relaxation's, for means over them."""
    return 1

  def balance(self, routes, host: Host) -> Aux:
    if not routes:
      return NO_AUX
    load_NxE, E = jnp.sum(routes['load'], 1), self.count_experts(host)
    share = 1.0 / self.sites(host)
    losses = {'z': share * self.z_loss * jnp.mean(routes['z'])}
    if self.balance_by == 'switch':
      switch_N = routing.switch_loss(load_NxE, routes['prob'])
      losses['switch'] = share * self.aux_loss * jnp.mean(switch_N)
    p_NxE = jnp.maximum(load_NxE, 1e-20)
    stats = {
      'usage': jnp.mean(load_NxE, 0),
      'largest_load': jnp.mean(E * jnp.max(load_NxE, -1)),
      'entropy': jnp.mean(-jnp.sum(load_NxE * jnp.log(p_NxE), -1)),
      'loop_information': jnp.mean(routing.mutual_information(routes['load'])),
    }
    return Aux(losses, stats)

  def after_step(self, params: Leaves, routes, host: Host) -> Leaves:
    found: Leaves = {}
    balance, temperature = f'{self.kind}_balance', f'{self.kind}_temperature'
    if balance in params and routes:
      load_NxE = jnp.sum(routes['load'], 1)
      found[balance] = routing.balanced(params[balance], load_NxE, self.bias_rate)
    if temperature in params:
      found[temperature] = jnp.maximum(params[temperature] - 1.0 / self.anneal, 0.0)
    return found
