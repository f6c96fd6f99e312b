"""Relaxations inside linen modules: their parameters, application and aux."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.relax.base import NO_AUX, Aux, Leaf, Leaves, Place, Relaxation
from rrt.relax.hosts import Host
from rrt.relax.trees import own_leaves, relaxed_hosts, subtree

# The collection into which modules put what relaxations return as `Aux`.
AUX = 'aux'


class Relaxed(NamedTuple):
  """A relaxation of one module and its parameters there."""

  relaxation: Relaxation
  host: Host
  leaves: Leaves


def relaxations_of(
  module: nn.Module, config: ModelConfig, name: str, looped: bool, pooled: bool = False
) -> tuple[Relaxed, ...]:
  """The relaxations of a host, their parameters created or read.

  Call it where a module creates its parameters.

  Args:
    module: holds the parameters.
    config: the model's shape.
    name: of the host: a linear's, 'mlp', 'kv' or 'block'.
    looped: whether the module belongs to the block; others have none.
    pooled: whether to find the pooled ones, whose parameters the block itself holds.
  """
  if not looped or not config.relax:
    return ()
  found = []
  for relaxation in config.relax:
    for host in relaxation.hosts(config):
      here = host.name == name and relaxation.pooled == pooled
      described = relaxation.leaves(host) if here else {}
      if not described:
        continue
      stored = own_leaves(dict(module.variables.get('params', {})), relaxation.kind)
      if stored and stored.keys() != described.keys():  # Laid out by `prepare`.
        leaves: dict[str, Any] = stored
      else:
        leaves = {leaf: _param(module, leaf, d, host.experts) for leaf, d in described.items()}
      found.append(Relaxed(relaxation, host, leaves))
  return tuple(found)


def _param(module: nn.Module, name: str, leaf: Leaf, experts: int):
  """A leaf as a parameter of a module, one for each expert where the host has them."""
  shape, axes, init = leaf
  if experts:
    shape, axes, init = (experts, *shape), ('expert', *axes), per_expert(init)
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def per_expert(init):
  """An initializer of one expert's array, for all of them."""

  def of_all(key, shape, dtype=jnp.float32):
    return jax.vmap(lambda key: init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

  return of_all


def pooled_of(config: ModelConfig, pools: dict[str, Leaves] | None) -> tuple[Relaxed, ...]:
  """The pooled relaxations of an MLP, by their leaves."""
  return tuple(
    Relaxed(r, r.hosts(config)[0], pools[r.kind]) for r in config.relax if pools and r.kind in pools
  )


def relax(module: nn.Module, relaxed: Iterable[Relaxed], x, y, place: Place):
  """The output y of a module for its input x, relaxed in order."""
  for relaxation, host, leaves in relaxed:
    y, aux = relaxation.apply_at(leaves, x, y, place, host)
    if aux != NO_AUX:
      module.sow(AUX, relaxation.kind, aux)
  return y


def collect(config: ModelConfig, sown: Any, scanned: bool) -> Aux:
  """One `Aux` of all that modules have sown: losses added up, stats averaged.

  Its routes are those of each host by `route_key`, averaged over the loops, [N, ...].

  Args:
    config: the model's shape.
    sown: the collection `AUX`.
    scanned: whether scans ran layers and loops: then layers, and in the CYCLE
      order loops before them, are leading axes.
  """
  losses: dict[str, jax.Array] = {}
  stats: dict[str, list[jax.Array]] = {}
  is_aux = lambda x: isinstance(x, Aux)
  for path, aux in jax.tree_util.tree_flatten_with_path(sown, is_leaf=is_aux)[0]:
    keys = [k.key for k in path if hasattr(k, 'key')]
    kind = keys[-1]
    leading = 0
    if scanned:
      leading = int('layers' in keys) + int(config.order == 'cycle')
    for name, value in aux.losses.items():
      key = f'{kind}/{name}'
      losses[key] = losses.get(key, jnp.zeros(())) + jnp.sum(value)
    for name, value in aux.stats.items():
      flat = value.reshape(-1, *value.shape[leading:])
      stats.setdefault(f'{kind}/{name}', []).append(flat)
  routes = _routes(config, sown, scanned)
  for relaxation, host, _ in relaxed_hosts(config):
    found = relaxation.balance(routes.get(route_key(relaxation, host), {}), host)
    for name, value in found.losses.items():
      key = f'{relaxation.kind}/{name}'
      losses[key] = losses.get(key, jnp.zeros(())) + value
    for name, value in found.stats.items():
      stats.setdefault(f'{relaxation.kind}/{name}', []).append(value[None])
  means = {name: jnp.mean(jnp.concatenate(parts), 0) for name, parts in stats.items()}
  shown: dict[str, jax.Array] = {}
  for relaxation in config.relax:
    head = f'{relaxation.kind}/'
    own = {name.removeprefix(head): v for name, v in means.items() if name.startswith(head)}
    shown |= {head + name: v for name, v in relaxation.summarize(own).items()}
  return Aux(losses, shown, routes)


def route_key(relaxation: Relaxation, host: Host) -> str:
  """The name of a host's routes."""
  return f'{"mlp" if relaxation.pooled else host.path}/{relaxation.kind}'


def _routes(config: ModelConfig, sown: Any, scanned: bool) -> dict[str, dict[str, jax.Array]]:
  """The routes of each host, averaged over its loops, [N, ...]."""
  found: dict[str, dict[str, list[list[jax.Array]]]] = {}
  is_aux = lambda x: isinstance(x, Aux)
  for path, aux in jax.tree_util.tree_flatten_with_path(sown, is_leaf=is_aux)[0]:
    _, layer, *rest = [k.key for k in path if hasattr(k, 'key')]  # 'block', 'layers', 'attn'...
    for name, value in aux.routes.items():
      of_host = found.setdefault('/'.join(rest), {})
      by_layer = of_host.setdefault(name, [[] for _ in range(config.block_layers)])
      if scanned and config.order == 'cycle':
        value = jnp.mean(value, 0)
      for n in range(config.block_layers):
        if scanned:
          by_layer[n].append(value[n])
        elif layer == f'layers_{n}':
          by_layer[n].append(value)
  mean = lambda by_layer: jnp.stack([sum(each) / len(each) for each in by_layer])
  return {key: {name: mean(v) for name, v in host.items()} for key, host in found.items()}


def after_step(config: ModelConfig, params: Any, routes: Any) -> Any:
  """Parameters whose states are those after a training step.

  Args:
    config: the model's shape.
    params: nested, after the optimizer's update.
    routes: of the step's batch, from `collect`.
  """
  params = jax.tree.map(lambda p: p, params)  # New dicts, the same arrays.
  for relaxation, host, _ in relaxed_hosts(config):
    if relaxation.states:
      tree = subtree(params['block'], host)
      own = own_leaves(tree, relaxation.kind)
      tree.update(relaxation.after_step(own, routes.get(route_key(relaxation, host), {}), host))
  return params
