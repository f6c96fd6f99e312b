"""Gemma 1, Gemma 2 and the text decoder of Gemma 3.

All store norm gains as offsets from 1, scale embeddings by sqrt(D) and have a
GeGLU MLP with tanh-approximated GELU. Gemma 2 adds norms after attention and
after the MLP, soft-caps of attention scores and logits, and a sliding window in
every second layer; Gemma 3 has QK-norm instead of the caps, and a separate RoPE
base in its local layers.
"""

from __future__ import annotations

from typing import Any

from rrt.config import ModelConfig, Rope
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families import llama
from rrt.families.base import Family, Row
from rrt.families.fields import GLOBAL, LOCAL

GEMMA3_ROWS = (
  Row('embed/table', 'model.embed_tokens.weight', 'token_embd.weight', 'table'),
  Row(
    'attn_norm/scale', 'model.layers.{}.input_layernorm.weight', 'blk.{}.attn_norm.weight', 'gain'
  ),
  Row('attn/q/kernel', 'model.layers.{}.self_attn.q_proj.weight', 'blk.{}.attn_q.weight', 'q'),
  Row('attn/k/kernel', 'model.layers.{}.self_attn.k_proj.weight', 'blk.{}.attn_k.weight', 'k'),
  Row('attn/v/kernel', 'model.layers.{}.self_attn.v_proj.weight', 'blk.{}.attn_v.weight'),
  Row('attn/o/kernel', 'model.layers.{}.self_attn.o_proj.weight', 'blk.{}.attn_output.weight'),
  Row(
    'attn/q_norm/scale',
    'model.layers.{}.self_attn.q_norm.weight',
    'blk.{}.attn_q_norm.weight',
    'gain',
  ),
  Row(
    'attn/k_norm/scale',
    'model.layers.{}.self_attn.k_norm.weight',
    'blk.{}.attn_k_norm.weight',
    'gain',
  ),
  Row(
    'attn_post_norm/scale',
    'model.layers.{}.post_attention_layernorm.weight',
    'blk.{}.post_attention_norm.weight',
    'gain',
  ),
  Row(
    'mlp_norm/scale',
    'model.layers.{}.pre_feedforward_layernorm.weight',
    'blk.{}.ffn_norm.weight',
    'gain',
  ),
  Row('mlp/gate/kernel', 'model.layers.{}.mlp.gate_proj.weight', 'blk.{}.ffn_gate.weight'),
  Row('mlp/up/kernel', 'model.layers.{}.mlp.up_proj.weight', 'blk.{}.ffn_up.weight'),
  Row('mlp/down/kernel', 'model.layers.{}.mlp.down_proj.weight', 'blk.{}.ffn_down.weight'),
  Row(
    'mlp_post_norm/scale',
    'model.layers.{}.post_feedforward_layernorm.weight',
    'blk.{}.post_ffw_norm.weight',
    'gain',
  ),
  Row('final_norm/scale', 'model.norm.weight', 'output_norm.weight', 'gain'),
  Row('head/kernel', 'lm_head.weight', 'output.weight'),
)

