"""The server: answers of the engine, refusals with a reason, nothing lost."""

import asyncio
import dataclasses
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from rrt.checkpoints.load import save
from rrt.infer import generate
from rrt.infer.detokenize import Detokenizer
from rrt.infer.engine.engine import Engine
from tests import command, runs
from tests.infer.detokenize_test import byte_fallback

pytest.importorskip('starlette')
pytest.importorskip('httpx')

import httpx
from starlette.testclient import TestClient

from rrt.server.answer import Answer
from rrt.server.app import Limits, Server
from rrt.server.listen import bind
from rrt.server.protocol import Refused
from rrt.server.worker import Worker


@pytest.fixture(scope='module')
def child():
  model = runs.child()
  model.tokenizer.chat_template = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
  )
  yield model
  model.tokenizer.chat_template = None


@pytest.fixture(scope='module')
def client(child):
  engine = Engine(child, slots=2, page=8, steps=2, penalties=True, logprobs=20)
  worker = Worker(engine, child.tokenizer, max_waiting=3, name='tiny')
  limits = Limits(body_bytes=4000, max_tokens=30)
  app = Server(worker, child.tokenizer, 'tiny', limits).app()
  with TestClient(app) as client:
    client.worker = worker
    yield client


def events(reply):
  lines = [line for line in reply.text.split('\n\n') if line]
  assert lines[-1] == 'data: [DONE]'
  return [json.loads(line.removeprefix('data: ')) for line in lines[:-1]]


def ask(**fields):
  return {'prompt': 'The sea', 'max_tokens': 12, 'temperature': 0} | fields


@pytest.mark.slow
def test_a_completion_is_that_of_generate(client, child):
  want = generate.complete(child, 'The sea', max_new_tokens=12)[0]
  reply = client.post('/v1/completions', json=ask()).json()
  choice = reply['choices'][0]
  assert choice['text'] == want.text
  assert reply['model'] == 'tiny' and reply['object'] == 'text_completion'
  assert reply['usage'] == {
    'prompt_tokens': 7,
    'completion_tokens': len(want.tokens),
    'total_tokens': 7 + len(want.tokens),
  }


def test_a_stream_holds_the_same_text(client):
  whole = client.post('/v1/completions', json=ask()).json()
  reply = client.post(
    '/v1/completions',
    json=ask(stream=True, stream_options={'include_usage': True}, return_loops=True),
  )
  assert reply.headers['content-type'].startswith('text/event-stream')
  found = events(reply)
  assert found[-1]['usage'] == whole['usage'] and not found[-1]['choices']
  choices = [e['choices'][0] for e in found[:-1]]
  assert ''.join(c['text'] for c in choices) == whole['choices'][0]['text']
  assert choices[-1]['finish_reason'] == whole['choices'][0]['finish_reason']
  pieces = [p for c in choices for p in c['loops']]
  assert {depth for _, depth in pieces} == {2}
  # One for each token, with or without a text of its own.
  depths = [n for c in choices for n in c['token_loops']]
  assert depths == [2] * whole['usage']['completion_tokens']


def test_chats_stops_seeds_and_several_choices(client):
  body = {
    'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'The sea'}]}],
    'max_tokens': 10,
    'temperature': 1,
    'seed': 3,
    'n': 2,
    'ignore_eos': True,
  }
  first = client.post('/v1/chat/completions', json=body).json()
  again = client.post('/v1/chat/completions', json=body).json()
  texts = [c['message']['content'] for c in first['choices']]
  assert texts == [c['message']['content'] for c in again['choices']]
  assert texts[0] != texts[1]
  assert first['choices'][0]['message']['role'] == 'assistant'
  assert first['usage']['prompt_tokens'] == len('u:The sea\n')
  streamed = events(client.post('/v1/chat/completions', json=body | {'stream': True}))
  for i in (0, 1):
    deltas = [e['choices'][0]['delta'] for e in streamed if e['choices'][0]['index'] == i]
    assert deltas[0]['role'] == 'assistant'
    assert ''.join(d.get('content', '') for d in deltas) == texts[i]
  stop = texts[0][3:5]
  stopped = client.post('/v1/chat/completions', json=body | {'n': 1, 'stop': stop}).json()[
    'choices'
  ][0]
  assert stopped['message']['content'] == texts[0][: texts[0].index(stop)]
  assert stopped['finish_reason'] == 'stop'


