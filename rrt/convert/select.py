"""Shared weights by the paper's rules (section 2), relaxations by a plain SVD.

N block layers, R loops, I inputs and O outputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert.plan import source_layers
from rrt.convert.weights import ChildWeights
from rrt.relax.hosts import Host, hosts_of


def kernel_at(layers: Any, host: Host, depth: int) -> np.ndarray:
  """A linear of the parent at a depth, float32 [I, O], or those of its experts, [E, I, O]."""
  tree = layers
  for key in host.path.split('/'):
    tree = tree[key]
  return np.asarray(tree[host.leaf][depth], np.float32)


def select_shared(
  config: ModelConfig, layers: Any, init: str, seed: int, count: Callable[[int], None]
) -> dict[str, np.ndarray]:
  """Shared weights by component, float32 [N, I, O].

  Args:
    config: the child's.
    layers: the parent's stacked layers.
    init: 'stepwise', 'lower' and 'upper' take a layer's weights, 'random'
      draws them, others are the mean of the layers that a block layer stands
      for.
    seed: of random weights.
    count: called with 1 after each linear of a layer.
  """
  random = np.random.default_rng(seed)
  depths_RxN = config.block_depths()
  shared = {}
  for host in hosts_of(config, 'linear'):
    shape = host.d_in, host.d_out
    kernels = np.zeros((host.layers, *shape), np.float32)
    for n in range(config.block_layers):
      own = host.instances(n)
      if init == 'random':
        kernels[own] = random.normal(0, shape[0] ** -0.5, kernels[own].shape)
      elif init in ('stepwise', 'lower', 'upper'):
        kernels[own] = kernel_at(layers, host, int(source_layers(config, init)[n]))
      else:
        parents = [kernel_at(layers, host, int(d)) for d in depths_RxN[:, n]]
        kernels[own] = np.mean(parents, axis=0)
      count(1)
    shared[host.name] = kernels
  return shared


def spectra(
  config: ModelConfig, layers: Any, shared: dict[str, np.ndarray], count: Callable[[int], None]
) -> dict[str, np.ndarray]:
  """Singular values of what shared weights lack, relative to the weights' norms.

  Returns:
    component -> [R, N, K], K = min(I, O), falling.
  """
  R, N = config.loops, config.block_layers
  found = {}
  for host in hosts_of(config, 'linear'):
    values = np.zeros((R, N, min(host.d_in, host.d_out)))
    for r, n in np.ndindex(R, N):
      weight_IxO = kernel_at(layers, host, config.depth_of(r, n))
      sigma_K = jnp.linalg.svd(weight_IxO - shared[host.name][n], compute_uv=False)
      size = np.linalg.norm(weight_IxO)
      values[r, n] = np.asarray(sigma_K) / (size if size > 0 else 1.0)
      count(1)
    found[host.name] = values
  return found


def fit_relaxations(weights: ChildWeights, layers: Any, count: Callable[[int], None]) -> None:
  """Fits all positions' relaxations to the parent's weights (paper, eq. 4).

  Args:
    weights: the child's, its shared weights set.
    layers: the parent's stacked layers.
    count: called with 1 after each linear of a position.
  """
  config = weights.config
  for name, host in weights.hosts.items():
    for r, n in np.ndindex(config.loops, config.block_layers):
      target = kernel_at(layers, host, config.depth_of(r, n))
      for e in range(host.experts or 1):
        one, index = (target[e], n * host.experts + e) if host.experts else (target, n)
        weights.fit(name, (r, index), one)
      count(1)
