"""GGUF files that we write: read back, the same model and the same tokens."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rrt.checkpoints.load import load
from rrt.checkpoints.save_gguf import TYPES, save_gguf
from rrt.config import Rope
from rrt.convert.recursive import to_recursive
from rrt.data.tokenizer import Tokenizer
from rrt.errors import InputError
from tests.convert import tiny

gguf = pytest.importorskip('gguf')
TOKENS_BxL = tiny.tokens(60, seed=4).reshape(2, 30)


def byte_tokenizer():
  """Byte-level BPE of a few letters, with control tokens."""
  vocab = {c: i for i, c in enumerate('abcdefghijklmnopqrstuvwxyz\u0120')}
  vocab |= {'th': 27, 'he': 28}
  core = tokenizers.Tokenizer(models.BPE(vocab, [('t', 'h'), ('h', 'e')]))
  core.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens([tokenizers.AddedToken('<end>', special=True, normalized=False)])
  return Tokenizer(core, eos_ids=[29])


FAMILIES = (
  *('llama', 'llama_biases', 'qwen2', 'qwen3', 'gemma2', 'gemma3', 'olmo2'),
  *('gpt_neox', 'longrope'),
)
LONGROPE = Rope(
  scaling='longrope',
  factor=4.0,
  original_context=32,
  attention_factor=1.1832159757614136,
  short_factors=(1.0, 1.25, 1.5),
  long_factors=(1.5, 2.5, 4.0),
)


def parent(family):
  model = tiny.parent(family, layers=6)
  return type(model)(model.config, model.params, byte_tokenizer(), dict(model.meta))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_file_is_read_back_as_the_same_model(family, tmp_path):
  fields = {}
  if family == 'gemma3':  # llama.cpp takes the scale of queries from the head size.
    fields = dict(query_scale=None)
  if family == 'gemma2':
    fields = dict(tie_embeddings=True)
  if family == 'qwen2':  # It has no windows there.
    fields = dict(windows=())
  if family == 'gpt_neox':
    fields = dict(num_kv_heads=4, head_dim=4, d_model=16, activation='gelu')
  if family == 'longrope':
    family, fields = 'phi3', dict(ropes=(LONGROPE,))
  model = tiny.parent(family, layers=6, **fields)
  model = type(model)(model.config, model.params, byte_tokenizer(), dict(model.meta))
  out = save_gguf(model, tmp_path / 'model.gguf')
  again = load(out)
  error = np.abs(tiny.logits(again, TOKENS_BxL) - tiny.logits(model, TOKENS_BxL)).max()
  assert error < 1e-4
  text = 'the hat that he met'
  assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
  assert again.tokenizer.eos_ids == (29,)


def test_a_child_is_written_untied(tmp_path):
  child, _ = to_recursive(parent('llama'), prelude=1, loops=2, coda=1, rank=2, init='average')
  again = load(save_gguf(child, tmp_path / 'child.gguf'))
  assert again.config.depth == 6 and again.config.loops == 1
  error = np.abs(tiny.logits(again, TOKENS_BxL) - tiny.logits(child, TOKENS_BxL)).max()
  assert error < 1e-4


@pytest.mark.parametrize(
  'rope',
  [
    Rope(500.0, 'llama3', 8.0, 1.0, 4.0, 8192),
    Rope(100.0, 'linear', factor=2.0),
    Rope(100.0, 'yarn', factor=4.0, original_context=32, attention_factor=1 + 0.1 * np.log(4.0)),
  ],
)
def test_scaled_rotations(rope, tmp_path):
  model = tiny.parent(layers=2, ropes=(rope,))
  model = type(model)(model.config, model.params, byte_tokenizer(), {})
  again = load(save_gguf(model, tmp_path / 'model.gguf'))
  assert again.config.ropes[0].scaling == rope.scaling
  error = np.abs(tiny.logits(again, TOKENS_BxL) - tiny.logits(model, TOKENS_BxL)).max()
  assert error < 1e-4


@pytest.mark.parametrize('kind', TYPES)
def test_matrices_have_the_type_asked_for(kind, tmp_path, capsys):
  model = tiny.parent(layers=2, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=8)
  model = type(model)(model.config, model.params, byte_tokenizer(), {})
  out = save_gguf(model, tmp_path / 'model.gguf', kind)
  found = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(out).tensors}
  assert found['blk.0.attn_q.weight'] == kind and found['blk.1.ffn_norm.weight'] == 'f32'
  error = np.abs(tiny.logits(load(out), TOKENS_BxL) - tiny.logits(model, TOKENS_BxL)).max()
  assert error < {'f32': 1e-4, 'f16': 0.02, 'bf16': 0.1, 'q8_0': 0.2, 'q4_0': 3.0}[kind]


def test_rows_that_no_block_fits(tmp_path, capsys):
  out = save_gguf(parent('llama'), tmp_path / 'model.gguf', 'q8_0')
  assert 'no multiple of 32' in capsys.readouterr().err
  assert {t.tensor_type.name for t in gguf.GGUFReader(out).tensors} == {'F16', 'F32'}


def test_what_cannot_be_written(tmp_path):
  with pytest.raises(InputError, match=r'ends in \.gguf'):
    save_gguf(parent('llama'), tmp_path / 'model')
  (tmp_path / 'mine.gguf').write_text('notes')
  with pytest.raises(InputError, match='is no GGUF file'):
    save_gguf(parent('llama'), tmp_path / 'mine.gguf')
  assert (tmp_path / 'mine.gguf').read_text() == 'notes'
  with pytest.raises(InputError, match='quantize='):
    save_gguf(parent('llama'), tmp_path / 'a.gguf', 'q3')
  with pytest.raises(InputError, match='no head of its own'):
    save_gguf(parent('gemma2'), tmp_path / 'a.gguf')
  with pytest.raises(InputError, match='every fourth layer'):
    save_gguf(tiny.parent('smollm3'), tmp_path / 'a.gguf')
  with pytest.raises(InputError, match='no dynamic scaling'):
    rope = Rope(scaling='dynamic', factor=2.0, original_context=64)
    save_gguf(tiny.parent('llama', ropes=(rope,)), tmp_path / 'a.gguf')
  assert list(tmp_path.iterdir()) == [tmp_path / 'mine.gguf']
