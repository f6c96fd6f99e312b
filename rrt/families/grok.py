"""Grok-1, by its published code: four norms a layer, soft-capped attention, gates that do not sum to 1.

Names and fields are those of its port to PyTorch (`model_type` grok-1). Embeddings are scaled by
sqrt(D); logits by `output_multiplier_scale`, which the final norm's gain takes up.
"""

from __future__ import annotations

import math
from typing import Any

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families.base import Family, Row
from rrt.families.mixtral import experts_of

_HEAD = 'model.layers.{}'
# In the order in which a layer runs them.
_NORMS = {
  'attn_norm': 'rms_norm',
  'attn_post_norm': 'rms_norm_1',
  'mlp_norm': 'rms_norm_2',
  'mlp_post_norm': 'rms_norm_3',
}
_EXPERT = {'gate': 'linear', 'up': 'linear_v', 'down': 'linear_1'}
ROWS = (
  Row('embed/table', 'model.embed_tokens.weight', '', 'table'),
  *(Row(f'{ours}/scale', f'{_HEAD}.{name}.scale', '', 'gain') for ours, name in _NORMS.items()),
  *(Row(f'attn/{n}/kernel', f'{_HEAD}.attn.{n}_proj.weight', '') for n in ('q', 'k', 'v', 'o')),
  Row('mlp/router/weights', f'{_HEAD}.moe_block.gate.weight', ''),
  *(
    Row(f'mlp/{ours}/kernels', f'{_HEAD}.moe_block.experts.{{e}}.{name}.weight', '')
    for ours, name in _EXPERT.items()
  ),
  Row('final_norm/scale', 'model.norm.scale', '', 'gain'),
  Row('head/kernel', 'lm_head.weight', ''),
)


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Grok-1 config.json."""
  heads, d_model = fields_lib.whole(c, 'num_attention_heads'), fields_lib.whole(c, 'hidden_size')
  scale = fields_lib.number(c, 'embedding_multiplier_scale', 1.0)
  if not math.isclose(scale, d_model**0.5, rel_tol=1e-6):
    raise InputError(
      f'config.json: embedding_multiplier_scale={scale!r} is not supported, only the square root '
      f'of hidden_size={d_model}.'
    )
  fields_lib.refuse(c, 'attention_bias', False)
  fields_lib.refuse(c, 'rope_scaling')
  more: dict[str, Any] = experts_of({'num_experts': 8} | c, 'num_experts')
  return ModelConfig(
    family='grok1',
    vocab_size=fields_lib.whole(c, 'vocab_size'),
    d_model=d_model,
    d_ff=fields_lib.whole(c, 'intermediate_size'),
    num_heads=heads,
    num_kv_heads=fields_lib.whole(c, 'num_key_value_heads', heads),
    head_dim=d_model // heads,
    block_layers=fields_lib.whole(c, 'num_hidden_layers'),
    max_context=fields_lib.whole(c, 'max_position_embeddings', 4096),
    norm_eps=fields_lib.number(c, 'rms_norm_eps', 1e-5, least=0),
    post_norms=True,
    activation='gelu_tanh',
    norm_topk=False,
    attn_softcap=fields_lib.number(c, 'max_attn_value', 1.0),
    query_scale=fields_lib.number(c, 'attn_output_multiplier', 1.0),
    scale_embeddings=True,
    tie_embeddings=fields_lib.flag(c, 'tie_word_embeddings', True),
    **more,
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Grok-1."""
  return {
    'architectures': ['Grok1ModelForCausalLM'],
    'model_type': 'grok-1',
    'vocab_size': config.vocab_size,
    'hidden_size': config.d_model,
    'intermediate_size': config.d_ff,
    'num_hidden_layers': config.depth,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'num_experts': config.num_experts,
    'num_experts_per_tok': config.experts_per_token,
    'max_attn_value': config.attn_softcap,
    'attn_output_multiplier': config.scale_q,
    'embedding_multiplier_scale': config.d_model**0.5,
    'output_multiplier_scale': 1.0,  # Inside the final norm's gain.
    'max_position_embeddings': config.max_context,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
  }


FAMILY = Family(
  name='grok1',
  model_types=('grok-1',),
  rows=ROWS,
  fields=(
    *('num_experts', 'num_experts_per_tok', 'max_attn_value', 'attn_output_multiplier'),
    *('embedding_multiplier_scale', 'output_multiplier_scale'),
    *('output_router_logits', 'router_aux_loss_coef'),
  ),
  from_hf=from_hf,
  to_hf=to_hf,
  scaled='output_multiplier_scale',
  own_code=True,
)
