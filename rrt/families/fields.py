"""Reads and validates fields of a Hugging Face config.json."""

from __future__ import annotations

from typing import Any

from rrt.config import Rope, is_number, is_whole
from rrt.errors import InputError


def refuse(fields: dict[str, Any], name: str, *allowed: Any, remedy: str = '') -> None:
  """Raises InputError unless a field is absent, null or an allowed value."""
  value = fields.get(name)
  if value is None or value in allowed:
    return
  can = ' or '.join(repr(v) for v in allowed if v is not None) or 'no value'
  raise InputError(
    f'config.json: {name}={value!r} is not supported, only {can}{"; " + remedy if remedy else ""}.'
  )


def require(fields: dict[str, Any], name: str) -> Any:
  """A required field."""
  if fields.get(name) is None:
    raise InputError(f'config.json lacks {name}; add it.')
  return fields[name]


def whole(fields: dict[str, Any], name: str, default: int | None = None, *, least: int = 1) -> int:
  """An integer field.

  Args:
    fields: of config.json.
    name: of the field.
    default: used if it is absent or null; None if the field is required.
    least: the smallest valid value.

  Raises:
    InputError: names the field and its value.
  """
  if fields.get(name) is None and default is not None:
    return default
  value = require(fields, name)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if not is_whole(value, least):
    raise InputError(f'config.json: {name}={value!r} must be a whole number, {least} or more.')
  return value


def number(
  fields: dict[str, Any], name: str, default: float | None = None, *, least: float | None = None
) -> float:
  """A finite number, above 0 or at least `least`; otherwise as `whole`."""
  if fields.get(name) is None and default is not None:
    return default
  value = require(fields, name)
  if not is_number(value, least):
    need = 'above 0' if least is None else f'{least:g} or more'
    raise InputError(f'config.json: {name}={value!r} must be a finite number, {need}.')
  return float(value)


def flag(fields: dict[str, Any], name: str, default: bool) -> bool:
  """A boolean field; null is false."""
  value = fields.get(name, default)
  if not isinstance(value, bool | None):
    raise InputError(f'config.json: {name}={value!r} must be true or false.')
  return bool(value)


def table(fields: dict[str, Any], name: str) -> dict[str, Any]:
  """An object field; {} if it is absent or null."""
  value = fields.get(name)
  if not isinstance(value, dict | None):
    raise InputError(f'config.json: {name}={value!r} must be an object.')
  return value or {}


def rope_from_hf(parameters: dict[str, Any] | None, base: float, max_context: int) -> Rope:
  """One rotary table from a `rope_parameters` or `rope_scaling` dict.

  Args:
    parameters: the dict; None is no scaling.
    base: theta, if the dict has none.
    max_context: llama3's original context, if the dict has none.

  Raises:
    InputError: the kind of scaling is not supported, or a value is invalid.
  """
  p = parameters or {}
  base = number(p, 'rope_theta', base)
  refuse(p, 'partial_rotary_factor', 1, 1.0)
  kind = p.get('rope_type', p.get('type', 'default')) or 'default'
  if kind == 'default':
    return Rope(base=base)
  if kind == 'linear':
    return Rope(base=base, scaling='linear', factor=number(p, 'factor'))
  if kind == 'llama3':
    return Rope(
      base=base,
      scaling='llama3',
      factor=number(p, 'factor'),
      low_freq_factor=number(p, 'low_freq_factor'),
      high_freq_factor=number(p, 'high_freq_factor'),
      original_context=whole(p, 'original_max_position_embeddings', max_context),
    )
  raise InputError(
    f'config.json: rope_type={kind!r} is not supported, only default, linear and llama3.'
  )


def rope_to_hf(rope: Rope) -> dict[str, Any] | None:
  """A `rope_scaling` dict; None for no scaling."""
  if not rope.scaling:
    return None
  fields = {'rope_type': rope.scaling, 'factor': rope.factor}
  if rope.scaling == 'llama3':
    fields |= {
      'low_freq_factor': rope.low_freq_factor,
      'high_freq_factor': rope.high_freq_factor,
      'original_max_position_embeddings': rope.original_context,
    }
  return fields
