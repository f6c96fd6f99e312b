"""Configurations: round trip, arithmetic of depth, one sentence an error."""

import json

import numpy as np
import pytest

from rrt.config import ModelConfig, Rope
from rrt.errors import InputError
from rrt.models.count import count_params
from rrt.relax.lora import Lora
from tests.models.configs import CONFIGS, llama


@pytest.mark.parametrize('name', CONFIGS)
def test_json_round_trip(name):
  config = CONFIGS[name]
  assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_depths_of_both_orders():
  np.testing.assert_array_equal(llama().block_depths(), [[1, 2], [3, 4], [5, 6]])
  np.testing.assert_array_equal(llama(order='sequence').block_depths(), [[1, 4], [2, 5], [3, 6]])


NAN = float('nan')

# Published sizes: (family fields, parameters).
_SHAPE = dict(family='llama', max_context=2048)
PUBLISHED = {
  'SmolLM2-135M': (
    dict(
      vocab_size=49152,
      d_model=576,
      d_ff=1536,
      num_heads=9,
      num_kv_heads=3,
      head_dim=64,
      block_layers=30,
      tie_embeddings=True,
    ),
    134_515_008,
  ),
  'TinyLlama-1.1B': (
    dict(
      vocab_size=32000,
      d_model=2048,
      d_ff=5632,
      num_heads=32,
      num_kv_heads=4,
      head_dim=64,
      block_layers=22,
    ),
    1_100_048_384,
  ),
  'Gemma-2B': (
    dict(
      vocab_size=256000,
      d_model=2048,
      d_ff=16384,
      num_heads=8,
      num_kv_heads=1,
      head_dim=256,
      block_layers=18,
      tie_embeddings=True,
    ),
    2_506_172_416,
  ),
  'Gemma-3-270M': (
    dict(
      vocab_size=262144,
      d_model=640,
      d_ff=2048,
      num_heads=4,
      num_kv_heads=1,
      head_dim=256,
      block_layers=18,
      tie_embeddings=True,
      qk_norm=True,
      post_norms=True,
    ),
    268_098_176,
  ),
}


# (shape, experts, parameters). Experts and learned positions are no part of a
# `ModelConfig`: they are added to our count of the rest by their own formulas.
WITH_EXPERTS = {
  'Mixtral-8x7B': (
    dict(
      vocab_size=32000,
      d_model=4096,
      d_ff=14336,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      block_layers=32,
    ),
    8,
    46_702_792_704,
  ),
  'Grok-1': (
    dict(
      vocab_size=131072,
      d_model=6144,
      d_ff=32768,
      num_heads=48,
      num_kv_heads=8,
      head_dim=128,
      block_layers=64,
      tie_embeddings=True,
      post_norms=True,
    ),
    8,
    315_684_820_992,
  ),
}


@pytest.mark.parametrize('name', WITH_EXPERTS)
def test_published_parameter_counts_with_experts(name):
  fields, experts, parameters = WITH_EXPERTS[name]
  config = ModelConfig(**_SHAPE, **fields)
  router = config.d_model * experts
  mlp = sum(a * b for k, (a, b) in config.shapes().items() if k in ('gate', 'up', 'down'))
  added = config.depth * (router + (experts - 1) * mlp)
  assert count_params(config).unique + added == parameters


def test_the_size_of_gpt_3():
  config = ModelConfig(
    **_SHAPE,
    vocab_size=50257,
    d_model=12288,
    d_ff=4 * 12288,
    num_heads=96,
    num_kv_heads=96,
    head_dim=128,
    block_layers=96,
    tie_embeddings=True,
    norm='layer',
    gated=False,
    biases=('q', 'k', 'v', 'o', 'up', 'down'),
  )
  positions = 2048 * config.d_model
  assert round((count_params(config).unique + positions) / 1e9, 1) == 174.6


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_parameter_counts(name):
  fields, parameters = PUBLISHED[name]
  assert count_params(ModelConfig(**_SHAPE, **fields)).unique == parameters


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(loops=0), r'loops=0: must be a whole number above 0'),
    (dict(head_dim=5), r'head_dim=5: must be even'),
    (dict(num_kv_heads=3), r'num_kv_heads=3: must divide num_heads=4'),
    (dict(order='ring'), r"order='ring': must be one of"),
    (dict(windows=(1, 2)), r'windows=.*one entry for each of the 8'),
    (dict(rope_index=(1,) * 8), r'rope_index=.*1 tables'),
    (dict(vocab_size=True), r'vocab_size=True: must be a whole'),
    (dict(norm_eps=-1.0), r'norm_eps=-1.0: must be'),
    (dict(norm_eps=10**400), r'norm_eps=1000.*: must be'),
    (dict(coda_layers=-1), r'coda_layers=-1: must be a whole number of 0'),
    (dict(norm_eps=NAN), r'norm_eps=nan: must be'),
    (dict(query_scale=0.0), r'query_scale=0.0: must be'),
    (dict(query_scale=NAN), r'query_scale=nan: must be'),
    (dict(tie_embeddings='x'), r"tie_embeddings='x': must be true or"),
    (dict(windows=(-1,) * 8), r'windows=.*must hold whole numbers'),
    (dict(windows=(2.5,) * 8), r'windows=.*must hold whole numbers'),
    (dict(ropes=()), r'ropes=\(\): needs one'),
    (dict(ropes=(Rope(-1.0),)), r'ropes\[0\].base=-1.0: must be'),
    (dict(ropes=(Rope(NAN),)), r'ropes\[0\].base=nan: must be'),
    (dict(ropes=(Rope(scaling='x'),)), r"ropes\[0\].scaling='x'"),
    (dict(ropes=(Rope(1.0, 'linear', 0.0),)), r'ropes\[0\].factor=0.0'),
    (
      dict(ropes=(Rope(1.0, 'llama3', 2.0, 4.0, 4.0),)),
      r'ropes\[0\].high_freq_factor=4.0: must be above',
    ),
    (dict(ropes=(Rope(original_context=0),)), r'ropes\[0\].original_context=0: must be'),
    (dict(relax=(Lora(q=1, alpha=NAN),)), r'lora.alpha=nan: must be'),
    (dict(loops=2), r'lora.up has ranks of shape \(3, 2\)'),
  ],
)
def test_a_wrong_field_is_named(changes, message):
  with pytest.raises(InputError, match=message):
    llama(**changes)


def test_layers_that_do_not_add_up_are_refused():
  with pytest.raises(InputError, match='parent has 8'):
    llama().with_recursion(prelude=2, block=2, loops=2, coda=1)
