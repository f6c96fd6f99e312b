"""Restricted requests: valid whatever the model says, and nobody else is touched."""

import dataclasses
import json
import re

import numpy as np
import pytest

from rrt.errors import InputError
from rrt.exits import gate as gate_lib
from rrt.infer import generate
from rrt.infer.engine.engine import Engine
from rrt.infer.engine.request import Request
from tests import runs

SCHEMA = {
  'type': 'object',
  'properties': {
    'n': {'type': 'integer', 'minimum': 0, 'maximum': 99},
    'ok': {'type': 'boolean'},
    'k': {'enum': ['a', 'bc']},
  },
  'required': ['n', 'ok', 'k'],
  'additionalProperties': False,
}


@pytest.fixture(scope='module')
def model():
  """A random child, for longer texts, with a gate."""
  child = runs.child()
  config = dataclasses.replace(child.config, max_context=200)
  rng = np.random.default_rng(0)
  arrays = {
    'kernel': rng.normal(0, 1, (1, config.d_model)).astype(np.float32),
    'bias': np.zeros(1, np.float32),
  }
  gate = gate_lib.Gate('learned', 0.5, arrays, 'propagate', {})
  return dataclasses.replace(child, config=config, meta=gate_lib.store(child.meta, gate))


WAYS = [
  {},
  {'gate': 'stored'},
  {'lossless': True},
  {'gate': 'stored', 'lossless': True},
  {'gate': 'stored', 'kv': 'exact_fill'},
]


@pytest.fixture(scope='module', params=range(len(WAYS)), ids=lambda i: '-'.join(WAYS[i]) or 'plain')
def engine(request, model):
  return Engine(model, slots=4, page=16, steps=2, masks=True, context=200, **WAYS[request.param])


def plain(engine, prompts, **params):
  return [c.text for c in engine.generate(prompts, **params)]


def test_json_is_valid_for_every_prompt_of_a_random_model(engine):
  pytest.importorskip('llguidance')
  prompts = [f'{i} say' for i in range(40)]
  texts = plain(
    engine, prompts, max_new_tokens=120, temperature=1.0, structured_outputs={'json': SCHEMA}
  )
  for text in texts:
    found = json.loads(text)
    assert set(found) == {'n', 'ok', 'k'} and 0 <= found['n'] <= 99
    assert isinstance(found['ok'], bool) and found['k'] in ('a', 'bc')
  assert len(set(texts)) > 30  # What is free is sampled.


def test_others_are_not_touched(engine, model):
  """Restricted and plain requests share the batch; the plain ones are as alone."""
  pytest.importorskip('llguidance')
  full = {} if engine.shape.gate == 'none' else {'threshold': 2.0}
  prompts = [f'text {i}' for i in range(6)]
  want = generate.complete(model, prompts, max_new_tokens=20, ignore_eos=True)
  encode = model.tokenizer.encode
  restricted = {'structured_outputs': {'regex': '(ab|cd)+x'}, 'temperature': 1.0}
  requests = []
  for i, prompt in enumerate(prompts):
    requests.append(Request.of(encode(prompt), 20, ignore_eos=True, **full))
    requests.append(Request.of(encode(prompt), 30, seed=i, **restricted))
  done = engine.run(requests)
  assert [r.tokens for r in done[::2]] == [w.tokens for w in want]
  for request in done[1::2]:
    text = model.tokenizer.decode(request.tokens)
    assert re.fullmatch(r'(ab|cd)+(x)?', text) or re.fullmatch(r'(ab|cd)*[ac]?', text)
    assert text.endswith('x') == (request.finish == 'end')


@pytest.mark.parametrize(
  ('structured', 'pattern'),
  [
    ({'regex': '[0-9]{4}-[0-9]{2}'}, r'\d{4}-\d{2}'),
    ({'choice': ['yes', 'no', 'a+b']}, r'yes|no|a\+b'),
    ({'json_object': True}, r'\{.*'),
    ({'grammar': 'start: "a"+ "b"'}, r'a+b?'),
  ],
)
def test_each_kind(model, structured, pattern):
  pytest.importorskip('llguidance')
  engine = Engine(model, slots=2, page=16, masks=True, context=100)
  for text in plain(
    engine, ['one', 'two', 'three'], max_new_tokens=40, structured_outputs=structured
  ):
    assert re.fullmatch(pattern, text, re.S)


