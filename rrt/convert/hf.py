"""From checkpoints to our parameter tree: what all families share.

A family (llama.py, gemma.py) is a table of rows `path | Hugging Face name |
GGUF name | kind` and a config twin. Reading writes every tensor, chunk by
chunk, straight into the stacked array that will hold it, so that no more
than the model and one chunk are ever in memory. All that is wrong with a
checkpoint is collected and raised in one error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

import ml_dtypes
import numpy as np

from rrt.config import ModelConfig, Rope
from rrt.convert import tensorfile
from rrt.convert.tensorfile import Tensors
from rrt.errors import InputError

DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}

# How many names of a kind an error lists before it counts the others.
MAX_LISTED = 4


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a family's table.

  Attributes:
    path: place in our tree; of a layer when the names have a `{}`.
    hf: Hugging Face's name; `{}` stands for the depth.
    gguf: llama.cpp's name.
    kind: 'table' and 'gain' are stored as they are, 'linear' is transposed;
      'q' and 'k' are linears whose rows GGUF files of Llama interleave.
  """

  path: str
  hf: str
  gguf: str
  kind: str = 'linear'


@dataclasses.dataclass(frozen=True)
class Family:
  """A checkpoint family.

  Attributes:
    name: `ModelConfig.family`.
    model_types: values of `model_type` in config.json.
    rows: the table of names.
    from_hf: config.json as a dict -> ModelConfig.
    to_hf: ModelConfig of an untied model -> config.json as a dict.
    gguf_permuted: GGUF interleaves q and k rows (llama.cpp's RoPE pairs).
    gguf_gain_offset: what GGUF adds to norm gains.
  """

  name: str
  model_types: tuple[str, ...]
  rows: tuple[Row, ...]
  from_hf: Callable[[dict[str, Any]], ModelConfig]
  to_hf: Callable[[ModelConfig], dict[str, Any]]
  gguf_permuted: bool = False
  gguf_gain_offset: float = 0.0


def families() -> tuple[Family, ...]:
  """All families, in the order in which errors list them."""
  from rrt.convert import gemma, llama  # They import this module's types.

  return (llama.FAMILY, gemma.GEMMA, gemma.GEMMA3)


def family_of(config: ModelConfig) -> Family:
  """The family that a model came from."""
  return next(f for f in families() if f.name == config.family)


def family_for(model_type: str | None) -> Family:
  """The family of a config.json.

  Raises:
    InputError: no family has this model type.
  """
  known = []
  for family in families():
    known += family.model_types
    if model_type in family.model_types:
      return family
  raise InputError(
    f'model_type={model_type!r} is not supported; this version reads '
    f'{", ".join(known)}.'
  )


# ---- config.json -----------------------------------------------------------


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
  if fields.get('text_config'):  # A multimodal model: its text half.
    outer, fields = fields, dict(fields['text_config'])
    fields.setdefault('model_type', outer.get('model_type'))
    for key in ('quantization_config', 'tie_word_embeddings'):
      if outer.get(key) is not None:
        fields.setdefault(key, outer[key])
  family = family_for(fields.get('model_type'))
  refuse(fields, 'quantization_config', None, mend='dequantize it first')
  try:
    return family.from_hf(fields)
  except (TypeError, ValueError, AttributeError) as e:
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


