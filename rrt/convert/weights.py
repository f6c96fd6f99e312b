"""The child's weights during a conversion, fitted position by position.

N block layers, R loops, I inputs and O outputs of a linear, D model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert.plan import source_layers
from rrt.models.quantized import host as host_arrays
from rrt.models.quantized import quantize_params
from rrt.models.untie import VECTORS
from rrt.ops.quantize import dense, quantize
from rrt.relax.base import Leaves
from rrt.relax.hosts import hosts_of
from rrt.relax.trees import by_layer, initial, relaxed_hosts, subtree
from rrt.tree import flatten, set_path

TINY = 1e-30  # The least divisor of sizes that may be zero.


class ChildWeights:
  """Shared weights, relaxations, norm gains and refitted layers of their own.

  Attributes:
    config: the child's.
    shared: component -> [N, I, O]; of a model with experts N counts those (`Host`).
    relax: (kind, path of the host) -> leaves, [N, ...] each, from their
      initial values.
    norms: gains, biases and routers of the block by path: [N, R, ...] per loop, else [N, ...].
    own: depth -> layer tree of the prelude's and the coda's refitted layers.
    own_codes: depth -> linear -> its rounded weight, while that layer is fitted.
    codes: component -> block layer -> the rounded shared weight, where weights are
      quantized; `shared` then holds what the codes stand for.
    kept: component -> share of what the shared weight lacks that its
      relaxations regain, [R, N].
    drift: by depth from the block on, `||child - parent||^2 / ||parent||^2`
      of the residual stream after it.
  """

  def __init__(self, config: ModelConfig, layers: Any, init: str, seed: int, fits: bool):
    """Starts from initial values.

    Args:
      config: the child's, its relaxations known.
      layers: the parent's stacked layers.
      init: of the shared weights; tied gains come from the same layers.
      seed: of random initial values.
      fits: whether relaxations are fitted; otherwise they stay without effect.
    """
    self.config, self._layers, self._fits = config, layers, fits
    self.hosts = {host.name: host for host in hosts_of(config, 'linear')}
    R = config.loops
    self.shared = {
      name: np.zeros((h.layers, h.d_in, h.d_out), np.float32) for name, h in self.hosts.items()
    }
    self.codes: dict[str, dict[int, Any]] = {name: {} for name in self.hosts}
    self.kept: dict[str, np.ndarray] = {}
    self.relax: dict[tuple[str, str], Leaves] = {}
    key = jax.random.key(seed)
    for relaxation, host, described in relaxed_hosts(config):
      leaves, key = initial(described, host, key)
      masked = relaxation.mask(leaves, host)
      self.relax[relaxation.kind, host.path] = {k: np.array(v) for k, v in masked.items()}
      if host.site == 'linear':
        self.kept[host.name] = np.zeros((R, host.layers))
    self.own: dict[int, Any] = {}
    self.own_codes: dict[int, dict[str, Any]] = {}
    self.drift: list[float] = []
    self.norms = _norms(config, layers, init)

  def norms_at(self, depth: int) -> dict[str, Any]:
    """The child's gains and biases at a depth, as a tree."""
    positions = {int(d): p for p, d in np.ndenumerate(self.config.block_depths())}
    tree: dict[str, Any] = {}
    for path, leaf in flatten(self._layers).items():
      if not path.endswith(VECTORS):
        continue
      gain = np.asarray(leaf[depth], np.float32)
      if depth in positions:
        r, n = positions[depth]
        gain = self.norms[path][n]
        gain = gain[r] if self.config.loop_norms else gain
      set_path(tree, path, jnp.asarray(gain))
    return tree

  def take_vectors(self, layer: int, trees: list[Any]) -> None:
    """Takes a block layer's biases and router from the layers that it stands for.

    Args:
      layer: of the block.
      trees: of each loop, experts and hidden units aligned as the shared weights have them.
    """
    for name in self.config.biases:
      host, own = self.hosts[name], self.config.loop_norms
      biases_RxO = np.stack([np.asarray(subtree(tree, host)['bias']) for tree in trees])
      self.norms[f'{host.path}/bias'][layer] = biases_RxO if own else biases_RxO.mean(0)
    for name in trees[0]['mlp'].get('router', ()):
      own_RxDxE = np.stack([np.asarray(tree['mlp']['router'][name]) for tree in trees])
      own = self.config.loop_norms
      self.norms[f'mlp/router/{name}'][layer] = own_RxDxE if own else own_RxDxE.mean(0)

  def tie(self, name: str, layer: int, cs_RxIxI, ws_RxIxO) -> Any:
    """The shared weight that a relaxation asks for, or None."""
    for relaxation in self.config.relax if self._fits else ():
      if relaxation.site != 'linear':
        continue
      shared_IxO = relaxation.tie(cs_RxIxI, ws_RxIxO, layer, self.hosts[name])
      if shared_IxO is not None:
        return shared_IxO
    return None

  def keep(self, position: tuple[int, int], layer: Any) -> None:
    """Takes the shared weights of a block layer as a layer tree has them."""
    for name, host in self.hosts.items():
      self.shared[name][host.instances(position[1])] = subtree(layer, host)[host.leaf]

  def round(self, name: str, layer: int) -> Any:
    """Rounds a shared weight, if the child's weights are quantized; its codes."""
    if self.config.weights == 'float':
      return None
    codes = host_arrays(quantize(self.shared[name][layer], self.config.weights))
    self.codes[name][layer] = codes
    self.shared[name][layer] = np.asarray(dense(codes))
    return codes

  def round_own(self, depth: int, name: str, kernel_IxO):
    """A weight of a layer of its own as the child holds it: rounded if it is quantized."""
    if self.config.weights == 'float':
      return kernel_IxO
    codes = host_arrays(quantize(kernel_IxO, self.config.weights))
    self.own_codes.setdefault(depth, {})[name] = codes
    return dense(codes)

  def is_closed(self, name: str, position: tuple[int, int]) -> bool:
    """Whether the shared weight starts without effect at a position."""
    closed = any(r.closes(self.hosts[name]) for r in self.config.relax)
    return self._fits and closed and position[0] > 0

  def leave_out(self, name: str, position: tuple[int, int], c_IxI):
    """Makes a closed linear write nothing, as a deleted layer; its merged weight, 0."""
    host = self.hosts[name]
    if name in self.config.biases and self.config.loop_norms:
      self.norms[f'{host.path}/bias'][position[1]][position[0]] = 0
    return jnp.asarray(self.fit(name, position, np.zeros((host.d_in, host.d_out)), c_IxI))

  def fit(self, name: str, position: tuple[int, int], target_IxO, c_IxI=None, inputs=None):
    """Fits the relaxations of one linear at one position, in their order.

    Args:
      name: of the linear, whose shared weight is set.
      position: (loop, layer).
      target_IxO: the weight to stand for.
      c_IxI: covariance of the inputs; None for the identity.
      inputs: (those to fit on, those to check on), [T, I] each; None for none.

    Returns:
      The shared weight with the relaxations merged in, [I, O] float32.
    """
    loop, layer = position
    for relaxation in self.config.relax if self._fits else ():
      if relaxation.adopts(name, layer):
        if loop == 0:
          self.shared[name][layer] = target_IxO
        else:
          (site,) = relaxation.hosts(self.config)
          own = self.relax[relaxation.kind, site.path]
          relaxation.adopt(own, name, position, np.asarray(target_IxO))
        if name in self.kept:
          self.kept[name][position] = 1.0
        return target_IxO
    host, shared_IxO = self.hosts[name], self.shared[name][layer]
    merged_IxO = shared_IxO if c_IxI is None else jnp.asarray(shared_IxO)
    lacks = bool(np.any(np.asarray(target_IxO) != shared_IxO))
    for relaxation in self.config.relax if self._fits and lacks else ():
      if relaxation.site != 'linear' or not relaxation.leaves(host):
        continue
      fitted = relaxation.fit(merged_IxO, target_IxO, c_IxI, position, host)
      if fitted is not None:
        own = self.relax[relaxation.kind, host.path]
        for leaf, value in fitted.leaves.items():
          own[leaf][layer, loop] = value
        if inputs is not None:
          relaxation.fit_inputs(own, inputs, merged_IxO, target_IxO, position, host)
        merged_IxO = fitted.merged_IxO
    if name in self.kept:
      kept = energy(target_IxO - merged_IxO, c_IxI) / max(
        energy(target_IxO - shared_IxO, c_IxI), TINY
      )
      self.kept[name][loop, layer] = max(1.0 - kept, 0.0) if lacks else 1.0
    return merged_IxO

  def to_params(self, source: dict[str, Any]) -> dict[str, Any]:
    """The child's parameter tree, in the parent's dtype.

    Called once: arrays are given away as they are placed, so that a large
    block is not in memory twice.

    Args:
      source: the parent's parameters.
    """
    c = self.config
    tree: dict[str, Any] = {
      part: source[part] for part in ('embed', 'final_norm', 'head') if part in source
    }
    dtype = np.asarray(source['embed']['table']).dtype
    block: dict[str, Any] = {}
    for path, gains in self.norms.items():
      set_path(block, path, gains.astype(dtype, copy=False))
    for name in list(self.shared):
      leaf: Any = self.shared.pop(name).astype(dtype, copy=False)
      codes = self.codes.pop(name)
      if codes:
        leaf = jax.tree.map(lambda *t: np.stack(t), *(codes[n] for n in range(c.block_layers)))
      host = self.hosts[name]
      if host.experts:
        leaf = leaf.reshape(-1, host.experts, *leaf.shape[1:])
      set_path(block, f'{host.path}/{host.leaf}', leaf)
    tree['block'] = {'layers': block}
    for relaxation, host, _ in relaxed_hosts(c):
      leaves = by_layer(self.relax.pop((relaxation.kind, host.path)), host)
      part = block if host.path else tree['block']
      for name in list(leaves):
        path = f'{host.path}/{name}' if host.path else name
        set_path(part, path, leaves.pop(name).astype(dtype, copy=False))
    first, last = c.prelude_layers, c.depth - c.coda_layers
    for part, depths in (('prelude', range(first)), ('coda', range(last, c.depth))):
      if depths:
        tree[part] = {'layers': self._own_layers(depths, dtype)}
    return tree if c.weights == 'float' else quantize_params(tree, c.weights)

  def _own_layers(self, depths: range, dtype) -> Any:
    """The layers of the prelude or the coda, refitted where they were."""
    refitted = [self.own.pop(depth, None) for depth in depths]
    if not any(refitted):
      return jax.tree.map(lambda t: np.asarray(t[depths.start : depths.stop]), self._layers)
    at_depth = lambda depth: jax.tree.map(lambda t: np.asarray(t[depth]), self._layers)
    trees = [tree or at_depth(depth) for tree, depth in zip(refitted, depths, strict=True)]

    def stack(*leaves):
      stacked = np.stack(leaves)
      return stacked.astype(dtype, copy=False) if stacked.dtype.kind == 'f' else stacked

    return jax.tree.map(stack, *trees)


def _norms(config: ModelConfig, layers: Any, init: str) -> dict[str, np.ndarray]:
  """Gains, biases and routers by path; tied ones as `init` takes the weights, or means."""
  depths_NxR = config.block_depths().T
  gains = {}
  for path, leaf in flatten(layers).items():
    if not path.endswith(VECTORS):
      continue
    leaf = np.asarray(leaf, np.float32)
    if config.loop_norms:
      gains[path] = leaf[depths_NxR]
    elif init in ('stepwise', 'lower', 'upper'):
      gains[path] = leaf[source_layers(config, init)]
    else:
      gains[path] = leaf[depths_NxR].mean(1)
  return gains


def energy(m_IxO, c_IxI) -> float:
  """||x M||^2 of inputs x with covariance C; of M itself without one."""
  if c_IxI is None:
    return float(np.sum(np.asarray(m_IxO, np.float64) ** 2))
  return float(jnp.sum(m_IxO * (c_IxI @ m_IxO)))
