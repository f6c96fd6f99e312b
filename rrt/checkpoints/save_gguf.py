"""Writes untied models as GGUF files, which llama.cpp runs.

The reverse of `rrt.checkpoints.gguf`: names of the family's table, q and k in the
order of llama.cpp's rotations, gains with its offset, the tokenizer inside the file.

V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from rrt import console
from rrt.checkpoints import gguf_file
from rrt.checkpoints.gguf import FIELDS, MODEL_TYPES
from rrt.checkpoints.reader import interleaved_rows
from rrt.checkpoints.save_hf import tensors_of
from rrt.config import ModelConfig
from rrt.data import gguf_tokenizer
from rrt.errors import InputError
from rrt.families.registry import family_of
from rrt.files import check_file_writable
from rrt.model import LanguageModel
from rrt.models.layers import rope_frequencies
from rrt.models.untie import to_untied

# Types of the matrices; gains and biases stay float32.
TYPES = ('f32', 'f16', 'bf16', 'q8_0', 'q4_0')
_ARCH = {model_type: arch for arch, model_type in MODEL_TYPES.items()}


def arch_of(config: ModelConfig) -> str:
  """llama.cpp's name of a model's architecture.

  Raises:
    InputError: it is none that this version writes.
  """
  family = family_of(config)
  found = [_ARCH[kind] for kind in family.model_types if kind in _ARCH]
  if not found:
    raise InputError(
      f'family={config.family!r}: GGUF files are written of {", ".join(MODEL_TYPES)}; take '
      '--format=hf.'
    )
  if config.family == 'llama' and len({*config.windows}) > 1:
    raise InputError(
      "windows: layers of a llama differ in theirs, which llama.cpp's llama cannot say; take "
      '--format=hf.'
    )
  if config.family in ('gemma', 'gemma2') and not config.tie_embeddings:
    raise InputError(
      f"tie_embeddings: llama.cpp's {config.family} has no head of its own; take --format=hf."
    )
  index = config.rope_index or (0,) * config.depth
  rotates = [config.ropes[i].scaling != 'none' for i in index]
  if config.family == 'smollm3' and rotates != [(i + 1) % 4 != 0 for i in range(config.depth)]:
    raise InputError(
      "rope_index: llama.cpp's smollm3 has every fourth layer without rotation; take --format=hf."
    )
  if any(r.scaling == 'dynamic' for r in config.ropes):
    raise InputError('ropes: llama.cpp has no dynamic scaling; take --format=hf.')
  return found[0]


def check_save_gguf(path: str | Path) -> None:
  """Checks, before long work, that `save_gguf` may and can write a file.

  Raises:
    InputError: the path is no GGUF file's, or cannot be written.
  """
  path = Path(path).expanduser()
  if path.suffix != '.gguf':
    raise InputError(f'out={path}: give a file whose name ends in .gguf.')
  if path.is_dir():
    raise InputError(f'out={path}: is a directory; choose another name.')
  if path.is_file():
    with open(path, 'rb') as file:
      if file.read(4) not in (gguf_file.MAGIC, b''):
        raise InputError(f'out={path}: exists and is no GGUF file; choose another name.')
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    check_file_writable(path)
  except OSError as e:
    raise InputError(f'out={path}: cannot be written ({e.strerror or e}).') from e


def save_gguf(model: LanguageModel, path: str | Path, quantize: str = 'f32') -> Path:
  """Writes a model as one GGUF file, atomically.

  Args:
    model: vanilla or recursive; it is untied first.
    path: the file; an earlier GGUF file is replaced once the new one is complete.
    quantize: type of the matrices, one of `TYPES`; those whose rows are no
      multiple of a block of 32 are written as f16.

  Returns:
    The path.

  Raises:
    InputError: the file cannot be written, or llama.cpp has no words for the
      model or its tokenizer.

  Example:
    >>> rrt.save_gguf(child, 'child.gguf', quantize='q8_0')
  """
  if quantize not in TYPES:
    raise InputError(f'quantize={quantize!r}: must be one of {", ".join(TYPES)}.')
  path = Path(path).expanduser()
  check_save_gguf(path)
  model = to_untied(model)
  arch, library = arch_of(model.config), gguf_file.library()
  vocabulary = {}
  if model.tokenizer is not None:
    vocabulary = gguf_tokenizer.metadata_of(model.tokenizer, model.config.vocab_size)
  new = path.with_name(f'.{path.name}.{os.getpid()}.new')
  writer = library.GGUFWriter(new, arch)
  try:
    for key, value in (_metadata(model, arch) | vocabulary).items():
      if isinstance(value, list):
        writer.add_array(key, value)
      else:
        writer.add_key_value(key, value, _kind(library, key, value))
    left = _add_tensors(writer, library, model, quantize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(new, path)
  except OSError as e:
    raise InputError(f'out={path}: cannot be written ({e.strerror or e}).') from e
  finally:
    new.unlink(missing_ok=True)
  if left:
    console.note(f'{left} matrices have rows that are no multiple of 32: written as f16.')
  return path


def _kind(library, key: str, value: Any):
  """llama.cpp reads counts as uint32 and other numbers as float32."""
  kinds = library.GGUFValueType
  if isinstance(value, bool) or isinstance(value, str):
    return kinds.get_type(value)
  return kinds.UINT32 if isinstance(value, int) else kinds.FLOAT32


def _metadata(model: LanguageModel, arch: str) -> dict[str, Any]:
  """The fields of the architecture, from the family's config.json."""
  c = model.config
  fields = family_of(c).to_hf(c)
  found: dict[str, Any] = {'general.name': str(model.meta.get('source') or 'rrt')}
  if model.meta.get('license'):
    found['general.license'] = model.meta['license']
  for field, key in FIELDS.items():
    value = fields.get(field)
    if value is not None and value is not False:
      found[f'{arch}.{key}'] = float(value) if isinstance(value, float) else int(value)
  found |= {
    f'{arch}.attention.key_length': c.head_dim,
    f'{arch}.attention.value_length': c.head_dim,
    f'{arch}.rope.dimension_count': c.rotary_dim or c.head_dim,
    f'{arch}.vocab_size': c.vocab_size,
  }
  found.setdefault(f'{arch}.rope.freq_base', float(c.ropes[0].base))
  if arch == 'gptneox':
    found[f'{arch}.use_parallel_residual'] = c.parallel
  scaling = fields.get('rope_scaling') or {}
  kind = scaling.get('rope_type')
  if kind in ('linear', 'yarn'):
    found[f'{arch}.rope.scaling.type'] = kind
    found[f'{arch}.rope.scaling.factor'] = float(scaling['factor'])
  if kind == 'longrope':
    found[f'{arch}.rope.scaling.attn_factor'] = float(scaling['attention_factor'])
  if kind in ('yarn', 'longrope'):
    original = scaling['original_max_position_embeddings']
    found[f'{arch}.rope.scaling.original_context_length'] = original
  if arch == 'gemma3':
    found[f'{arch}.attention.sliding_window_pattern'] = [w > 0 for w in c.windows]
    found[f'{arch}.rope.freq_base_swa'] = float(fields['rope_local_base_freq'])
  return found