def test_log_probabilities_and_penalties(client):
  plain = client.post('/v1/completions', json=ask(logprobs=2, ignore_eos=True)).json()['choices'][0]
  told = plain['logprobs']
  assert len(told['tokens']) == len(told['token_logprobs']) == 12
  for own, top in zip(told['token_logprobs'], told['top_logprobs']):
    assert own == pytest.approx(max(top.values())) and len(top) == 2
  chat = client.post(
    '/v1/chat/completions',
    json={
      'messages': [{'role': 'user', 'content': 'x'}],
      'logprobs': True,
      'top_logprobs': 3,
      'max_tokens': 4,
      'temperature': 0,
      'ignore_eos': True,
    },
  ).json()['choices'][0]['logprobs']['content']
  assert len(chat) == 4 and all(len(c['top_logprobs']) == 3 for c in chat)
  other = client.post(
    '/v1/completions', json=ask(frequency_penalty=2, ignore_eos=True, logprobs=0)
  ).json()['choices'][0]['logprobs']['tokens']
  most = lambda tokens: max(tokens.count(t) for t in tokens)
  assert most(other) < most(told['tokens'])


def test_parts_of_characters_have_their_bytes():
  tokenizer = runs.tokenizer()
  job = types.SimpleNamespace(chat=True)
  answer = Answer(job, 'tiny', tokenizer)
  text = '\u20ac\U0001f600'
  told = [answer._token(t)[1] for t in tokenizer.encode(text)]
  assert [len(t) for t in told] == [1] * 7  # Each a part of a character.
  assert b''.join(told) == text.encode()
  names = [answer._token(t)[0] for t in tokenizer.encode(text)]
  assert names[0] == r'bytes:\xe2' and len(set(names)) == 7


@pytest.mark.parametrize(
  'fields, word',
  [
    ({'prompt': None}, 'prompt'),
    ({'prompt': ''}, 'prompt'),
    ({'prompt': []}, 'prompt'),
    ({'prompt': [1, 'a']}, 'prompt'),
    ({'prompt': [[]]}, 'prompt'),
    ({'prompt': [[1]] * 9, 'n': 16}, 'more than 8 prompts'),
    ({'prompt': ['x'] * 6}, 'choices are more than the 5'),
    ({'prompt': [264]}, '0..263'),
    ({'prompt': [-1]}, '0..263'),
    ({'prompt': {'a': 1}}, 'prompt'),
    ({'prompt': 'x' * 40}, 'maximum context length'),
    ({'max_tokens': 0}, 'max_tokens'),
    ({'max_tokens': 1.5}, 'max_tokens'),
    ({'max_tokens': True}, 'max_tokens'),
    ({'max_tokens': 31}, 'max_tokens'),
    ({'max_tokens': 30}, 'maximum context length'),
    ({'temperature': -1}, 'temperature'),
    ({'temperature': 'hot'}, 'temperature'),
    ({'top_p': 0}, 'top_p'),
    ({'n': 99}, 'n must lie'),
    ({'best_of': 2}, 'best_of'),
    ({'stop': ['']}, 'stop'),
    ({'stop': 'x' * 300}, 'stop'),
    ({'seed': 'a'}, 'seed'),
    ({'stream': 1}, 'stream'),
    ({'logprobs': 6}, 'logprobs'),
    ({'logit_bias': {'1': 500}}, 'logit_bias'),
    ({'presence_penalty': 3}, 'presence_penalty'),
    ({'repetition_penalty': 0}, 'repetition_penalty'),
    ({'exit_threshold': 'no'}, 'exit_threshold'),
    ({'response_format': {'type': 'xml'}}, 'response_format'),
  ],
)
def test_wrong_fields_are_refused_with_a_reason(client, fields, word):
  reply = client.post('/v1/completions', json=ask(**fields))
  assert reply.status_code == 400
  assert word in reply.json()['error']['message']


