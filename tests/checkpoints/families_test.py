"""Families: config.json of both generations, and what is refused."""

import dataclasses
import json
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest

from rrt.checkpoints import hf, safetensors
from rrt.checkpoints.load import load
from rrt.config import Rope
from rrt.errors import InputError
from rrt.families.registry import family_of
from rrt.models.count import count_params
from rrt.pieces import Pieces
from rrt.tree import flatten

GOLDEN = Path(__file__).parents[1] / 'golden'

INF, NAN = float('inf'), float('nan')
LLAMA = {
  'model_type': 'llama',
  'vocab_size': 61,
  'hidden_size': 24,
  'intermediate_size': 38,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
}
LLAMA3_ROPE = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
LINEAR = {'rope_type': 'linear'}
MISTRAL = {'model_type': 'mistral'}
GEMMA3 = {
  'model_type': 'gemma3_text',
  'hidden_size': 640,
  'intermediate_size': 2048,
  'num_hidden_layers': 7,
  'num_attention_heads': 4,
  'num_key_value_heads': 1,
  'sliding_window': 512,
}


def test_llama_defaults():
  config = hf.config_from_hf(LLAMA)
  assert config.head_dim == 6 and config.num_kv_heads == 4
  assert config.ropes == (Rope(),) and config.windows == ()
  assert not config.tie_embeddings and config.norm_eps == 1e-6


@pytest.mark.parametrize(
  'fields',
  [
    {'rope_theta': 5e5, 'rope_scaling': LLAMA3_ROPE},
    {'rope_parameters': LLAMA3_ROPE | {'rope_theta': 5e5}},
    {
      'rope_theta': 5e5,
      'rope_scaling': LLAMA3_ROPE,
      'rope_parameters': LLAMA3_ROPE | {'rope_theta': 5e5},
    },
  ],
)
def test_llama3_rope_in_every_style(fields):
  (rope,) = hf.config_from_hf(LLAMA | fields).ropes
  assert rope == Rope(5e5, 'llama3', 8.0, 1.0, 4.0, 8192)


def test_linear_rope_of_old_files():
  fields = {'rope_scaling': {'type': 'linear', 'factor': 2.0}}
  (rope,) = hf.config_from_hf(LLAMA | fields).ropes
  assert rope == Rope(10_000.0, 'linear', 2.0)


def test_mistral_window():
  mistral = LLAMA | {'model_type': 'mistral', 'num_key_value_heads': 2}
  assert hf.config_from_hf(mistral).windows == (4096,) * 4
  assert hf.config_from_hf(mistral | {'sliding_window': None}).windows == ()
  config = hf.config_from_hf(mistral | {'sliding_window': 7})
  assert config.windows == (7,) * 4


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'sliding_window_pattern': 6},
    {'_sliding_window_pattern': 6, 'rope_theta': 1e6},
    {
      'layer_types': ['sliding_attention'] * 5 + ['full_attention', 'sliding_attention'],
      'rope_theta': 1e6,
      'rope_local_base_freq': 1e4,
    },
    {
      'rope_parameters': {
        'full_attention': {'rope_theta': 1e6, 'rope_type': 'default'},
        'sliding_attention': {'rope_theta': 1e4, 'rope_type': 'default'},
      }
    },
  ],
)
def test_gemma3_in_every_style(fields):
  config = hf.config_from_hf(GEMMA3 | fields)
  assert config.windows == (512,) * 5 + (0, 512)
  assert config.rope_index == (1,) * 5 + (0, 1)
  assert config.ropes == (Rope(1e6), Rope(1e4))
  assert config.head_dim == 256 and config.scale_q == 1 / 16
  assert config.tie_embeddings and config.unit_offset_norm


def test_gemma3_scales_global_rope_only():
  scaling = {'rope_type': 'linear', 'factor': 8.0}
  config = hf.config_from_hf(GEMMA3 | {'rope_scaling': scaling})
  assert config.ropes == (Rope(1e6, 'linear', 8.0), Rope(1e4))


def test_gemma3_multimodal_config():
  fields = {
    'model_type': 'gemma3',
    'text_config': {k: v for k, v in GEMMA3.items() if k != 'model_type'},
    'vision_config': {'hidden_size': 3},
  }
  assert hf.config_from_hf(fields) == hf.config_from_hf(GEMMA3)


