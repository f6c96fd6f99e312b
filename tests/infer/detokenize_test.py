"""Incremental detokenization: character boundaries, stop strings, special tokens."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rrt.data.tokenizer import Tokenizer
from rrt.infer.detokenize import Detokenizer, StreamDecoder


def byte_fallback(words=()) -> Tokenizer:
  """A SentencePiece vocabulary of words, in which other characters are bytes."""
  vocab = {'<unk>': 0, '<s>': 1, '</s>': 2}
  vocab |= {f'<0x{i:02X}>': 3 + i for i in range(256)}
  for word in ('▁', *'abcdefghijklmnopqrstuvwxyz', *words):
    vocab[word] = len(vocab)
  core = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token='<unk>', byte_fallback=True))
  core.normalizer = normalizers.Replace(' ', '▁')
  core.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  core.add_special_tokens(['<s>', '</s>'])
  return Tokenizer(core, bos_id=1, eos_ids=[2])


def byte_level(*special: str) -> Tokenizer:
  """A token a byte, and special tokens."""
  vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  core = tokenizers.Tokenizer(models.BPE(vocab, []))
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens(list(special))
  return Tokenizer(core)


def detokenize(tokenizer, prompt, tokens, stops=(), end=()):
  """(completion, what was streamed)."""
  shown = []
  row = Detokenizer(tokenizer, prompt, end, stops, 0, lambda i, text: shown.append(text))
  for token in tokens:
    row.extend([token])
  return row.finish(len(prompt), 'length'), ''.join(shown)


@pytest.mark.parametrize('make', [byte_fallback, byte_level])
@pytest.mark.parametrize('text', ['語', '語が', 'ab語', '가나'])
def test_a_prompt_of_bytes_is_not_cut_inside_a_character(make, text):
  tokenizer = make()
  # Letters of three bytes: eight tokens back is inside of one.
  prompt = tokenizer.encode('가나다라', bos=False)
  assert len(prompt) == 12
  tokens = tokenizer.encode(text, bos=False)
  done, shown = detokenize(tokenizer, prompt, tokens)
  assert done.text == shown == text
  done, shown = detokenize(tokenizer, prompt, tokens, stops=[text[-1]])
  assert done.finish_reason == 'stop' and done.text == shown == text[:-1]


@pytest.mark.parametrize('make', [byte_fallback, byte_level])
@pytest.mark.parametrize('split', [1, 2])
def test_a_character_that_the_prompt_leaves_incomplete(make, split):
  tokenizer = make()
  ids = tokenizer.encode('ab가나다라語c', bos=False)
  cut = ids.index(tokenizer.encode('c', bos=False)[0], 3) - 3 + split
  done, shown = detokenize(tokenizer, ids[:cut], ids[cut:])
  assert done.text == shown == '語c'


def test_every_cut_of_a_text_continues_it():
  text = 'the ꦧꦱꦗꦮ 𪚥 sea 語\n'  # Javanese, and a Han character of four bytes.
  for tokenizer in (byte_fallback(words=['語']), byte_level()):
    ids = tokenizer.encode(text, bos=False)
    for cut in range(len(ids)):
      stream = StreamDecoder(tokenizer, before=ids[:cut])
      found = ''.join(map(stream.push, ids[cut:])) + stream.flush()
      assert '\ufffd' not in found and text.endswith(found)
      assert len(found) >= len(text) - len(tokenizer.decode(ids[:cut]))


def test_a_prompt_alone_gives_no_text():
  tokenizer = byte_fallback()
  assert StreamDecoder(tokenizer, before=tokenizer.encode('語', bos=False)[:2]).flush() == ''


END = '<|im_end|>'


@pytest.mark.parametrize(
  'stops, text',
  [
    ([END], 'b'),
    ([f'b{END}'], ''),
    ([f'{END}cd'], 'b'),
    (['ef', f'{END}x'], 'bcd'),
    (['|im_end|'], 'bcdef'),  # No part of a special token is text.
    (['bcd'], 'bcdef'),  # A special token stands between.
    (['cd'], 'b'),
  ],
)
def test_stop_strings_with_special_tokens(stops, text):
  tokenizer = byte_level(END)
  tokens = tokenizer.encode(f'b{END}cdef')
  done, shown = detokenize(tokenizer, tokenizer.encode('a'), tokens, stops)
  assert done.text == shown == text
  stopped = text != 'bcdef'
  assert done.finish_reason == ('stop' if stopped else 'length')
  assert (len(done.tokens) < len(tokens)) == stopped or stops == ['ef', f'{END}x']


def test_a_stop_string_may_end_in_an_end_token():
  tokenizer = byte_level(END)
  tokens = tokenizer.encode(f'ab{END}c')
  ends = [tokenizer.token_id(END)]
  assert detokenize(tokenizer, [], tokens, [f'b{END}'], ends)[0].text == 'a'
  done, _ = detokenize(tokenizer, [], tokens, [END], ends)
  assert (done.text, done.finish_reason) == ('ab', 'end')
