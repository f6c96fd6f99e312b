"""Llama and models of its architecture: Mistral, TinyLlama, SmolLM, SmolLM2.

Pre-norm layers, SwiGLU MLP, grouped-query attention, RoPE with or without Llama
3's scaling, one sliding window for all layers (Mistral) or none.
"""

from __future__ import annotations

from typing import Any

from rrt.config import ModelConfig
from rrt.families import fields as fields_lib
from rrt.families.base import Family, Row

ROWS = (
  Row('embed/table', 'model.embed_tokens.weight', 'token_embd.weight', 'table'),
  Row(
    'attn_norm/scale', 'model.layers.{}.input_layernorm.weight', 'blk.{}.attn_norm.weight', 'gain'
  ),
  Row('attn/q/kernel', 'model.layers.{}.self_attn.q_proj.weight', 'blk.{}.attn_q.weight', 'q'),
  Row('attn/k/kernel', 'model.layers.{}.self_attn.k_proj.weight', 'blk.{}.attn_k.weight', 'k'),
  Row('attn/v/kernel', 'model.layers.{}.self_attn.v_proj.weight', 'blk.{}.attn_v.weight'),
  Row('attn/o/kernel', 'model.layers.{}.self_attn.o_proj.weight', 'blk.{}.attn_output.weight'),
  Row(
    'mlp_norm/scale',
    'model.layers.{}.post_attention_layernorm.weight',
    'blk.{}.ffn_norm.weight',
    'gain',
  ),
  Row('mlp/gate/kernel', 'model.layers.{}.mlp.gate_proj.weight', 'blk.{}.ffn_gate.weight'),
  Row('mlp/up/kernel', 'model.layers.{}.mlp.up_proj.weight', 'blk.{}.ffn_up.weight'),
  Row('mlp/down/kernel', 'model.layers.{}.mlp.down_proj.weight', 'blk.{}.ffn_down.weight'),
  Row('final_norm/scale', 'model.norm.weight', 'output_norm.weight', 'gain'),
  Row('head/kernel', 'lm_head.weight', 'output.weight'),
)


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Llama or Mistral config.json, 4.x or 5.x style."""
  mistral = c.get('model_type') == 'mistral'
  fields_lib.refuse(c, 'attention_bias', False)
  fields_lib.refuse(c, 'mlp_bias', False)
  fields_lib.refuse(c, 'hidden_act', 'silu', 'swish')
  fields_lib.refuse(c, 'num_local_experts', 0, 1)
  layers = fields_lib.whole(c, 'num_hidden_layers')
  max_context = fields_lib.whole(c, 'max_position_embeddings', 2048)
  window = 0
  if mistral and 'sliding_window' not in c:
    window = 4096  # The default of the original.
  elif mistral:
    window = fields_lib.whole(c, 'sliding_window', 0, least=0)
  heads = fields_lib.whole(c, 'num_attention_heads')
  d_model = fields_lib.whole(c, 'hidden_size')
  return ModelConfig(
    family='llama',
    vocab_size=fields_lib.whole(c, 'vocab_size'),
    d_model=d_model,
    d_ff=fields_lib.whole(c, 'intermediate_size'),
    num_heads=heads,
    num_kv_heads=fields_lib.whole(c, 'num_key_value_heads', 8 if mistral else heads),
    head_dim=fields_lib.whole(c, 'head_dim', d_model // heads),
    block_layers=layers,
    max_context=max_context,
    norm_eps=fields_lib.number(c, 'rms_norm_eps', 1e-6, least=0),
    tie_embeddings=fields_lib.flag(c, 'tie_word_embeddings', False),
    windows=(window,) * layers if window else (),
    ropes=(
      fields_lib.rope_from_hf(
        fields_lib.table(c, 'rope_scaling') or fields_lib.table(c, 'rope_parameters'),
        fields_lib.number(c, 'rope_theta', 10_000.0),
        max_context,
      ),
    ),
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Llama or Mistral, for 4.x and 5.x.

  Assumes that all layers are alike; other families override the fields.
  """
  rope = config.ropes[0]
  scaling = fields_lib.rope_to_hf(rope)
  fields = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab_size,
    'hidden_size': config.d_model,
    'intermediate_size': config.d_ff,
    'num_hidden_layers': config.depth,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': config.max_context,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'rope_theta': rope.base,
    'rope_scaling': scaling,
    'rope_parameters': {'rope_type': 'default'} | (scaling or {}) | {'rope_theta': rope.base},
    'attention_bias': False,
    'mlp_bias': False,
  }
  if config.windows and config.windows[0]:
    fields['architectures'] = ['MistralForCausalLM']
    fields['model_type'] = 'mistral'
    fields['sliding_window'] = config.windows[0]
  return fields


FAMILY = Family(
  name='llama',
  model_types=('llama', 'mistral'),
  rows=ROWS,
  from_hf=from_hf,
  to_hf=to_hf,
  gguf_permuted=True,
)
