"""Banks of MLPs with fewer experts: merged by likeness, or pruned by usage.

A merged expert is the mean of two of different loops, their hidden units aligned, weighted by
usage; both loops take it from then on. The shared MLP's segments stay, others may be merged into
them. A pruned expert is left out; the router chooses among the others.

D model, S hidden units of a segment, R loops, E experts, P positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.convert.permute import match_units
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models import transformer
from rrt.models.adapter import with_relaxation
from rrt.models.relaxed import route_key
from rrt.relax.bank import Bank
from rrt.relax.base import Relaxation
from rrt.relax.hosts import Host
from rrt.relax.trees import relaxed_hosts

HOW = ('merge', 'prune')


def wanted(relaxations: Iterable[Relaxation]) -> int:
  """The number of experts that a bank among these is to keep; 0 for all."""
  return next((r.experts for r in relaxations if isinstance(r, Bank)), 0)


def whole(relaxations: Iterable[Relaxation]) -> tuple[Relaxation, ...]:
  """The relaxations, a bank with all its experts."""
  every = lambda r: dataclasses.replace(r, experts=0) if isinstance(r, Bank) else r
  return tuple(every(r) for r in relaxations)


def bank_of(model: LanguageModel) -> tuple[Bank, Host]:
  """The model's bank or pool.

  Raises:
    InputError: it has none.
  """
  for relaxation in model.config.relax:
    if isinstance(relaxation, Bank):
      return relaxation, relaxation.hosts(model.config)[0]
  raise InputError('The model has no bank of MLPs; convert one with --relax=bank or pool.')


def usage(model: LanguageModel, tokens_BxL: np.ndarray) -> np.ndarray:
  """Share of all choices that each expert has, float32 [P, E]; 1 for those always taken."""
  bank, host = bank_of(model)
  params = jax.tree.map(jnp.asarray, model.params)

  @jax.jit
  def one(row_1xL):
    aux = transformer.forward(model.config, params, row_1xL, return_aux=True).aux
    load_NxRxE = aux.routes[route_key(bank, host)]['load']
    return jnp.sum(load_NxRxE, 1)[jnp.asarray(bank.positions)]

  load_PxE = sum(one(row[None]) for row in jnp.asarray(tokens_BxL)) / len(tokens_BxL)
  return np.pad(np.asarray(load_PxE), ((0, 0), (bank.always, 0)), constant_values=1.0)


def reduced(
  model: LanguageModel, experts: int, tokens_BxL: np.ndarray | None = None, how: str = 'merge'
) -> LanguageModel:
  """A model whose bank has so many experts a position.

  Args:
    model: with a bank or pool.
    experts: E, segments of the shared MLP included.
    tokens_BxL: text on which usage is counted; None counts all experts alike, and prunes the
      last ones.
    how: 'merge' or 'prune'.

  Raises:
    InputError: fewer experts than the shared MLP has segments, more than there are, or loops
      that have nothing left to merge.
  """
  bank, host = bank_of(model)
  if how not in HOW:
    raise InputError(f'how={how!r}: must be one of {", ".join(HOW)}.')
  if not bank.segments <= experts <= bank.total(host):
    raise InputError(
      f'experts={experts}: must lie between {bank.segments}, the segments of the shared MLP, and '
      f'{bank.total(host)}, those there are.'
    )
  P, E = len(bank.positions), bank.total(host)
  used_PxE = np.ones((P, E), np.float32) if tokens_BxL is None else usage(model, tokens_BxL)
  small = dataclasses.replace(bank, experts=experts)
  relax = tuple(small if r is bank else r for r in model.config.relax)
  config = dataclasses.replace(model.config, relax=relax)
  params = jax.tree.map(lambda p: p, model.params)
  block = params['block']
  names = [n for n in small.leaves(host) if n != f'{bank.kind}_temperature']
  stacked: dict[str, list[np.ndarray]] = {name: [] for name in names}
  for m in range(P):
    of_position = _Position(bank, host, block, m, used_PxE[m])
    if how == 'merge':
      while len(of_position.experts) > experts:
        of_position.merge()
    else:
      of_position.prune(len(of_position.experts) - experts)
    of_position.write(stacked, block)
  dtype = {name: np.asarray(block[name]).dtype for name in names}
  block |= {name: np.stack(stacked[name]).astype(dtype[name]) for name in names}
  return dataclasses.replace(model, config=config, params=params)


def upcycled(
  model: LanguageModel,
  positions: tuple[int, ...],
  experts: int,
  topk: int = 2,
  noise: float = 0.0,
  seed: int = 0,
) -> LanguageModel:
  """A model with copies of the shared MLP as experts (sparse upcycling, arXiv 2212.05055).

  The weights of a token's experts add up to 1, so that without noise it computes what it did.

  Args:
    model: without a bank.
    positions: layers of the block.
    experts: E, the shared MLP included.
    topk: experts a token.
    noise: of the copies, in standard deviations of each matrix.
    seed: of the noise and of the router, which is normal with 0.02.

  Raises:
    InputError: positions or numbers that cannot work, or an MLP with terms that differ by loop.
  """
  for relaxation, host, _ in relaxed_hosts(model.config):
    if host.name in ('gate', 'up', 'down'):
      raise InputError(
        f'The MLPs have {relaxation.kind!r}, which copies would lack; convert without it there.'
      )
  bank = Bank(positions=positions, experts=experts, topk=topk, by='token')
  child = with_relaxation(model, bank, seed)
  rng, mlp = np.random.default_rng(seed), child.params['block']['layers']['mlp']
  params = jax.tree.map(lambda p: p, child.params)
  block = params['block']
  for part in ('gate', 'up', 'down'):
    if part in mlp:
      shared = np.stack([np.asarray(mlp[part]['kernel'][p], np.float32) for p in positions])
      copies = np.repeat(shared[:, None], experts - 1, 1)
      spread = noise * shared.std((1, 2))[:, None, None, None]
      copies = copies + spread * rng.normal(size=copies.shape).astype(np.float32)
      block[f'bank_{part}'] = copies.astype(np.asarray(mlp[part]['kernel']).dtype)
  router = np.asarray(block['bank_router'])
  block['bank_router'] = rng.normal(0, 0.02, router.shape).astype(router.dtype)
  return dataclasses.replace(child, params=params)


@dataclasses.dataclass
class _Expert:
  """One segment: its kernels, its columns of the router's leaves, and who takes it."""

  kernels: dict[str, np.ndarray]
  router: dict[str, np.ndarray]
  used: float
  loops: frozenset[int]
  base: bool  # Of the shared MLP.
  free: bool = True  # For a router to take, and to merge.


