"""Shares frozen parameters between the child and its parent in the train step.

Parameters of the parent that equal frozen ones of the child are stored once. Of
trained parameters the parent keeps its own copy: with `optimizer.train='all'`
nothing is shared; with 'relaxations' the embedding and every layer that the
conversion left unchanged are.
"""

from __future__ import annotations

import dataclasses

from flax import traverse_util
import jax
import numpy as np

from rrt.config import ModelConfig
from rrt.train.placement import param_shardings, place
from rrt.train.step import Params, Step, split


def share_teacher(
  parent_config: ModelConfig,
  parent: Params,
  child_config: ModelConfig,
  child: Params,
  trained: frozenset[str],
) -> tuple[ModelConfig, Params, frozenset[str]]:
  """Separates the parent's parameters from those shared with the child.

  A vanilla parent is rearranged as prelude, block and coda of the child's
  lengths (the same layers in the same order), so that frozen layers that the
  conversion left unchanged can be shared.

  Returns:
    The rearranged configuration of the parent, its own parameters as a flat
    dict, and the paths that it shares with the child.
  """
  _, frozen = split(child, trained)
  P, C = child_config.prelude_layers, child_config.coda_layers
  plain = parent_config.loops == 1 and not (
    parent_config.prelude_layers or parent_config.coda_layers
  )
  outer = any(k.startswith(('prelude/', 'coda/')) for k in frozen)
  if outer and plain and parent_config.depth == child_config.depth:
    N = parent_config.depth - P - C
    layers = parent['block']
    rest = {k: v for k, v in parent.items() if k != 'block'}
    cut = lambda a, b: jax.tree.map(lambda x: x[a:b], layers)
    parts = {'prelude': cut(0, P), 'block': cut(P, P + N)}
    parts['coda'] = cut(P + N, None)
    if not P:
      del parts['prelude']
    if not C:
      del parts['coda']
    parent = {**rest, **parts}
    parent_config = dataclasses.replace(
      parent_config, prelude_layers=P, block_layers=N, coda_layers=C
    )
  flat = traverse_util.flatten_dict(parent, sep='/')
  shared = frozenset(
    k
    for k, v in flat.items()
    if k in frozen
    and v.shape == frozen[k].shape
    and (v is frozen[k] or np.array_equal(v, frozen[k]))
  )
  own = {k: v for k, v in flat.items() if k not in shared}
  return parent_config, own, shared


def with_teacher(spec: Step, parent, child, mesh) -> tuple[Step, Params]:
  """Adds the parent, if any, to a step.

  Args:
    spec: a step without a teacher.
    parent, child: `LanguageModel`s; the parent may be None.
    mesh: where the parent's own parameters go.

  Returns:
    The step, and the parent's own parameters for it, flat and placed.
  """
  if parent is None:
    return spec, {}
  config, own, shared = share_teacher(
    parent.config, parent.params, child.config, child.params, spec.trained
  )
  where = traverse_util.flatten_dict(param_shardings(config, mesh), sep='/')
  own = place(own, {k: where[k] for k in own})
  return dataclasses.replace(spec, teacher_config=config, shared=shared), own
