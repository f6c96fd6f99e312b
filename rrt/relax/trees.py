"""The parameters of all relaxations of a model: where they lie, their padding, count and size.

R loops, N layers of the block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.relax.base import Leaf, Leaves, Relaxation
from rrt.relax.hosts import Host


def relaxed_hosts(config):
  """(relaxation, host, its leaves' descriptions) of a `ModelConfig`, in order."""
  for relaxation in config.relax:
    for host in relaxation.hosts(config):
      leaves = relaxation.leaves(host)
      if leaves:
        yield relaxation, host, leaves


def subtree(block: dict[str, Any], host: Host) -> dict[str, Any]:
  """The parameters beside which a host's leaves lie.

  Args:
    block: `params['block']`, stacked, or the tree of one layer.
    host: where.
  """
  tree = block.get('layers', block) if host.path else block
  for key in host.path.split('/') if host.path else ():
    tree = tree[key]
  return tree


def own_leaves(tree: dict[str, Any], kind: str) -> Leaves:
  """The leaves of one kind among the parameters of a host."""
  return {k: v for k, v in tree.items() if (k == kind or k.startswith(f'{kind}_'))}


def by_expert(leaves: Leaves, host: Host) -> Leaves:
  """Leaves of all layers, [N, ...], with each expert's as a layer of its own, [N E, ...]."""
  if not host.experts:
    return leaves
  return {name: leaf.reshape(host.layers, *leaf.shape[2:]) for name, leaf in leaves.items()}


def by_layer(leaves: Leaves, host: Host) -> Leaves:
  """The reverse of `by_expert`: [N, E, ...]."""
  if not host.experts:
    return leaves
  return {name: leaf.reshape(-1, host.experts, *leaf.shape[1:]) for name, leaf in leaves.items()}


def initial(described: dict[str, Leaf], host: Host, key) -> tuple[Leaves, jax.Array]:
  """Initial leaves of a host as numpy arrays, [N, ...] in a layer; and the key for what follows."""
  found = {}
  for name, leaf in described.items():
    key, *own = jax.random.split(key, 1 + (host.layers if host.path else 1))
    drawn = [np.asarray(leaf.init(k, leaf.shape, jnp.float32)) for k in own]
    found[name] = np.stack(drawn) if host.path else drawn[0]
  return found, key


def mask_all(config, params):
  """Parameters with the padding of all relaxations set to zero."""
  params = jax.tree.map(lambda p: p, params)  # New dicts, the same arrays.
  for relaxation, host, _ in relaxed_hosts(config):
    tree = subtree(params['block'], host)
    leaves = by_expert(own_leaves(tree, relaxation.kind), host)
    tree.update(by_layer(relaxation.mask(leaves, host), host))
  return params


def prepare_all(config, params, layout: str = 'auto'):
  """Unstacked parameters with all relaxations laid out for the engine."""
  params = jax.tree.map(lambda p: p, params)
  for relaxation, host, _ in relaxed_hosts(config):
    if host.experts:  # Products by expert read them as they are.
      continue
    block = params['block']
    layers = [f'layers_{n}' for n in range(config.block_layers)]
    for part in [block[n] for n in layers] if host.path else [block]:
      tree = subtree(part, host)
      leaves = own_leaves(tree, relaxation.kind)
      for name in leaves:
        del tree[name]
      tree.update(relaxation.prepare(leaves, host, layout))
  return params


def count_all(config) -> int:
  """Unique parameters of all relaxations of a `ModelConfig`."""
  return sum(relaxation.count(host) for relaxation, host, _ in relaxed_hosts(config))


def padding(config) -> int:
  """Entries of their arrays that are padding and not counted."""
  # The base class counts whole arrays.
  stored = sum(Relaxation.count(relaxation, host) for relaxation, host, _ in relaxed_hosts(config))
  return stored - count_all(config)


def norms(config, params) -> dict[str, jax.Array]:
  """Frobenius norms of what each kind of relaxation adds, [R] by kind."""
  squares: dict[str, jax.Array] = {}
  for relaxation, host, _ in relaxed_hosts(config):
    leaves = by_expert(own_leaves(subtree(params['block'], host), relaxation.kind), host)
    square_R = relaxation.square_norm(leaves, host)
    if square_R is not None:
      squares[relaxation.kind] = squares.get(relaxation.kind, jnp.zeros(())) + square_R
  return {kind: jnp.sqrt(square_R) for kind, square_R in squares.items()}
