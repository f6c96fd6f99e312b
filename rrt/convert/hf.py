"""Hugging Face directories: config.json and its safetensors."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path
import re
from typing import Any

import numpy as np

from rrt.config import ModelConfig, Rope, is_number, is_whole
from rrt.convert import family, tensorfile
from rrt.convert.tensorfile import Tensors
from rrt.errors import InputError

# More than any model has: a larger number is damage.
MAX_LAYERS = 10_000


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    InputError: the file is missing, unreadable or not an object.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise InputError(f'{path} cannot be read: {e.strerror or e}.') from e
  except ValueError as e:
    raise InputError(f'{path} is not valid JSON: {e}.') from e
  if not isinstance(value, dict):
    raise InputError(f'{path} must hold a JSON object.')
  return value


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
  """The config twin of a config.json; see `Family.from_hf`.

  Raises:
    InputError: names the field that is missing or not supported.
  """
  text = table(fields, 'text_config')
  if text:  # A multimodal model: its text half.
    outer, fields = fields, dict(text)
    fields.setdefault('model_type', outer.get('model_type'))
    for key in ('quantization_config', 'tie_word_embeddings'):
      if outer.get(key) is not None:
        fields.setdefault(key, outer[key])
  kind = family.family_for(fields.get('model_type'))
  layers = whole(fields, 'num_hidden_layers', 1)  # Families know the default.
  if layers > MAX_LAYERS:
    raise InputError(
      f'config.json: num_hidden_layers={layers} cannot be right.'
    )
  refuse(fields, 'quantization_config', None, mend='dequantize it first')
  try:
    return kind.from_hf(fields)
  except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f'config.json has a value of a wrong type: {e}.') from e


def refuse(
  fields: dict[str, Any], name: str, *allowed: Any, mend: str = ''
) -> None:
  """Raises InputError unless a field is absent, null or as allowed."""
  value = fields.get(name)
  if value is None or value in allowed:
    return
  can = ' or '.join(repr(v) for v in allowed if v is not None) or 'no value'
  raise InputError(
    f'config.json: {name}={value!r} is not supported, only {can}'
    f'{"; " + mend if mend else ""}.'
  )


def require(fields: dict[str, Any], name: str) -> Any:
  """A field that has no default."""
  if fields.get(name) is None:
    raise InputError(f'config.json lacks {name}; add it.')
  return fields[name]


def whole(
  fields: dict[str, Any],
  name: str,
  default: int | None = None,
  *,
  least: int = 1,
) -> int:
  """A field that counts something.

  Args:
    fields: of config.json.
    name: of the field.
    default: where it is absent or null; None if it may not be.
    least: the smallest value that can work.

  Raises:
    InputError: names the field and its value.
  """
  if fields.get(name) is None and default is not None:
    return default
  value = require(fields, name)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if not is_whole(value, least):
    raise InputError(
      f'config.json: {name}={value!r} must be a whole number, {least} or more.'
    )
  return value


def number(
  fields: dict[str, Any],
  name: str,
  default: float | None = None,
  *,
  least: float | None = None,
) -> float:
  """A finite number, above 0 or at least `least`; otherwise as `whole`."""
  if fields.get(name) is None and default is not None:
    return default
  value = require(fields, name)
  if not is_number(value, least):
    need = 'above 0' if least is None else f'{least:g} or more'
    raise InputError(
      f'config.json: {name}={value!r} must be a finite number, {need}.'
    )
  return float(value)


def flag(fields: dict[str, Any], name: str, default: bool) -> bool:
  """A field that is true or false; null is false."""
  value = fields.get(name, default)
  if not isinstance(value, bool | None):
    raise InputError(f'config.json: {name}={value!r} must be true or false.')
  return bool(value)


def table(fields: dict[str, Any], name: str) -> dict[str, Any]:
  """A field that is an object; {} where it is absent or null."""
  value = fields.get(name)
  if not isinstance(value, dict | None):
    raise InputError(f'config.json: {name}={value!r} must be an object.')
  return value or {}


def rope_from_hf(
  parameters: dict[str, Any] | None, base: float, max_context: int
) -> Rope:
  """One rotary table from a `rope_parameters` or `rope_scaling` dict.

  Args:
    parameters: the dict; None is the plain table.
    base: theta where the dict has none.
    max_context: llama3's original context where the dict has none.

  Raises:
    InputError: the kind of scaling is not supported, or a value cannot work.
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
      original_context=whole(
        p, 'original_max_position_embeddings', max_context
      ),
    )
  raise InputError(
    f'config.json: rope_type={kind!r} is not supported, only default, '
    'linear and llama3.'
  )


