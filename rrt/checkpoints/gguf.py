"""Reads the configuration and parameters of models in GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
import math
from pathlib import Path
from typing import Any

import numpy as np

from rrt.checkpoints import gguf_parts, hf, reader, safetensors
from rrt.checkpoints.gguf_file import GgufFile
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families.registry import family_of

# Fields of config.json by llama.cpp's keys (after the architecture's name).
FIELDS = {
  'hidden_size': 'embedding_length',
  'num_hidden_layers': 'block_count',
  'intermediate_size': 'feed_forward_length',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'max_position_embeddings': 'context_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'layer_norm_eps': 'attention.layer_norm_epsilon',
  'rope_theta': 'rope.freq_base',
  'sliding_window': 'attention.sliding_window',
  'num_local_experts': 'expert_count',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
# Keys that are read too, and those that do not change what a model computes.
_READ = (
  'attention.value_length',
  'attention.sliding_window_pattern',
  'rope.dimension_count',
  'rope.freq_base_swa',
  'rope.scaling.type',
  'rope.scaling.factor',
  'rope.scaling.attn_factor',
  'use_parallel_residual',
)
_HARMLESS = (
  'vocab_size',
  'attention.causal',
  'expert_used_count',
  'pooling_type',
  'rope.scaling.finetuned',
  'rope.scaling.original_context_length',
  'tensor_data_layout',
)
MODEL_TYPES = {
  'llama': 'llama',
  'gemma': 'gemma',
  'gemma2': 'gemma2',
  'gemma3': 'gemma3_text',
  'smollm3': 'smollm3',
  'olmo2': 'olmo2',
  'phi3': 'phi3',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'gptneox': 'gpt_neox',
}


def open_gguf(paths: Sequence[Path]) -> tuple[dict[str, Any], Any]:
  """(metadata, tensors) of a GGUF file given by all its paths.

  Args:
    paths: one file, or all parts of a model; see `gguf_parts`.

  Raises:
    InputError: the file is damaged or a part of it is missing.
  """
  paths = gguf_parts.in_order(paths)
  first = gguf_parts.part_of(paths[0].name)
  if first is None or not first.is_split:
    file = GgufFile(paths)
    return file.metadata, file
  files = safetensors.open_all(paths, lambda path: GgufFile([path]), [])
  dtypes = set().union(*(file.dtypes for file in files))
  return files[0].metadata, safetensors.ShardedTensors(files, dtypes)


def config_from_gguf(metadata: dict[str, Any], tensors: Any) -> ModelConfig:
  """The ModelConfig of a GGUF file.

  Raises:
    InputError: its architecture or one of its settings is not supported.
  """
  arch = metadata.get('general.architecture')
  if arch not in MODEL_TYPES:
    raise InputError(
      f'The GGUF field general.architecture={arch!r} is not supported; '
      f'this version reads {", ".join(MODEL_TYPES)}.'
    )
  _refuse_unknown(metadata, arch)
  fields: dict[str, Any] = {'model_type': MODEL_TYPES[arch]}
  for field, key in FIELDS.items():
    value = metadata.get(f'{arch}.{key}')
    if isinstance(value, np.ndarray):
      if len(set(value.tolist())) != 1:
        raise InputError(f'The GGUF field {arch}.{key} differs by layer, which is not supported.')
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
  if rotated and arch == 'phi3' and rotated != fields.get('head_dim', rotated):
    fields['partial_rotary_factor'] = rotated / fields['head_dim']
  elif rotated and arch == 'gptneox':
    size = fields.get('hidden_size', 0) // max(fields.get('num_attention_heads', 1), 1)
    fields['rotary_pct'] = rotated / max(size, 1)
    fields['use_parallel_residual'] = bool(metadata.get('gptneox.use_parallel_residual', True))
  elif rotated and rotated != fields.get('head_dim', rotated):
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
    if scaling == 'yarn':
      original = metadata.get(f'{arch}.rope.scaling.original_context_length')
      fields['rope_scaling']['original_max_position_embeddings'] = original
  if 'rope_factors_long.weight' in tensors.infos:
    fields['rope_scaling'] = _longrope_scaling(metadata, tensors, arch)
  if 'rope_freqs.weight' in tensors.infos:
    if scaling != 'none':
      raise InputError(
        f'The GGUF field {arch}.rope.scaling.type={scaling!r} beside the '
        'tensor rope_freqs.weight is not supported.'
      )
    if tensors.infos['rope_freqs.weight'].dtype != 'F32':
      raise InputError('The GGUF tensor rope_freqs.weight must be F32.')
    (_, divisors), *_ = tensors.chunks('rope_freqs.weight')
    fields['rope_scaling'] = _llama3_scaling(divisors, fields.get('rope_theta', 10_000.0))
  if arch == 'llama' and 'blk.0.attn_q.bias' in tensors.infos:
    fields['attention_bias'] = True
  if arch == 'llama' and 'blk.0.ffn_up.bias' in tensors.infos:
    fields['mlp_bias'] = True
  if arch == 'gemma2':
    fields |= _gemma2_fields(fields)
  if arch == 'gemma3':
    fields |= _gemma3_fields(metadata, fields)
  try:
    return hf.config_from_hf(fields)
  except InputError as e:
    raise InputError(f'The GGUF fields do not make a model (named as in config.json): {e}') from e


def _refuse_unknown(metadata: dict[str, Any], arch: str) -> None:
  """Raises InputError for keys of the architecture that are not known, unless 0."""
  known = {f'{arch}.{key}' for key in (*FIELDS.values(), *_READ, *_HARMLESS)}
  for key, value in metadata.items():
    if key.startswith(f'{arch}.') and key not in known and np.any(value):
      raise InputError(
        f'The GGUF field {key}={str(value)[:40]} is not known to this version, and may change '
        'what the model computes.'
      )
  sizes = [metadata.get(f'{arch}.attention.{name}_length') for name in ('key', 'value')]
  if None not in sizes and sizes[0] != sizes[1]:
    raise InputError(
      f'The GGUF fields {arch}.attention.key_length={sizes[0]} and value_length={sizes[1]} '
      'differ, which is not supported.'
    )


def _gemma2_fields(fields) -> dict[str, Any]:
  """Gemma 2's constants, which GGUF files do not store."""
  scalar = fields.get('head_dim', 256)
  if fields.get('num_hidden_layers') == 46:  # The 27B model scales by the width of a head slice.
    width = fields_lib.whole(fields, 'hidden_size')
    scalar = width // fields_lib.whole(fields, 'num_attention_heads')
  return {'query_pre_attn_scalar': scalar}


