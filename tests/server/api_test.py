"""Fields of the API: honoured, refused by name, or counted; tools, echo, errors, guards."""

import dataclasses
import json
import re

import numpy as np
import pytest

from rrt import console
from rrt.data.tokenizer import Tokenizer
from rrt.infer import generate
from rrt.infer.engine.engine import Engine
from tests import runs
from tests.server.server_test import events, sample

pytest.importorskip('starlette')
pytest.importorskip('httpx')

from starlette.testclient import TestClient

from rrt.server import tools
from rrt.server.app import Limits, Server
from rrt.server.gatekeeper import Rules
from rrt.server.tools import Tools
from rrt.server.worker import Worker

TEMPLATE = (
  '{% for t in tools or [] %}[{{ t.function.name }}] {# <tool_call> #}{% endfor %}'
  '{% for d in documents or [] %}<{{ d.text }}>{% endfor %}{{ mode }}'
  "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] or '' }}"
  "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ '\n' }}{% endfor %}"
  '{% if add_generation_prompt %}a:{% endif %}'
)


@pytest.fixture(scope='module')
def model():
  child = runs.child()
  tokenizer = Tokenizer(child.tokenizer._core, eos_ids=[0], bos_id=0, chat_template=TEMPLATE)
  config = dataclasses.replace(child.config, max_context=200)
  return dataclasses.replace(child, config=config, tokenizer=tokenizer)


@pytest.fixture(scope='module')
def client(model):
  engine = Engine(
    model, slots=3, page=16, steps=2, penalties=True, masks=True, logprobs=5, prefill_tokens=32
  )
  worker = Worker(engine, model.tokenizer, max_waiting=9, name='tiny')
  app = Server(worker, model.tokenizer, 'tiny', Limits(20000, max_tokens=150)).app()
  with TestClient(app) as client:
    client.worker = worker
    yield client


def ask(client, status=200, **fields):
  body = {'prompt': 'The sea', 'max_tokens': 20, 'temperature': 0, 'ignore_eos': True} | fields
  reply = client.post('/v1/completions', json=body)
  assert reply.status_code == status, reply.text
  return reply.json()['choices'][0] if status == 200 else reply.json()['error']