MIXTRAL = dict(
  model_type='mixtral', vocab_size=32_000, hidden_size=4096, intermediate_size=14_336,
  num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=None,
  num_local_experts=8, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
QWEN2_MOE = dict(
  model_type='qwen2_moe', vocab_size=151_936, hidden_size=2048, intermediate_size=5632,
  moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_hidden_layers=24,
  num_attention_heads=16, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
)  # fmt: skip
QWEN3_MOE = dict(
  model_type='qwen3_moe', vocab_size=151_936, hidden_size=2048, intermediate_size=6144,
  moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
  head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, rope_theta=1e6,
)  # fmt: skip


@pytest.mark.parametrize(
  ('fields', 'count'),
  [(MIXTRAL, 46_702_792_704), (QWEN2_MOE, 14_315_784_192), (QWEN3_MOE, 30_532_122_624)],
  ids=['Mixtral-8x7B', 'Qwen1.5-MoE-A2.7B', 'Qwen3-30B-A3B'],
)
def test_models_with_experts_have_their_published_counts(fields, count):
  assert count_params(hf.config_from_hf(fields)).unique == count


def test_windows_of_mixtures_are_their_own():
  """Of Qwen3-MoE all layers have the window, of Qwen2-MoE those that layer_types names."""
  windowed = {'use_sliding_window': True, 'sliding_window': 7, 'num_hidden_layers': 4}
  assert hf.config_from_hf(QWEN3_MOE | windowed).windows == (7,) * 4
  with pytest.raises(InputError, match=r'use_sliding_window=True is not supported.*layer_types'):
    hf.config_from_hf(QWEN2_MOE | windowed)
  kinds = ['sliding_attention', 'full_attention'] * 2
  alternating = hf.config_from_hf(QWEN2_MOE | windowed | {'layer_types': kinds})
  assert alternating.windows == (7, 0, 7, 0)
  for config in (alternating, hf.config_from_hf(QWEN3_MOE | windowed)):
    assert hf.config_from_hf(family_of(config).to_hf(config)) == config
  assert hf.config_from_hf(MIXTRAL | {'sliding_window': 9}).windows == (9,) * 32


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    (MIXTRAL | {'num_experts_per_tok': 9}, 'num_experts_per_tok=9 must be no more than.*=8'),
    (MIXTRAL | {'num_local_experts': 1}, 'num_local_experts=1 must be a whole number, 2'),
    (QWEN3_MOE | {'mlp_only_layers': [3]}, r'mlp_only_layers=\[3\] is not supported.*no experts'),
    (QWEN2_MOE | {'shared_expert_intermediate_size': 5000}, '=5000 must be a multiple of.*=1408'),
    (QWEN3_MOE | {'decoder_sparse_step': 2}, 'decoder_sparse_step=2 is not supported'),
  ],
)
def test_a_mixture_that_cannot_be_is_refused(fields, says):
  with pytest.raises(InputError, match=says):
    hf.config_from_hf(fields)


@pytest.mark.parametrize('name', ['mixtral', 'qwen3_moe'])
def test_experts_and_a_router_of_other_shapes_are_refused(name, tmp_path):
  source = GOLDEN / name
  fields = json.loads((source / 'config.json').read_text())
  shutil.copy(source / 'model.safetensors', tmp_path)
  fewer = json.dumps(fields | {'num_local_experts': fields['num_local_experts'] - 1})
  (tmp_path / 'config.json').write_text(fewer)
  with pytest.raises(InputError, match=r'unexpected .*experts.*of a wrong shape .*gate.weight'):
    load(tmp_path)


def test_experts_are_read_lazily():
  whole, lazy = load(GOLDEN / 'mixtral'), load(GOLDEN / 'mixtral', lazy=True)
  kernels = lazy.params['block']['layers']['mlp']['gate']['kernels']
  assert isinstance(kernels, Pieces) and kernels.shape == (4, 5, 20, 14)
  for path, leaf in flatten(whole.params).items():
    np.testing.assert_array_equal(np.asarray(flatten(lazy.params)[path]), leaf)


