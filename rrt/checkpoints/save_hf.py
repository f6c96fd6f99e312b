"""Exports an untied model in Hugging Face format.

Every position gets its own weights, with the relaxations merged in, and its own
norm gains, in the order in which the positions run. The result is an ordinary
model of the family, for tests against transformers and for other software.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from rrt.checkpoints import card, safetensors, shared_experts
from rrt.checkpoints.hf import EXIT_THRESHOLD
from rrt.data.tokenizer import TOKENIZER_FILES
from rrt.families.base import Row, tensor_rows, wanted_rows
from rrt.families.registry import family_of
from rrt.files import check_replaceable, read_json, write_directory
from rrt.model import LanguageModel
from rrt.models.untie import to_untied
from rrt.pieces import Pieces
from rrt.tree import flatten

SHARD_BYTES = 5_000_000_000
_LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('{0}')
tokenizer = AutoTokenizer.from_pretrained('{0}')
"""
MARK = 'exported_by'  # A field of config.json: this directory is an export.
# The two directories of an export for PEFT, and the code beside a tied export.
ADAPTER, BASE = 'adapter', 'base'
MODELING = 'modeling_rrt.py'


def tensors_of(model: LanguageModel, style: str = 'hf') -> Iterator[tuple[str, np.ndarray, Row]]:
  """(name, tensor, row of the table) of an untied model, as a checkpoint stores them.

  Linears are transposed, and fused ones put together; other tensors are views. Of weights
  that are `Pieces` tensors are `Pieces` too, but for fused ones.

  Args:
    model: untied.
    style: 'hf' or 'gguf': which column of the family's table has the names.
  """
  config = model.config
  leaves = flatten(model.params)
  fused: dict[str, list[Any]] = {}  # Name -> tensor, parts that it has.
  for row in wanted_rows(config, family_of(config)):
    names = row.hf if style == 'hf' else row.gguf
    is_layer = '{}' in names
    leaf = leaves[f'block/layers/{row.path}' if is_layer else row.path]
    turned = row.kind in ('linear', 'q', 'k')
    if '{e}' in names:
      # Experts of a layer follow each other: it is read once.
      layer = functools.lru_cache(maxsize=1)(lambda depth, leaf=leaf: np.asarray(leaf[depth]))
      for depth, e in np.ndindex(leaf.shape[:2]):
        value = _expert(leaf, functools.partial(layer, depth), e)
        yield names.format(depth, e=e), value, row
      continue
    for depth in range(len(leaf) if is_layer else 1):
      name = names.format(depth)
      value = _tensor(leaf, depth if is_layer else None, turned)
      if row.fused:
        index, rows = tensor_rows(config, row, style)
        parts = fused.setdefault(name, [np.empty((rows, *value.shape[1:]), value.dtype), 0])
        parts[0][index] = value
        parts[1] += 1
        if parts[1] < len(row.fused):
          continue
        value = fused.pop(name)[0]
      yield name, value, row


def _expert(leaf: Any, layer: Callable[[], np.ndarray], expert: int) -> Any:
  """One expert's matrix of a layer's, transposed."""
  if not isinstance(leaf, Pieces):
    return layer()[expert].T
  shape = leaf.shape[:1:-1]
  return Pieces(shape, leaf.dtype, lambda a, b: layer()[expert].T[a:b], shape[0])


def _tensor(leaf: Any, depth: int | None, turned: bool) -> Any:
  """A leaf, or its entry of one depth, transposed if asked."""
  if not isinstance(leaf, Pieces):
    value = np.asarray(leaf) if depth is None else np.asarray(leaf)[depth]
    return value.T if turned else value
  if depth is None and not turned:
    return leaf
  shape = leaf.shape if depth is None else leaf.shape[1:]
  whole = lambda: np.asarray(leaf) if depth is None else leaf[depth]
  shape = shape[::-1] if turned else shape
  rows = lambda a, b: (whole().T if turned else whole())[a:b]
  return Pieces(shape, leaf.dtype, rows, shape[0])


def hf_tensors(model: LanguageModel) -> dict[str, np.ndarray]:
  """An untied model's tensors under Hugging Face's names."""
  tensors = {name: value for name, value, _ in tensors_of(model)}
  return shared_experts.joined(model.config, tensors) if model.config.shared_experts else tensors