def _gemma3_fields(metadata, fields) -> dict[str, Any]:
  """Gemma 3's constants, which GGUF files do not store."""
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
    width = fields_lib.whole(fields, 'hidden_size')
    heads = fields_lib.whole(fields, 'num_attention_heads')
    out['query_pre_attn_scalar'] = width // heads
  return out


_FACTORS = ('rope_factors_long.weight', 'rope_factors_short.weight')


def _longrope_scaling(metadata: dict[str, Any], tensors: Any, arch: str) -> dict[str, Any]:
  """The LongRoPE scaling of a file with its two lists of factors."""
  found: dict[str, Any] = {
    'rope_type': 'longrope',
    'original_max_position_embeddings': metadata.get(
      f'{arch}.rope.scaling.original_context_length'
    ),
  }
  for name in _FACTORS:
    if name not in tensors.infos or tensors.infos[name].dtype != 'F32':
      raise InputError(f'The GGUF file needs the tensor {name} as F32.')
    (_, values), *_ = tensors.chunks(name)
    found[f'{name.split(".")[0].split("_")[-1]}_factor'] = values.tolist()
  attention = metadata.get(f'{arch}.rope.scaling.attn_factor')
  return found | ({'attention_factor': float(attention)} if attention else {})


def _llama3_scaling(divisors: np.ndarray, base: float) -> dict[str, Any]:
  """The llama3 RoPE scaling that a table of frequency divisors comes from.

  GGUF files store the table and not the parameters; low and high frequency
  factors and original context are the same in all released models.

  Raises:
    InputError: the table is of another scaling.
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


def read_params(
  config: ModelConfig, tensors: Any, dtype: str, where: str, lazy: bool = False
) -> dict[str, Any]:
  """The parameters of an open GGUF file; see `reader.read_params`."""
  return reader.read_params(
    config,
    family_of(config),
    tensors,
    dtype=dtype,
    style='gguf',
    ignore=lambda name: name in ('rope_freqs.weight', *_FACTORS),
    where=where,
    lazy=lazy,
  )