@pytest.mark.parametrize(
  'fields, says',
  [
    ({'model_type': 'deepseek_v3'}, "model_type='deepseek_v3'.*llama, mistral"),
    ({'model_type': None}, 'model_type=None'),
    ({'attention_bias': 1}, 'attention_bias=1 must be'),
    (MISTRAL | {'attention_bias': True}, 'attention_bias=True'),
    ({'hidden_act': 'relu'}, "hidden_act='relu'"),
    ({'num_local_experts': 8}, 'num_local_experts=8'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config.*dequantize'),
    ({'rope_scaling': {'rope_type': 'mrope'}}, "rope_type='mrope'"),
    ({'rope_scaling': {'rope_type': 'su'}}, 'lacks original_max_position_embeddings'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 0}}, 'factor=0 must be'),
    ({'model_type': 'smollm3', 'no_rope_layers': [1, 2, 1, 1]}, 'no_rope_layers='),
    ({'model_type': 'qwen2', 'use_mrope': True}, 'use_mrope=True'),
    ({'rope_scaling': {'rope_type': 'linear'}}, 'lacks factor'),
    ({'hidden_size': None}, 'lacks hidden_size'),
    ({'hidden_size': '24'}, "hidden_size='24' must be"),
    ({'num_attention_heads': 0}, 'num_attention_heads=0 must be'),
    ({'num_hidden_layers': True}, 'num_hidden_layers=True must be'),
    ({'rms_norm_eps': -1}, 'rms_norm_eps=-1 must be'),
    ({'rms_norm_eps': NAN}, 'rms_norm_eps=nan must be'),
    ({'rope_theta': -1}, 'rope_theta=-1 must be'),
    ({'rope_theta': NAN}, 'rope_theta=nan must be'),
    ({'rope_scaling': 'x'}, "rope_scaling='x' must be"),
    ({'rope_scaling': LINEAR | {'factor': 0}}, 'factor=0 must be'),
    ({'rope_scaling': LINEAR | {'factor': -1}}, 'factor=-1 must be'),
    ({'rope_scaling': LINEAR | {'factor': NAN}}, 'factor=nan must be'),
    (
      {'rope_scaling': LLAMA3_ROPE | {'original_max_position_embeddings': INF}},
      'original_max_position_embeddings=inf must be',
    ),
    ({'tie_word_embeddings': 'x'}, "tie_word_embeddings='x' must be"),
    ({'text_config': 3}, 'text_config=3 must be an object'),
    (MISTRAL | {'sliding_window': -1}, 'sliding_window=-1 must be'),
    (MISTRAL | {'sliding_window': 2.5}, 'sliding_window=2.5 must be'),
    (MISTRAL | {'sliding_window': 'x'}, "sliding_window='x' must be"),
    (GEMMA3 | {'sliding_window': -1}, 'sliding_window=-1 must be'),
    (GEMMA3 | {'sliding_window_pattern': -1}, 'window_pattern=-1 must be'),
    (GEMMA3 | {'layer_types': 5}, 'layer_types=5 must be a list'),
    (GEMMA3 | {'query_pre_attn_scalar': -1}, 'attn_scalar=-1 must be'),
    (GEMMA3 | {'query_pre_attn_scalar': NAN}, 'attn_scalar=nan must be'),
    (GEMMA3 | {'query_pre_attn_scalar': 0}, 'attn_scalar=0 must be'),
    ({'num_key_value_heads': 3}, 'num_kv_heads=3'),
    (GEMMA3 | {'final_logit_softcapping': -30.0}, 'final_logit_softcapping=-30.0'),
    ({'model_type': 'gemma2', 'attn_logit_softcapping': 0}, 'attn_logit_softcapping=0'),
    (GEMMA3 | {'layer_types': ['full_attention']}, 'layer_types has 1'),
    (GEMMA3 | {'layer_types': ['chunked'] * 7}, 'chunked'),
    (GEMMA3 | {'sliding_window': None}, 'sliding_window'),
    (GEMMA3 | {'use_bidirectional_attention': True}, 'bidirectional'),
  ],
)
def test_unsupported_configs_name_the_field(fields, says):
  with pytest.raises(InputError, match=says) as error:
    hf.config_from_hf(LLAMA | fields)
  assert '\n' not in str(error.value)