def hf_config(model: LanguageModel) -> dict[str, Any]:
  """config.json of an untied model, read alike by transformers 4 and 5."""
  fields = family_of(model.config).to_hf(model.config)
  dtype = np.dtype(model.params['embed']['table'].dtype).name
  ids, meta = token_ids(model), model.meta
  return (
    fields
    | {
      'bos_token_id': ids.get('bos_token_id'),
      'eos_token_id': ids.get('eos_token_id'),
      'pad_token_id': ids.get('pad_token_id'),
    }
    | ({'early_exit_threshold': meta[EXIT_THRESHOLD]} if EXIT_THRESHOLD in meta else {})
    | {'torch_dtype': dtype, 'dtype': dtype, 'use_cache': True, MARK: 'rrt'}
  )


def token_ids(model: LanguageModel) -> dict[str, Any]:
  """Begin, end and padding ids, from the tokenizer or the source's files."""
  ids = dict(model.meta.get('token_ids') or {})
  if model.tokenizer is not None:
    ends = list(model.tokenizer.eos_ids)
    ids['bos_token_id'] = model.tokenizer.bos_id
    ids['eos_token_id'] = ends[0] if len(ends) == 1 else ends or None
  return ids


def save_hf(model: LanguageModel, directory: str | Path) -> Path:
  """Writes an untied model that Hugging Face's transformers loads.

  Args:
    model: vanilla or recursive; it is untied first.
    directory: new or empty, or an earlier export, which is replaced once the
      new one is complete.

  Returns:
    The directory.

  Raises:
    InputError: the directory holds something else, or cannot be written; or
      no config.json can describe the model.

  Example:
    >>> rrt.save_hf(child, 'child_hf')
    >>> transformers.AutoModelForCausalLM.from_pretrained('child_hf')
  """
  if not model.config.end_norm:  # Else it is a looped model of its family.
    model = to_untied(model)
  name = Path(directory).name
  tensors, fields = hf_tensors(model), hf_config(model)

  def write(folder: Path) -> None:
    write_tensors(folder, tensors)
    write_tokenizer(folder, model)
    (folder / card.NAME).write_text(card.write(model, _LOAD.format(name)), encoding='utf-8')
    write_json(folder / 'config.json', fields)

  keep = card.kept(Path(directory))
  return write_directory(directory, write, is_export, 'an rrt export', keep)


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes model.safetensors, or several shards and their index."""
  shards = _shards(tensors)
  for file, part in shards.items():
    safetensors.write(folder / file, part, {'format': 'pt'})
  if len(shards) > 1:
    total = sum(t.size * t.dtype.itemsize for t in tensors.values())
    write_json(
      folder / 'model.safetensors.index.json',
      {
        'metadata': {'total_size': total},
        'weight_map': {t: file for file, part in shards.items() for t in part},
      },
    )


def write_tokenizer(folder: Path, model: LanguageModel) -> None:
  """Writes the tokenizer's files and generation_config.json."""
  if model.tokenizer is not None:
    model.tokenizer.save(folder)
  ids = {k: v for k, v in token_ids(model).items() if v is not None}
  write_json(folder / 'generation_config.json', ids)


def check_save_hf(directory: str | Path) -> None:
  """Checks, before long work, that an export may and can be written there.

  Raises:
    InputError: the directory holds something else, or cannot be written.
  """
  check_replaceable(directory, is_export, 'an rrt export')


def is_export(directory: Path) -> bool:
  """Whether a directory is an export of any format and has no other files."""
  if (directory / ADAPTER).is_dir() and (directory / BASE).is_dir():
    rest = {p.name for p in directory.iterdir()} - {ADAPTER, BASE, card.NAME}
    return not rest and all(_is_ours(directory / name) for name in (ADAPTER, BASE))
  return _is_ours(directory)


def _is_ours(directory: Path) -> bool:
  path = directory / ('adapter_config.json' if directory.name == ADAPTER else 'config.json')
  if not path.is_file() or MARK not in read_json(path):
    return False
  names = {*TOKENIZER_FILES, path.name, 'model.safetensors.index.json', card.NAME}
  return all(
    p.is_file() and (p.name in names or p.suffix == '.safetensors' or p.name == MODELING)
    for p in directory.iterdir()
  )


def _shards(tensors: dict[str, np.ndarray]) -> dict[str, dict]:
  """Tensors by file name, each file under `SHARD_BYTES` where it can be."""
  groups: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name, array in tensors.items():
    size += array.nbytes
    if size > SHARD_BYTES and groups[-1]:
      groups.append({})
      size = array.nbytes
    groups[-1][name] = array
  if len(groups) == 1:
    return {'model.safetensors': groups[0]}
  n = len(groups)
  return {f'model-{i:05}-of-{n:05}.safetensors': group for i, group in enumerate(groups, 1)}


def write_json(path: Path, fields: dict[str, Any]) -> None:
  """Writes a JSON object, readable."""
  path.write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