@pytest.mark.parametrize(
  'raw, status',
  [
    (b'', 400),
    (b'{', 400),
    (b'[]', 400),
    (b'\xff\xfe', 400),
    (b'{"prompt": "\xed\xa0\x80"}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"temperature": NaN, "prompt": "a"}', 400),
    (b'[' * 3000, 400),
    (b'{"prompt": ' + b'1' * 3000 + b'}', 400),
    (b'"' + b'x' * 5000 + b'"', 413),
  ],
)
def test_bodies_that_are_no_request_are_refused(client, raw, status):
  reply = client.post('/v1/completions', content=raw, headers={'Content-Type': 'application/json'})
  assert reply.status_code == status, reply.text
  assert reply.json()['error']['message']


def test_a_body_of_another_type_is_refused(client):
  body = json.dumps(ask())
  for kind in ('text/plain', 'application/x-www-form-urlencoded'):
    given = {'Content-Type': kind}
    reply = client.post('/v1/completions', content=body, headers=given)
    assert reply.status_code == 415


def test_log_probabilities_come_with_a_stream(client):
  body = ask(logprobs=2, ignore_eos=True)
  whole = client.post('/v1/completions', json=body).json()['choices'][0]
  parts = [
    e['choices'][0]['logprobs']
    for e in events(client.post('/v1/completions', json=body | {'stream': True}))
  ]
  for field in ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset'):
    joined = [v for part in parts for v in part[field]]
    assert joined == whole['logprobs'][field]


