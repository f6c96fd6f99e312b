"""LoRA experts: low-rank terms that all loops share, chosen by token and loop.

    y = x W + sum_e gate_e(x, loop) x A_e B_e

Per-loop LoRA is the mixture whose router is the loop's number. At the start it is that: a loop's
own experts are the columns of its LoRA, each with a gate of 1.

B batch, L length, I inputs, O outputs, N layers, R loops, E experts, r rank of an expert,
s = E r / R columns of a loop.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.ops import clusters, expert_parallel, least_squares
from rrt.ops.matmul import matmul, prefers_transposed, transpose_named
from rrt.relax.base import NO_AUX, Fitted, Leaf, Leaves, Place
from rrt.relax.hosts import LINEAR_AXES, Host
from rrt.relax.lora import Lora, low_rank, widen
from rrt.relax.routed import Chosen, Routed

# Columns of all experts, and experts for each that a token takes, from which sorting tokens by
# expert beats one dense product (benchmarks/kernels.py).
_LARGE, _FEW = 512, 8


@dataclasses.dataclass(frozen=True)
class Experts(Routed):
  """LoRA experts on some of the block's seven linears; see `Routed` for the router's fields.

  Attributes:
    q, k, v, o, gate, up, down: rank of one expert; 0 leaves the linear without experts.
    clusters: with topk=1, a conversion clusters the calibration text by what the shared weight
      gets wrong and fits an expert and the router to each cluster (`rrt.ops.clusters`); the router
      stays as it is fitted.
  """

  kind: ClassVar[str] = 'experts'
  site: ClassVar[str] = 'linear'
  unmergeable: ClassVar[str] = 'each token chooses its experts'
  states: ClassVar[tuple[str, ...]] = ('experts_balance', 'experts_start', 'experts_temperature')

  q: int = 0
  k: int = 0
  v: int = 0
  o: int = 0
  gate: int = 0
  up: int = 0
  down: int = 0
  clusters: bool = False

  @property
  def _components(self) -> tuple[str, ...]:
    return tuple(name for name in LINEAR_AXES if getattr(self, name))

  def lora(self, host: Host) -> Lora:
    """The per-loop LoRA that a host starts as."""
    return Lora(**{host.name: getattr(self, host.name) * self.own(host)})

  def active(self, host: Host) -> Lora:
    """The part of it that a token takes at the start."""
    return Lora(**{host.name: getattr(self, host.name) * min(self.taken(host), self.own(host))})

  def check(self, hosts: tuple[Host, ...]) -> None:
    super().check(hosts)
    for name in LINEAR_AXES:
      rank = getattr(self, name)
      if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise InputError(f'experts.{name}={rank!r}: must be a whole number, 0 or more.')
    if not self._components:
      raise InputError('experts: no linear has a rank; give one, such as experts:gate=8,up=8.')
    fits = self.by == 'both' and self.topk == 1 and self.own(hosts[0]) > 1
    moved = self.anneal or self.balance_by != 'none' or self.z_loss
    if self.clusters and (not fits or moved):
      raise InputError(
        'experts.clusters=True: needs two experts a loop or more of which a token takes one '
        '(topk=1), by=both, a learned prior (anneal=0), balance_by=none and z_loss=0: the only '
        'gate of a token is 1, so that losses of the balance alone would train the router, away '
        'from its clusters. Where a token takes all experts of its loop, plain LoRA is the best '
        'start there is.'
      )
    for host in hosts:
      if getattr(self, host.name):
        most = min(host.d_in, host.d_out)
        if getattr(self, host.name) * self.own(host) > most:
          raise InputError(
            f'experts.{host.name}={getattr(self, host.name)}: times {self.own(host)} experts a '
            f'loop it must be at most {most}, the smaller side of the matrix.'
          )

  def leaves(self, host: Host) -> dict[str, Leaf]:
    if not getattr(self, host.name):
      return {}
    terms = self.lora(host).leaves(host)
    return {_own(name): leaf for name, leaf in terms.items()} | self.router_leaves(host)

  def sites(self, host: Host) -> int:
    return len(self._components)

  def apply_at(self, params: Leaves, x, y, place: Place, host: Host):
    wide = 'experts_a_wide' in params
    if self.by == 'loop' and not wide:
      return y + low_rank(x, params['experts_a'], params['experts_b'], place.loop), NO_AUX
    chosen = self.choose(params, x, place, host)
    if wide:  # From `prepare`.
      a_IxEr, b_ErxO = params['experts_a_wide'], params['experts_b_wide']
    else:
      a_IxEr, b_ErxO = widen(params['experts_a'], params['experts_b'])
    a_IxEr, b_ErxO = a_IxEr.astype(x.dtype), b_ErxO.astype(x.dtype)
    if not wide and self.is_grouped(host):
      return y + self._grouped(a_IxEr, b_ErxO, x, chosen, host), chosen.aux
    gate_BxLxEr = jnp.repeat(chosen.gate_BxLxE, getattr(self, host.name), axis=-1)
    inner_BxLxEr = matmul(x, a_IxEr) * gate_BxLxEr.astype(x.dtype)
    return y + matmul(inner_BxLxEr, b_ErxO), chosen.aux

  def is_grouped(self, host: Host) -> bool:
    """Whether each token meets its own experts alone: of many columns, a few."""
    E, r = self.count_experts(host), getattr(self, host.name)
    return E * r >= _LARGE and self.taken(host) * _FEW <= E

  def _grouped(self, a_IxEr, b_ErxO, x_BxLxI, chosen: Chosen, host: Host):
    """The experts' part, choices sorted by expert."""
    E, (B, L, size) = self.count_experts(host), x_BxLxI.shape
    factors = (
      jnp.moveaxis(a_IxEr.reshape(size, E, -1), 1, 0),
      b_ErxO.reshape(E, -1, b_ErxO.shape[-1]),
    )

    run = lambda factors, rows, product, _: product(product(rows, factors[0]), factors[1])
    flat = lambda t: t.reshape(B * L, -1)
    tokens = flat(x_BxLxI), flat(chosen.index_BxLxk), flat(chosen.weight_BxLxk)
    return expert_parallel.dropless(run, factors, *tokens).reshape(B, L, -1)

  def prepare(self, params: Leaves, host: Host, layout: str) -> Leaves:
    found = {k: v for k, v in params.items() if k not in ('experts_a', 'experts_b')}
    a_IxEr, b_ErxO = widen(params['experts_a'], params['experts_b'])
    wide: dict[str, Any] = {'experts_a_wide': a_IxEr, 'experts_b_wide': b_ErxO}
    return found | (transpose_named(wide, tuple(wide)) if prefers_transposed() else wide)

  def tie(self, cs_RxIxI, ws_RxIxO, layer: int, host: Host):
    return self.active(host).tie(cs_RxIxI, ws_RxIxO, layer, host)

  def fit(self, base_IxO, target_IxO, c_IxI, position, host: Host) -> Fitted:
    """The loop's own experts as its LoRA: of its singular directions the first r, and so on."""
    fitted = self.lora(host).fit(base_IxO, target_IxO, c_IxI, position, host)
    part = self.active(host)
    merged_IxO = fitted.merged_IxO
    if part != self.lora(host):
      merged_IxO = part.fit(base_IxO, target_IxO, c_IxI, position, host).merged_IxO
    return Fitted({_own(k): v for k, v in fitted.leaves.items()}, merged_IxO)

  @property
  def fits_inputs(self) -> bool:
    return self.clusters

  def fit_inputs(self, params: Leaves, inputs, base_IxO, target_IxO, position, host: Host) -> None:
    """Experts of clusters of tokens, where they beat LoRA of one expert's rank; else copies of it."""
    fit_TxI, checked_TxI = inputs
    (loop, layer), C, r = position, self.own(host), getattr(self, host.name)
    rest_IxO = jnp.asarray(target_IxO - base_IxO)
    c_IxI = least_squares.damp(fit_TxI.T @ fit_TxI / len(fit_TxI), 1e-2)
    a_Ixr, b_rxO, _ = least_squares.low_rank(c_IxI, rest_IxO, r, r)
    found = clusters.fit(fit_TxI, rest_IxO, C, r)
    own = slice(loop * C, loop * C + C)
    if clusters.improves(found, checked_TxI, rest_IxO, a_Ixr @ b_rxO):
      a_Ixs, b_sxO = np.concatenate(found.a_CxIxr, 1), np.concatenate(found.b_CxrxO, 0)
      params['experts_router'][layer][:, own] = found.router_IxC
      # The other loops' experts are out of reach of any input.
      params['experts_prior'][layer, loop, own] = 100.0 + np.asarray(found.bias_C)
    else:  # The first directions of what `fit` found are the best of their number.
      a_Ixs = np.tile(params['experts_a'][layer, loop][:, :r], (1, C))
      b_sxO = np.tile(params['experts_b'][layer, loop][:r], (C, 1))
    params['experts_a'][layer, loop], params['experts_b'][layer, loop] = a_Ixs, b_sxO

  def is_exact(self, host: Host) -> bool:
    return self.active(host).is_exact(host)

  def square_norm(self, params: Leaves, host: Host):
    terms = {f'lora_{n}': params[f'experts_{n}'] for n in ('a', 'b')}
    return self.lora(host).square_norm(terms, host)


def _own(name: str) -> str:
  """'lora_a' as 'experts_a'."""
  return name.replace('lora_', 'experts_')


def uniform(experts: Experts, leaves: Leaves, host: Host) -> Leaves:
  """The leaves with all experts merged into one that every token takes, in every loop.

  Each loop then has the same product: the mean over its own number of experts of all of them.

  Args:
    experts: the relaxation.
    leaves: of all layers, [N, ...].
    host: where.
  """
  found = dict(leaves)
  a_NxRxIxs, b_NxRxsxO = (np.asarray(leaves[f'experts_{n}'], np.float32) for n in ('a', 'b'))
  R, width = a_NxRxIxs.shape[1], a_NxRxIxs.shape[-1]
  for n in range(a_NxRxIxs.shape[0]):
    mean_IxO = np.einsum('ris,rso->io', a_NxRxIxs[n], b_NxRxsxO[n]) / R
    a_Ixs, b_sxO, _ = least_squares.truncated_svd(mean_IxO, width)
    for leaf, value in (('experts_a', a_Ixs), ('experts_b', b_sxO)):
      merged = np.array(found[leaf])
      merged[n] = np.asarray(value)[None]
      found[leaf] = merged
  return found