def test_biases_and_windows_of_qwen():
  qwen2 = hf.config_from_hf(LLAMA | {'model_type': 'qwen2', 'num_key_value_heads': 2})
  assert qwen2.biases == ('q', 'k', 'v') and qwen2.windows == () and not qwen2.qk_norm
  some = {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 3}
  some |= {'model_type': 'qwen2', 'num_key_value_heads': 2}
  assert hf.config_from_hf(LLAMA | some).windows == (0, 0, 0, 8)
  qwen3 = hf.config_from_hf(LLAMA | {'model_type': 'qwen3', 'num_key_value_heads': 2})
  assert qwen3.qk_norm and qwen3.biases == () and qwen3.head_dim == 128


def test_caps_of_gemma2_are_its_own_unless_null():
  fields = {k: v for k, v in LLAMA.items() if k != 'num_attention_heads'} | {'model_type': 'gemma2'}
  config = hf.config_from_hf(fields)
  assert (config.attn_softcap, config.final_softcap) == (50.0, 30.0)
  assert config.windows == (4096, 0, 4096, 0) and config.post_norms
  config = hf.config_from_hf(fields | {'attn_logit_softcapping': None})
  assert config.attn_softcap is None


# name -> (fields, parameters as published).
PUBLISHED = {
  'qwen2.5-0.5b': (
    dict(
      model_type='qwen2',
      vocab_size=151936,
      hidden_size=896,
      intermediate_size=4864,
      num_hidden_layers=24,
      num_attention_heads=14,
      num_key_value_heads=2,
      tie_word_embeddings=True,
    ),
    494_032_768,
  ),
  'qwen2.5-1.5b': (
    dict(
      model_type='qwen2',
      vocab_size=151936,
      hidden_size=1536,
      intermediate_size=8960,
      num_hidden_layers=28,
      num_attention_heads=12,
      num_key_value_heads=2,
      tie_word_embeddings=True,
    ),
    1_543_714_304,
  ),
  'qwen3-0.6b': (
    dict(
      model_type='qwen3',
      vocab_size=151936,
      hidden_size=1024,
      intermediate_size=3072,
      num_hidden_layers=28,
      num_attention_heads=16,
      num_key_value_heads=8,
      head_dim=128,
      tie_word_embeddings=True,
    ),
    596_049_920,
  ),
  'qwen3-1.7b': (
    dict(
      model_type='qwen3',
      vocab_size=151936,
      hidden_size=2048,
      intermediate_size=6144,
      num_hidden_layers=28,
      num_attention_heads=16,
      num_key_value_heads=8,
      head_dim=128,
      tie_word_embeddings=True,
    ),
    1_720_574_976,
  ),
  'gemma-2-2b': (dict(model_type='gemma2'), 2_614_341_888),
  'gemma-2-9b': (
    dict(
      model_type='gemma2',
      hidden_size=3584,
      intermediate_size=14336,
      num_hidden_layers=42,
      num_attention_heads=16,
      num_key_value_heads=8,
    ),
    9_241_705_984,
  ),
  'gemma-2b': (
    dict(
      model_type='gemma',
      hidden_size=2048,
      intermediate_size=16384,
      num_hidden_layers=18,
      num_attention_heads=8,
      num_key_value_heads=1,
    ),
    2_506_172_416,
  ),
  'gemma-3-270m': (GEMMA3 | dict(num_hidden_layers=18, vocab_size=262144), 268_098_176),
  'gemma-3-1b': (
    dict(
      model_type='gemma3_text',
      vocab_size=262144,
      hidden_size=1152,
      intermediate_size=6912,
      num_attention_heads=4,
      num_key_value_heads=1,
    ),
    999_885_952,
  ),
  'llama-2-7b': (
    dict(
      model_type='llama',
      vocab_size=32000,
      hidden_size=4096,
      intermediate_size=11008,
      num_hidden_layers=32,
      num_attention_heads=32,
    ),
    6_738_415_616,
  ),
  'llama-3.1-8b': (
    dict(
      model_type='llama',
      vocab_size=128256,
      hidden_size=4096,
      intermediate_size=14336,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
    ),
    8_030_261_248,
  ),
  'llama-3.2-1b': (
    dict(
      model_type='llama',
      vocab_size=128256,
      hidden_size=2048,
      intermediate_size=8192,
      num_hidden_layers=16,
      num_attention_heads=32,
      num_key_value_heads=8,
      tie_word_embeddings=True,
    ),
    1_235_814_400,
  ),
  'tinyllama-1.1b': (
    dict(
      model_type='llama',
      vocab_size=32000,
      hidden_size=2048,
      intermediate_size=5632,
      num_hidden_layers=22,
      num_attention_heads=32,
      num_key_value_heads=4,
    ),
    1_100_048_384,
  ),
  'llama-3.2-3b': (
    dict(
      model_type='llama',
      vocab_size=128256,
      hidden_size=3072,
      intermediate_size=8192,
      num_hidden_layers=28,
      num_attention_heads=24,
      num_key_value_heads=8,
      head_dim=128,
      tie_word_embeddings=True,
    ),
    3_212_749_824,
  ),
  'gemma-7b': (
    dict(
      model_type='gemma',
      hidden_size=3072,
      intermediate_size=24576,
      num_hidden_layers=28,
      num_attention_heads=16,
      num_key_value_heads=16,
    ),
    8_537_680_896,
  ),
  'smollm2-360m': (
    dict(
      model_type='llama',
      vocab_size=49152,
      hidden_size=960,
      intermediate_size=2560,
      num_hidden_layers=32,
      num_attention_heads=15,
      num_key_value_heads=5,
      tie_word_embeddings=True,
    ),
    361_821_120,
  ),
  'smollm2-1.7b': (
    dict(
      model_type='llama',
      vocab_size=49152,
      hidden_size=2048,
      intermediate_size=8192,
      num_hidden_layers=24,
      num_attention_heads=32,
      tie_word_embeddings=True,
    ),
    1_711_376_384,
  ),
  'mistral-7b': (
    dict(
      model_type='mistral',
      vocab_size=32000,
      hidden_size=4096,
      intermediate_size=14336,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
    ),
    7_241_732_096,
  ),
}


