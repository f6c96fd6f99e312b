"""SmolLM 3: Llama's architecture with layers that have no rotary embedding (NoPE)."""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.config import ModelConfig, Rope
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families import llama
from rrt.families.base import Family
from rrt.families.fields import GLOBAL, LOCAL

NOPE = Rope(scaling='none')
# What a config.json may leave out, by the original's own defaults.
DEFAULTS = {
  'vocab_size': 128_256,
  'hidden_size': 2048,
  'intermediate_size': 11_008,
  'num_hidden_layers': 36,
  'num_attention_heads': 16,
  'num_key_value_heads': 4,
  'max_position_embeddings': 32_768,
  'tie_word_embeddings': True,
  'rope_theta': 2_000_000.0,
}


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a SmolLM 3 config.json, 4.x or 5.x style."""
  c = DEFAULTS | c
  layers = fields_lib.whole(c, 'num_hidden_layers')
  rotates = c.get('no_rope_layers')
  if rotates is None:
    every = fields_lib.whole(c, 'no_rope_layer_interval', 4)
    rotates = [int((i + 1) % every != 0) for i in range(layers)]
  if not isinstance(rotates, list) or len(rotates) != layers or not {*rotates} <= {0, 1}:
    raise InputError(
      f'config.json: no_rope_layers={rotates!r} must have a 0 (no rotation) or 1 for each of '
      f'the {layers} layers.'
    )
  windowed = fields_lib.flag(c, 'use_sliding_window', False)
  window = fields_lib.whole(c, 'sliding_window', 0, least=0) if windowed else 0
  kinds = fields_lib.layer_types(c)
  if kinds is None:
    kinds = [LOCAL if window and not r else GLOBAL for r in rotates]
  windows = fields_lib.windows(c, kinds, window)
  mine = ('model_type', 'sliding_window', 'layer_types')
  config = llama.from_hf({k: v for k, v in c.items() if k not in mine} | {'model_type': 'llama'})
  return dataclasses.replace(
    config,
    family='smollm3',
    windows=windows if any(windows) else (),
    ropes=(*config.ropes, NOPE),
    rope_index=tuple(1 - r for r in rotates),
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied SmolLM 3, for 4.x and 5.x."""
  index = config.rope_index or (0,) * config.depth
  used = {config.ropes[i] for i in index} - {NOPE}
  if len(used) > 1:
    raise InputError(f'ropes: {len(used)} rotary tables, of which a config.json holds one.')
  rope = used.pop() if used else Rope()
  fields = llama.to_hf(dataclasses.replace(config, ropes=(rope,), rope_index=(), windows=()))
  window = max(config.windows, default=0)
  return fields | {
    'architectures': ['SmolLM3ForCausalLM'],
    'model_type': 'smollm3',
    'no_rope_layers': [int(config.ropes[i] != NOPE) for i in index],
    'use_sliding_window': bool(window),
    'sliding_window': window or None,
    'layer_types': [LOCAL if w else GLOBAL for w in config.windows or (0,) * config.depth],
  }


FAMILY = Family(
  name='smollm3',
  model_types=('smollm3',),
  rows=llama.ROWS,
  fields=(
    *llama.FAMILY.fields,
    'no_rope_layers',
    'no_rope_layer_interval',
    'use_sliding_window',
    'max_window_layers',
  ),
  from_hf=from_hf,
  to_hf=to_hf,
  gguf_permuted=True,
)