def chat(client, status=200, **fields):
  body = {'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 20, 'temperature': 0}
  reply = client.post('/v1/chat/completions', json=body | {'ignore_eos': True} | fields)
  assert reply.status_code == status, reply.text
  return reply.json()['choices'][0] if status == 200 else reply.json()['error']


def test_cheap_fields_are_honoured(client, model):
  encode = model.tokenizer.encode
  free = generate.complete(model, 'The sea', max_new_tokens=20, ignore_eos=True)[0]
  text = ask(client)['text']
  assert text == free.text
  stop = free.tokens[6]
  early = ask(client, stop_token_ids=[stop])
  assert early['finish_reason'] == 'stop'
  assert early['text'] == model.tokenizer.decode(free.tokens[: free.tokens.index(stop)])
  assert len(ask(client, stop_token_ids=[stop], min_tokens=15)['text']) > len(early['text'])
  word = text[5:8]
  assert ask(client, stop=word)['text'] == text[: text.index(word)]
  kept = ask(client, stop=word, include_stop_str_in_output=True)['text']
  assert kept == text[: text.index(word) + len(word)]
  assert word not in ask(client, bad_words=[word])['text']
  (only,) = encode('x')
  assert set(ask(client, allowed_token_ids=[only])['text']) == {'x'}
  assert text[0] not in ask(client, logit_bias={str(free.tokens[0]): -100})['text'][:1]
  cut = generate.complete(model, [encode('sea')], max_new_tokens=20, ignore_eos=True)[0].text
  assert ask(client, truncate_prompt_tokens=3)['text'] == cut


def test_fields_of_the_chat_template(client, model):
  tell = lambda text: generate.complete(model, text, max_new_tokens=20, ignore_eos=True)[0].text
  said = lambda **fields: chat(client, **fields)['message']['content']
  assert said() == tell('u:Hi\na:')
  assert said(add_generation_prompt=False) == tell('u:Hi\n')
  assert said(chat_template_kwargs={'mode': 'M'}) == tell('Mu:Hi\na:')
  assert said(documents=[{'text': 'doc'}]) == tell('<doc>u:Hi\na:')
  assert said(chat_template='{{ messages[0].content }}!') == tell('Hi!')
  turns = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Well, '}]
  got = said(messages=turns, continue_final_message=True, add_generation_prompt=False)
  assert got == tell('u:Hi\na:Well,')
  error = chat(client, 400, continue_final_message=True, add_generation_prompt=True)
  assert error['param'] == 'continue_final_message'


@pytest.mark.parametrize(
  ('fields', 'param'),
  [
    ({'prompt_logprobs': 1}, 'prompt_logprobs'),
    ({'suffix': 'x'}, 'suffix'),
    ({'tools': [], 'messages': [{'role': 'user', 'content': 'a'}]}, 'messages'),
    ({'top_logprobs': 2}, 'top_logprobs'),
    ({'use_beam_search': True}, 'use_beam_search'),
    ({'logits_processors': ['a']}, 'logits_processors'),
    ({'modalities': ['audio']}, 'modalities'),
    ({'guided_json': {}, 'guided_regex': 'a'}, 'guided_json'),
    ({'logit_bias': {'a': 1}}, 'logit_bias'),
    ({'logit_bias': {'1': 101}}, 'logit_bias'),
    ({'stop_token_ids': [264]}, 'stop_token_ids'),
    ({'min_tokens': 21}, 'min_tokens'),
    ({'bad_words': ['']}, 'bad_words'),
    ({'response_format': {'type': 'xml'}}, 'response_format'),
    ({'max_tokens': 0}, 'max_tokens'),
  ],
)
def test_what_is_not_done_is_refused_by_name(client, fields, param):
  assert ask(client, 400, **fields)['param'] == param


def test_a_grammar_that_is_none_is_refused(client):
  assert 'structured_outputs' in ask(client, 400, guided_regex='(')['message']
  assert 'give one of' in ask(client, 400, structured_outputs={'xml': 'a'})['message']


def test_fields_that_no_api_knows_are_counted(client, capsys, monkeypatch):
  monkeypatch.setattr(console, '_noted', set())
  count = lambda: sample(client.get('/metrics').text, 'rrt:unknown_fields_total')
  before = count()
  ask(client, temprature=0.5, user='me', store=True)
  ask(client, temprature=0.5)
  assert count() - before == 2
  assert capsys.readouterr().err.count("'temprature', which no API knows") == 1


@pytest.mark.parametrize(
  'fields',
  [
    {'response_format': {'type': 'json_object'}},
    {'response_format': {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': True}}},
  ],
)
def test_json_of_any_kind(client, fields):
  for seed in range(6):
    got = ask(client, ignore_eos=False, temperature=1, seed=seed, max_tokens=150, **fields)
    if got['finish_reason'] == 'stop':
      json.loads(got['text'])


def test_structured_outputs_and_choices(client):
  schema = {
    'type': 'object',
    'properties': {'a': {'enum': ['x', 'y']}},
    'required': ['a'],
    'additionalProperties': False,
  }
  for seed in range(5):
    rest = {'temperature': 1, 'seed': seed, 'ignore_eos': False, 'max_tokens': 60}
    for fields in (
      {'guided_json': schema},
      {'guided_json': json.dumps(schema)},
      {'structured_outputs': {'json': schema}},
      {'response_format': {'type': 'json_schema', 'json_schema': {'schema': schema}}},
    ):
      assert json.loads(ask(client, **fields, **rest)['text'])['a'] in ('x', 'y')
    assert ask(client, guided_choice=['yes', 'no'], **rest)['text'] in ('yes', 'no')
    assert re.fullmatch('[a-c]{4}', ask(client, guided_regex='[a-c]{4}', **rest)['text'])


WEATHER = {
  'type': 'function',
  'function': {
    'name': 'weather',
    'parameters': {
      'type': 'object',
      'properties': {'city': {'enum': ['Rome', 'Oslo']}},
      'required': ['city'],
      'additionalProperties': False,
    },
  },
}


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
  'choice', ['required', {'type': 'function', 'function': {'name': 'weather'}}]
)
def test_a_required_call_is_one(client, choice, stream):
  body = {
    'messages': [{'role': 'user', 'content': 'Hi'}],
    'tools': [WEATHER],
    'tool_choice': choice,
    'max_tokens': 120,
    'temperature': 1,
    'seed': 4,
    'stream': stream,
  }
  reply = client.post('/v1/chat/completions', json=body)
  if stream:
    last = events(reply)[-1]['choices'][0]
    calls, finish = last['delta']['tool_calls'], last['finish_reason']
  else:
    last = reply.json()['choices'][0]
    calls, finish = last['message']['tool_calls'], last['finish_reason']
    assert last['message']['content'] is None
  assert finish == 'tool_calls' and calls[0]['type'] == 'function' and calls[0]['id']
  assert all(c['function']['name'] == 'weather' for c in calls)
  assert all(json.loads(c['function']['arguments'])['city'] in ('Rome', 'Oslo') for c in calls)


def test_offered_tools_reach_the_template(client, model):
  tell = lambda text: generate.complete(model, text, max_new_tokens=20, ignore_eos=True)[0].text
  said = lambda **fields: chat(client, tools=[WEATHER], **fields)['message']['content']
  assert said() == tell('[weather] u:Hi\na:')
  assert said(tool_choice='none') == tell('u:Hi\na:')
  assert chat(client, tool_choice='none')['message']['content'] == tell('u:Hi\na:')
  call = {'id': '1', 'type': 'function', 'function': {'name': 'weather', 'arguments': '{}'}}
  history = [
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': None, 'tool_calls': [call]},
    {'role': 'tool', 'tool_call_id': '1', 'content': 'sunny'},
  ]
  assert said(messages=history) == tell('[weather] u:Hi\na:weather\nt:sunny\na:')
  # A stream with tools holds the same text.
  body = {'messages': history[:1], 'tools': [WEATHER], 'max_tokens': 20, 'temperature': 0}
  streamed = events(
    client.post('/v1/chat/completions', json=body | {'ignore_eos': True, 'stream': True})
  )
  deltas = [e['choices'][0]['delta'] for e in streamed]
  assert ''.join(d.get('content') or '' for d in deltas) == tell('[weather] u:Hi\na:')
  assert chat(client, 400, tool_choice='required')['param'] == 'tool_choice'
  assert chat(client, 400, tools=[{'name': 'f'}])['param'] == 'tools'
  assert chat(client, 400, tools=[WEATHER], chat_template='x')['param'] == 'tools'


@pytest.mark.parametrize(
  ('form', 'text', 'content', 'calls'),
  [
    ('hermes', 'Hm <tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}}}\n</tool_call>', 'Hm',
     [('f', {'a': {'b': 1}})]),
    ('hermes', '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g", "arguments": {}}'
     '</tool_call>', None, [('f', {}), ('g', {})]),
    ('hermes', '<tool_call>{"name": </tool_call>', '<tool_call>{"name": </tool_call>', []),
    ('mistral', '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', None, [('f', {'a': 1})]),
    ('mistral', 'No call.', 'No call.', []),
    ('llama', '{"name": "f", "parameters": {"a": 1}}', None, [('f', {'a': 1})]),
    ('llama', '<|python_tag|>{"name": "f", "parameters": {}}', None, [('f', {})]),
    ('llama', '{"city": "Rome"}', '{"city": "Rome"}', []),
    ('', '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
  ],
)  # fmt: skip
def test_calls_are_read_from_texts(form, text, content, calls):
  got, found = tools.parse(Tools([WEATHER], form), text)
  assert got == content
  assert [(c['function']['name'], json.loads(c['function']['arguments'])) for c in found] == calls


@pytest.mark.parametrize('stream', [False, True])
def test_echo_with_log_probabilities(client, model, stream):
  """Those of the prompt are a plain forward pass's."""
  import jax
  import jax.numpy as jnp

  from rrt.models import lm_head, transformer

  text = 'The wide green sea is here'
  ids = model.tokenizer.encode(text)
  hidden = transformer.forward(model.config, model.params, jnp.asarray([ids])).hidden_BxLxD
  logits = hidden[0] @ lm_head.kernel(model.config, model.params)
  want = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
  for most in (0, 1, 5):
    fields = {'prompt': text, 'echo': True, 'logprobs': 2, 'max_tokens': most}
    if stream:
      body = {'temperature': 0, 'ignore_eos': True, 'stream': True} | fields
      parts = [e['choices'][0] for e in events(client.post('/v1/completions', json=body))]
      got = {
        'text': ''.join(p['text'] for p in parts),
        'logprobs': {k: [v for p in parts for v in p['logprobs'][k]] for k in parts[0]['logprobs']},
      }
    else:
      got = ask(client, **fields)
    assert got['text'].startswith(text)
    found = got['logprobs']
    assert len(found['tokens']) == len(found['top_logprobs']) == len(ids) + most
    assert found['token_logprobs'][0] is None and found['text_offset'][: len(ids)] == list(
      range(len(ids))
    )
    np.testing.assert_allclose(found['token_logprobs'][1 : len(ids)], want, atol=1e-4)
    assert ''.join(found['tokens'][: len(ids)]) == text
  assert ask(client, echo=True, max_tokens=3)['text'].startswith('The sea')


def test_a_prompt_that_is_too_long(client):
  for error in (
    ask(client, 400, prompt='x' * 300),
    ask(client, 400, prompt='x' * 100, max_tokens=120),
    chat(client, 400, messages=[{'role': 'user', 'content': 'x' * 300}]),
  ):
    assert error['code'] == 'context_length_exceeded'
    assert 'maximum context length is 200 tokens' in error['message']


def test_errors_are_json_everywhere(client):
  for reply, status in (
    (client.get('/nope'), 404),
    (client.get('/v1/completions'), 405),
    (client.post('/v1/models', json={}), 405),
  ):
    assert reply.status_code == status
    assert reply.json()['error']['message'] and reply.json()['error']['type']
  assert ask(client, 400, lossless=True, exit_threshold=1)['param'] == 'exit_threshold'


def test_small_endpoints(client, model):
  import rrt

  assert client.get('/version').json() == {'version': rrt.__version__}
  assert client.get('/ping').status_code == client.post('/ping').status_code == 200
  ids = model.tokenizer.encode('The sea')
  got = client.post('/tokenize', json={'prompt': 'The sea'}).json()
  assert got == {'count': len(ids), 'max_model_len': 200, 'tokens': ids}
  messages = [{'role': 'user', 'content': 'Hi'}]
  got = client.post('/tokenize', json={'messages': messages}).json()
  assert got['tokens'] == model.tokenizer.encode('u:Hi\na:')
  assert client.post('/detokenize', json={'tokens': ids}).json() == {'prompt': 'The sea'}
  assert client.post('/detokenize', json={'tokens': ['a']}).status_code == 400
  assert client.post('/tokenize', json={}).status_code == 400


def guarded(model, key=None, **rules):
  engine = Engine(model, slots=1, page=16, steps=2)
  worker = Worker(engine, model.tokenizer, max_waiting=3)
  return Server(worker, model.tokenizer, 'tiny', Limits(), key, Rules(**rules)).app()


def test_hosts_and_origins(model):
  app = guarded(model, hosts=('localhost', '127.0.0.1', '::1'), origins=('https://a.example',))
  with TestClient(app, base_url='http://localhost:8000') as client:
    for host in ('localhost:8000', '127.0.0.1', '[::1]:8000', 'LOCALHOST'):
      assert client.get('/v1/models', headers={'Host': host}).status_code == 200, host
    for host in ('evil.example', 'localhost.evil.example', ''):
      reply = client.get('/v1/models', headers={'Host': host})
      assert reply.status_code == 403 and 'allowed_hosts' in reply.json()['error']['message']
    asked = {'Origin': 'https://a.example', 'Access-Control-Request-Method': 'POST'}
    reply = client.options('/v1/completions', headers=asked)
    assert reply.status_code == 200
    assert reply.headers['access-control-allow-origin'] == 'https://a.example'
    reply = client.get('/v1/models', headers={'Origin': 'https://b.example'})
    assert 'access-control-allow-origin' not in reply.headers


def test_the_keys_scheme_is_case_insensitive(model):
  with TestClient(guarded(model, key='secret')) as client:
    for scheme in ('Bearer', 'bearer', 'BEARER'):
      given = {'Authorization': f'{scheme} secret'}
      assert client.get('/v1/models', headers=given).status_code == 200
    reply = client.get('/v1/models', headers={'Authorization': 'Basic secret'})
    assert reply.status_code == 401 and reply.headers['www-authenticate'] == 'Bearer'


def test_overload_is_told_and_health_lives(model):
  with TestClient(guarded(model, concurrent=0)) as client:
    reply = client.get('/v1/models')
    assert reply.status_code == 503 and reply.headers['retry-after'] == '1'
    assert reply.json()['error']['type'] == 'server_error'
    assert client.get('/health').status_code == client.get('/metrics').status_code == 200


def test_the_grafana_board_asks_for_metrics_that_exist(client):
  from pathlib import Path

  board = json.loads((Path(__file__).parents[2] / 'docs' / 'grafana.json').read_text())
  asked = {
    name
    for panel in board['panels']
    for target in panel['targets']
    for name in re.findall(r'(?:vllm|rrt):\w+', target['expr'])
  }
  ask(client)
  text = client.get('/metrics').text
  there = set(re.findall(r'^((?:vllm|rrt):\w+)\{[^}]*model_name="tiny"', text, re.M))
  assert len(asked) > 20 and asked <= there


def test_inputs_that_cannot_be_encoded_or_rendered_are_refused(client):
  given = {'Content-Type': 'application/json'}
  reply = client.post('/tokenize', content=b'{"prompt": "\\ud800"}', headers=given)
  assert reply.status_code == 400 and reply.json()['error']['message']
  assert chat(client, 400, tools=[WEATHER], chat_template=3)['param'] == 'chat_template'
  # What is echoed is what was read.
  assert ask(client, echo=True, truncate_prompt_tokens=3, max_tokens=0)['text'] == 'sea'