def _add_tensors(writer, library, model: LanguageModel, quantize: str) -> int:
  """Adds all tensors; returns how many could not have the type asked for."""
  c, family = model.config, family_of(model.config)
  types = library.GGMLQuantizationType
  left = 0

  def add(name: str, value: np.ndarray) -> None:
    nonlocal left
    kind = types.F32
    value = np.ascontiguousarray(value, np.float32)
    if value.ndim > 1:
      kind = getattr(types, quantize.upper())
      if quantize.startswith('q') and value.shape[-1] % 32:
        kind, left = types.F16, left + 1
    writer.add_tensor(name, library.quantize(value, kind), raw_dtype=kind)

  for name, value, row in tensors_of(model, 'gguf'):
    if family.gguf_permuted and row.kind[0] in 'qk':
      heads = c.num_heads if row.kind[0] == 'q' else c.num_kv_heads
      value = value[interleaved_rows(heads, c.head_dim)]
    if row.kind == 'gain':
      value = np.asarray(value, np.float32) + family.gguf_gain_offset
    add(name, value)
  for kind in ('long', 'short') if c.ropes[0].scaling == 'longrope' else ():
    factors = np.array(getattr(c.ropes[0], f'{kind}_factors'), np.float32)
    add(f'rope_factors_{kind}.weight', factors)
  if c.ropes[0].scaling == 'llama3':
    plain = rope_frequencies(dataclasses.replace(c.ropes[0], scaling=''), c.head_dim)
    add('rope_freqs.weight', plain / rope_frequencies(c.ropes[0], c.head_dim))
  return left
