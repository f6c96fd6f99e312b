"""Loops that are added to a vanilla model, and start closed.

They stand for no layer of it: with a gain of 0 on what writes to the residual stream
(`Gain.start`) the model computes what it did, in more layers. Training opens them.

N layers of the block, R loops.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models.init import init_params
from rrt.models.untie import has_loops
from rrt.relax import registry
from rrt.relax.base import Relaxation
from rrt.tree import flatten, set_path

WRITES = ('o', 'down')  # The linears that write to the residual stream.
BIASES = ('attn/o/bias', 'mlp/down/bias')


def config_with_loops(
  config: ModelConfig,
  prelude: int,
  block: int | None,
  loops: int,
  coda: int,
  relax: tuple[Relaxation, ...],
  loop_norms: bool = True,
) -> ModelConfig:
  """The config of a vanilla model whose block runs `loops` times.

  Args:
    config: the vanilla model's.
    prelude, coda: layers before and behind the block.
    block: its layers; None for what the others leave.
    loops: R, 2 or more.
    relax: of the block.
    loop_norms: every loop has norm gains of its own.

  Raises:
    InputError: the layers do not add up, the loops do not start closed, or they would share
      a bias that writes to the residual stream.
  """
  if block is None:
    block = config.depth - prelude - coda
  if loops < 2:
    raise InputError(f'loops={loops}: there is no loop to add; give 2 or more.')
  if block < 1 or prelude + block + coda != config.depth:
    raise InputError(
      f'prelude {prelude} + block {block} + coda {coda} = {prelude + block + coda} layers, but '
      f'{config.depth} are there to add loops to.'
    )
  P, end = prelude, prelude + block
  repeat = lambda v: v and (*v[:P], *v[P:end] * loops, *v[end:])
  found = dataclasses.replace(
    config,
    prelude_layers=prelude,
    block_layers=block,
    coda_layers=coda,
    loops=loops,
    loop_norms=loop_norms,
    relax=relax,
    windows=repeat(config.windows),
    rope_index=repeat(config.rope_index),
  )
  closed = {h.name for r in relax for h in r.hosts(found) if r.site == 'linear' and r.closes(h)}
  if not closed.issuperset(WRITES):
    raise InputError(
      'Loops that are added must start closed: relax needs gain:start=0,components=o+down.'
    )
  if not loop_norms and set(WRITES) & set(config.biases):
    raise InputError(
      'loop_norms=False: the biases of o and down would be added in every loop; leave it out.'
    )
  return found


def add_loops(model: LanguageModel, config: ModelConfig, seed: int = 0) -> LanguageModel:
  """A vanilla model with closed loops: it computes what it did.

  Args:
    model: vanilla, without prelude and coda.
    config: from `config_with_loops`.
    seed: of low-rank factors, which start with a product of 0.
  """
  P, end = config.prelude_layers, config.prelude_layers + config.block_layers
  layers = model.params['block']['layers']
  cut = lambda a, b: jax.tree.map(lambda t: np.asarray(t)[a:b], layers)
  params: dict[str, Any] = {k: v for k, v in model.params.items() if k != 'block'}
  if config.prelude_layers:
    params['prelude'] = {'layers': cut(0, P)}
  if config.coda_layers:
    params['coda'] = {'layers': cut(end, None)}
  block: dict[str, Any] = {'layers': cut(P, end)}
  # Gains, biases and routers are each loop's own.
  for path, leaf in flatten(block['layers']).items():
    if has_loops(config, path):
      by_loop = np.repeat(np.asarray(leaf)[:, None], config.loops, 1)
      if path in BIASES:  # They are added behind the gain.
        by_loop[:, 1:] = 0
      set_path(block['layers'], path, by_loop)
  dtype = np.asarray(model.params['final_norm']['scale']).dtype
  for path, leaf in _relaxations(config, seed).items():
    set_path(block, path, np.asarray(leaf, dtype))
  params['block'] = block
  return dataclasses.replace(model, config=config, params=params)


def _relaxations(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
  """The first values of all relaxations, by path in the block."""

  @jax.jit  # Which makes nothing else of the model.
  def init(key):
    block = init_params(config, key)['block']
    return {path: leaf for path, leaf in flatten(block).items() if registry.kind_of_path(path)}

  return init(jax.random.key(seed))
