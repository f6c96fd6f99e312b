"""Reads and validates fields of a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Iterable
import math
from typing import Any

from rrt.config import Rope
from rrt.config_checks import is_number, is_whole
from rrt.errors import InputError

LOCAL, GLOBAL = 'sliding_attention', 'full_attention'

# Fields that all families read or refuse.
COMMON = (
  'model_type',
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'max_position_embeddings',
  'rms_norm_eps',
  'tie_word_embeddings',
  'rope_theta',
  'rope_scaling',
  'rope_parameters',
  'attention_bias',
  'quantization_config',
)

# Fields that do not change what a trained model computes: of other software, of
# training, of generation, and of heads that are not read.
HARMLESS = frozenset(
  """
  architectures transformers_version transformers.js_config _name_or_path name_or_path
  exported_by torch_dtype dtype use_cache cache_implementation is_llama_config
  unsloth_version unsloth_fixed model_name revision license
  bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id
  mask_token_id decoder_start_token_id tokenizer_class prefix
  initializer_range initializer_factor attention_dropout attn_pdrop embd_pdrop resid_pdrop
  hidden_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
  neftune_noise_alpha gradient_checkpointing use_bfloat16 torchscript tf_legacy_loss
  pretraining_tp tensor_parallel_size chunk_size_feed_forward max_sequence_length
  attn_implementation _attn_implementation _attn_implementation_autoset
  _attn_implementation_internal _flash_attn_2_enabled use_flash_attention_2 flash_attention
  output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
  id2label label2id num_labels problem_type finetuning_task task_specific_params
  is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
  tie_encoder_decoder pruned_heads summary_type summary_use_proj summary_activation
  summary_proj_to_labels summary_first_dropout max_length min_length do_sample
  early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
  typical_p repetition_penalty length_penalty no_repeat_ngram_size
  encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
  forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
  suppress_tokens begin_suppress_tokens
  """.split()
)
_ROPE_FIELDS = (
  'rope_type',
  'type',
  'rope_theta',
  'factor',
  'low_freq_factor',
  'high_freq_factor',
  'original_max_position_embeddings',
  'partial_rotary_factor',
  'beta_fast',
  'beta_slow',
  'attention_factor',
  'mscale',
  'mscale_all_dim',
  'truncate',
  'short_factor',
  'long_factor',
)


def refuse_unknown(fields: dict[str, Any], known: Iterable[str], where: str = '') -> None:
  """Raises InputError for fields that are neither known, nor harmless, nor null."""
  known = {*known}
  odd = [n for n, v in fields.items() if v is not None and n not in known and n not in HARMLESS]
  if odd:
    named = ', '.join(f'{n}={str(fields[n])[:40]!r}' for n in odd[:4])
    more = f' and {len(odd) - 4} more' if len(odd) > 4 else ''
    raise InputError(
      f'config.json: {where}{named}{more}: not known to this version for '
      f'{"this model" if where else fields.get("model_type")}, and may change what the model '
      'computes; remove what does not.'
    )


def layer_types(fields: dict[str, Any]) -> list[str] | None:
  """LOCAL or GLOBAL for every layer; None if the field is absent."""
  kinds = fields.get('layer_types')
  if kinds is None:
    return None
  layers = whole(fields, 'num_hidden_layers')
  if not isinstance(kinds, list):
    raise InputError(f'config.json: layer_types={kinds!r} must be a list.')
  if len(kinds) != layers:
    raise InputError(
      f'config.json: layer_types has {len(kinds)} entries for '
      f'num_hidden_layers={layers}; give one a layer.'
    )
  for kind in kinds:
    if kind not in (LOCAL, GLOBAL):
      raise InputError(
        f'config.json: layer_types has {kind!r}, which is not supported, only {LOCAL} and {GLOBAL}.'
      )
  return kinds


def windows(fields: dict[str, Any], kinds: list[str], window: int) -> tuple[int, ...]:
  """The window of every layer, 0 for global ones."""
  if LOCAL in kinds and not window:
    raise InputError(
      f'config.json: sliding_window={fields.get("sliding_window")!r} with layers of type '
      f'{LOCAL}; give the window in tokens.'
    )
  return tuple(window if kind == LOCAL else 0 for kind in kinds)


def refuse(fields: dict[str, Any], name: str, *allowed: Any, remedy: str = '') -> None:
  """Raises InputError unless a field is absent, null or an allowed value."""
  value = fields.get(name)
  if value is None or value in allowed:
    return
  can = ' or '.join(repr(v) for v in allowed if v is not None) or 'no value'
  raise InputError(
    f'config.json: {name}={value!r} is not supported, only {can}{"; " + remedy if remedy else ""}.'
  )


def require(fields: dict[str, Any], name: str) -> Any:
  """A required field."""
  if fields.get(name) is None:
    raise InputError(f'config.json lacks {name}; add it.')
  return fields[name]


def whole(fields: dict[str, Any], name: str, default: int | None = None, *, least: int = 1) -> int:
  """An integer field.

  Args:
    fields: of config.json.
    name: of the field.
    default: used if it is absent or null; None if the field is required.
    least: the smallest valid value.

  Raises:
    InputError: names the field and its value.
  """
  if fields.get(name) is None and default is not None:
    return default
  value = require(fields, name)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if not is_whole(value, least):
    raise InputError(f'config.json: {name}={value!r} must be a whole number, {least} or more.')
  return value


def number(
  fields: dict[str, Any], name: str, default: float | None = None, *, least: float | None = None
) -> float:
  """A finite number, above 0 or at least `least`; otherwise as `whole`."""
  if fields.get(name) is None and default is not None:
    return default
  value = require(fields, name)
  if not is_number(value, least):
    need = 'above 0' if least is None else f'{least:g} or more'
    raise InputError(f'config.json: {name}={value!r} must be a finite number, {need}.')
  return float(value)


def flag(fields: dict[str, Any], name: str, default: bool) -> bool:
  """A boolean field; null is false."""
  value = fields.get(name, default)
  if not isinstance(value, bool | None):
    raise InputError(f'config.json: {name}={value!r} must be true or false.')
  return bool(value)


def table(fields: dict[str, Any], name: str) -> dict[str, Any]:
  """An object field; {} if it is absent or null."""
  value = fields.get(name)
  if not isinstance(value, dict | None):
    raise InputError(f'config.json: {name}={value!r} must be an object.')
  return value or {}


def rope_from_hf(parameters: dict[str, Any] | None, base: float, max_context: int) -> Rope:
  """One rotary table from a `rope_parameters` or `rope_scaling` dict.

  Args:
    parameters: the dict; None is no scaling.
    base: theta, if the dict has none.
    max_context: the model's; the original one, if the dict has none.

  Raises:
    InputError: the kind of scaling is not supported, or a value is invalid.
  """
  p = parameters or {}
  refuse_unknown(p, _ROPE_FIELDS, 'rotary parameter ')
  base = number(p, 'rope_theta', base)
  refuse(p, 'partial_rotary_factor', 1, 1.0)
  kind = p.get('rope_type', p.get('type', 'default')) or 'default'
  if kind == 'default':
    return Rope(base=base)
  if kind == 'linear':
    return Rope(base=base, scaling='linear', factor=number(p, 'factor'))
  if kind == 'llama3':
    return Rope(
      base=base,
      scaling='llama3',
      factor=number(p, 'factor'),
      low_freq_factor=number(p, 'low_freq_factor'),
      high_freq_factor=number(p, 'high_freq_factor'),
      original_context=whole(p, 'original_max_position_embeddings', max_context),
    )
  if kind == 'yarn':
    return _yarn_from_hf(p, base, max_context)
  if kind == 'dynamic':
    return Rope(base=base, scaling=kind, factor=number(p, 'factor'), original_context=max_context)
  if kind in ('longrope', 'su'):
    return _longrope_from_hf(p, base, max_context)
  raise InputError(
    f'config.json: rope_type={kind!r} is not supported, only default, linear, llama3, yarn, '
    'dynamic and longrope.'
  )


def _longrope_from_hf(p: dict[str, Any], base: float, max_context: int) -> Rope:
  """A LongRoPE table; its attention factor from `factor`."""
  original = whole(p, 'original_max_position_embeddings')
  factor = number(p, 'factor', max_context / original)
  attention = 1.0
  if factor > 1:
    attention = math.sqrt(1 + math.log(factor) / math.log(original))
  lists = [require(p, name) for name in ('short_factor', 'long_factor')]
  for name, value in zip(('short_factor', 'long_factor'), lists, strict=True):
    if not isinstance(value, list) or not all(map(is_number, value)):
      raise InputError(f'config.json: {name} must be a list of numbers above 0.')
  short, long = (tuple(map(float, value)) for value in lists)
  return Rope(
    base=base,
    scaling='longrope',
    factor=factor,
    original_context=original,
    attention_factor=number(p, 'attention_factor', attention),
    short_factors=short,
    long_factors=long,
  )


def _yarn_from_hf(p: dict[str, Any], base: float, max_context: int) -> Rope:
  """A YaRN table; its attention factor from `factor` or DeepSeek's mscales."""
  original = whole(p, 'original_max_position_embeddings', max_context)
  factor = number(p, 'factor', max_context / original)
  scale = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
  attention = scale(1.0)
  if p.get('mscale') and p.get('mscale_all_dim'):
    attention = scale(number(p, 'mscale')) / scale(number(p, 'mscale_all_dim'))
  return Rope(
    base=base,
    scaling='yarn',
    factor=factor,
    original_context=original,
    beta_fast=number(p, 'beta_fast', 32.0),
    beta_slow=number(p, 'beta_slow', 1.0),
    attention_factor=number(p, 'attention_factor', attention),
    truncate=flag(p, 'truncate', True),
  )


def rope_to_hf(rope: Rope) -> dict[str, Any] | None:
  """A `rope_scaling` dict; None for no scaling."""
  if rope.scaling in ('', 'none'):
    return None
  fields = {'rope_type': rope.scaling, 'factor': rope.factor}
  if rope.scaling == 'llama3':
    fields |= {
      'low_freq_factor': rope.low_freq_factor,
      'high_freq_factor': rope.high_freq_factor,
      'original_max_position_embeddings': rope.original_context,
    }
  if rope.scaling == 'longrope':
    fields |= {
      'original_max_position_embeddings': rope.original_context,
      'attention_factor': rope.attention_factor,
      'short_factor': list(rope.short_factors),
      'long_factor': list(rope.long_factors),
    }
  if rope.scaling == 'yarn':
    fields |= {
      'original_max_position_embeddings': rope.original_context,
      'beta_fast': rope.beta_fast,
      'beta_slow': rope.beta_slow,
      'attention_factor': rope.attention_factor,
      'truncate': rope.truncate,
    }
  return fields
