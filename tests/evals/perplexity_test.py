"""Cross-entropy against a naive computation; bytes; what is refused."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rrt.data.tokenizer import Tokenizer
from rrt.errors import InputError
from rrt.evals import perplexity
from rrt.models import lm_head, transformer
from tests import runs

TEXT = 'The sea is wide, naïve 日本 and the ship sails on to a far shore. ' * 3


@functools.cache
def model():
  return runs.model(dataclasses.replace(runs.CHILD, max_context=64), 3)


@functools.partial(jax.jit, static_argnames=('loops',))
def log_probs(tokens_BxL, loops):
  params = model().params
  out = transformer.forward(model().config, params, tokens_BxL, loops=loops)
  logits = lm_head.logits(model().config, params, out.hidden_BxLxD)
  return jax.nn.log_softmax(logits, -1)


def naive(tokens, context, loops=None):
  """Sum and count of losses, a row at a time, all logits at once."""
  total, count = 0.0, 0
  for i in range(0, len(tokens), context):
    row = np.array([tokens[i : i + context]])
    logp = log_probs(row, loops)[0, :-1]
    nll = -jnp.take_along_axis(logp, row[0, 1:, None], -1)
    total, count = total + float(nll.sum()), count + row.size - 1
  return total, count


def test_equals_a_naive_computation():
  tokens = model().tokenizer.encode(TEXT)
  total, count = naive(tokens, 50)
  got = perplexity.score(model(), TEXT, context=50, batch=3)
  assert got.tokens == count
  np.testing.assert_allclose(got.nll_nats, total / count, rtol=1e-5)
  np.testing.assert_allclose(got.perplexity, math.exp(total / count), rtol=1e-4)


def test_neither_batch_nor_head_chunk_matters(monkeypatch):
  want = perplexity.score(model(), TEXT, context=50, batch=1).nll_nats
  monkeypatch.setattr(perplexity, 'HEAD_CHUNK', 7)
  got = perplexity.score(model(), TEXT, context=50, batch=4).nll_nats
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_every_loop_count():
  tokens = model().tokenizer.encode(TEXT)[:60]
  for loops in (1, 2):
    total, count = naive(tokens, 30, loops)
    got = perplexity.score(model(), tokens, context=30, loops=loops)
    assert got.loops == loops
    np.testing.assert_allclose(got.nll_nats, total / count, rtol=1e-5)


def test_bits_per_byte_counts_the_bytes_of_scored_tokens():
  got = perplexity.score(model(), TEXT, context=50)
  # One token a byte, and the first of each row is not scored.
  size = len(TEXT.encode())
  assert got.bytes == got.tokens == size - -(-size // 50)
  np.testing.assert_allclose(got.bits_per_byte, got.nll_nats / math.log(2))


def test_byte_lengths_add_up_to_the_text():
  tokenizer = model().tokenizer
  lengths = perplexity.byte_lengths(tokenizer, tokenizer.encode(TEXT))
  assert lengths.sum() == len(TEXT.encode())


def test_max_tokens_takes_the_beginning():
  tokens = model().tokenizer.encode(TEXT)
  want = perplexity.score(model(), tokens[:70], context=32)
  assert perplexity.score(model(), TEXT, context=32, max_tokens=70) == want
  assert want.tokens == 31 + 31 + 5


def test_a_last_row_of_one_token_is_left_out():
  tokens = model().tokenizer.encode(TEXT)
  assert perplexity.score(model(), tokens[:65], context=32).tokens == 62


def test_no_array_of_all_logits(monkeypatch):
  monkeypatch.setattr(perplexity, 'HEAD_CHUNK', 16)
  tokens = jnp.zeros((4, 41), jnp.int32)
  text = perplexity._row_losses.lower(
    model().params, tokens, config=model().config, loops=2, dtype='float32'
  ).as_text()
  assert '16x264xf32' in text
  assert '160x264xf32' not in text and '40x264xf32' not in text


def test_texts_of_a_file_are_joined_by_blank_lines(tmp_path):
  path = tmp_path / 'a.jsonl'
  documents = ['one', 'two', 'three']
  path.write_text('\n'.join(json.dumps({'text': d}) for d in documents))
  assert perplexity.read_text(path) == 'one\n\ntwo\n\nthree'
  assert perplexity.read_text(path, max_tokens=0) == 'one'


@pytest.mark.parametrize(
  ('text', 'settings', 'word'),
  [
    ('', {}, 'empty'),
    (' \n', {}, 'empty'),
    ([], {}, '0 tokens'),
    ([1], {}, '1 tokens'),
    ([1, 264], {}, 'outside 0..263'),
    ('abc', {'context': 1}, 'context=1'),
    ('abc', {'context': 65}, 'between 2 and 64'),
    ('abc', {'max_tokens': 1}, 'max_tokens=1'),
    ('abc', {'loops': 3}, '1 to 2 loops'),
    ('abc', {'batch': 0}, 'batch=0'),
    ('abc', {'dtype': 'int8'}, 'dtype'),
  ],
)
def test_bad_input_is_refused(text, settings, word):
  with pytest.raises(InputError, match=word):
    perplexity.score(model(), text, **({'context': 32} | settings))


def test_each_row_of_a_text_begins_with_the_begin_token():
  begins = dataclasses.replace(model(), tokenizer=runs.tokenizer(add_bos=True))
  rows = perplexity.make_rows(begins, 'a' * 20, 8, None)
  a = begins.tokenizer.token_id('a')
  assert rows == [[0, *[a] * 7], [0, *[a] * 7], [0, *[a] * 6]]
  # Every token of the text is scored, and what is given as ids is left alone.
  assert perplexity.score(begins, 'a' * 20, context=8).tokens == 20
  assert perplexity.make_rows(begins, [a] * 12, 8, None) == [[a] * 8, [a] * 4]


def test_bytes_of_a_sentencepiece_vocabulary_that_has_the_byte_letters():
  pieces = ['\u0120', '\u2581', '\u2581caf', '\u00e9', '<0x0A>']
  core = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, []))
  lengths = perplexity.byte_lengths(Tokenizer(core), range(5))
  assert lengths.tolist() == [2, 1, 4, 2, 1]