def test_templates_get_whole_messages(client, child):
  template, child.tokenizer.chat_template = (
    child.tokenizer.chat_template,
    (
      '{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ m.name }}'
      '{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}'
      '{% endfor %}{{ mode }}'
    ),
  )
  try:
    call = {'id': '1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{"x": 12}'}}
    messages = [
      {'role': 'user', 'content': 'a'},
      {'role': 'assistant', 'content': None, 'tool_calls': [call]},
      {'role': 'tool', 'content': 'b', 'name': 'f'},
      {'role': 'assistant', 'content': None},
    ]
    body = {'messages': messages, 'max_tokens': 1, 'chat_template_kwargs': {'mode': 'M'}}
    reply = client.post('/v1/chat/completions', json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()['usage']['prompt_tokens'] == len('ua' + 'a12' + 'tbf' + 'a' + 'M')
    call['function']['arguments'] = '{'
    reply = client.post('/v1/chat/completions', json=body)
    assert reply.status_code == 400 and 'not JSON' in reply.text
    body['messages'] = [{'role': 'user', 'content': None}]
    assert client.post('/v1/chat/completions', json=body).status_code == 400
  finally:
    child.tokenizer.chat_template = template


def test_log_probabilities_of_a_sentencepiece_vocabulary():
  tokenizer = byte_fallback(words=['▁world', '▁true', '▁s'])
  text = ' world 語 true s'
  ids = [tokenizer.token_id('▁world'), *tokenizer.encode(' 語', bos=False)]
  ids += [tokenizer.token_id('▁true'), tokenizer.token_id('▁s')]
  row = Detokenizer(tokenizer, tokenizer.encode('a', bos=False), (), (), 0, lambda i, t: None)
  row.extend(ids)
  assert row.finish(1, 'length').text == text
  # Two pairs that decode alike on their own, and two names of one letter.
  top = [(tokenizer.token_id('s'), -1.0), (tokenizer.token_id('▁s'), -2.0)]
  top += [(tokenizer.token_id(f'<0x{b:02X}>'), -3.0) for b in (0xE8, 0xAA, ord('s'))]
  params = types.SimpleNamespace(logprobs=5)
  request = types.SimpleNamespace(params=params, detokenizer=row, logprobs=[(-1.0, top)] * len(ids))
  found = Answer(types.SimpleNamespace(chat=False), 'm', tokenizer)._logprobs(request, 0, len(ids))
  named = ''.join(t for t in found['tokens'] if not t.startswith('bytes:'))
  assert named == text.replace('語', '')
  assert r'bytes:\xe8' in found['tokens']
  starts = [0, 6, 7, 7, 7, 8, 13]
  assert found['text_offset'] == starts and text[6:9] == ' 語 '
  assert len(found['top_logprobs'][0]) == 5
  chat = Answer(types.SimpleNamespace(chat=True), 'm', tokenizer)._logprobs(request, 0, len(ids))
  joined = b''.join(bytes(c['bytes']) for c in chat['content'])
  assert joined == text.encode()


def test_other_models_chats_and_paths(client):
  reply = client.post('/v1/completions', json=ask(model='gpt'))
  assert reply.status_code == 404
  assert client.get('/v1/models').json()['data'][0]['id'] == 'tiny'
  assert client.get('/v1/models/tiny').json()['loops'] == 2
  assert client.get('/v1/models/other').status_code == 404
  for messages in (None, [], ['a'], [{'role': 'user'}], [{'content': 'a'}]):
    reply = client.post('/v1/chat/completions', json={'messages': messages})
    assert reply.status_code == 400
  assert client.get('/v1/completions').status_code == 405
  assert client.get('/health').json() == {'status': 'ok'}
  assert '<textarea' in client.get('/').text


def test_a_full_queue_asks_to_come_back(client):
  # Two slots and three places: a sixth request finds none.
  body = ask(n=5, max_tokens=20, ignore_eos=True)
  replies = []
  post = lambda: replies.append(client.post('/v1/completions', json=body))
  threads = [threading.Thread(target=post) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  found = sorted(r.status_code for r in replies)
  assert found[0] == 200 and found[-1] == 429
  refused = next(r for r in replies if r.status_code == 429)
  assert refused.headers['retry-after'] == '1'
  assert client.post('/v1/completions', json=body).status_code == 200


def test_many_clients_get_what_each_gets_alone(client, child):
  prompts = [chr(97 + i) * (1 + i) for i in range(8)]
  want = [generate.complete(child, p, max_new_tokens=9, ignore_eos=True)[0].text for p in prompts]
  got = [''] * len(prompts)

  def one(i):
    while True:
      reply = client.post(
        '/v1/completions', json=ask(prompt=prompts[i], max_tokens=9, ignore_eos=True)
      )
      if reply.status_code != 429:
        break
      time.sleep(0.05)
    got[i] = reply.json()['choices'][0]['text']

  threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert got == want


def sample(text, name, **labels):
  """A sample of Prometheus' text format; 0 if it is not there."""
  from prometheus_client.parser import text_string_to_metric_families

  for family in text_string_to_metric_families(text):
    for one in family.samples:
      if one.name == name and labels.items() <= one.labels.items():
        return one.value
  return 0


def test_metrics_count_what_happened(client):
  before = client.get('/metrics').text
  client.post('/v1/completions', json=ask(ignore_eos=True))
  after = client.get('/metrics').text
  grown = lambda name, **labels: sample(after, name, **labels) - sample(before, name, **labels)
  assert grown('vllm:generation_tokens_total', model_name='tiny') == 12
  assert grown('vllm:prompt_tokens_total') == 7
  assert grown('vllm:request_success_total', finished_reason='length') == 1
  for name in ('request_prompt_tokens', 'request_generation_tokens', 'request_params_max_tokens'):
    assert grown(f'vllm:{name}_count') == 1
  assert grown('vllm:request_prompt_tokens_sum') == 7
  assert grown('vllm:request_generation_tokens_sum') == 12
  assert grown('vllm:inter_token_latency_seconds_count') == 11
  parts = [
    grown(f'vllm:{name}_seconds_sum')
    for name in ('request_queue_time', 'request_prefill_time', 'request_decode_time')
  ]
  assert min(parts) >= 0
  np.testing.assert_allclose(sum(parts), grown('vllm:e2e_request_latency_seconds_sum'), rtol=1e-6)
  assert grown('rrt:tokens_by_loops_total', loops='2') == 12
  assert sample(after, 'rrt:mean_exit_depth', model_name='tiny') == 2
  assert sample(after, 'vllm:num_requests_running') == 0
  assert sample(after, 'vllm:time_to_first_token_seconds_bucket', le='+Inf') >= 1
  helps = [line for line in after.splitlines() if line.startswith('# HELP')]
  assert len(helps) > 20 and all(len(line.split()) > 4 for line in helps if '_created' not in line)


def test_an_engine_that_stops_is_told(child):
  engine = Engine(child, slots=1, page=8, steps=2)
  worker = Worker(engine, child.tokenizer, max_waiting=3)

  def broken():
    time.sleep(0.5)  # The others come meanwhile.
    raise MemoryError('out of memory')

  engine.step = broken
  app = Server(worker, child.tokenizer, 'tiny', Limits()).app()
  with TestClient(app) as client:
    replies = []
    post = lambda: replies.append(client.post('/v1/completions', json=ask()))
    threads = [threading.Thread(target=post) for _ in range(3)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(timeout=20)
    assert [r.status_code for r in replies] == [503] * 3
    assert all('out of memory' in r.text for r in replies)
    assert client.get('/health').status_code == 503
    assert client.post('/v1/completions', json=ask()).status_code == 503


def test_a_key_is_asked_for(child):
  engine = Engine(child, slots=1, page=8, steps=2)
  worker = Worker(engine, child.tokenizer, max_waiting=3)
  app = Server(worker, child.tokenizer, 'tiny', Limits(), 'secret').app()
  with TestClient(app) as client:
    assert client.get('/v1/models').status_code == 401
    for wrong in ('Bearer', 'Bearer secre', 'secret', 'Bearer \xe9'):
      given = {'Authorization': wrong.encode('latin-1')}
      assert client.get('/v1/models', headers=given).status_code == 401
    given = {'Authorization': 'Bearer secret'}
    assert client.get('/v1/models', headers=given).status_code == 200
    assert client.get('/health').status_code == 200


def slow(child, seconds=60.0):
  """A worker and its application, which takes four seconds for 25 tokens."""
  engine = Engine(child, slots=2, page=8, steps=2, penalties=True, logprobs=20)
  worker = Worker(engine, child.tokenizer, max_waiting=3)
  step = engine.step

  def slowly():
    time.sleep(0.15)
    return step()

  engine.step = slowly
  limits = Limits(max_tokens=30, seconds=seconds)
  return worker, Server(worker, child.tokenizer, 'tiny', limits).app()


def wait_until(ready):
  end = time.monotonic() + 60
  while not ready():
    assert time.monotonic() < end
    time.sleep(0.02)


def cancelled(worker):
  return sample(worker.metrics.text(), 'vllm:request_success_total', finished_reason='abort')


LONG = ask(max_tokens=25, ignore_eos=True)  # 7 tokens before, 32 in all


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_away_ends_its_request(child, stream):
  pytest.importorskip('uvicorn')
  from tests.serving import serving

  worker, app = slow(child)
  body = json.dumps(LONG | {'stream': stream})
  kind = {'Content-Type': 'application/json'}
  with serving(app) as address:
    connection = http.client.HTTPConnection(*address)
    connection.request('POST', '/v1/completions', body, kind)
    if stream:
      with connection.getresponse() as reply:
        assert reply.readline().startswith(b'data: ')
    else:
      wait_until(lambda: sample(worker.metrics.text(), 'vllm:num_requests_running'))
    connection.close()
    wait_until(lambda: not worker._tickets)
  assert cancelled(worker) == 1
  assert sample(worker.metrics.text(), 'vllm:generation_tokens_total') < 25


@pytest.mark.slow
def test_an_answer_that_takes_too_long_ends(child):
  worker, app = slow(child, seconds=2)
  with TestClient(app) as client:
    reply = client.post('/v1/completions', json=LONG)
    assert reply.status_code == 504
    assert 'within 2 s' in reply.json()['error']['message']
    wait_until(lambda: cancelled(worker) == 1)
    reply = client.post('/v1/completions', json=LONG | {'stream': True})
    *pieces, last = filter(None, reply.text.split('\n\n'))
    assert len(pieces) > 1 and 'within 2 s' in last
    assert json.loads(last.removeprefix('data: '))['error']
    wait_until(lambda: cancelled(worker) == 2)
    assert sample(worker.metrics.text(), 'vllm:generation_tokens_total') < 40


def test_a_client_that_stops_reading_is_left(child):
  async def post(app):
    body = json.dumps(LONG | {'stream': True}).encode()
    sent = [{'type': 'http.request', 'body': body}]
    never = asyncio.Event()

    async def receive():
      if not sent:
        await never.wait()
      return sent.pop()

    async def send(message):
      if message['type'] == 'http.response.body':
        await never.wait()

    scope = {
      'type': 'http',
      'method': 'POST',
      'path': '/v1/completions',
      'headers': [(b'content-type', b'application/json')],
      'query_string': b'',
    }
    await asyncio.wait_for(app(scope, receive, send), 30)
    await asyncio.to_thread(wait_until, lambda: not worker._tickets)

  worker, app = slow(child, seconds=0.5)
  worker.start()
  asyncio.run(post(app))
  worker.stop()
  assert cancelled(worker) == 1


def test_a_full_server_refuses_before_it_tokenizes(client, monkeypatch):
  worker = client.worker
  monkeypatch.setattr(worker, '_open', worker._most)
  parse = lambda *_, **__: pytest.fail('read a prompt')
  monkeypatch.setattr('rrt.server.protocol.parse', parse)
  reply = client.post('/v1/completions', json=ask())
  assert reply.status_code == 429 and reply.headers['retry-after'] == '1'


def test_a_reason_may_quote_what_is_no_text(client, child, monkeypatch):
  template = '{{ raise_exception(messages[0].role) }}'
  monkeypatch.setattr(child.tokenizer, 'chat_template', template)
  reply = client.post(
    '/v1/chat/completions',
    content=b'{"messages": [{"role": "\\ud800", "content": "a"}]}',
    headers={'Content-Type': 'application/json'},
  )
  assert reply.status_code == 400
  assert '\\ud800' in reply.json()['error']['message']


def listens(url):
  try:
    httpx.get(url + 'health')
  except httpx.TransportError:
    return False
  return True


def start(place, *more, **environment):
  """A served tiny model and its address."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'rrt', 'serve', '--model=child', '--port=0', '--slots=2', *more],
    cwd=place,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=command.environment() | environment,
  )
  for line in process.stdout:
    if 'http://' in line:
      return process, line.split()[-1]
  raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_openais_client_then_sigterm(tmp_path):
  openai = pytest.importorskip('openai')
  pytest.importorskip('uvicorn')
  child = runs.child()
  long = dataclasses.replace(child.config, max_context=2048)
  save(dataclasses.replace(child, config=long), tmp_path / 'child')
  process, url = start(tmp_path, RRT_API_KEY='k')
  try:
    client = openai.OpenAI(base_url=url + 'v1', api_key='k', max_retries=0)
    want = generate.complete(child, 'The sea', max_new_tokens=12)[0].text
    got = client.completions.create(model='child', prompt='The sea', max_tokens=12, temperature=0)
    assert got.choices[0].text == want
    pieces = client.completions.create(
      model='child', prompt='The sea', max_tokens=12, temperature=0, stream=True
    )
    assert ''.join(p.choices[0].text for p in pieces) == want
    with pytest.raises(openai.BadRequestError, match='temperature'):
      client.completions.create(model='child', prompt='a', temperature=9)
    with pytest.raises(openai.AuthenticationError):
      openai.OpenAI(base_url=url + 'v1', api_key='x').models.list()
    # What runs at SIGTERM is answered to its end; nothing new is taken.
    pieces = client.completions.create(
      model='child',
      prompt='a',
      max_tokens=2000,
      stream=True,
      stream_options={'include_usage': True},
      extra_body={'ignore_eos': True},
    )
    got = [next(pieces)]
    reader = threading.Thread(target=lambda: got.extend(pieces))
    reader.start()
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: not listens(url))
    assert reader.is_alive()
    reader.join(timeout=60)
    assert got[-2].choices[0].finish_reason == 'length'
    assert got[-1].usage.completion_tokens == 2000
    assert process.wait(timeout=30) == 0
  finally:
    process.kill()
  printed = process.stdout.read() + process.stderr.read()
  assert 'The sea' not in printed


@pytest.mark.parametrize(
  'more, word',
  [
    (['--host=0.0.0.0'], 'give them a key'),
    (['--slots=0'], 'slots=0'),
    (['--gate=stored'], 'rrt fit-gate'),
    (['--gate=change'], 'needs a --threshold'),
    (['--api_key_file=none'], 'api_key_file'),
    (['--port=70000'], '--port=70000'),
    (['--max_tokens=0'], '--max_tokens=0'),
    (['--max_waiting=-99'], '--max_waiting=-99'),
    (['--seconds=nan'], '--seconds=nan'),
    (['--context=1'], '--context=1'),
    (['--threshold=1'], '--threshold'),
    (['--gate=change', '--threshold=inf'], '--threshold=inf'),
    (['--gate=change', '--threshold=nan'], '--threshold=nan'),
    (['--prefill_tokens=0'], '--prefill_tokens=0'),
  ],
)
def test_a_server_that_cannot_work_does_not_start(tmp_path, more, word):
  pytest.importorskip('uvicorn')
  save(runs.child(), tmp_path / 'child')
  done = subprocess.run(
    [sys.executable, '-m', 'rrt', 'serve', '--model=child', '--port=0', *more],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    env=command.environment(),
  )
  assert done.returncode == 2 and word in done.stderr, done.stderr


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path):
  pytest.importorskip('uvicorn')
  with bind('127.0.0.1', 0, 1) as sock:
    sock.listen()
    flags = '--model=none', f'--port={sock.getsockname()[1]}'
    status, _, error = command.run('serve', *flags, cwd=tmp_path)
  assert status == 2 and 'not free' in error


def test_a_body_that_stops_half_way_is_refused():
  class Stalled:
    headers = {'content-length': '20'}

    async def stream(self):
      yield b'{"prompt":'
      await asyncio.sleep(60)

  idle = types.SimpleNamespace(engine=None)
  server = Server(idle, None, 'tiny', Limits(body_seconds=0.05))
  with pytest.raises(Refused, match='took longer') as refused:
    asyncio.run(server._read_in_time(Stalled()))
  assert refused.value.status == 408


def test_numbers_for_the_context_are_those_of_the_model(client, child):
  context = client.get('/v1/models').json()['data'][0]['max_model_len']
  assert context == child.config.max_context


@pytest.mark.slow
def test_two_interrupts_end_quietly(tmp_path):
  openai = pytest.importorskip('openai')
  pytest.importorskip('uvicorn')
  child = runs.child()
  long = dataclasses.replace(child.config, max_context=2048)
  save(dataclasses.replace(child, config=long), tmp_path / 'child')
  process, url = start(tmp_path, '--warm=16')
  try:
    client = openai.OpenAI(base_url=url + 'v1', api_key='k', max_retries=0)
    pieces = client.completions.create(
      model='child', prompt='a', max_tokens=2000, stream=True, extra_body={'ignore_eos': True}
    )
    next(pieces)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not listens(url))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (0, 130, -signal.SIGINT)
  finally:
    process.kill()
  error = process.stderr.read()
  assert 'Traceback' not in error and 'abort' not in error.lower(), error
