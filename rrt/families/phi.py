"""Phi-3 and Phi-4-mini: Llama's architecture with fused projections.

q, k and v are one tensor of the file, gate and up another. Part of each head may be
rotated (`partial_rotary_factor`), and LongRoPE has frequencies for texts within the
context of pretraining and others for longer ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families import llama
from rrt.families.base import Family, Row

_FUSED = {
  'q': ('qkv_proj', 'attn_qkv', ('q', 'k', 'v')),
  'k': ('qkv_proj', 'attn_qkv', ('q', 'k', 'v')),
  'v': ('qkv_proj', 'attn_qkv', ('q', 'k', 'v')),
  'gate': ('gate_up_proj', 'ffn_up', ('gate', 'up')),
  'up': ('gate_up_proj', 'ffn_up', ('gate', 'up')),
}


def _row(row: Row) -> Row:
  name = row.path.split('/')[-2]
  if name not in _FUSED:
    return row
  hf, gguf, fused = _FUSED[name]
  part = 'self_attn' if name in 'qkv' else 'mlp'
  return Row(
    row.path, f'model.layers.{{}}.{part}.{hf}.weight', f'blk.{{}}.{gguf}.weight', fused=fused
  )


ROWS = tuple(_row(row) for row in llama.ROWS if not row.path.endswith('bias'))
DEFAULTS = {
  'vocab_size': 32_064,
  'hidden_size': 3072,
  'intermediate_size': 8192,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'max_position_embeddings': 4096,
  'rms_norm_eps': 1e-5,
}


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Phi-3 config.json, 4.x or 5.x style."""
  c = DEFAULTS | c
  rope = fields_lib.table(c, 'rope_scaling') or fields_lib.table(c, 'rope_parameters')
  share = fields_lib.number(rope, 'partial_rotary_factor', 1.0)
  share = fields_lib.number(c, 'partial_rotary_factor', share)
  plain = {k: v for k, v in rope.items() if k != 'partial_rotary_factor'}
  original = c.get('original_max_position_embeddings')
  if original is not None and plain.get('rope_type', plain.get('type')) in ('longrope', 'su'):
    plain.setdefault('original_max_position_embeddings', original)
  # A window makes it Mistral to Llama's reader, which is otherwise the same.
  mine = ('model_type', 'partial_rotary_factor', 'rope_scaling', 'rope_parameters')
  kind = 'mistral' if c.get('sliding_window') else 'llama'
  fields = {k: v for k, v in c.items() if k not in mine}
  heads = fields_lib.whole(c, 'num_key_value_heads', fields_lib.whole(c, 'num_attention_heads'))
  fields |= {'model_type': kind, 'num_key_value_heads': heads}
  config = llama.from_hf(fields)
  theta = fields_lib.number(c, 'rope_theta', 10_000.0)
  table = fields_lib.rope_from_hf(plain, theta, config.max_context)
  rotary = int(config.head_dim * share)
  return dataclasses.replace(
    config, family='phi3', rotary_dim=None if rotary == config.head_dim else rotary, ropes=(table,)
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Phi-3, for 4.x and 5.x."""
  if config.windows and len({*config.windows}) > 1:
    raise InputError('windows: a config.json of phi3 has one window for all layers.')
  if config.biases:
    raise InputError(f'biases={config.biases}: phi3 has none.')
  fields = llama.to_hf(config)
  for name in ('mlp_bias', 'attention_bias'):
    fields.pop(name)
  share = (config.rotary_dim or config.head_dim) / config.head_dim
  parameters = fields['rope_parameters'] | {'partial_rotary_factor': share}
  return fields | {
    'architectures': ['Phi3ForCausalLM'],
    'model_type': 'phi3',
    'partial_rotary_factor': share,
    'rope_parameters': parameters,
    'original_max_position_embeddings': (
      config.ropes[0].original_context
      if config.ropes[0].scaling == 'longrope'
      else config.max_context
    ),
    'sliding_window': max(config.windows, default=0) or None,
  }


FAMILY = Family(
  name='phi3',
  model_types=('phi3',),
  rows=ROWS,
  fields=(*llama.FAMILY.fields, 'original_max_position_embeddings'),
  from_hf=from_hf,
  to_hf=to_hf,
)
