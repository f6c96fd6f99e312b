"""GPT-NeoX: Pythia, the paper's third family.

LayerNorm, attention and MLP in parallel, an MLP without a gate, biases everywhere,
a quarter of each head rotated, q, k and v in one tensor, head by head.
"""

from __future__ import annotations

from typing import Any

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families.base import Family, Row
from rrt.families.llama import check_biases

_LAYER = 'gpt_neox.layers.{}.'
_QKV = ('q', 'k', 'v')
_LINEARS = ('q', 'k', 'v', 'o', 'up', 'down')
_NAMES = {
  'attn/o': ('attention.dense', 'attn_output'),
  'mlp/up': ('mlp.dense_h_to_4h', 'ffn_up'),
  'mlp/down': ('mlp.dense_4h_to_h', 'ffn_down'),
}
_NORMS = {
  'attn_norm': (_LAYER + 'input_layernorm', 'blk.{}.attn_norm'),
  'mlp_norm': (_LAYER + 'post_attention_layernorm', 'blk.{}.ffn_norm'),
  'final_norm': ('gpt_neox.final_layer_norm', 'output_norm'),
}


def _rows() -> tuple[Row, ...]:
  rows = [Row('embed/table', 'gpt_neox.embed_in.weight', 'token_embd.weight', 'table')]
  rows.append(Row('head/kernel', 'embed_out.weight', 'output.weight'))
  for path, (hf, gguf) in _NORMS.items():
    rows.append(Row(f'{path}/scale', f'{hf}.weight', f'{gguf}.weight', 'gain'))
    rows.append(Row(f'{path}/bias', f'{hf}.bias', f'{gguf}.bias', 'bias'))
  for leaf, end, kind in (('kernel', 'weight', 'linear'), ('bias', 'bias', 'bias')):
    for name in _QKV:
      hf, gguf = f'{_LAYER}attention.query_key_value.{end}', f'blk.{{}}.attn_qkv.{end}'
      rows.append(Row(f'attn/{name}/{leaf}', hf, gguf, kind, _QKV, by_head=True))
    for path, (hf, gguf) in _NAMES.items():
      rows.append(Row(f'{path}/{leaf}', f'{_LAYER}{hf}.{end}', f'blk.{{}}.{gguf}.{end}', kind))
  return tuple(rows)


# What a config.json may leave out, by the original's own defaults.
DEFAULTS = {
  'vocab_size': 50_432,
  'hidden_size': 6144,
  'num_hidden_layers': 44,
  'num_attention_heads': 64,
  'intermediate_size': 24_576,
  'max_position_embeddings': 2048,
}
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh'}


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a GPT-NeoX config.json, 4.x or 5.x style."""
  c = DEFAULTS | c
  fields_lib.refuse(c, 'hidden_act', *_ACTIVATIONS)
  heads, d_model = fields_lib.whole(c, 'num_attention_heads'), fields_lib.whole(c, 'hidden_size')
  fields_lib.refuse(c, 'num_key_value_heads', heads)
  max_context = fields_lib.whole(c, 'max_position_embeddings')
  rope = fields_lib.table(c, 'rope_scaling') or fields_lib.table(c, 'rope_parameters')
  share = fields_lib.number(rope, 'partial_rotary_factor', 0.25)
  share = fields_lib.number(c, 'rotary_pct', share)
  base = fields_lib.number(c, 'rope_theta', 10_000.0)
  base = fields_lib.number(c, 'rotary_emb_base', base)
  plain = {k: v for k, v in rope.items() if k != 'partial_rotary_factor'}
  attention = ('q', 'k', 'v', 'o') if fields_lib.flag(c, 'attention_bias', True) else ()
  return ModelConfig(
    family='gpt_neox',
    vocab_size=fields_lib.whole(c, 'vocab_size'),
    d_model=d_model,
    d_ff=fields_lib.whole(c, 'intermediate_size'),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=d_model // heads,
    block_layers=fields_lib.whole(c, 'num_hidden_layers'),
    max_context=max_context,
    norm_eps=fields_lib.number(c, 'layer_norm_eps', 1e-5, least=0),
    norm='layer',
    parallel=fields_lib.flag(c, 'use_parallel_residual', True),
    gated=False,
    activation=_ACTIVATIONS[c.get('hidden_act') or 'gelu'],
    biases=(*attention, 'up', 'down'),
    rotary_dim=int(d_model // heads * share),
    tie_embeddings=fields_lib.flag(c, 'tie_word_embeddings', False),
    ropes=(fields_lib.rope_from_hf(plain, base, max_context),),
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied GPT-NeoX, for 4.x and 5.x."""
  check_biases(config, ('q', 'k', 'v', 'o'), ('up', 'down'))
  if not {'up', 'down'} <= {*config.biases} or any(config.windows):
    raise InputError('biases, windows: a gpt_neox has biases in its MLP, and no windows.')
  rope = config.ropes[0]
  share = (config.rotary_dim or config.head_dim) / config.head_dim
  names = {kind: name for name, kind in reversed(_ACTIVATIONS.items())}
  scaling = fields_lib.rope_to_hf(rope)
  return {
    'architectures': ['GPTNeoXForCausalLM'],
    'model_type': 'gpt_neox',
    'vocab_size': config.vocab_size,
    'hidden_size': config.d_model,
    'intermediate_size': config.d_ff,
    'num_hidden_layers': config.depth,
    'num_attention_heads': config.num_heads,
    'hidden_act': names[config.activation],
    'max_position_embeddings': config.max_context,
    'layer_norm_eps': config.norm_eps,
    'use_parallel_residual': config.parallel,
    'attention_bias': 'q' in config.biases,
    'tie_word_embeddings': config.tie_embeddings,
    'rotary_pct': share,
    'rotary_emb_base': rope.base,
    'rope_scaling': scaling,
    'rope_parameters': {'rope_type': 'default'}
    | (scaling or {})
    | {'rope_theta': rope.base, 'partial_rotary_factor': share},
  }


FAMILY = Family(
  name='gpt_neox',
  model_types=('gpt_neox',),
  rows=_rows(),
  fields=(
    'hidden_act',
    'layer_norm_eps',
    'rotary_pct',
    'rotary_emb_base',
    'use_parallel_residual',
    'partial_rotary_factor',
  ),
  from_hf=from_hf,
  to_hf=to_hf,
)