PUBLISHED |= {
  f'pythia-{name}': (
    dict(
      model_type='gpt_neox',
      vocab_size=50304,
      hidden_size=width,
      intermediate_size=4 * width,
      num_hidden_layers=layers,
      num_attention_heads=heads,
    ),
    count,
  )
  for name, layers, width, heads, count in (
    ('70m', 6, 512, 8, 70_426_624),
    ('160m', 12, 768, 12, 162_322_944),
    ('410m', 24, 1024, 16, 405_334_016),
    ('1b', 16, 2048, 8, 1_011_781_632),
    ('1.4b', 24, 2048, 16, 1_414_647_808),
  )
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_of_published_models(name):
  fields, published = PUBLISHED[name]
  assert count_params(hf.config_from_hf(fields)).unique == published


def test_config_twin_round_trips():
  for name in ('llama3', 'mistral', 'gemma', 'gemma3'):
    config = load(GOLDEN / name).config
    fields = family_of(config).to_hf(config)
    assert hf.config_from_hf(fields) == config
    del fields['rope_parameters']  # What transformers 4 reads.
    assert hf.config_from_hf(fields) == config


def test_gemma3_exports_what_its_layers_have():
  config = hf.config_from_hf(GEMMA3)
  to_hf = family_of(config).to_hf
  swapped = dataclasses.replace(
    config, ropes=config.ropes[::-1], rope_index=tuple(1 - i for i in config.rope_index)
  )
  assert to_hf(swapped) == to_hf(config)
  for changes, says in (
    (dict(rope_index=(1, 0) * 3 + (1,)), 'with a window have 2'),
    (dict(rope_index=(1,) * 3 + (0,) * 4), 'with a window have 2'),
    (dict(windows=(3, 5, 3, 5, 3, 0, 5)), 'windows: layers have 2'),
  ):
    with pytest.raises(InputError, match=says):
      to_hf(dataclasses.replace(config, **changes))


def test_layer_types_of_mistral():
  kinds = ['sliding_attention', 'full_attention'] * 2
  mistral = LLAMA | MISTRAL | {'num_key_value_heads': None}
  config = hf.config_from_hf(mistral | {'sliding_window': 5, 'layer_types': kinds})
  assert config.windows == (5, 0, 5, 0)
  fields = family_of(config).to_hf(config)
  assert fields['model_type'] == 'ministral' and fields['layer_types'] == kinds
  assert hf.config_from_hf(fields) == config
  full = hf.config_from_hf(mistral | {'layer_types': ['full_attention'] * 4})
  assert full.windows == ()
  with pytest.raises(InputError, match='2 different sizes'):
    family_of(config).to_hf(dataclasses.replace(config, windows=(5, 0, 7, 0)))


@pytest.mark.parametrize(
  'fields, says',
  [
    ({'embedding_multiplier': 12.0}, "embedding_multiplier='12.0': not known"),
    ({'use_qk_norm': True, 'logits_scaling': 8}, "use_qk_norm='True', logits_scaling='8'"),
    ({'sliding_window': 5}, 'sliding_window=5 is not supported'),
    (MISTRAL | {'layer_types': ['chunked_attention'] * 4}, 'chunked_attention'),
    (MISTRAL | {'layer_types': ['full_attention']}, 'layer_types has 1'),
    ({'rope_interleaved': True}, 'rope_interleaved=True'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'rope_parameters': {'mrope_section': [1]}}, 'rotary parameter mrope_section'),
    ({'auto_map': {'AutoModelForCausalLM': 'm.Model'}}, 'auto_map has AutoModelForCausalLM'),
    (GEMMA3 | {'altup_num_inputs': 4}, 'altup_num_inputs'),
  ],
)
def test_fields_that_may_change_the_function_are_refused(fields, says):
  with pytest.raises(InputError, match=says) as error:
    hf.config_from_hf(LLAMA | fields)
  assert '\n' not in str(error.value)