# What a config.json may leave out, by the original's own defaults.
GEMMA_DEFAULTS = {'vocab_size': 256_000, 'head_dim': 256, 'max_position_embeddings': 8192}
GEMMA2_DEFAULTS = {
  'vocab_size': 256_000,
  'hidden_size': 2304,
  'intermediate_size': 9216,
  'num_hidden_layers': 26,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'max_position_embeddings': 8192,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
}
# Null turns a cap off, absent means these.
GEMMA2_CAPS = {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
GEMMA3_DEFAULTS = {
  'vocab_size': 262_208,
  'hidden_size': 2304,
  'intermediate_size': 9216,
  'num_hidden_layers': 26,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'max_position_embeddings': 131_072,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
}


def gemma_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Gemma 1 config.json, 4.x or 5.x style."""
  c = GEMMA_DEFAULTS | c
  fields_lib.refuse(c, 'attention_bias', False)
  # Early files say 'gelu' and mean its tanh approximation.
  fields_lib.refuse(c, 'hidden_act', 'gelu_pytorch_tanh', 'gelu')
  fields_lib.refuse(c, 'hidden_activation', 'gelu_pytorch_tanh', 'gelu')
  return ModelConfig(
    **_common(c, 'gemma'),
    ropes=(
      fields_lib.rope_from_hf(
        fields_lib.table(c, 'rope_scaling') or fields_lib.table(c, 'rope_parameters'),
        fields_lib.number(c, 'rope_theta', 10_000.0),
        fields_lib.whole(c, 'max_position_embeddings'),
      ),
    ),
  )


def gemma2_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Gemma 2 config.json, 4.x or 5.x style."""
  c = GEMMA2_DEFAULTS | GEMMA2_CAPS | c
  fields_lib.refuse(c, 'attention_bias', False)
  fields_lib.refuse(c, 'hidden_act', 'gelu_pytorch_tanh', 'gelu')
  fields_lib.refuse(c, 'hidden_activation', 'gelu_pytorch_tanh')
  kinds = fields_lib.layer_types(c)
  if kinds is None:
    layers = fields_lib.whole(c, 'num_hidden_layers')
    kinds = [GLOBAL if i % 2 else LOCAL for i in range(layers)]
  rope = fields_lib.table(c, 'rope_scaling') or fields_lib.table(c, 'rope_parameters')
  return ModelConfig(
    **_common(c, 'gemma2'),
    post_norms=True,
    attn_softcap=_cap(c, 'attn_logit_softcapping'),
    final_softcap=_cap(c, 'final_logit_softcapping'),
    query_scale=fields_lib.number(c, 'query_pre_attn_scalar') ** -0.5,
    windows=fields_lib.windows(c, kinds, fields_lib.whole(c, 'sliding_window', 0, least=0)),
    ropes=(
      fields_lib.rope_from_hf(
        rope,
        fields_lib.number(c, 'rope_theta', 10_000.0),
        fields_lib.whole(c, 'max_position_embeddings'),
      ),
    ),
  )


def gemma3_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Gemma 3 text config, 4.x or 5.x style."""
  c = GEMMA3_DEFAULTS | c
  fields_lib.refuse(c, 'attention_bias', False)
  fields_lib.refuse(c, 'hidden_activation', 'gelu_pytorch_tanh')
  kinds = _layer_kinds(c)
  window = fields_lib.whole(c, 'sliding_window', 0, least=0)
  is_local = tuple(int(kind == LOCAL) for kind in kinds)
  return ModelConfig(
    **_common(c, 'gemma3'),
    post_norms=True,
    qk_norm=True,
    attn_softcap=_cap(c, 'attn_logit_softcapping'),
    final_softcap=_cap(c, 'final_logit_softcapping'),
    query_scale=fields_lib.number(c, 'query_pre_attn_scalar') ** -0.5,
    windows=fields_lib.windows(c, kinds, window),
    ropes=_ropes_from_hf(c),
    rope_index=is_local,
  )


def _cap(c: dict[str, Any], name: str) -> float | None:
  return None if c.get(name) is None else fields_lib.number(c, name)


def _common(c: dict[str, Any], family: str) -> dict[str, Any]:
  fields_lib.refuse(c, 'use_bidirectional_attention', False)
  heads = fields_lib.whole(c, 'num_attention_heads')
  return {
    'family': family,
    'vocab_size': fields_lib.whole(c, 'vocab_size'),
    'd_model': fields_lib.whole(c, 'hidden_size'),
    'd_ff': fields_lib.whole(c, 'intermediate_size'),
    'num_heads': heads,
    'num_kv_heads': fields_lib.whole(c, 'num_key_value_heads', heads),
    'head_dim': fields_lib.whole(c, 'head_dim'),
    'block_layers': fields_lib.whole(c, 'num_hidden_layers'),
    'max_context': fields_lib.whole(c, 'max_position_embeddings'),
    'norm_eps': fields_lib.number(c, 'rms_norm_eps', 1e-6, least=0),
    'unit_offset_norm': True,
    'activation': 'gelu_tanh',
    'scale_embeddings': True,
    'tie_embeddings': fields_lib.flag(c, 'tie_word_embeddings', True),
  }


def _layer_kinds(c: dict[str, Any]) -> list[str]:
  """LOCAL or GLOBAL for every layer."""
  kinds = fields_lib.layer_types(c)
  if kinds is None:
    every = fields_lib.whole(c, '_sliding_window_pattern', 6)
    every = fields_lib.whole(c, 'sliding_window_pattern', every)
    layers = fields_lib.whole(c, 'num_hidden_layers')
    kinds = [LOCAL if (i + 1) % every else GLOBAL for i in range(layers)]
  return kinds


def _ropes_from_hf(c: dict[str, Any]) -> tuple[Rope, Rope]:
  """(global, local) rotary tables; `rope_scaling` applies to the global one."""
  nested = fields_lib.table(c, 'rope_parameters')
  if nested and not (GLOBAL in nested or LOCAL in nested):
    nested = {GLOBAL: nested}
  far = fields_lib.table(nested, GLOBAL) | fields_lib.table(c, 'rope_scaling')
  near = fields_lib.table(nested, LOCAL)
  context = fields_lib.whole(c, 'max_position_embeddings')
  return (
    fields_lib.rope_from_hf(far, fields_lib.number(c, 'rope_theta', 1e6), context),
    fields_lib.rope_from_hf(near, fields_lib.number(c, 'rope_local_base_freq', 1e4), context),
  )


def gemma_to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Gemma 1, for 4.x and 5.x."""
  fields = llama.to_hf(config)
  del fields['mlp_bias']
  return fields | {
    'architectures': ['GemmaForCausalLM'],
    'model_type': 'gemma',
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
  }


def gemma2_to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Gemma 2, for 4.x and 5.x."""
  windows = config.windows or (0,) * config.depth
  _, _, window = _kinds_of_layers(config, windows)
  return gemma_to_hf(config) | {
    'architectures': ['Gemma2ForCausalLM'],
    'model_type': 'gemma2',
    'query_pre_attn_scalar': _whole(config.scale_q**-2),
    'sliding_window': window or GEMMA2_DEFAULTS['sliding_window'],
    'layer_types': [LOCAL if w else GLOBAL for w in windows],
    'attn_logit_softcapping': config.attn_softcap,
    'final_logit_softcapping': config.final_softcap,
  }


def gemma3_to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Gemma 3 text model, for 4.x and 5.x.

  Raises:
    InputError: its layers differ by more than Gemma 3's two layer types.
  """
  windows = config.windows or (0,) * config.depth
  far, near, window = _kinds_of_layers(config, windows)
  fields = gemma_to_hf(config)
  del fields['hidden_act']
  return fields | {
    'architectures': ['Gemma3ForCausalLM'],
    'model_type': 'gemma3_text',
    'query_pre_attn_scalar': _whole(config.scale_q**-2),
    'sliding_window': window or GEMMA3_DEFAULTS['sliding_window'],
    'layer_types': [LOCAL if w else GLOBAL for w in windows],
    'rope_theta': far.base,
    'rope_scaling': fields_lib.rope_to_hf(far),
    'rope_local_base_freq': near.base,
    'rope_parameters': {GLOBAL: _rope_parameters(far), LOCAL: _rope_parameters(near)},
    'attn_logit_softcapping': config.attn_softcap,
    'final_logit_softcapping': config.final_softcap,
  }


def _kinds_of_layers(config: ModelConfig, windows: tuple[int, ...]) -> tuple[Rope, Rope, int]:
  """(global rotary table, local one, local window) of an untied model.

  A config.json has one of each. If there are no layers of a type, the first
  table is the global and the last the local one.
  """
  index = config.rope_index or (0,) * config.depth
  used: dict[bool, set[Rope]] = {False: set(), True: set()}
  for i, window in zip(index, windows, strict=True):
    used[window > 0].add(config.ropes[i])
  sizes = {window for window in windows if window}
  for name, found in (
    ('rope_index: layers without a window', used[False]),
    ('rope_index: layers with a window', used[True]),
    ('windows: layers', sizes),
  ):
    if len(found) > 1:
      raise InputError(
        f'{name} have {len(found)} different values, of which a Gemma 3 '
        'config.json holds one; set them equal to export the model.'
      )
  far = used[False] or {config.ropes[0]}
  near = used[True] or {config.ropes[-1]}
  return far.pop(), near.pop(), max(sizes, default=0)


def _rope_parameters(rope: Rope) -> dict[str, Any]:
  fields = fields_lib.rope_to_hf(rope) or {'rope_type': 'default'}
  return fields | {'rope_theta': rope.base}


def _whole(value: float) -> int | float:
  """Rounds a value to an integer if it is one up to rounding errors."""
  nearest = round(value)
  return nearest if abs(value - nearest) < 1e-6 * value else value


GEMMA = Family(
  name='gemma',
  model_types=('gemma',),
  rows=llama.ROWS,
  fields=('hidden_act', 'hidden_activation', 'use_bidirectional_attention'),
  from_hf=gemma_from_hf,
  to_hf=gemma_to_hf,
  gguf_gain_offset=1.0,
)
GEMMA2 = Family(
  name='gemma2',
  model_types=('gemma2',),
  rows=GEMMA3_ROWS,
  fields=(
    'hidden_act',
    'hidden_activation',
    'use_bidirectional_attention',
    'attn_logit_softcapping',
    'final_logit_softcapping',
    'query_pre_attn_scalar',
    'sliding_window',
    'layer_types',
    'sliding_window_size',  # The original files say the window twice.
  ),
  from_hf=gemma2_from_hf,
  to_hf=gemma2_to_hf,
  gguf_gain_offset=1.0,
)
GEMMA3 = Family(
  name='gemma3',
  model_types=('gemma3_text', 'gemma3'),
  rows=GEMMA3_ROWS,
  fields=(
    'hidden_activation',
    'use_bidirectional_attention',
    'attn_logit_softcapping',
    'final_logit_softcapping',
    'query_pre_attn_scalar',
    'sliding_window',
    'sliding_window_pattern',
    '_sliding_window_pattern',
    'layer_types',
    'rope_local_base_freq',
  ),
  from_hf=gemma3_from_hf,
  to_hf=gemma3_to_hf,
  gguf_gain_offset=1.0,
)
