"""Native checkpoints: a directory of manifest, weights and tokenizer.

The manifest, `rrt.json`, holds configuration, provenance and checksums: of
itself, of every tensor, and of every other file.
"""

from __future__ import annotations

from collections.abc import Iterable
import json
import math
from pathlib import Path
from typing import Any
import zlib

import numpy as np

from rrt.checkpoints import card, reader, safetensors
from rrt.config import ModelConfig
from rrt.data.tokenizer import TOKENIZER_FILES, Tokenizer
from rrt.errors import InputError
from rrt.files import read_json
from rrt.models.init import abstract_params
from rrt.tree import flatten, set_path

FORMAT = 1
MANIFEST, WEIGHTS = 'rrt.json', 'model.safetensors'
TOKENIZER = 'tokenizer.json'
SMALL = 1 << 18  # Entries of a tensor that is read at once, even lazily.
# Files that commands write beside a model.
BESIDE = (card.NAME, 'frontier.svg')


def is_native(directory: Path) -> bool:
  """Whether `write` made a directory."""
  return (directory / MANIFEST).is_file()


def is_only_native(directory: Path) -> bool:
  """Whether a directory is native and has no other files."""
  names = {MANIFEST, WEIGHTS, *TOKENIZER_FILES, *BESIDE}
  return is_native(directory) and all(p.name in names and p.is_file() for p in directory.iterdir())


def write(
  folder: Path,
  config: ModelConfig,
  params: dict[str, Any],
  tokenizer: Tokenizer | None,
  meta: dict[str, Any],
) -> None:
  """Writes a native checkpoint into an empty directory."""
  if tokenizer is not None:
    tokenizer.save(folder)
  others = {p.name: zlib.crc32(p.read_bytes()) for p in folder.iterdir()}
  leaves = flatten(params)
  manifest = {
    'format': FORMAT,
    'config': config.to_json(),
    'meta': meta,
    'files_crc32': others,
    'tensors': safetensors.write(folder / WEIGHTS, leaves, {'format': 'rrt'}),
  }
  manifest = json.loads(json.dumps(manifest))  # As it will be read.
  manifest['manifest_crc32'] = _crc(manifest)
  text = json.dumps(manifest, indent=1)
  (folder / MANIFEST).write_text(text, encoding='utf-8')


def read_manifest(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
  """(configuration, manifest) of a directory; verifies the manifest.

  Raises:
    InputError: it is damaged, or of another version.
  """
  path = directory / MANIFEST
  manifest = read_json(path)
  if manifest.get('format') != FORMAT:
    raise InputError(f'{path} has format={manifest.get("format")!r}; this version reads {FORMAT}.')
  rest = {k: v for k, v in manifest.items() if k != 'manifest_crc32'}
  if manifest.get('manifest_crc32') != _crc(rest):
    raise InputError(f'{path} is damaged: its checksum is wrong; copy it again.')
  try:
    for field in ('meta', 'tensors', 'files_crc32'):
      dict(manifest[field])
    return ModelConfig.from_json(manifest['config']), manifest
  except (KeyError, TypeError, ValueError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f'{path} is damaged: {e}.') from e


def read(
  directory: Path, dtype: str, lazy: bool = False
) -> tuple[ModelConfig, dict[str, Any], Tokenizer | None, dict[str, Any]]:
  """(config, params, tokenizer, meta); verifies all checksums.

  With `lazy` large tensors are `Pieces`, and of several processes each verifies its share.

  Raises:
    InputError: anything in the directory is damaged or missing.
  """
  config, manifest = read_manifest(directory)
  for name, crc in manifest['files_crc32'].items():
    _check_file(directory / name, crc)
  tokenizer = tokenizer_in(directory)
  params = _read_params(directory, manifest['tensors'], dtype, lazy)
  _check_shapes(config, params, str(directory))
  return config, params, tokenizer, dict(manifest['meta'])


def tokenizer_in(directory: Path) -> Tokenizer | None:
  """The tokenizer of a directory.

  Parsing a large vocabulary takes some hundred megabytes of temporary memory: read
  it before the weights, to keep the peak low.
  """
  if not (directory / TOKENIZER).is_file():
    return None
  tokenizer = Tokenizer.from_directory(directory)
  tokenizer.text_vocab_size  # noqa: B018  (cached: it takes memory too)
  return tokenizer


def _read_params(
  directory: Path, listed: dict[str, int], dtype: str, lazy: bool = False
) -> dict[str, Any]:
  """The parameter tree in the given dtype; verifies the checksums."""
  file = safetensors.SafetensorsFile(directory / WEIGHTS)
  if set(file.infos) != set(listed):
    odd = sorted(set(file.infos) ^ set(listed))
    raise InputError(
      f'{directory}: {WEIGHTS} and {MANIFEST} do not belong together; they '
      f'differ in {len(odd)} tensors, such as {odd[0]}.'
    )
  params: dict[str, Any] = {}
  damaged = []
  first, count = _share_of_this_process() if lazy else (0, 1)
  for i, (name, info) in enumerate(file.infos.items()):
    stored: Any = safetensors.CODES.get(info.dtype, reader.DTYPES[dtype])
    if name.endswith('/step'):  # Of codes, whose precision it is.
      stored = np.float32
    if lazy and math.prod(info.shape) > SMALL:
      set_path(params, name, file.pieces(name, stored))
      if i % count == first and _checksum(file.chunks(name)) != listed[name]:
        damaged.append(name)
      continue
    array = np.empty(info.shape, stored)
    crc = 0
    for start, rows in file.chunks(name):
      crc = _checksum([(start, rows)], crc)
      if rows.ndim:
        array[start : start + len(rows)] = rows
      else:
        array[...] = rows
    if crc != listed[name]:
      damaged.append(name)
    set_path(params, name, array)
  if damaged:
    raise InputError(
      f'{directory / WEIGHTS} is damaged: the checksums of {len(damaged)} '
      f'tensors are wrong ({", ".join(damaged[: reader.MAX_LISTED])}); copy it '
      'again.'
    )
  return params


def _checksum(chunks: Iterable[tuple[int, np.ndarray]], crc: int = 0) -> int:
  for _, rows in chunks:
    crc = zlib.crc32(rows.reshape(-1).view(np.uint8).data, crc)
  return crc


def _share_of_this_process() -> tuple[int, int]:
  import jax  # Kept out of the import, as below.

  return jax.process_index(), jax.process_count()


def _crc(value: Any) -> int:
  """Checksum of a JSON value, independent of its formatting."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _check_file(path: Path, crc: int) -> None:
  """Raises InputError unless a file has its saved checksum."""
  try:
    found = zlib.crc32(path.read_bytes())
  except OSError as e:
    raise InputError(f'{path} cannot be read: {e.strerror or e}.') from e
  if found != crc:
    raise InputError(f'{path} is damaged: its checksum is wrong; copy it again.')


def _check_shapes(config: ModelConfig, params: dict, where: str) -> None:
  """Raises InputError unless a tree has the shapes of its configuration."""
  wanted = {k: tuple(v.shape) for k, v in flatten(abstract_params(config)).items()}
  found = {k: tuple(v.shape) for k, v in flatten(params).items()}
  faults = [
    f'{name} {found.get(name, "missing")} instead of {wanted.get(name, "none")}'
    for name in sorted(wanted | found)
    if wanted.get(name) != found.get(name)
  ]
  if faults:
    raise InputError(
      f'{where}: {len(faults)} tensors do not fit the configuration '
      f'({"; ".join(faults[: reader.MAX_LISTED])}).'
    )
