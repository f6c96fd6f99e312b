"""Reads Hugging Face directories: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
from pathlib import Path
import re
from typing import Any

import numpy as np

from rrt import console
from rrt.checkpoints import reader, safetensors, shared_experts
from rrt.checkpoints.safetensors import Tensors
from rrt.config import ModelConfig
from rrt.data import tokenizer_config
from rrt.errors import InputError
from rrt.families.base import Family
from rrt.families.fields import COMMON, number, refuse, refuse_unknown, table, whole
from rrt.families.registry import family_for, family_of
from rrt.files import read_json

# Beside the token ids: of a model with a gate of its own.
EXIT_THRESHOLD = 'exit_threshold'
# More than any model has: a larger number is damage.
MAX_LAYERS = 10_000


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
  """The ModelConfig of a config.json; see `Family.from_hf`.

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
  kind = family_for(fields.get('model_type'))
  layers = whole(fields, 'num_hidden_layers', 1)  # Families know the default.
  if layers > MAX_LAYERS:
    raise InputError(f'config.json: num_hidden_layers={layers} cannot be right.')
  refuse(fields, 'quantization_config', None, remedy='dequantize it first')
  if not kind.own_code:
    _refuse_custom_code(fields)
  refuse_unknown(fields, (*COMMON, *kind.fields, 'auto_map'))
  try:
    return kind.from_hf(fields)
  except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f'config.json has a value of a wrong type: {e}.') from e


def _refuse_custom_code(fields: dict[str, Any]) -> None:
  """Raises InputError for a model with Python code of its own."""
  for name, code in table(fields, 'auto_map').items():
    if name == 'AutoModel' or name.startswith('AutoModelFor'):
      raise InputError(
        f'config.json: auto_map has {name}={code!r}, code that may compute something else; '
        'remove auto_map if the model is one of transformers itself.'
      )


_PREFIXES = (
  (re.compile(r'^(model\.)?language_model\.(model\.)?'), 'model.'),
  (re.compile(r'^(?=embed_tokens\.|layers\.|norm\.)'), 'model.'),
)
_HEADLESS = re.compile(r'^(model\.)?language_model\.lm_head\.')


def canonical_name(name: str) -> str:
  """A tensor's name in the family's text-only `...ForCausalLM`."""
  if _HEADLESS.match(name):
    return _HEADLESS.sub('lm_head.', name)
  for pattern, prefix in _PREFIXES:
    if pattern.match(name):
      return pattern.sub(prefix, name)
  return name


class _Renamed:
  """A view of a checkpoint under other names."""

  def __init__(self, tensors: Tensors, rename: Callable[[str], str]):
    self._names = {rename(name): name for name in tensors.infos}
    self._tensors = tensors
    self.infos = {new: tensors.infos[n] for new, n in self._names.items()}

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    return self._tensors.chunks(self._names[name])


def open_directory(directory: Path) -> Tensors:
  """The safetensors of a Hugging Face directory, one file or sharded.

  Raises:
    InputError: no safetensors, missing shards, or damaged files; lists all.
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
        f'its index names ({", ".join(absent[: reader.MAX_LISTED])}); copy '
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
      f'{directory} has a config.json but no *.safetensors{pickled}; save the model as safetensors.'
    )
  shards = safetensors.open_all([directory / n for n in names], safetensors.SafetensorsFile, faults)
  return _Renamed(safetensors.ShardedTensors(shards), canonical_name)


def _resolve_head(
  config: ModelConfig, family: Family, tensors: Tensors, where: Path
) -> tuple[ModelConfig, Tensors]:
  """Head and embedding of a model whose config.json says that they are tied.

  The file may hold the matrix under the head's name alone, or a head that differs
  from the embedding: then they are untied, as in transformers.
  """
  names = {row.path: row.hf for row in family.rows}
  embed, head = names['embed/table'], names['head/kernel']
  if not config.tie_embeddings or head not in tensors.infos:
    return config, tensors
  if embed not in tensors.infos:
    return config, _Renamed(tensors, lambda name: embed if name == head else name)
  if _same_values(tensors, embed, head):
    return config, tensors
  console.note(f'{where}: {head} differs from {embed}: loaded without tie_word_embeddings')
  return dataclasses.replace(config, tie_embeddings=False), tensors


def _same_values(tensors: Tensors, one: str, other: str) -> bool:
  if tensors.infos[one] != tensors.infos[other]:
    return False
  pairs = zip(tensors.chunks(one), tensors.chunks(other), strict=True)
  return all(np.array_equal(a, b) for (_, a), (_, b) in pairs)


def load_directory(
  directory: Path, dtype: str, lazy: bool = False
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
  """(config, parameters, special token ids) of a Hugging Face directory.

  Raises:
    InputError: the directory is incomplete, damaged or not supported.
  """
  fields = read_json(directory / 'config.json')
  config = config_from_hf(fields)
  generation = read_json(directory / 'generation_config.json', optional=True)
  ids = _token_ids(directory, fields, generation, config.vocab_size)
  family = family_of(config)
  config, tensors = _resolve_head(config, family, open_directory(directory), directory)
  if config.shared_experts:
    tensors = shared_experts.Split(tensors, config)
  ignored = ['rotary_emb.inv_freq']
  if config.tie_embeddings:
    ignored.append('lm_head.weight')
  if config.family == 'gpt_neox':  # Masks, which old files hold.
    ignored += ['.attention.bias', '.attention.masked_bias']
  if fields.get('text_config'):
    ignored += ['vision_tower.', 'multi_modal_projector.']
  params = reader.read_params(
    config,
    family,
    tensors,
    dtype=dtype,
    ignore=lambda name: any(part in name for part in ignored),
    where=str(directory),
    lazy=lazy,
  )
  if family.scaled:
    factor = number(fields, family.scaled, 1.0)
    gain = params['final_norm']['scale']
    params['final_norm']['scale'] = (gain * np.float32(factor)).astype(gain.dtype)
  if fields.get('early_exit_threshold') is not None:
    ids[EXIT_THRESHOLD] = number(fields, 'early_exit_threshold', least=0)
  return config, params, ids


def _token_ids(directory: Path, fields, generation, vocab_size: int) -> dict[str, Any]:
  """Ids of special tokens, generation_config.json before config.json."""
  ids: dict[str, Any] = {}
  for name, source in (
    ('config.json', table(fields, 'text_config')),
    ('config.json', fields),
    ('generation_config.json', generation),
  ):
    for field in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
      if field == 'pad_token_id' and source.get(field) == -1:  # Early Llamas: none.
        continue
      if tokenizer_config.token_ids(source, field, vocab_size, directory / name):
        ids[field] = source[field]
  return ids