class _Position:
  """The experts of one position, merged or pruned in memory."""

  def __init__(self, bank: Bank, host: Host, block: Any, m: int, used_E: np.ndarray):
    self.bank, self.layer, self.m = bank, bank.positions[m], m
    M, parts = bank.segments, ('gate', 'up', 'down') if host.gated else ('up', 'down')
    mlp = block['layers']['mlp']
    shared = {p: np.asarray(mlp[p]['kernel'][self.layer], np.float32) for p in parts}
    own = {p: np.asarray(block[f'{bank.kind}_{p}'][m], np.float32) for p in parts}
    self.router = [n for n in bank.router_leaves(host) if n != f'{bank.kind}_temperature']
    leaves = {n: np.asarray(block[n][m], np.float32) for n in self.router}
    prior = next((v for n, v in leaves.items() if n.endswith(('_prior', '_start'))), None)
    self.experts: list[_Expert] = []
    self._seen: dict[tuple[int, int], tuple[float, Any, Any]] = {}
    for e in range(bank.total(host)):
      units = slice(e * shared['down'].shape[0] // M, (e + 1) * shared['down'].shape[0] // M)
      cut = lambda p, units=units: shared[p][units] if p == 'down' else shared[p][:, units]
      kernels = {p: cut(p) if e < M else own[p][e - M] for p in parts}
      column = e - bank.always
      free = column >= 0
      loops = frozenset(range(host.loops))
      if free and prior is not None:
        loops = frozenset(np.flatnonzero(prior[:, column] > prior[:, column].max() / 2).tolist())
      router = {n: v[..., column] for n, v in leaves.items()} if free else {}
      self.experts.append(_Expert(kernels, router, float(used_E[e]), loops, e < M, free))

  def merge(self) -> None:
    """Merges the two most alike experts of different loops."""
    best, pair = -np.inf, None
    for a, b in self._pairs():
      likeness = self._likeness(a, b)
      if likeness > best:
        best, pair = likeness, (a, b)
    if pair is None:
      raise InputError(
        f'experts: at position {self.layer} no two experts of different loops are left to merge; '
        "ask for more experts, or how='prune'."
      )
    a, b = pair
    total = max(a.used + b.used, 1e-20)
    share = a.used / total if total > 1e-20 else 0.5
    aligned = _aligned(a.kernels, b.kernels)
    a.kernels = {p: share * v + (1 - share) * aligned[p] for p, v in a.kernels.items()}
    for name, column in a.router.items():
      if name.endswith(('_prior', '_start')):
        a.router[name] = np.maximum(column, b.router[name])
      else:
        a.router[name] = share * column + (1 - share) * b.router[name]
    a.used, a.loops = a.used + b.used, a.loops | b.loops
    # By identity: arrays are not compared.
    self.experts = [e for e in self.experts if e is not b]

  def _pairs(self) -> Iterator[tuple[_Expert, _Expert]]:
    for i, a in enumerate(self.experts):
      for b in self.experts[i + 1 :]:
        if a.free and b.free and not b.base and not a.loops & b.loops:
          yield a, b

  def _likeness(self, a: _Expert, b: _Expert) -> float:
    """Of their aligned weights; 1 where they are equal."""
    key = id(a.kernels), id(b.kernels)
    if key not in self._seen:
      other = _aligned(a.kernels, b.kernels)
      gap = sum(float(np.sum((v - other[p]) ** 2)) for p, v in a.kernels.items())
      size = sum(float(np.sum(v**2 + other[p] ** 2)) for p, v in a.kernels.items())
      # The kernels too, so that no other arrays get their ids.
      self._seen[key] = 1 - gap / max(size, 1e-30), a.kernels, b.kernels
    return self._seen[key][0]

  def prune(self, count: int) -> None:
    """Leaves out the least used experts of the bank; of equals the last."""
    order = sorted(range(len(self.experts)), key=lambda e: (self.experts[e].used, -e))
    gone = [e for e in order if not self.experts[e].base][:count]
    self.experts = [x for e, x in enumerate(self.experts) if e not in gone]

  def write(self, stacked: dict[str, list[np.ndarray]], block: Any) -> None:
    """Appends the position's leaves, and puts the shared MLP's segments back."""
    base, rest = ([x for x in self.experts if x.base == b] for b in (True, False))
    shape = lambda part: np.asarray(block[f'{self.bank.kind}_{part}']).shape[2:]
    mlp = dict(block['layers']['mlp'])
    for part in self.experts[0].kernels:
      kernel = np.array(mlp[part]['kernel'])
      axis = 0 if part == 'down' else 1
      kernel[self.layer] = np.concatenate([x.kernels[part] for x in base], axis)
      mlp[part] = {**mlp[part], 'kernel': kernel}
      own = [x.kernels[part] for x in rest]
      stacked[f'{self.bank.kind}_{part}'].append(
        np.stack(own) if own else np.zeros((0, *shape(part)), np.float32)
      )
    block['layers'] = {**block['layers'], 'mlp': mlp}
    free = [x for x in (*base, *rest) if x.free]
    for name in self.router:
      stacked[name].append(np.stack([x.router[name] for x in free], -1))


def _aligned(first: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The other segment with its hidden units in the first one's order."""
  ones_S = jnp.ones((first['down'].shape[0],))
  eye = jnp.eye(first['up'].shape[0])
  order_S, sign_S = match_units(first, other, eye, ones_S, ones_S)
  found = {p: v[order_S] if p == 'down' else v[:, order_S] for p, v in other.items()}
  found['up'], found['down'] = found['up'] * sign_S[None], found['down'] * sign_S[:, None]
  return found
