"""Qwen 2, Qwen 2.5 and the dense Qwen 3: Llama's architecture with additions.

Qwen 2 has biases of q, k and v. Qwen 3 has RMSNorm over each head of q and k and a
head size of its own. Both may have a sliding window from some layer on.
"""

from __future__ import annotations

from typing import Any

from rrt.config import ModelConfig
from rrt.families import fields as fields_lib
from rrt.families import llama
from rrt.families.base import Family
from rrt.families.fields import GLOBAL, LOCAL

QKV = ('q', 'k', 'v')
# What a config.json may leave out, by the original's own defaults.
DEFAULTS = {
  'vocab_size': 151_936,
  'hidden_size': 4096,
  'intermediate_size': 22_016,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 32,
  'max_position_embeddings': 32_768,
  'sliding_window': 4096,
  'max_window_layers': 28,
}
_FIELDS = ('hidden_act', 'use_sliding_window', 'sliding_window', 'max_window_layers', 'layer_types')
# Qwen 2's own files say that rotation takes whole heads.
_SAME = ('use_mrope', 'partial_rotary_factor')


def qwen2_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Qwen 2 or 2.5 config.json, 4.x or 5.x style."""
  return _from_hf(DEFAULTS | c, 'qwen2', biases=QKV)


def qwen3_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a dense Qwen 3 config.json, 4.x or 5.x style."""
  c = DEFAULTS | {'head_dim': 128} | c
  biases = llama.ATTENTION * fields_lib.flag(c, 'attention_bias', False)
  return _from_hf(c, 'qwen3', biases=biases, qk_norm=True)


def _from_hf(c: dict[str, Any], family: str, **more: Any) -> ModelConfig:
  fields_lib.refuse(c, 'hidden_act', 'silu', 'swish')
  fields_lib.refuse(c, 'use_mrope', False)
  fields_lib.refuse(c, 'partial_rotary_factor', 1, 1.0)
  layers = fields_lib.whole(c, 'num_hidden_layers')
  max_context = fields_lib.whole(c, 'max_position_embeddings')
  windowed = fields_lib.flag(c, 'use_sliding_window', False)
  window = fields_lib.whole(c, 'sliding_window', 0, least=0) if windowed else 0
  kinds = fields_lib.layer_types(c)
  if kinds is None:
    first = fields_lib.whole(c, 'max_window_layers', least=0)
    kinds = [LOCAL if window and i >= first else GLOBAL for i in range(layers)]
  windows = fields_lib.windows(c, kinds, window)
  heads, d_model = fields_lib.whole(c, 'num_attention_heads'), fields_lib.whole(c, 'hidden_size')
  rope = fields_lib.table(c, 'rope_scaling') or fields_lib.table(c, 'rope_parameters')
  theta = fields_lib.number(c, 'rope_theta', 10_000.0)
  return ModelConfig(
    family=family,
    vocab_size=fields_lib.whole(c, 'vocab_size'),
    d_model=d_model,
    d_ff=fields_lib.whole(c, 'intermediate_size'),
    num_heads=heads,
    num_kv_heads=fields_lib.whole(c, 'num_key_value_heads', heads),
    head_dim=fields_lib.whole(c, 'head_dim', d_model // heads),
    block_layers=layers,
    max_context=max_context,
    norm_eps=fields_lib.number(c, 'rms_norm_eps', 1e-6, least=0),
    tie_embeddings=fields_lib.flag(c, 'tie_word_embeddings', False),
    windows=windows if any(windows) else (),
    ropes=(fields_lib.rope_from_hf(rope, theta, max_context),),
    **more,
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Qwen 2, 2.5 or 3, for 4.x and 5.x."""
  qwen2 = config.family in ('qwen2', 'qwen2_moe')
  llama.check_biases(config, QKV if qwen2 else llama.ATTENTION)
  fields = llama.to_hf(config)
  for name in ('mlp_bias', *(['attention_bias'] if qwen2 else [])):
    fields.pop(name)
  window = max(config.windows, default=0)
  kinds = config.windows or (0,) * config.depth
  architecture = 'Qwen2ForCausalLM' if qwen2 else 'Qwen3ForCausalLM'
  return fields | {
    'architectures': [architecture],
    'model_type': config.family,
    'use_sliding_window': bool(window),
    'sliding_window': window or None,
    'max_window_layers': next((i for i, w in enumerate(kinds) if w), config.depth),
    'layer_types': [LOCAL if w else GLOBAL for w in kinds],
  }


QWEN2 = Family(
  name='qwen2',
  model_types=('qwen2',),
  rows=llama.ROWS,
  fields=_FIELDS + _SAME,
  from_hf=qwen2_from_hf,
  to_hf=to_hf,
)
QWEN3 = Family(
  name='qwen3',
  model_types=('qwen3',),
  rows=llama.ROWS,
  fields=_FIELDS + _SAME,
  from_hf=qwen3_from_hf,
  to_hf=to_hf,
)
