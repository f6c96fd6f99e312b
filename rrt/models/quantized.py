"""Models with quantized weights: made, and made dense again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rrt.config_checks import WEIGHTS
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.ops import quantize as quantize_lib


def quantize(model: LanguageModel, weights: str) -> LanguageModel:
  """Rounds the matrices of a model to codes of 8 or 4 bits, one by one.

  Nothing is fitted: `to_recursive(..., weights=...)` fits what follows a rounded weight
  to what the rounding left.

  Args:
    model: of float weights, recursive or not.
    weights: 'int8', 'int4' or 'nf4', of the linears; embeddings and head are int8.

  Raises:
    InputError: another kind, or a model that is quantized already.

  Example:
    >>> small = rrt.quantize(child, 'int8')
  """
  if weights not in WEIGHTS[1:]:
    raise InputError(f'weights={weights!r}: must be one of {", ".join(WEIGHTS[1:])}.')
  if model.config.weights != 'float':
    raise InputError(f'The model has weights={model.config.weights!r} already.')
  config = dataclasses.replace(model.config, weights=weights)
  params = quantize_params(model.params, weights)
  return LanguageModel(config, params, model.tokenizer, dict(model.meta))


def quantize_params(params: dict[str, Any], weights: str) -> dict[str, Any]:
  """A parameter tree with the matrices that are still arrays rounded."""

  def one(path: tuple[str, ...], value):
    if isinstance(value, dict) and quantize_lib.kind_of(value) is None:
      return {name: one((*path, name), part) for name, part in value.items()}
    if path[-1] not in ('kernel', 'table') or isinstance(value, dict):
      return value
    if path[0] == 'exit_gate':
      return value
    outer = path[0] in ('embed', 'head')
    axis = -1 if path[-1] == 'table' else -2
    return host(quantize_lib.quantize(value, 'int8' if outer else weights, axis))

  return one((), params)


def dequantized(model: LanguageModel) -> LanguageModel:
  """The same model with float32 matrices; the given one if it has them already."""
  if model.config.weights == 'float':
    return model

  def one(value):
    if not isinstance(value, dict):
      return value
    if quantize_lib.kind_of(value):
      return np.asarray(quantize_lib.dense(value))
    return {name: one(part) for name, part in value.items()}

  config = dataclasses.replace(model.config, weights='float')
  return LanguageModel(config, one(model.params), model.tokenizer, dict(model.meta))


def host(tree):
  """The arrays of a tree in the host's memory."""
  return jax.tree.map(np.asarray, tree)
