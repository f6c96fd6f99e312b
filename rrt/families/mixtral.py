"""Mixtral, Qwen2-MoE and Qwen3-MoE: Mistral's and Qwen's layers with experts in place of the MLP.

A router's softmax over all experts, of which each token takes the largest few; their gates are
divided by their sum (in Qwen's where `norm_topk_prob` says so). Qwen2-MoE has a shared expert beside
them, which every token takes, with a gate of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import fields as fields_lib
from rrt.families import llama, qwen
from rrt.families.base import Family, Row


def rows(block: str, names: dict[str, str]) -> tuple[Row, ...]:
  """Llama's table with experts for the MLP.

  Args:
    block: of the tensors' names, behind the layer's.
    names: the linear of each tensor of an expert.
  """
  head = f'model.layers.{{}}.{block}'
  return (
    *(row for row in llama.ROWS if not row.path.startswith('mlp/')),
    Row('mlp/router/weights', f'{head}.gate.weight', ''),
    *(
      Row(f'mlp/{linear}/kernels', f'{head}.experts.{{e}}.{tensor}.weight', '')
      for tensor, linear in names.items()
    ),
  )


def experts_of(c: dict[str, Any], name: str) -> dict[str, int]:
  """The number of experts and how many a token takes, as fields of a `ModelConfig`.

  Raises:
    InputError: more experts a token than there are.
  """
  experts = fields_lib.whole(c, name, least=2)
  taken = fields_lib.whole(c, 'num_experts_per_tok', 2)
  if taken > experts:
    raise InputError(
      f'config.json: num_experts_per_tok={taken} must be no more than {name}={experts}.'
    )
  return {'num_experts': experts, 'experts_per_token': taken}


def mixtral_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Mixtral config.json, 4.x or 5.x style."""
  fields_lib.refuse(c, 'attention_bias', False)
  c = {'num_local_experts': 8, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-5} | c
  c = {'rope_theta': 1e6, 'max_position_embeddings': 131_072} | c
  window = fields_lib.whole(c, 'sliding_window', 0, least=0)
  dense = {k: v for k, v in c.items() if k not in ('sliding_window', 'num_local_experts')}
  config = llama.from_hf(dense)
  more: dict[str, Any] = experts_of(c, 'num_local_experts')
  windows = (window,) * config.depth if window else ()
  return dataclasses.replace(config, family='mixtral', windows=windows, **more)