def test_fields_that_are_null_or_do_not_matter_are_not():
  fields = {'embedding_multiplier': None, 'use_cache': True, 'temperature': 1.0}
  fields |= {'auto_map': {'AutoConfig': 'c.Config'}, 'id2label': {'0': 'a'}}
  assert hf.config_from_hf(LLAMA | fields) == hf.config_from_hf(LLAMA)


# ---- tensors ---------------------------------------------------------------


def tensors_of(name):
  file = safetensors.SafetensorsFile(GOLDEN / name / 'model.safetensors')
  return {n: np.concatenate([r for _, r in file.chunks(n)]) for n in file.infos}


def write(directory, name, tensors, **fields):
  directory.mkdir(exist_ok=True)
  config = json.loads((GOLDEN / name / 'config.json').read_text()) | fields
  (directory / 'config.json').write_text(json.dumps(config))
  safetensors.write(directory / 'model.safetensors', tensors)
  return directory


def test_all_faults_of_a_checkpoint_come_together(tmp_path):
  tensors = tensors_of('llama3')
  del tensors['model.layers.2.mlp.up_proj.weight']
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(24, np.float32)
  tensors['model.norm.weight'] = np.zeros(23, np.float32)
  with pytest.raises(InputError) as error:
    load(write(tmp_path / 'm', 'llama3', tensors))
  text = str(error.value)
  assert '1 missing (model.layers.2.mlp.up_proj.weight)' in text
  assert '1 unexpected (model.layers.0.self_attn.q_proj.bias)' in text
  assert 'model.norm.weight [23] instead of [24]' in text
  assert '\n' not in text


def test_values_that_are_not_finite(tmp_path):
  tensors = tensors_of('gemma3')
  spoilt = {'model.norm.weight': np.nan, 'model.layers.1.mlp.down_proj.weight': np.inf}
  for name, value in spoilt.items():
    tensors[name] = tensors[name].copy()
    tensors[name][3] = value
  with pytest.raises(InputError, match='2 with NaN or Inf') as error:
    load(write(tmp_path / 'm', 'gemma3', tensors))
  assert 'model.norm.weight' in str(error.value)


def test_integer_tensors_are_refused(tmp_path):
  directory = write(tmp_path / 'm', 'gemma', tensors_of('gemma'))
  path = directory / 'model.safetensors'
  data = path.read_bytes()
  path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
  with pytest.raises(InputError, match=r'unsupported dtype.* I32'):
    load(directory)


def test_wrong_config_for_the_weights(tmp_path):
  tensors = tensors_of('llama3')
  with pytest.raises(InputError, match='shape'):
    load(write(tmp_path / 'a', 'llama3', tensors, vocab_size=60))
  with pytest.raises(InputError, match='9 missing'):
    load(write(tmp_path / 'b', 'llama3', tensors, num_hidden_layers=5))
  with pytest.raises(InputError, match=r'9 unexpected .*layers.3'):
    load(write(tmp_path / 'c', 'llama3', tensors, num_hidden_layers=3))


