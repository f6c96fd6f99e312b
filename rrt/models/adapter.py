"""Task adapters of a model: added, taken off, merged.

See `rrt.relax.Adapter`. R loops, N block layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.relax import registry
from rrt.relax.adapter import Adapter, into_low_rank
from rrt.relax.base import Relaxation
from rrt.relax.hosts import hosts_of
from rrt.relax.trees import initial, own_leaves, relaxed_hosts, subtree
from rrt.tree import flatten


def adapter_of(config: ModelConfig) -> Adapter | None:
  """The task adapter of a model's configuration, or None."""
  return next((r for r in config.relax if isinstance(r, Adapter)), None)


def bare_config(config: ModelConfig) -> ModelConfig:
  """The configuration without a task adapter."""
  relax = tuple(r for r in config.relax if not isinstance(r, Adapter))
  return dataclasses.replace(config, relax=relax)


def with_adapter(model: LanguageModel, adapter: Adapter | str, seed: int = 0) -> LanguageModel:
  """A model with a new task adapter, which has no effect yet.

  Train it with `optimizer.train='adapter'`: everything else stays bit for bit.

  Args:
    model: recursive or not, of any weights; an adapter that it has is replaced.
    adapter: an `rrt.relax.Adapter`, or words: 'rank=8,by_loop=true,components=q+v'.
    seed: of its first factors; the second are zero.

  Raises:
    InputError: an adapter that does not fit the model.

  Example:
    >>> child = rrt.with_adapter(child, 'rank=16,components=all')
  """
  if isinstance(adapter, str):
    adapter = parse(adapter)
  return with_relaxation(without_adapter(model), adapter, seed)


def with_relaxation(model: LanguageModel, added: Relaxation, seed: int = 0) -> LanguageModel:
  """A model with one more relaxation, as initialised: it has no effect yet.

  Args:
    model: without one of this kind.
    added: the relaxation; it comes before those that the model has.
    seed: of its parameters.

  Raises:
    InputError: a relaxation that does not fit the model.
  """
  config = dataclasses.replace(model.config, relax=(added, *model.config.relax))
  params = _copied(model.params)
  key = jax.random.key(seed)
  for relaxation, host, leaves in relaxed_hosts(config):
    if relaxation is not added:
      continue
    own, key = initial(leaves, host, key)
    subtree(params['block'], host).update(own)
  return dataclasses.replace(model, config=config, params=params)


def parse(words: str) -> Adapter:
  """An adapter from words: 'rank=8,by_loop=true,components=q+v'."""
  found = registry.parse(f'adapter:{words}')
  assert isinstance(found, Adapter)
  return found


def without_adapter(model: LanguageModel) -> LanguageModel:
  """The model without its task adapter; the given one if it has none."""
  adapter = adapter_of(model.config)
  if adapter is None:
    return model
  params = _copied(model.params)
  for relaxation, host, _ in relaxed_hosts(model.config):
    if relaxation is adapter:
      tree = subtree(params['block'], host)
      for name in own_leaves(tree, adapter.kind):
        del tree[name]
  return dataclasses.replace(model, config=bare_config(model.config), params=params)


def merge_adapter(model: LanguageModel) -> LanguageModel:
  """The same function without a task adapter: merged into weights that are there.

  One for all loops goes into the shared weights. One a loop goes into the loops'
  low-rank terms, whose ranks grow by its rank, or becomes them.

  Raises:
    InputError: weights that are quantized, or a gain between the two.

  Example:
    >>> rrt.save(rrt.merge_adapter(tuned), 'tuned')
  """
  adapter = adapter_of(model.config)
  if adapter is None:
    return model
  if not adapter.by_loop and model.config.weights != 'float':
    raise InputError(
      f'weights={model.config.weights!r}: an adapter cannot be merged into codes; make the model '
      'dense (rrt.dequantized), or keep the adapter beside it.'
    )
  bare = without_adapter(model)
  merged = _into_terms if adapter.by_loop else _into_shared
  return merged(model, bare, adapter)


def _into_shared(model: LanguageModel, bare: LanguageModel, adapter: Adapter) -> LanguageModel:
  params = _copied(bare.params)
  for relaxation, host, _ in relaxed_hosts(model.config):
    if relaxation is not adapter:
      continue
    leaves = own_leaves(subtree(model.params['block'], host), adapter.kind)
    tree = subtree(params['block'], host)
    kernel_NxIxO = np.array(tree['kernel'])
    for n in range(host.layers):
      merged_IxO = adapter.merge(kernel_NxIxO[n].astype(np.float64), leaves, (0, n), host)
      kernel_NxIxO[n] = merged_IxO.astype(kernel_NxIxO.dtype)
    tree['kernel'] = kernel_NxIxO
  return dataclasses.replace(bare, params=params)


def _into_terms(model: LanguageModel, bare: LanguageModel, adapter: Adapter) -> LanguageModel:
  relax, leaves = into_low_rank(adapter, model.config, model.params['block'])
  params = _copied(bare.params)
  for host in hosts_of(bare.config, 'linear'):
    subtree(params['block'], host).update(leaves.get(host.path, {}))
  return dataclasses.replace(
    bare, config=dataclasses.replace(bare.config, relax=relax), params=params
  )


def _copied(tree: Any) -> Any:
  """New dicts, the same arrays."""
  return jax.tree.map(lambda leaf: leaf, tree)


def adapter_leaves(model: LanguageModel) -> dict[str, np.ndarray]:
  """The adapter's arrays by path in the parameter tree."""
  leaves = flatten(model.params)
  return {p: np.asarray(v) for p, v in leaves.items() if registry.kind_of_path(p) == Adapter.kind}