def rope_from_hf(
  parameters: dict[str, Any] | None, base: float, max_context: int
) -> Rope:
  """One rotary table from a `rope_parameters` or `rope_scaling` dict.

  Args:
    parameters: the dict; None is the plain table.
    base: theta where the dict has none.
    max_context: llama3's original context where the dict has none.

  Raises:
    InputError: the kind of scaling is not supported.
  """
  p = parameters or {}
  base = float(p.get('rope_theta') or base)
  refuse(p, 'partial_rotary_factor', 1, 1.0)
  kind = p.get('rope_type', p.get('type', 'default')) or 'default'
  if kind == 'default':
    return Rope(base=base)
  if kind == 'linear':
    return Rope(base=base, scaling='linear', factor=float(require(p, 'factor')))
  if kind == 'llama3':
    return Rope(
      base=base,
      scaling='llama3',
      factor=float(require(p, 'factor')),
      low_freq_factor=float(require(p, 'low_freq_factor')),
      high_freq_factor=float(require(p, 'high_freq_factor')),
      original_context=int(
        p.get('original_max_position_embeddings') or max_context
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


# ---- the tree --------------------------------------------------------------


def set_path(tree: dict, path: str, leaf: Any) -> None:
  """Puts a leaf at a '/'-joined path of nested dicts."""
  *parents, last = path.split('/')
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = leaf


def flatten(tree: dict, prefix: str = '') -> dict[str, Any]:
  """Leaves of nested dicts by '/'-joined path, in a fixed order."""
  leaves = {}
  for key in sorted(tree):
    path = f'{prefix}{key}'
    if isinstance(tree[key], dict):
      leaves |= flatten(tree[key], path + '/')
    else:
      leaves[path] = tree[key]
  return leaves


def row_shape(config: ModelConfig, path: str) -> tuple[int, ...]:
  """Shape of a row's leaf in our tree, without the layers axis."""
  parts = path.split('/')
  if parts[-1] == 'table':
    return (config.vocab_size, config.d_model)
  if parts[0] == 'head':
    return (config.d_model, config.vocab_size)
  if parts[-1] == 'kernel':
    return config.shapes()[parts[-2]]
  if parts[-2] in ('q_norm', 'k_norm'):
    return (config.head_dim,)
  return (config.d_model,)


def wanted_rows(config: ModelConfig, family: Family) -> Iterator[Row]:
  """The rows of a table that a model has tensors for."""
  for row in family.rows:
    if not (row.path.startswith('head/') and config.tie_embeddings):
      yield row


@dataclasses.dataclass
class _Job:
  """One checkpoint tensor and the array that takes it."""

  name: str
  row: Row
  target: np.ndarray  # In the checkpoint's orientation: a view of the tree.


def read_params(
  config: ModelConfig,
  family: Family,
  tensors: Tensors,
  *,
  dtype: str = 'float32',
  style: str = 'hf',
  ignore: Callable[[str], bool] = lambda name: False,
  where: str = 'the checkpoint',
) -> dict[str, Any]:
  """Reads a checkpoint into the tree of an untied model (loops 1).

  Args:
    config: the model; P = C = 0 and R = 1.
    family: its table.
    tensors: the checkpoint.
    dtype: of the parameters: 'float32', 'bfloat16' or 'float16'.
    style: 'hf' or 'gguf': which column of the table has the names, and how
      values are stored.
    ignore: names that may be there without a place in the tree.
    where: the checkpoint's name in errors.

  Raises:
    InputError: lists every tensor that is missing, unexpected, of a wrong
      shape or dtype, or not finite.
  """
  if dtype not in DTYPES:
    raise InputError(f'dtype={dtype!r} must be one of {", ".join(DTYPES)}.')
  tree: dict[str, Any] = {}
  jobs: list[_Job] = []
  for row in wanted_rows(config, family):
    names = row.hf if style == 'hf' else row.gguf
    shape = row_shape(config, row.path)
    is_layer = '{}' in names
    lead = (config.depth,) if is_layer else ()
    array = np.empty(lead + shape, DTYPES[dtype])
    path = f'block/layers/{row.path}' if is_layer else row.path
    set_path(tree, path, array)
    views = array if is_layer else [array]
    for depth, view in enumerate(views):
      transposed = row.kind in ('linear', 'q', 'k')
      jobs.append(
        _Job(names.format(depth), row, view.T if transposed else view)
      )
  faults = _Faults()
  expected = {job.name for job in jobs}
  for name in tensors.infos:
    if name not in expected and not ignore(name):
      faults.add('unexpected', name)
  ready = [job for job in jobs if _check(job, tensors, faults)]
  if faults.found:  # Cheap faults first: no value is read before they pass.
    raise faults.error(where)
  for job in ready:
    _read(job, config, family, tensors, style, faults)
  if faults.found:
    raise faults.error(where)
  return tree


class _Faults:
  """What is wrong with a checkpoint, by kind."""

  def __init__(self):
    self.found: dict[str, list[str]] = {}

  def add(self, kind: str, what: str) -> None:
    self.found.setdefault(kind, []).append(what)

  def error(self, where: str) -> InputError:
    parts = []
    for kind, names in self.found.items():
      more = len(names) - MAX_LISTED
      listed = ', '.join(names[:MAX_LISTED])
      parts.append(
        f'{len(names)} {kind} ({listed}{f", and {more} more" * (more > 0)})'
      )
    return InputError(
      f'{where} does not fit its configuration: {"; ".join(parts)}.'
    )


def _check(job: _Job, tensors: Tensors, faults: _Faults) -> bool:
  info = tensors.infos.get(job.name)
  if info is None:
    faults.add('missing', job.name)
    return False
  if info.shape != job.target.shape:
    faults.add(
      'of a wrong shape',
      f'{job.name} {list(info.shape)} instead of {list(job.target.shape)}',
    )
    return False
  supported = getattr(tensors, 'dtypes', tensorfile.DTYPES)
  if info.dtype not in supported:
    faults.add('of an unsupported dtype', f'{job.name} {info.dtype}')
    return False
  return True


def _read(job, config, family, tensors, style, faults) -> None:
  """Copies one tensor into its place, chunk by chunk."""
  order = None
  if style == 'gguf' and family.gguf_permuted and job.row.kind in ('q', 'k'):
    heads = config.num_heads if job.row.kind == 'q' else config.num_kv_heads
    order = interleaved_rows(heads, config.head_dim)
  offset = 0.0
  if style == 'gguf' and job.row.kind == 'gain':
    offset = family.gguf_gain_offset
  finite = True
  for start, rows in tensors.chunks(job.name):
    if offset:
      rows = rows - rows.dtype.type(offset)
    with np.errstate(over='ignore'):  # Overflow is found below.
      rows = rows.astype(job.target.dtype, copy=False)
    finite = finite and bool(np.isfinite(rows).all())
    where = slice(start, start + len(rows))
    job.target[where if order is None else order[where]] = rows
  if not finite:
    faults.add('with NaN or Inf', job.name)


def interleaved_rows(heads: int, head_dim: int) -> np.ndarray:
  """For every q or k row of a Llama GGUF, the half-split row it holds.

  llama.cpp rotates neighbouring pairs, so its files hold a head's rows in
  the order 0, Dh/2, 1, Dh/2 + 1, ...; we rotate halves, as Hugging Face.
  """
  rows = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
  return rows.swapaxes(1, 2).reshape(-1)


# ---- Hugging Face directories ----------------------------------------------

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
    InputError: there are none, a shard is missing, or a file is broken.
  """
  index = directory / 'model.safetensors.index.json'
  if index.exists():
    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise InputError(f'{index} has no weight_map; copy it again.')
    names = sorted(set(weight_map.values()))
    absent = [n for n in names if not (directory / n).is_file()]
    if absent:
      raise InputError(
        f'{directory} lacks {len(absent)} of the {len(names)} files that '
        f'its index names ({", ".join(absent[:MAX_LISTED])}); copy them too.'
      )
  else:
    names = sorted(p.name for p in directory.glob('*.safetensors'))
    if 'model.safetensors' in names:
      names = ['model.safetensors']
  if not names:
    other = [p.name for p in directory.glob('*.bin')]
    other += [p.name for p in directory.glob('*.pth')]
    pickled = f' ({other[0]} is a pickle, which is never read)' if other else ''
    raise InputError(
      f'{directory} has a config.json but no *.safetensors{pickled}; '
      'save the model as safetensors.'
    )
  shards = (tensorfile.SafetensorsFile(directory / n) for n in names)
  return _Renamed(tensorfile.ShardedTensors(shards))


def load_directory(
  directory: Path, dtype: str
) -> tuple[ModelConfig, dict[str, Any]]:
  """Config and parameters of a Hugging Face directory.

  Raises:
    InputError: anything about it is wrong or not supported.
  """
  fields = read_json(directory / 'config.json')
  config = config_from_hf(fields)
  ignored = ['rotary_emb.inv_freq']
  if config.tie_embeddings:
    ignored.append('lm_head.weight')
  if fields.get('text_config'):
    ignored += ['vision_tower.', 'multi_modal_projector.']
  params = read_params(
    config,
    family_of(config),
    open_directory(directory),
    dtype=dtype,
    ignore=lambda name: any(part in name for part in ignored),
    where=str(directory),
  )
  return config, params
