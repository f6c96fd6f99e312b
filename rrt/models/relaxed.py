"""Relaxations inside linen modules: their parameters, application and aux."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.relax.base import Aux, Host, Leaves, Relaxation
from rrt.relax.trees import own_leaves

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
        leaves = {
          leaf: module.param(
            leaf, nn.with_logical_partitioning(d.init, d.axes), d.shape, jnp.float32
          )
          for leaf, d in described.items()
        }
      found.append(Relaxed(relaxation, host, leaves))
  return tuple(found)


def relax(module: nn.Module, relaxed: tuple[Relaxed, ...], x, y, loop):
  """The output y of a module for its input x, relaxed in order."""
  for relaxation, host, leaves in relaxed:
    y, aux = relaxation.apply(leaves, x, y, loop, host)
    if aux.losses or aux.stats:
      module.sow(AUX, relaxation.kind, aux)
  return y


def relax_pooled(module: nn.Module, pools: dict[str, Leaves], config: ModelConfig, x, y, place):
  """The output y of a block layer's MLP for its input x, by the pooled relaxations.

  Args:
    module: the MLP.
    pools: their leaves by kind.
    config: the model's shape.
    x, y: input and output so far.
    place: (loop, layer).
  """
  loop, layer = place
  for relaxation in config.relax:
    if relaxation.kind not in pools:
      continue
    (host,) = relaxation.hosts(config)
    y, aux = relaxation.apply_at(pools[relaxation.kind], x, y, loop, layer, host)
    if aux.losses or aux.stats:
      module.sow(AUX, relaxation.kind, aux)
  return y


def collect(config: ModelConfig, sown: Any, scanned: bool) -> Aux:
  """One `Aux` of all that modules have sown: losses added up, stats averaged.

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
  means = {name: jnp.mean(jnp.concatenate(parts), 0) for name, parts in stats.items()}
  shown: dict[str, jax.Array] = {}
  for relaxation in config.relax:
    head = f'{relaxation.kind}/'
    own = {name.removeprefix(head): v for name, v in means.items() if name.startswith(head)}
    shown |= {head + name: v for name, v in relaxation.summarize(own).items()}
  return Aux(losses, shown)
