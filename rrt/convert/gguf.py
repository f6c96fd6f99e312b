"""GGUF files: metadata, and tensors dequantized row by row.

The header is read here and not by the `gguf` package's reader because that
one maps a single whole file: pieces of a file are read in place, damage gets
a clear error, and no more than one chunk is decoded at a time. The package
supplies the decoding of every quantization type.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
import math
import os
from pathlib import Path
import re
import struct
from typing import Any

import numpy as np

from rrt.config import ModelConfig
from rrt.convert import hf
from rrt.convert import tensorfile
from rrt.convert.tensorfile import TensorInfo
from rrt.errors import InputError

MAGIC = b'GGUF'
_SCALARS = {
    0: '<u1', 1: '<i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4',
    7: '?', 10: '<u8', 11: '<i8', 12: '<f8',
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r'-(\d{5})-of-(\d{5})\.gguf$')

# Fields of config.json by llama.cpp's keys (after the architecture's name).
_FIELDS = {
  'hidden_size': 'embedding_length',
  'num_hidden_layers': 'block_count',
  'intermediate_size': 'feed_forward_length',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'max_position_embeddings': 'context_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'rope_theta': 'rope.freq_base',
  'sliding_window': 'attention.sliding_window',
  'num_local_experts': 'expert_count',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
_MODEL_TYPES = {'llama': 'llama', 'gemma': 'gemma', 'gemma3': 'gemma3_text'}


class _Pieces:
  """Files read as if they were one."""

  def __init__(self, paths: Sequence[Path]):
    self.name = str(paths[0])
    self._files = [open(path, 'rb') for path in paths]
    sizes = [os.fstat(f.fileno()).st_size for f in self._files]
    self._starts = [0]
    for size in sizes:
      self._starts.append(self._starts[-1] + size)
    self.size = self._starts[-1]

  def read(self, offset: int, count: int) -> bytes:
    """Bytes at an offset of the whole.

    Raises:
      InputError: the files end before them.
    """
    if offset + count > self.size:
      raise self.broken(
        f'it ends after {self.size:,} of at least {offset + count:,} bytes'
      )
    parts = []
    while count:
      i = bisect.bisect_right(self._starts, offset) - 1
      take = min(count, self._starts[i + 1] - offset)
      self._files[i].seek(offset - self._starts[i])
      data = self._files[i].read(take)
      if len(data) != take:
        raise self.broken(f'it cannot be read at byte {offset:,}')
      parts.append(data)
      offset, count = offset + take, count - take
    return parts[0] if len(parts) == 1 else b''.join(parts)

  def broken(self, why: str) -> InputError:
    n = len(self._files)
    pieces = f' and its {n - 1} other pieces' if n > 1 else ''
    verb = 'are' if n > 1 else 'is'
    return InputError(
      f'{self.name}{pieces} {verb} not a whole GGUF file: {why}; copy or '
      'download it again.'
    )


class _Cursor:
  """Reads values one after another from a buffered window of the file."""

  def __init__(self, pieces: _Pieces):
    self._pieces = pieces
    self._window = b''
    self._base = 0
    self._at = 0

  @property
  def offset(self) -> int:
    return self._base + self._at

  def take(self, count: int) -> bytes:
    stop = self._at + count
    if stop > len(self._window):
      left = self._pieces.size - self.offset
      size = max(count, min(left, 4 << 20))
      self._base, self._window = (
        self.offset,
        self._pieces.read(self.offset, size),
      )
      self._at, stop = 0, count
    data = self._window[self._at : stop]
    self._at = stop
    return data

  def number(self, form: str) -> int:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def string(self) -> str:
    return self.take(self.number('<Q')).decode('utf-8', errors='replace')

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      item, count = self.number('<I'), self.number('<Q')
      if item in _SCALARS:
        dtype = np.dtype(_SCALARS[item])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)
      return [self.value(item) for _ in range(count)]
    if kind in _SCALARS:
      dtype = np.dtype(_SCALARS[kind])
      return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
    raise self._pieces.broken(f'it has a value of the unknown type {kind}')


class GgufFile:
  """One GGUF file, whole or in pieces that follow each other.

  Attributes:
    metadata: the key-value pairs; arrays of numbers are numpy arrays.
    infos: shape (first axis slowest) and quantization type by tensor name.
    dtypes: the types that can be decoded.
  """

  def __init__(self, paths: Sequence[Path]):
    """Reads and checks the header.

    Raises:
      InputError: not a GGUF file, damaged, or the `gguf` package is missing.
    """
    self._gguf = _import_gguf()
    sizes = self._gguf.GGML_QUANT_SIZES
    try:
      self._pieces = _Pieces(paths)
    except OSError as e:
      raise InputError(
        f'{e.filename} cannot be read: {e.strerror or e}.'
      ) from e
    broken = self._pieces.broken
    cursor = _Cursor(self._pieces)
    if cursor.take(4) != MAGIC:
      raise broken('it does not begin with the letters GGUF')
    version = cursor.number('<I')
    if version not in (2, 3):
      raise broken(f'its version is {version}, where 2 or 3 can be read')
    n_tensors, n_fields = cursor.number('<Q'), cursor.number('<Q')
    self.metadata: dict[str, Any] = {}
    for _ in range(n_fields):
      key = cursor.string()
      self.metadata[key] = cursor.value(cursor.number('<I'))
    used: set[Any] = set()
    self.infos: dict[str, TensorInfo] = {}
    self._places: dict[str, tuple[int, int, int]] = {}
    for _ in range(n_tensors):
      name = cursor.string()
      n_axes = cursor.number('<I')
      if n_axes > 8:
        raise broken(f'the entry of tensor {name[:80]!r} is damaged')
      shape = tuple(cursor.number('<Q') for _ in range(n_axes))[::-1]
      kind, offset = cursor.number('<I'), cursor.number('<Q')
      types = [t for t in sizes if t.value == kind]
      self.infos[name] = TensorInfo(
        shape, types[0].name if types else f'type {kind}'
      )
      if types:
        used.add(types[0])
        per_block, block_bytes = sizes[types[0]]
        if shape and shape[-1] % per_block:
          raise broken(
            f'the rows of {name!r} have {shape[-1]} values, not a multiple '
            f'of {per_block}'
          )
        row = shape[-1] // per_block * block_bytes if shape else block_bytes
        self._places[name] = (kind, offset, row)
    self.dtypes = {t.name for t in used if _decodable(self._gguf, t)}
    align = int(self.metadata.get('general.alignment', 32))
    self._data = -(-cursor.offset // align) * align
    for name, (_, offset, row) in self._places.items():
      end = self._data + offset + row * math.prod(self.infos[name].shape[:-1])
      if end > self._pieces.size:
        raise broken(
          f'it ends after {self._pieces.size:,} bytes, {name!r} at {end:,}'
        )

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, float rows) of a tensor."""
    shape = self.infos[name].shape
    kind, offset, row_bytes = self._places[name]
    n_rows = math.prod(shape[:-1])
    # Decoding makes several float32 copies of a chunk.
    step = max(1, tensorfile.CHUNK // 16 // max(1, shape[-1]))
    for start in range(0, n_rows, step):
      count = min(step, n_rows - start)
      data = self._pieces.read(
        self._data + offset + start * row_bytes, count * row_bytes
      )
      rows = self._decode(data, kind).reshape(count, -1)
      yield start, rows if len(shape) > 1 else rows.reshape(shape)

  def _decode(self, data: bytes, kind: int) -> np.ndarray:
    if kind == 0:
      return np.frombuffer(data, '<f4')
    if kind == 1:
      return np.frombuffer(data, '<f2')
    raw = np.frombuffer(data, np.uint8)
    qtype = self._gguf.GGMLQuantizationType(kind)
    with np.errstate(over='ignore', invalid='ignore'):  # The caller checks.
      return self._gguf.quants.dequantize(raw, qtype)


def _import_gguf():
  try:
    import gguf
  except ImportError as e:
    raise InputError(
      'Reading GGUF files needs the gguf package: pip install '
      '"relaxed-recursive-transformers[convert]".'
    ) from e
  return gguf


def _decodable(gguf, kind) -> bool:
  """Whether the gguf package decodes a type; it has no list of them."""
  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.quants.dequantize(np.zeros(block_bytes, np.uint8), kind)
  except NotImplementedError:
    return kind == gguf.GGMLQuantizationType.F16
  return True


def open_gguf(paths: Sequence[Path]) -> tuple[dict[str, Any], Any]:
  """(metadata, tensors) of a GGUF file given by all its paths.

  Args:
    paths: one file; the raw pieces of one file in order; or the files of a
      split (`name-00001-of-00003.gguf`), each a GGUF file of its own.

  Raises:
    InputError: the file is damaged or a part of it is missing.
  """
  split = [_SPLIT_NAME.search(path.name) for path in paths]
  if not split[0]:
    file = GgufFile(paths)
    return file.metadata, file
  total = int(split[0].group(2))
  if len(paths) == 1:
    stem = paths[0].name[: split[0].start()]
    paths = [
      paths[0].with_name(f'{stem}-{i:05}-of-{total:05}.gguf')
      for i in range(1, total + 1)
    ]
  absent = [path.name for path in paths if not path.is_file()]
  if absent or len(paths) != total:
    raise InputError(
      f'{paths[0].parent} has {len(paths) - len(absent)} of the {total} '
      f'files of this split GGUF model; {", ".join(absent) or "some"} '
      'are missing.'
    )
  files = [GgufFile([path]) for path in sorted(paths)]
  merged = tensorfile.ShardedTensors(files)
  merged.dtypes = files[0].dtypes
  return files[0].metadata, merged


def config_from_gguf(metadata: dict[str, Any], tensors: Any) -> ModelConfig:
  """The model that a GGUF file holds.

  Raises:
    InputError: its architecture or one of its settings is not supported.
  """
  arch = metadata.get('general.architecture')
  if arch not in _MODEL_TYPES:
    raise InputError(
      f'The GGUF field general.architecture={arch!r} is not supported; '
      f'this version reads {", ".join(_MODEL_TYPES)}.'
    )
  fields: dict[str, Any] = {'model_type': _MODEL_TYPES[arch]}
  for field, key in _FIELDS.items():
    value = metadata.get(f'{arch}.{key}')
    if isinstance(value, np.ndarray):
      if len(set(value.tolist())) != 1:
        raise InputError(
          f'The GGUF field {arch}.{key} differs by layer, which is not '
          'supported.'
        )
      value = value[0].item()
    if isinstance(value, float):  # Stored in float32: back to its decimals.
      value = float(str(np.float32(value)))
    if value:
      fields[field] = value
  table = tensors.infos.get('token_embd.weight')
  if table is None:
    raise InputError('The GGUF file has no token_embd.weight tensor.')
  fields['vocab_size'] = table.shape[0]
  fields['tie_word_embeddings'] = 'output.weight' not in tensors.infos
  rotated = metadata.get(f'{arch}.rope.dimension_count')
  if rotated and 'head_dim' not in fields and arch == 'llama':
    fields['head_dim'] = rotated
  if rotated and rotated != fields.get('head_dim', rotated):
    raise InputError(
      f'The GGUF field {arch}.rope.dimension_count={rotated} differs from '
      f'the head size {fields["head_dim"]}: partial RoPE is not supported.'
    )
  if arch == 'llama' and 'sliding_window' in fields:
    fields['model_type'] = 'mistral'
  scaling = metadata.get(f'{arch}.rope.scaling.type', 'none')
  if scaling != 'none':
    factor = metadata.get(f'{arch}.rope.scaling.factor', 1.0)
    fields['rope_scaling'] = {'rope_type': scaling, 'factor': factor}
  if 'rope_freqs.weight' in tensors.infos:
    (_, divisors), *_ = tensors.chunks('rope_freqs.weight')
    fields['rope_scaling'] = _llama3_scaling(
      divisors, fields.get('rope_theta', 10_000.0)
    )
  if arch == 'gemma3':
    fields |= _gemma3_fields(metadata, fields)
  return hf.config_from_hf(fields)


def _gemma3_fields(metadata, fields) -> dict[str, Any]:
  """What llama.cpp leaves out of the file and knows of Gemma 3."""
  layers = fields.get('num_hidden_layers')
  pattern = metadata.get('gemma3.attention.sliding_window_pattern', 6)
  local = metadata.get('gemma3.rope.freq_base_swa', 10_000.0)
  out: dict[str, Any] = {'rope_local_base_freq': local}
  if isinstance(pattern, np.ndarray | list):
    kinds = ('full_attention', 'sliding_attention')
    out['layer_types'] = [kinds[bool(local)] for local in pattern]
  else:
    out['sliding_window_pattern'] = pattern
  out['query_pre_attn_scalar'] = fields.get('head_dim', 256)
  if layers == 62:  # The 27B model alone scales by the width of a head slice.
    out['query_pre_attn_scalar'] = (
      fields['hidden_size'] // fields['num_attention_heads']
    )
  return out


def _llama3_scaling(divisors: np.ndarray, base: float) -> dict[str, Any]:
  """The llama3 rule that made a table of frequency divisors.

  GGUF files store the table, not the rule; the rule's low and high frequency
  factors and original context are the same in all released models.

  Raises:
    InputError: the table does not come from that rule.
  """
  factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192
  n = len(divisors)
  wavelengths = 2 * math.pi * base ** (np.arange(n) / n)
  ramp = (context / wavelengths - low) / (high - low)
  ramp = np.clip(ramp, 0.0, 1.0)
  rule = 1 / ((1 - ramp) / factor + ramp)
  if not np.allclose(rule, divisors, rtol=1e-3):
    raise InputError(
      "The GGUF tensor rope_freqs.weight does not follow Llama 3's rule "
      f'(factor {factor:g}, 1, 4, 8192), the only one supported.'
    )
  return {
    'rope_type': 'llama3',
    'factor': factor,
    'low_freq_factor': low,
    'high_freq_factor': high,
    'original_max_position_embeddings': context,
  }


def load_gguf(
  paths: Sequence[Path], dtype: str
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
  """(config, parameters, metadata) of a GGUF file or its pieces.

  Raises:
    InputError: anything about it is wrong or not supported.
  """
  metadata, tensors = open_gguf(paths)
  config = config_from_gguf(metadata, tensors)
  params = hf.read_params(
    config,
    hf.family_of(config),
    tensors,
    dtype=dtype,
    style='gguf',
    ignore=lambda name: name == 'rope_freqs.weight',
    where=str(paths[0]),
  )
  return config, params, metadata
