"""Llama and models of its architecture: Mistral, TinyLlama, SmolLM, SmolLM2.

Pre-norm layers, SwiGLU MLP, grouped-query attention, RoPE with or without Llama
3's scaling, biases of attention and of the MLP where a config asks for them, one
sliding window for all layers (Mistral), for some (Ministral) or none.
"""

from __future__ import annotations

from typing import Any

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families.base import Family, Row

ROWS: tuple[Row, ...] = (
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
# Of the models that have them.
ROWS += tuple(
  Row(
    f'attn/{name}_norm/scale',
    f'model.layers.{{}}.self_attn.{name}_norm.weight',
    f'blk.{{}}.attn_{name}_norm.weight',
    'gain',
  )
  for name in ('q', 'k')
)
ROWS += tuple(
  Row(
    row.path.replace('kernel', 'bias'),
    row.hf.replace('weight', 'bias'),
    row.gguf.replace('weight', 'bias'),
    f'{row.kind}_bias' if row.kind in ('q', 'k') else 'bias',
  )
  for row in ROWS
  if row.path.startswith(('attn/', 'mlp/')) and row.path.endswith('kernel')
)
ATTENTION, MLP = ('q', 'k', 'v', 'o'), ('gate', 'up', 'down')


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Llama, Mistral or Ministral config.json, 4.x or 5.x style."""
  mistral = c.get('model_type') in ('mistral', 'ministral')
  biases: tuple[str, ...] = ()
  if mistral:
    fields_lib.refuse(c, 'attention_bias', False)
    fields_lib.refuse(c, 'mlp_bias', False)
  else:
    biases += ATTENTION * fields_lib.flag(c, 'attention_bias', False)
    biases += MLP * fields_lib.flag(c, 'mlp_bias', False)
  fields_lib.refuse(c, 'hidden_act', 'silu', 'swish')
  fields_lib.refuse(c, 'num_local_experts', 0, 1)
  fields_lib.refuse(c, 'rope_interleaved', False)
  fields_lib.refuse(c, 'partial_rotary_factor', 1, 1.0)
  layers = fields_lib.whole(c, 'num_hidden_layers')
  max_context = fields_lib.whole(c, 'max_position_embeddings', 2048)
  window = 0
  if mistral and 'sliding_window' not in c:
    window = 4096  # The default of the original.
  elif mistral:
    window = fields_lib.whole(c, 'sliding_window', 0, least=0)
  else:
    fields_lib.refuse(c, 'sliding_window')
  kinds = fields_lib.layer_types(c)
  if kinds is None:
    kinds = [fields_lib.LOCAL if window else fields_lib.GLOBAL] * layers
  windows = fields_lib.windows(c, kinds, window)
  heads = fields_lib.whole(c, 'num_attention_heads')
  kv_heads = 8 if mistral and 'num_key_value_heads' not in c else heads
  d_model = fields_lib.whole(c, 'hidden_size')
  rope = fields_lib.rope_from_hf(
    fields_lib.table(c, 'rope_scaling') or fields_lib.table(c, 'rope_parameters'),
    fields_lib.number(c, 'rope_theta', 10_000.0),
    max_context,
  )
  if rope.scaling == 'dynamic':  # Its context is that of pretraining.
    max_context = int(max_context * rope.factor)
  return ModelConfig(
    family='llama',
    vocab_size=fields_lib.whole(c, 'vocab_size'),
    d_model=d_model,
    d_ff=fields_lib.whole(c, 'intermediate_size'),
    num_heads=heads,
    num_kv_heads=fields_lib.whole(c, 'num_key_value_heads', kv_heads),
    head_dim=fields_lib.whole(c, 'head_dim', d_model // heads),
    block_layers=layers,
    max_context=max_context,
    norm_eps=fields_lib.number(c, 'rms_norm_eps', 1e-6, least=0),
    biases=biases,
    tie_embeddings=fields_lib.flag(c, 'tie_word_embeddings', False),
    windows=windows if any(windows) else (),
    ropes=(rope,),
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Llama, Mistral or Ministral, for 4.x and 5.x.

  Assumes that all layers have the same rotary table; other families override the
  fields.

  Raises:
    InputError: its layers have windows of several sizes.
  """
  if config.family == 'llama':
    check_biases(config, ATTENTION, MLP)
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
    'max_position_embeddings': (
      rope.original_context if rope.scaling == 'dynamic' else config.max_context
    ),
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'rope_theta': rope.base,
    'rope_scaling': scaling,
    'rope_parameters': {'rope_type': 'default'} | (scaling or {}) | {'rope_theta': rope.base},
    'attention_bias': 'q' in config.biases,
    'mlp_bias': 'up' in config.biases,
  }
  sizes = {window for window in config.windows if window}
  if len(sizes) > 1 and config.family == 'llama':
    raise InputError(
      f'windows: layers have {len(sizes)} different sizes, of which a config.json holds one; '
      'set them equal to export the model.'
    )
  if sizes and config.biases and config.family == 'llama':
    raise InputError('biases beside windows: no model of this architecture has both.')
  if sizes and all(config.windows):
    fields['architectures'] = ['MistralForCausalLM']
    fields['model_type'] = 'mistral'
    fields['sliding_window'] = max(sizes)
  elif sizes:
    fields['architectures'] = ['MinistralForCausalLM']
    fields['model_type'] = 'ministral'
    fields['sliding_window'] = max(sizes)
    kinds = {False: fields_lib.GLOBAL, True: fields_lib.LOCAL}
    fields['layer_types'] = [kinds[window > 0] for window in config.windows]
  return fields


def check_biases(config: ModelConfig, *groups: tuple[str, ...]) -> None:
  """Raises InputError unless the biases are whole groups of linears."""
  rest = {*config.biases}
  for group in groups:
    if rest >= {*group}:
      rest -= {*group}
  if rest:
    raise InputError(
      f'biases={config.biases}: a config.json of {config.family} cannot say this; it has '
      f'biases of {" or of ".join(", ".join(g) for g in groups)}.'
    )


FAMILY = Family(
  name='llama',
  model_types=('llama', 'mistral', 'ministral'),
  rows=ROWS,
  fields=(
    'hidden_act',
    'mlp_bias',
    'num_local_experts',
    'num_experts_per_tok',
    'sliding_window',
    'layer_types',
    'rope_interleaved',
    'partial_rotary_factor',
  ),
  from_hf=from_hf,
  to_hf=to_hf,
  gguf_permuted=True,
)