def test_other_names_for_the_same_tensors(tmp_path):
  plain = load(GOLDEN / 'gemma3').params
  tensors = tensors_of('gemma3')
  vision = {'vision_tower.patch.weight': np.zeros((2, 2), np.float32)}
  for i, prefix in enumerate(('language_model.model.', 'model.language_model.', '')):
    renamed = {n.replace('model.', prefix, 1): t for n, t in tensors.items()}
    config = json.loads((GOLDEN / 'gemma3' / 'config.json').read_text())
    extra = {'text_config': config} if prefix else {}
    directory = write(tmp_path / str(i), 'gemma3', renamed | (vision if prefix else {}), **extra)
    params = load(directory).params
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_head_of_a_tied_checkpoint_is_ignored(tmp_path):
  tensors = tensors_of('mistral')
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  model = load(write(tmp_path / 'm', 'mistral', tensors))
  assert 'head' not in model.params


def test_missing_shard_and_pickles(tmp_path):
  directory = write(tmp_path / 'm', 'gemma', tensors_of('gemma'))
  index = {'weight_map': {'a': 'model-1.safetensors'}}
  path = directory / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  with pytest.raises(InputError, match='lacks 1 of the 1 files'):
    load(directory)
  for value in (3, None):
    path.write_text(json.dumps({'weight_map': {'b': 'model-1', 'a': value}}))
    with pytest.raises(InputError, match=f"weight_map has {value} for 'a'"):
      load(directory)
  weight_map = {name: f'model-{name}.safetensors' for name in 'abc'}
  path.write_text(json.dumps({'weight_map': weight_map}))
  for name in 'ab':
    (directory / f'model-{name}.safetensors').write_bytes(b'x')
  with pytest.raises(InputError, match=r'lacks 1 of the 3 .*-a.* not.*-b.* not'):
    load(directory)
  path.unlink()
  for name in 'ab':
    (directory / f'model-{name}.safetensors').unlink()
  shutil.move(directory / 'model.safetensors', directory / 'model.bin')
  with pytest.raises(InputError, match=r'model.bin is a pickle'):
    load(directory)


def head_and_embedding(name='gemma'):
  tensors = tensors_of(name)
  return tensors, tensors['model.embed_tokens.weight']


def test_a_tied_matrix_under_the_name_of_the_head(tmp_path):
  """As safetensors' `save_model` writes a tied model."""
  tensors, table = head_and_embedding()
  plain = load(GOLDEN / 'gemma')
  del tensors['model.embed_tokens.weight']
  found = load(write(tmp_path / 'm', 'gemma', tensors | {'lm_head.weight': table}))
  assert found.config == plain.config
  jax.tree.map(np.testing.assert_array_equal, found.params, plain.params)
  with pytest.raises(InputError, match=r'1 missing \(model\.embed_tokens'):
    load(write(tmp_path / 'none', 'gemma', tensors))


def test_a_head_that_differs_unties_the_model(tmp_path, capsys):
  tensors, table = head_and_embedding()
  plain = load(GOLDEN / 'gemma')
  same = load(write(tmp_path / 'same', 'gemma', tensors | {'lm_head.weight': table.copy()}))
  assert same.config.tie_embeddings and 'head' not in same.params
  other = table.copy()
  other[-1, -1] += 1
  untied = load(write(tmp_path / 'other', 'gemma', tensors | {'lm_head.weight': other}))
  assert untied.config == dataclasses.replace(plain.config, tie_embeddings=False)
  np.testing.assert_array_equal(untied.params['head']['kernel'], other.T)
  np.testing.assert_array_equal(untied.params['embed']['table'], table)
  assert 'loaded without tie_word_embeddings' in capsys.readouterr().err


def test_token_ids_of_wrong_types_or_outside_the_vocabulary(tmp_path):
  tensors = tensors_of('gemma')
  for i, (value, says) in enumerate((('x', 'must be a token id'), ([99999], 'outside'))):
    with pytest.raises(InputError, match=says):
      load(write(tmp_path / str(i), 'gemma', tensors, eos_token_id=value))
  assert load(write(tmp_path / 'pad', 'gemma', tensors, pad_token_id=-1)).tokenizer is None
