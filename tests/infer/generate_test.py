"""From prompts to text: stops, streams, chats, and what is refused."""

import dataclasses
import functools

import pytest

from rrt.errors import InputError
from rrt.infer import generate
from rrt.infer.detokenize import Detokenizer
from rrt.infer.generate import complete
from rrt.infer.sampling import SamplingParams
from tests import runs


@functools.cache
def model():
  config = dataclasses.replace(runs.CHILD, max_context=64)
  return runs.model(config, 3)


@functools.cache
def writer():
  return generate.Generator(model())


def write(prompts, **kwargs):
  return complete(writer(), prompts, **({'max_new_tokens': 20} | kwargs))


def test_text_is_what_its_tokens_decode_to():
  done = write(['the sea', 'a'])
  for c in done:
    assert c.text == model().tokenizer.decode(c.tokens)
    assert c.finish_reason == 'length' and len(c.tokens) == 20
  assert [c.prompt_tokens for c in done] == [7, 1]


def test_one_text_several_texts_or_token_ids():
  (one,) = write('the sea')
  assert write(['the sea'])[0] == one
  assert write([model().tokenizer.encode('the sea')])[0] == one


@pytest.mark.slow
def test_batches_do_not_change_completions():
  prompts = ['the sea', 'a', 'old ships sail', 'x' * 30]
  settings = dict(temperature=1.2, top_p=0.95, max_new_tokens=20)
  whole = complete(model(), prompts, seed=5, **settings)
  small = generate.Generator(model(), batch=3)
  split = small.complete(prompts, SamplingParams(seed=5, **settings))
  assert whole == split
  for i, prompt in enumerate(prompts):
    assert write([prompt], seed=5 + i, **settings) == [whole[i]]


def test_seeds_of_each_prompt():
  same = write(['the'] * 3, temperature=2.0, seed=[4, 4, 9])
  assert same[0] == same[1] != same[2]


def test_a_stop_string_across_tokens_ends_the_text():
  text = write('the sea', temperature=1.0, seed=1)[0].text
  stop = text[5:9]
  assert len(stop.encode()) >= 4  # One token a byte: it spans several.
  first = text.index(stop)
  (c,) = write('the sea', temperature=1.0, seed=1, stop=[stop, 'never'])
  assert c.text == text[:first] and c.finish_reason == 'stop'
  # A token too many may be needed to tell that a character is complete.
  assert len(c.tokens) < 20
  assert model().tokenizer.decode(c.tokens).startswith(text[:first] + stop)


def test_a_stop_ends_only_its_own_row():
  free = write(['the sea', 'a'], temperature=1.0)
  stop = free[0].text[3:6]
  got = write(['the sea', 'a'], temperature=1.0, stop=stop)
  assert got[0].text == free[0].text[: free[0].text.index(stop)]
  if stop not in free[1].text:
    assert got[1] == free[1]


@pytest.mark.parametrize('stop', [(), ('zz', 'qqqq'), None])
def test_streams_add_up_to_the_text(stop):
  if stop is None:
    stop = (write('the sea', temperature=1.0)[0].text[6:8],)
  parts = [[], []]
  done = write(
    ['the sea', 'a'], temperature=1.0, stop=stop, stream=lambda i, text: parts[i].append(text)
  )
  assert [''.join(p) for p in parts] == [c.text for c in done]


def test_multi_byte_characters_arrive_whole():
  tokenizer = runs.tokenizer()
  seen = []
  text = Detokenizer(tokenizer, (), (), (), 0, lambda i, t: seen.append(t))
  wanted = 'naïve 日本 😀!'
  for token in tokenizer.encode(wanted):
    text.extend([token])
  assert text.finish(1, 'length').text == wanted
  assert ''.join(seen) == wanted and not any('\ufffd' in t for t in seen)


def test_what_may_begin_a_stop_string_is_held_back():
  tokenizer = runs.tokenizer()
  seen = []
  text = Detokenizer(tokenizer, (), (), ('END',), 0, lambda i, t: seen.append(t))
  for token in tokenizer.encode('an E, an EN, the END of it'):
    text.extend([token])
    assert not ''.join(seen).endswith('E')
  completion = text.finish(1, 'length')
  assert completion.text == ''.join(seen) == 'an E, an EN, the '
  assert completion.finish_reason == 'stop'


def test_end_tokens_end_unless_ignored():
  free = write('the sea', temperature=1.5, seed=3, ignore_eos=True)[0]
  assert len(free.tokens) == 20
  tokenizer = model().tokenizer
  end = free.tokens[4]
  changed = dataclasses.replace(model(), tokenizer=type(tokenizer)(tokenizer._core, eos_ids=[end]))
  (c,) = complete(changed, 'the sea', temperature=1.5, seed=3)
  first = free.tokens.index(end)
  assert c.tokens == free.tokens[: first + 1]
  assert c.finish_reason == 'end'
  assert c.text == tokenizer.decode(free.tokens[:first])


def test_the_context_ends_a_text():
  (c,) = write('x' * 60, max_new_tokens=50, ignore_eos=True)
  assert len(c.tokens) == 4 and c.finish_reason == 'context'


def test_fewer_loops():
  shallow = complete(model(), 'the sea', max_new_tokens=20, loops=1)
  assert shallow != write('the sea')


def test_chat_uses_the_template():
  tokenizer = runs.tokenizer()
  chatty = type(tokenizer)(
    tokenizer._core,
    eos_ids=[0],
    chat_template="{% for m in messages %}<{{ m['content'] }}>{% endfor %}",
  )
  changed = dataclasses.replace(model(), tokenizer=chatty)
  (c,) = complete(changed, 'hi', chat=True, max_new_tokens=8)
  assert c == write('<hi>', max_new_tokens=8)[0]


@pytest.mark.parametrize(
  ('prompts', 'settings', 'word'),
  [
    ('', {}, 'empty'),
    ([], {}, 'no prompt'),
    ([[]], {}, 'no tokens'),
    (['a', [1]], {}, 'all as'),
    ('x' * 64, {}, 'context of 64'),
    ([[1, 264]], {}, 'outside 0..263'),
    ('a', {'max_new_tokens': 0}, 'max_new_tokens=0'),
    ('a', {'temperature': -1.0}, 'temperature=-1'),
    ('a', {'temperature': float('nan')}, 'temperature=nan'),
    ('a', {'top_k': -1}, 'top_k'),
    ('a', {'top_p': 0.0}, 'top_p'),
    ('a', {'top_p': 1.1}, 'top_p'),
    ('a', {'min_p': 2.0}, 'min_p'),
    ('a', {'seed': -1}, 'seed'),
    ('a', {'seed': [1, 2]}, '2 values for 1'),
    ('a', {'stop': ['']}, 'stop'),
    ('a', {'chat': True}, 'chat template'),
  ],
)
def test_bad_input_is_refused(prompts, settings, word):
  with pytest.raises(InputError, match=word):
    write(prompts, **settings)


@pytest.mark.parametrize('loops', [0, 3])
def test_loops_that_the_model_lacks(loops):
  with pytest.raises(InputError, match='1 to 2 loops'):
    complete(model(), 'a', loops=loops)


def test_models_without_a_tokenizer_take_and_give_ids():
  bare = dataclasses.replace(model(), tokenizer=None)
  ids = model().tokenizer.encode('the sea')
  (c,) = complete(bare, [ids], max_new_tokens=20)
  assert c.tokens == write('the sea', ignore_eos=True)[0].tokens
  assert c.text == ''
  with pytest.raises(InputError, match='no tokenizer'):
    complete(bare, 'the sea')