def mixtral_to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Mixtral, for 4.x and 5.x.

  Raises:
    InputError: biases, or windows of several sizes.
  """
  _refuse(config, bool(config.biases), 'biases', 'attention without biases')
  _refuse(config, len({*config.windows}) > 1, 'windows', 'one window for all layers')
  _refuse(config, not config.norm_topk, 'norm_topk', 'gates that sum to 1')
  fields = llama.to_hf(config)
  for name in ('attention_bias', 'mlp_bias'):
    fields.pop(name)
  return fields | {
    'architectures': ['MixtralForCausalLM'],
    'model_type': 'mixtral',
    'sliding_window': max(config.windows, default=0) or None,
    'num_local_experts': config.num_experts,
    'num_experts_per_tok': config.experts_per_token,
  }


def qwen2_moe_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Qwen2-MoE config.json, 4.x or 5.x style."""
  fields_lib.refuse(c, 'qkv_bias', True)
  if not c.get('layer_types'):  # Its layers alternate in their windows, unlike Qwen 2's.
    fields_lib.refuse(c, 'use_sliding_window', False, remedy='give layer_types')
  c = {'num_experts_per_tok': 4, 'moe_intermediate_size': 1408} | c
  c = {'shared_expert_intermediate_size': 5632} | c
  config = _with_experts(qwen.qwen2_from_hf(c), c, 60)
  shared = fields_lib.whole(c, 'shared_expert_intermediate_size')
  if shared % config.d_ff:
    raise InputError(
      f'config.json: shared_expert_intermediate_size={shared} must be a multiple of '
      f'moe_intermediate_size={config.d_ff}.'
    )
  return dataclasses.replace(config, family='qwen2_moe', shared_experts=shared // config.d_ff)


def qwen3_moe_from_hf(c: dict[str, Any]) -> ModelConfig:
  """ModelConfig of a Qwen3-MoE config.json, 4.x or 5.x style."""
  c = {'num_experts_per_tok': 8, 'moe_intermediate_size': 768} | c
  c = c | {'max_window_layers': 0}  # A window is that of all layers, unlike Qwen 3's.
  return dataclasses.replace(_with_experts(qwen.qwen3_from_hf(c), c, 128), family='qwen3_moe')


def _with_experts(config: ModelConfig, c: dict[str, Any], default: int) -> ModelConfig:
  """A dense Qwen's config with the mixture of a config.json."""
  fields_lib.refuse(c, 'decoder_sparse_step', 1, remedy='some layers would have no experts')
  fields_lib.refuse(c, 'mlp_only_layers', [], remedy='those layers would have no experts')
  # transformers 5 writes the name that Mixtral has.
  c = c | {'num_experts': c.get('num_experts') or c.get('num_local_experts') or default}
  mixture: dict[str, Any] = experts_of(c, 'num_experts')
  return dataclasses.replace(
    config,
    d_ff=fields_lib.whole(c, 'moe_intermediate_size'),
    norm_topk=fields_lib.flag(c, 'norm_topk_prob', False),
    **mixture,
  )


def qwen_moe_to_hf(config: ModelConfig) -> dict[str, Any]:
  """config.json of an untied Qwen2-MoE or Qwen3-MoE, for 4.x and 5.x."""
  fields, old = qwen.to_hf(config), config.family == 'qwen2_moe'
  if old:
    fields |= {'shared_expert_intermediate_size': config.shared_experts * config.d_ff}
  else:
    fields.pop('layer_types')
    _refuse(config, len({*config.windows}) > 1, 'windows', 'one window for all layers')
  return fields | {
    'architectures': ['Qwen2MoeForCausalLM' if old else 'Qwen3MoeForCausalLM'],
    'model_type': config.family,
    'max_window_layers': 0,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
    'moe_intermediate_size': config.d_ff,
    'num_experts': config.num_experts,
    'num_experts_per_tok': config.experts_per_token,
    'norm_topk_prob': config.norm_topk,
  }


def _refuse(config: ModelConfig, wrong: bool, field: str, only: str) -> None:
  if wrong:
    raise InputError(
      f'{field}={getattr(config, field)!r}: a config.json of {config.family} cannot say this; it '
      f'has {only}.'
    )


# Losses of training with other software.
_ROUTER = ('num_experts_per_tok', 'router_aux_loss_coef', 'output_router_logits')
MIXTRAL = Family(
  name='mixtral',
  model_types=('mixtral',),
  rows=rows('block_sparse_moe', {'w1': 'gate', 'w3': 'up', 'w2': 'down'}),
  fields=('hidden_act', 'sliding_window', 'num_local_experts', 'router_jitter_noise', *_ROUTER),
  from_hf=mixtral_from_hf,
  to_hf=mixtral_to_hf,
)
_QWEN_EXPERT = {'gate_proj': 'gate', 'up_proj': 'up', 'down_proj': 'down'}
_QWEN_FIELDS = (
  *('decoder_sparse_step', 'mlp_only_layers', 'moe_intermediate_size'),
  *('num_experts', 'num_local_experts', 'norm_topk_prob', *_ROUTER),
)
QWEN2_MOE = Family(
  name='qwen2_moe',
  model_types=('qwen2_moe',),
  rows=(
    *rows('mlp', _QWEN_EXPERT),
    Row('mlp/router/shared', 'model.layers.{}.mlp.shared_expert_gate.weight', ''),
  ),
  fields=(*qwen.QWEN2.fields, *_QWEN_FIELDS, 'shared_expert_intermediate_size', 'qkv_bias'),
  from_hf=qwen2_moe_from_hf,
  to_hf=qwen_moe_to_hf,
)
QWEN3_MOE = Family(
  name='qwen3_moe',
  model_types=('qwen3_moe',),
  rows=rows('mlp', _QWEN_EXPERT),
  fields=(*qwen.QWEN3.fields, *_QWEN_FIELDS),
  from_hf=qwen3_moe_from_hf,
  to_hf=qwen_moe_to_hf,
)
