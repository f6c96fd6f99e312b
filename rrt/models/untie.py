"""Unties a recursive model: every position gets weights of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models.quantized import dequantized
from rrt.pieces import Pieces
from rrt.relax import registry
from rrt.relax.trees import by_expert, own_leaves, relaxed_hosts, subtree
from rrt.tree import flatten, set_path


def to_untied(model: LanguageModel) -> LanguageModel:
  """The same function with loops 1 and all layers in one block.

  Args:
    model: vanilla or recursive; with prelude, coda, relaxations and per-loop
      norms.

  Returns:
    A model of `config.depth` layers; the given one if it is that already.

  Raises:
    InputError: a relaxation that no untied model can hold.

  Example:
    >>> rrt.to_untied(child).config.loops
    1
  """
  c = model.config
  if c.weights != 'float':
    return to_untied(dequantized(model))
  if c.loops == 1 and c.block_layers == c.depth and not c.relax and not c.loop_norms:
    return model
  check_mergeable(c)
  config = untied_config(c)
  params: dict[str, Any] = {
    part: model.params[part] for part in ('embed', 'final_norm', 'head') if part in model.params
  }
  layers: dict[str, Any] = {}
  for path, leaf in flatten(model.params['block']['layers']).items():
    if registry.kind_of_path(path):
      continue
    shape = (c.depth, *leaf.shape[1 + has_loops(c, path) :])
    of_depth = functools.partial(_value, c, model.params, path)
    rows = lambda a, b, of_depth=of_depth: np.stack([of_depth(depth) for depth in range(a, b)])
    stacked = Pieces(shape, leaf.dtype, rows)
    # Of a model that is read lazily each layer is made when it is used.
    set_path(layers, path, stacked if isinstance(leaf, Pieces) else np.asarray(stacked))
  params['block'] = {'layers': layers}
  return LanguageModel(config, params, model.tokenizer, dict(model.meta))


def untied_config(config: ModelConfig) -> ModelConfig:
  """The shape of the untied model: all layers in one block that runs once."""
  return dataclasses.replace(
    config,
    block_layers=config.depth,
    prelude_layers=0,
    loops=1,
    coda_layers=0,
    order='cycle',
    loop_norms=False,
    weights='float',
    relax=(),
  )


def check_mergeable(config: ModelConfig) -> None:
  """Raises InputError for what no untied model can hold."""
  if config.end_norm:
    raise InputError(
      f'family={config.family!r}: a norm ends every loop, which no untied model has; '
      '--format=hf writes the model as it is.'
    )
  for relaxation in config.relax:
    if relaxation.unmergeable:
      raise InputError(
        f'relax: {relaxation.kind!r} cannot be merged into untied weights: '
        f'{relaxation.unmergeable}. Save it with rrt.save, and run it with rrt generate or '
        'rrt serve.'
      )


# Leaves that a loop may have of its own.
VECTORS = ('scale', 'bias', 'router/weights', 'router/shared')


def has_loops(config: ModelConfig, path: str) -> bool:
  """Whether a leaf of a block layer has a loops axis: norms, biases and routers may."""
  return config.loop_norms and path.endswith(VECTORS)


def _value(config: ModelConfig, params: dict, path: str, depth: int) -> np.ndarray:
  """One leaf of the layer that a token passes at this depth."""

  def layer_of(part, layer):
    tree = params[part]['layers']
    for key in path.split('/'):
      tree = tree[key]
    return np.asarray(tree[layer])

  c = config
  behind = depth - (c.depth - c.coda_layers)
  if depth < c.prelude_layers:
    return layer_of('prelude', depth)
  if behind >= 0:
    return layer_of('coda', behind)
  loop, layer = map(int, np.argwhere(c.block_depths() == depth)[0])
  value = layer_of('block', layer)
  if has_loops(c, path):
    return value[loop]
  return _merged(c, params['block'], path, value, (loop, layer))


def _merged(config, block, path: str, value: np.ndarray, position) -> np.ndarray:
  """A block leaf at one position, with what relaxes it merged in."""
  parent, _, leaf = path.rpartition('/')
  loop, layer = position
  for relaxation, host, _ in relaxed_hosts(config):
    if host.path != parent or host.leaf != leaf:
      continue
    leaves = own_leaves(subtree(block, host), relaxation.kind)
    if not host.experts:
      value = relaxation.merge(value, leaves, position, host)
      continue
    leaves, first = by_expert(leaves, host), layer * host.experts
    value = np.stack(
      [relaxation.merge(w, leaves, (loop, first + e), host) for e, w in enumerate(value)]
    )
  return value
