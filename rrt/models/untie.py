"""Unties a recursive model: every position gets weights of its own."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

import numpy as np

from rrt.config import ModelConfig
from rrt.model import LanguageModel
from rrt.tree import flatten, set_path


def to_untied(model: LanguageModel) -> LanguageModel:
  """The same function with loops 1 and all layers in one block.

  Args:
    model: vanilla or recursive; with prelude, coda, LoRA and per-loop norms.

  Returns:
    A model of `config.depth` layers; the given one if it is that already.
  """
  c = model.config
  if c.loops == 1 and c.block_layers == c.depth and not c.lora:
    if not c.loop_norms:
      return model
  config = dataclasses.replace(
    c,
    block_layers=c.depth,
    prelude_layers=0,
    loops=1,
    coda_layers=0,
    order='cycle',
    loop_norms=False,
    lora=None,
  )
  params: dict[str, Any] = {
    part: model.params[part] for part in ('embed', 'final_norm', 'head') if part in model.params
  }
  layers: dict[str, Any] = {}
  for path, leaf in flatten(model.params['block']['layers']).items():
    if path.rsplit('/', 1)[-1] in ('lora_a', 'lora_b'):
      continue
    shape = leaf.shape[1 + _has_loops(c, path) :]
    stacked = np.empty((c.depth, *shape), leaf.dtype)
    for depth, value in _values(c, model.params, path):
      stacked[depth] = value
    set_path(layers, path, stacked)
  params['block'] = {'layers': layers}
  return LanguageModel(config, params, model.tokenizer, dict(model.meta))


def _has_loops(config: ModelConfig, path: str) -> bool:
  return config.loop_norms and path.endswith('scale')


def _values(config: ModelConfig, params: dict, path: str) -> Iterator[tuple[int, np.ndarray]]:
  """(depth, value) of one leaf of every layer that a token passes."""

  def stack(part):
    tree = params[part]['layers']
    for key in path.split('/'):
      tree = tree[key]
    return np.asarray(tree)

  c = config
  if c.prelude_layers:
    yield from enumerate(stack('prelude'))
  for (loop, layer), depth in np.ndenumerate(c.block_depths()):
    yield int(depth), _merged(c, params, path, stack('block'), loop, layer)
  if c.coda_layers:
    yield from enumerate(stack('coda'), c.depth - c.coda_layers)


def _merged(c, params, path, stacked, loop, layer) -> np.ndarray:
  """A block leaf at one position."""
  if _has_loops(c, path):
    return stacked[layer, loop]
  *parents, _ = path.split('/')
  component = parents[-1]
  rank = 0
  if c.lora is not None and path.endswith('kernel'):
    rank = int(c.lora.table(component, c.loops, c.block_layers)[loop, layer])
  if not rank:
    return stacked[layer]
  tree = params['block']['layers']
  for key in parents:
    tree = tree[key]
  a, b = (np.asarray(tree[k][layer, loop]) for k in ('lora_a', 'lora_b'))
  # In float64, so that the only rounding is that of the merged weight.
  a, b = a[:, :rank].astype(np.float64), b[:rank].astype(np.float64)
  return stacked[layer] + c.lora.scale(component) * (a @ b)