def rope_to_hf(rope: Rope) -> dict[str, Any] | None:
  """A `rope_scaling` dict, None for the plain table."""
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


_PREFIXES = (
  (re.compile(r'^(model\.)?language_model\.(model\.)?'), 'model.'),
  (re.compile(r'^(?=embed_tokens\.|layers\.|norm\.)'), 'model.'),
)
_HEADLESS = re.compile(r'^(model\.)?language_model\.lm_head\.')


def canonical_name(name: str) -> str:
  """A tensor's name as a text-only `...ForCausalLM` would save it."""
  if _HEADLESS.match(name):
    return _HEADLESS.sub('lm_head.', name)
  for pattern, prefix in _PREFIXES:
    if pattern.match(name):
      return pattern.sub(prefix, name)
  return name


class _Renamed:
  """A checkpoint under canonical names."""

  def __init__(self, tensors: Tensors):
    self._names = {canonical_name(name): name for name in tensors.infos}
    self._tensors = tensors
    self.infos = {new: tensors.infos[n] for new, n in self._names.items()}

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    return self._tensors.chunks(self._names[name])


def open_directory(directory: Path) -> Tensors:
  """The safetensors of a Hugging Face directory, one file or sharded.

  Raises:
    InputError: there are none, shards are missing, or files are broken; all
      of these in one.
  """
  index = directory / 'model.safetensors.index.json'
  faults = []
  if index.exists():
    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise InputError(f'{index} has no weight_map; copy it again.')
    for tensor, name in weight_map.items():
      if not isinstance(name, str):
        raise InputError(
          f'{index}: weight_map has {name!r} for {tensor!r} instead of a '
          "file's name; copy it again."
        )
    names = sorted(set(weight_map.values()))
    absent = [n for n in names if not (directory / n).is_file()]
    if absent:
      faults.append(
        f'{directory} lacks {len(absent)} of the {len(names)} files that '
        f'its index names ({", ".join(absent[: family.MAX_LISTED])}); copy '
        'them too.'
      )
    names = [n for n in names if n not in absent]
  else:
    names = sorted(p.name for p in directory.glob('*.safetensors'))
    if 'model.safetensors' in names:
      names = ['model.safetensors']
  if not names and not faults:
    other = [p.name for p in directory.glob('*.bin')]
    other += [p.name for p in directory.glob('*.pth')]
    pickled = f' ({other[0]} is a pickle, which is never read)' if other else ''
    raise InputError(
      f'{directory} has a config.json but no *.safetensors{pickled}; '
      'save the model as safetensors.'
    )
  shards = tensorfile.open_all(
    [directory / n for n in names], tensorfile.SafetensorsFile, faults
  )
  return _Renamed(tensorfile.ShardedTensors(shards))


def load_directory(
  directory: Path, dtype: str
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
  """(config, parameters, special token ids) of a Hugging Face directory.

  Raises:
    InputError: anything about it is wrong or not supported.
  """
  fields = read_json(directory / 'config.json')
  config = config_from_hf(fields)
  generation = {}
  if (directory / 'generation_config.json').is_file():
    generation = read_json(directory / 'generation_config.json')
  ignored = ['rotary_emb.inv_freq']
  if config.tie_embeddings:
    ignored.append('lm_head.weight')
  if fields.get('text_config'):
    ignored += ['vision_tower.', 'multi_modal_projector.']
  params = family.read_params(
    config,
    family.family_of(config),
    open_directory(directory),
    dtype=dtype,
    ignore=lambda name: any(part in name for part in ignored),
    where=str(directory),
  )
  ids = {}
  for source in (fields.get('text_config') or {}, fields, generation):
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
      if source.get(name) is not None:
        ids[name] = source[name]
  return config, params, ids
