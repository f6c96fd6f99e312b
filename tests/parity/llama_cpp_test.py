"""llama.cpp on the GGUF files that we write: the same greedy tokens.

make parity
"""

import dataclasses

import numpy as np
import pytest

import rrt
from rrt.checkpoints.save_gguf import save_gguf
from rrt.config import Rope
from tests.checkpoints import save_gguf_test
from tests.checkpoints.save_gguf_test import byte_tokenizer
from tests.convert import tiny

pytestmark = pytest.mark.parity
pytest.importorskip('xllamacpp')

END = 29  # Of `byte_tokenizer`.
SIZES = dict(d_model=64, d_ff=96, num_heads=4, num_kv_heads=2, head_dim=16)


@pytest.mark.parametrize(
  'family',
  (
    *('llama', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3', 'olmo2', 'phi3'),
    *('gpt_neox', 'smollm3', 'longrope'),
  ),
)
def test_greedy_tokens_are_ours(family, tmp_path):
  from benchmarks.llama_cpp import Server

  fields = dict(SIZES)
  if family in ('gemma', 'gemma2'):
    fields |= dict(tie_embeddings=True)
  if family == 'qwen2':
    fields |= dict(windows=())
  if family == 'gemma3':  # Its local layers have the lower rotary base.
    fields |= dict(rope_index=(1, 0) * 3, ropes=(Rope(1e6), Rope(1e4)))
  if family == 'gpt_neox':  # llama.cpp approximates the activation.
    fields |= dict(num_kv_heads=4, rotary_dim=4, activation='gelu_tanh')
  if family == 'gemma':
    fields |= dict(unit_offset_norm=True, activation='gelu_tanh', scale_embeddings=True)
  if family == 'smollm3':
    fields |= dict(ropes=(Rope(), Rope(scaling='none')), rope_index=(0, 0, 0, 1, 0, 0))
  if family == 'longrope':  # The server's context is longer than that of pretraining.
    factors = dict(short_factors=(1.0, 1.25) * 4, long_factors=(1.5, 2.5, 3.0, 4.0) * 2)
    rope = dataclasses.replace(save_gguf_test.LONGROPE, original_context=12, **factors)
    family, fields = 'phi3', fields | dict(ropes=(rope,))
  model = tiny.parent(family, layers=6, seed=3, **fields)
  model = type(model)(model.config, model.params, byte_tokenizer(), dict(model.meta))
  out = save_gguf(model, tmp_path / 'model.gguf')
  server = Server(out, 1, 128, 2, 'float32')
  rng = np.random.default_rng(0)
  compared = 0
  for _ in range(4):
    prompt = rng.integers(0, 28, 9).tolist()
    (ours,) = rrt.complete(model, [prompt], max_new_tokens=12, ignore_eos=True)
    # llama.cpp never writes the end token where it is to be ignored; ours may.
    count = ours.tokens.index(END) if END in ours.tokens else 12
    assert server.complete(prompt, 12)[:count] == list(ours.tokens[:count])
    compared += count
  assert compared >= 16