def test_min_tokens_stop_ids_and_stops(model):
  engine = Engine(model, slots=3, page=16, masks=True, context=100)
  ids = model.tokenizer.encode('The sea')
  free = generate.complete(model, [ids], max_new_tokens=30, ignore_eos=True)[0]
  stop = free.tokens[5]
  first = free.tokens.index(stop)
  done = lambda **p: engine.generate([ids], max_new_tokens=30, ignore_eos=True, **p)[0]
  got = done(stop_token_ids=(stop,))
  assert got.tokens == free.tokens[: first + 1] and got.finish_reason == 'end'
  late = done(stop_token_ids=(stop,), min_tokens=20)
  assert stop not in late.tokens[:20] and len(late.tokens) >= 20
  # A stop string that comes early does not count before min_tokens.
  text = model.tokenizer.decode(free.tokens[2:4])
  assert done(stop=text).finish_reason == 'stop' and len(done(stop=text).tokens) <= 4
  kept = done(stop=text, include_stop=True)
  assert kept.text.endswith(text) and kept.finish_reason == 'stop'
  assert len(done(stop=text, min_tokens=15).tokens) > 15


def test_bias_allowed_and_bad_words(model):
  engine = Engine(model, slots=3, page=16, masks=True, context=100)
  ids = model.tokenizer.encode('The sea')
  done = lambda **p: engine.generate([ids], max_new_tokens=24, ignore_eos=True, **p)[0]
  free = done()
  assert set(done(allowed_token_ids=[70, 71, 72], temperature=1.0).tokens) <= {70, 71, 72}
  assert set(done(logit_bias={75: 1e6}).tokens) == {75}
  assert free.tokens[0] not in done(logit_bias={free.tokens[0]: -1e9}).tokens
  assert done().tokens == free.tokens  # A slot's bias does not outlive its request.
  pair = model.tokenizer.decode(free.tokens[3:5])
  got = done(bad_words=(pair,))
  assert pair in free.text and pair not in got.text
  both = done(bad_words=('a',), structured_outputs={'regex': '[ab]{6}'})
  assert both.text == 'bbbbbb'


@pytest.mark.parametrize(
  ('params', 'reason'),
  [
    ({'structured_outputs': {'json': '{'}}, 'json is not a JSON schema'),
    ({'structured_outputs': {'json': {'type': 'nope'}}}, 'structured_outputs: '),
    ({'structured_outputs': {'regex': '('}}, 'structured_outputs: '),
    ({'structured_outputs': {'regex': 'a', 'choice': ['a']}}, 'give one of'),
    ({'structured_outputs': {'xml': 'a'}}, 'give one of'),
    ({'structured_outputs': {'choice': []}}, 'choice must be a list of texts'),
    ({'min_tokens': 9}, 'min_tokens=9: must be whole, from 0 to max_new_tokens'),
    ({'stop_token_ids': tuple(range(20))}, 'up to 16 token ids'),
    ({'stop_token_ids': (999,)}, 'stop_token_ids: the token 999 lies outside'),
    ({'allowed_token_ids': []}, 'at least one token id'),
    ({'logit_bias': {3: float('nan')}}, 'logit_bias'),
    ({'bad_words': ('',)}, 'bad_words'),
  ],
)
def test_bad_restrictions_get_one_sentence(model, params, reason):
  engine = Engine(model, slots=1, page=16, masks=True, context=50)
  with pytest.raises(InputError, match=reason):
    engine.generate(['a'], max_new_tokens=4, **params)
  assert not engine.busy


def test_engines_and_decoders_without_masks_refuse(model):
  with pytest.raises(InputError, match='masks=True'):
    Engine(model, slots=1, page=16).generate(['a'], max_new_tokens=4, min_tokens=2)
  with pytest.raises(InputError, match='need an Engine'):
    generate.complete(model, 'a', min_tokens=2)
  with pytest.raises(InputError, match='need an Engine'):
    generate.complete(model, 'a', stop_token_ids=(2,))
