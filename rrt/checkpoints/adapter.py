"""Task adapters as directories of their own, beside the model that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
import zlib

import numpy as np

from rrt.checkpoints import card, reader, safetensors
from rrt.errors import InputError
from rrt.files import check_replaceable, read_json, write_directory
from rrt.model import LanguageModel
from rrt.models.adapter import adapter_leaves, adapter_of, with_adapter, without_adapter
from rrt.relax import registry
from rrt.relax.adapter import Adapter
from rrt.tree import flatten, set_path

FORMAT = 1
MANIFEST, WEIGHTS = 'adapter.json', 'adapter.safetensors'
_LOAD = """
import rrt

# 'child' is the directory of the model that it was trained on.
model = rrt.load('child', adapter='{name}')
"""


def save_adapter(model: LanguageModel, directory: str | Path) -> Path:
  """Saves a model's task adapter alone.

  Args:
    model: with an adapter (`rrt.with_adapter`).
    directory: new or empty, or an older adapter, which is replaced once the new one is
      complete.

  Returns:
    The directory.

  Raises:
    InputError: the model has no adapter; the directory holds something else, or cannot
      be written.

  Example:
    >>> rrt.save_adapter(run.model, 'sums')
    >>> rrt.load('child', adapter='sums')
  """
  adapter = adapter_of(model.config)
  if adapter is None:
    raise InputError('The model has no adapter; rrt.with_adapter gives it one.')
  leaves, name = adapter_leaves(model), Path(directory).name

  def write(folder: Path) -> None:
    manifest = {
      'format': FORMAT,
      'adapter': registry.to_json(adapter),
      'base': _fingerprint(model),
      'base_name': str(model.meta.get('source') or 'child'),
      'tensors': safetensors.write(folder / WEIGHTS, leaves, {'format': 'rrt'}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding='utf-8')
    text = card.write(model, _LOAD.format(name=name))
    (folder / card.NAME).write_text(text, encoding='utf-8')

  keep = card.kept(Path(directory))
  return write_directory(directory, write, is_adapter, 'an rrt adapter', keep)


def check_save_adapter(directory: str | Path) -> None:
  """Raises InputError unless an adapter may and can be written there."""
  check_replaceable(directory, is_adapter, 'an rrt adapter')


def is_adapter(directory: Path) -> bool:
  """Whether `save_adapter` made a directory, and it has no other files."""
  names = {MANIFEST, WEIGHTS, card.NAME}
  return (directory / MANIFEST).is_file() and all(p.name in names for p in directory.iterdir())


def load_adapter(model: LanguageModel, directory: str | Path) -> LanguageModel:
  """A model with an adapter that was saved alone.

  Raises:
    InputError: the directory holds no adapter, is damaged, or belongs to another model.
  """
  path = Path(directory).expanduser()
  if not (path / MANIFEST).is_file():
    raise InputError(f'adapter={directory}: has no {MANIFEST}; give what rrt.save_adapter wrote.')
  manifest = read_json(path / MANIFEST)
  if manifest.get('format') != FORMAT:
    raise InputError(f'{path / MANIFEST} has format={manifest.get("format")!r}, not {FORMAT}.')
  try:
    adapter, listed = registry.from_json(manifest['adapter']), dict(manifest['tensors'])
    base, name = dict(manifest['base']), manifest['base_name']
  except (KeyError, TypeError, ValueError) as e:
    raise InputError(f'{path / MANIFEST} is damaged: {e}.') from e
  found = _fingerprint(model)
  different = [key for key in base if base[key] != found.get(key)]
  if not isinstance(adapter, Adapter) or different:
    raise InputError(
      f'adapter={directory}: was trained on another model ({name}), whose '
      f'{" and ".join(different) or "kind"} differs.'
    )
  model = with_adapter(model, adapter)
  file = safetensors.SafetensorsFile(path / WEIGHTS)
  wanted = adapter_leaves(model)
  if {k: i.shape for k, i in file.infos.items()} != {k: v.shape for k, v in wanted.items()}:
    raise InputError(f'{path / WEIGHTS} does not have the arrays of its adapter; copy it again.')
  dtype = next(v.dtype for k, v in flatten(model.params).items() if k.endswith('scale'))
  params: dict[str, Any] = model.params
  for key, info in file.infos.items():
    array, crc = np.empty(info.shape, dtype), 0
    for start, rows in file.chunks(key):
      crc = zlib.crc32(rows.reshape(-1).view(np.uint8).data, crc)
      array[start : start + len(rows)] = rows
    if crc != listed.get(key):
      raise InputError(f'{path / WEIGHTS} is damaged: the checksum of {key} is wrong.')
    set_path(params, key, array)
  return model


def _fingerprint(model: LanguageModel) -> dict[str, Any]:
  """What tells one model from another: its shape and its norms, in any dtype."""
  bare = without_adapter(model)
  shape = json.dumps(bare.config.to_json(), sort_keys=True)
  crc = 0
  for path, leaf in flatten(bare.params).items():
    if path.endswith('/scale'):
      rounded = np.asarray(leaf).astype(reader.DTYPES['bfloat16']).view(np.uint16)
      crc = zlib.crc32(np.ascontiguousarray(rounded).tobytes(), crc)
  return {'shape': zlib.crc32(shape.encode()), 'norms': crc}
