"""OLMo 2: norms after attention and MLP alone, and QK-norm over all heads together."""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.config import ModelConfig
from rrt.families import fields as fields_lib
from rrt.families import llama
from rrt.families.base import Family, Row

ROWS = tuple(
  row
  for row in llama.ROWS
  if row.path not in ('attn_norm/scale', 'mlp_norm/scale') and not row.path.startswith('mlp')
)
ROWS += tuple(row for row in llama.ROWS if row.path.startswith('mlp/') and 'bias' not in row.path)
ROWS += (
  Row(
    'attn_post_norm/scale',
    'model.layers.{}.post_attention_layernorm.weight',
    'blk.{}.post_attention_norm.weight',
    'gain',
  ),
  Row(
    'mlp_post_norm/scale',
    'model.layers.{}.post_feedforward_layernorm.weight',
    'blk.{}.post_ffw_norm.weight',
    'gain',
  ),
)
DEFAULTS = {
  'vocab_size': 50_304,
  'hidden_size': 4096,
  'intermediate_size': 11_008,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'rms_norm_eps': 1e-5,
}


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of an OLMo 2 config.json, 4.x or 5.x style."""
  c = DEFAULTS | c
  fields_lib.refuse(c, 'clip_qkv')
  config = llama.from_hf(
    {k: v for k, v in c.items() if k != 'model_type'} | {'model_type': 'llama'}
  )
  return dataclasses.replace(
    config, family='olmo2', pre_norms=False, post_norms=True, qk_norm=True, qk_norm_all=True
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied OLMo 2, for 4.x and 5.x."""
  llama.check_biases(config, llama.ATTENTION)
  fields = llama.to_hf(config)
  fields.pop('mlp_bias')
  return fields | {'architectures': ['Olmo2ForCausalLM'], 'model_type': 'olmo2'}


FAMILY = Family(
  name='olmo2',
  model_types=('olmo2',),
  rows=ROWS,
  fields=(*llama.FAMILY.fields, 'clip_qkv'),
  from_hf=from_hf,
  to_hf=to_hf,
)
