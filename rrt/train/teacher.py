"""Shares frozen parameters between the child and its parent in the train step.

Parameters of the parent that equal frozen ones of the child are stored once. Of
trained parameters the parent keeps its own copy: with `optimizer.train='all'`
nothing is shared; with 'relaxations' the embedding and every layer that the
conversion left unchanged are.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.pieces import cast, same
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

  It is `arranged` first, so that frozen layers that the conversion left unchanged can be
  shared.

  Returns:
    The rearranged configuration of the parent, its own parameters as a flat
    dict, and the paths that it shares with the child.
  """
  _, frozen = split(child, trained)
  parent_config, parent = arranged(parent_config, parent, child_config, frozen)
  flat = traverse_util.flatten_dict(parent, sep='/')
  shared = frozenset(k for k, v in flat.items() if k in frozen and same(v, frozen[k]))
  own = {k: v for k, v in flat.items() if k not in shared}
  return parent_config, own, shared


def arranged(
  parent_config: ModelConfig, parent: Params, child_config: ModelConfig, frozen: Iterable[str]
) -> tuple[ModelConfig, Params]:
  """A vanilla parent as prelude, block and coda of the child's lengths.

  It stays as it is where none of the child's outer layers is among the `frozen` paths.
  """
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
  return parent_config, parent


def in_dtype(path: str, x: Any, dtype: Any) -> Any:
  """The dtype in which the parent keeps an array: matrices that of the computation.

  Products and look-ups round them to it anyway, so that no figure changes.
  """
  matrix = path.endswith(('/kernel', '/table')) and x.dtype == jnp.float32
  return dtype if matrix else x.dtype


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
  own = {k: cast(v, in_dtype(k, v, spec.dtype)) for k, v in own.items()}
  own = place(own, {k: where[k] for k in own})
  return dataclasses.replace(spec, teacher_config=config, shared=shared), own
