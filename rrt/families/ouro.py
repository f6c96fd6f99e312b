"""Ouro: models that were trained with loops (LoopLM, arXiv 2510.25741).

All layers are one block that runs `total_ut_steps` times, with four norms a layer. The
final norm ends every pass, so that the next one reads what the head would, and a gate
gives each pass the probability of leaving after it. Nothing differs by loop, so that
there is no relaxation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families import llama
from rrt.families.base import Family, Row

_LAYER = 'model.layers.{}.'
# llama.cpp knows no such model: its column is empty.
_NORMS = {
  'attn_norm/scale': 'input_layernorm',
  'attn_post_norm/scale': 'input_layernorm_2',
  'mlp_norm/scale': 'post_attention_layernorm',
  'mlp_post_norm/scale': 'post_attention_layernorm_2',
}
ROWS = (
  *(
    row
    for row in llama.ROWS
    if row.path.endswith(('kernel', 'table')) or row.path.startswith('head')
  ),
  *(Row(path, f'{_LAYER}{name}.weight', '', 'gain') for path, name in _NORMS.items()),
  Row('block/end_norm/scale', 'model.norm.weight', '', 'gain'),
  Row('exit_gate/kernel', 'model.early_exit_gate.weight', ''),
  Row('exit_gate/bias', 'model.early_exit_gate.bias', '', 'bias'),
)


def from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of an Ouro config.json, 4.x or 5.x style."""
  fields_lib.refuse(c, 'use_sliding_window', False)
  mine = ('total_ut_steps', 'early_exit_threshold', 'use_sliding_window', 'max_window_layers')
  fields = {k: v for k, v in c.items() if k not in mine} | {'model_type': 'llama'}
  return dataclasses.replace(
    llama.from_hf(fields),
    family='ouro',
    loops=fields_lib.whole(c, 'total_ut_steps', 4),
    post_norms=True,
    end_norm=True,
    exit_gate=True,
  )


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an Ouro, for 4.x and 5.x; the model's code is the publisher's."""
  if config.biases or any(config.windows):
    raise InputError('biases, windows: an ouro has none.')
  plain = dataclasses.replace(config, loops=1, end_norm=False, exit_gate=False)
  fields = llama.to_hf(plain)
  for name in ('mlp_bias', 'attention_bias'):
    fields.pop(name)
  return fields | {
    'architectures': ['OuroForCausalLM'],
    'model_type': 'ouro',
    'total_ut_steps': config.loops,
    'layer_types': [fields_lib.GLOBAL] * config.block_layers,
    'use_sliding_window': False,
  }


FAMILY = Family(
  name='ouro',
  model_types=('ouro',),
  rows=ROWS,
  fields=(
    *llama.FAMILY.fields,
    'total_ut_steps',
    'early_exit_threshold',
    'use_sliding_window',
    'max_window_layers',
  ),
  from_hf=from_hf,
  to_hf=to_hf,
  own_code=True,
)
