"""Chat and instruction data: the loss counts the answers, and nothing else."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from rrt import console
from rrt.data import conversations, pipeline
from rrt.data.sources import Source
from rrt.data.stream import DataSpec
from rrt.data.tokenizer import Tokenizer
from rrt.errors import InputError
from rrt.train.loop import uptrain
from tests import runs

pytest.importorskip('grain')
pytest.importorskip('jinja2')

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: the last turn has thoughts, earlier ones lose them.
FORGETFUL = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
  "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
  "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> Tokenizer:
  core = tokenizers.Tokenizer.from_str(runs.tokenizer()._core.to_str())
  core.add_special_tokens(['<|im_start|>', '<|im_end|>'])
  return Tokenizer(core, eos_ids=[0], bos_id=0, chat_template=template)


def turns(*contents):
  roles = ('user', 'assistant')
  return [{'role': roles[i % 2], 'content': c} for i, c in enumerate(contents)]


ROWS = [
  ({'messages': turns('Hi é', 'Hello.', 'Bye', 'Yes.')}, ['Hello.', 'Yes.']),
  (
    {
      'conversations': [
        {'from': 'system', 'value': 'Be brief.'},
        {'from': 'human', 'value': 'Hi'},
        {'from': 'gpt', 'value': 'No.'},
        {'from': 'human', 'value': 'Why?'},
      ]
    },
    ['No.'],
  ),
  ({'prompt': 'A', 'completion': 'B', 'extra': 3}, ['B']),
  ({'prompt': turns('A'), 'completion': [{'role': 'assistant', 'content': 'B'}]}, ['B']),
  ({'instruction': 'Add.', 'input': '1 2', 'output': '3'}, ['3']),
  ({'instruction': 'Add.', 'context': '', 'response': '3', 'system': 'S'}, ['3']),
  ({'question': 'Why?', 'answer': 'Because.'}, ['Because.']),
]


def answers(text, spans):
  return [text[a:b] for a, b in spans]


@pytest.mark.parametrize(('row', 'want'), ROWS)
def test_each_form_of_row(row, want):
  tokenizer = chat_tokenizer()
  conversation = conversations.parse(row, 'row 1')
  text, spans, complete = conversations.render(conversation, tokenizer.apply_chat, ['<|im_end|>'])
  assert complete and answers(text, spans) == [w + '<|im_end|>' for w in want]
  assert text.endswith(want[-1] + '<|im_end|>\n')  # A question that nobody answers is gone.
  ids, counted = tokenizer.encode_marked(text, spans)
  assert tokenizer.decode(ids, skip_special=False) == text
  said = [i for i, c in zip(ids, counted, strict=True) if c]
  assert tokenizer.decode(said) == ''.join(want)
  for name in ('instruction', 'system'):
    assert row.get(name, '') in text


def test_a_template_that_rewrites_earlier_turns():
  tokenizer = chat_tokenizer(FORGETFUL)
  conversation = conversations.parse({'messages': turns('a', 'b', 'c', 'd')}, 'row')
  text, spans, complete = conversations.render(conversation, tokenizer.apply_chat, ['<|im_end|>'])
  assert not complete and answers(text, spans) == ['<think></think>d<|im_end|>']


def test_rows_that_are_none(capsys):
  for row in (
    {'text': 'a'},
    {'messages': turns('a')},
    {'messages': []},
    {'prompt': 'a'},
    {'instruction': 'a', 'output': None},
  ):
    assert conversations.parse(row, 'row 1') is None
  for row, reason in (
    ({'messages': 'a'}, 'is a text, not a list'),
    ({'messages': 3}, 'no list of messages'),
    ({'messages': [{'content': 'a'}]}, 'message 0 .* has no role'),
    ({'messages': [{'role': 'user', 'content': 3}]}, 'message 0 .* no text'),
    ({'messages': turns('a', 'b'), 'tools': '{'}, "'tools' is not JSON"),
  ):
    with pytest.raises(InputError, match=f'row 1: .*{reason}'):
      conversations.parse(row, 'row 1')


def write(path, ending: str, rows) -> str:
  if ending == 'parquet':
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path / 'a.parquet')
  else:
    (path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return str(path / f'a.{ending}')


def counted_text(spec, tokenizer, batch=2, length=32):
  """The texts whose tokens are counted targets, sorted."""
  ids = [[] for _ in range(batch)]  # An answer may go on in the lane's next row.
  for got in pipeline.batches(spec, tokenizer, batch=batch, length=length, prefetch=0):
    for row in range(batch):
      on = got['weights'][row] > 0
      assert np.array_equal(got['tokens'][row, 1:][on[:-1]], got['targets'][row, :-1][on[:-1]])
      ids[row] += got['targets'][row][on].tolist()
  texts = [t for row in ids for t in tokenizer.decode(row, skip_special=False).split('<|im_end|>')]
  return sorted(filter(None, texts))


@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'python', 'dataset'])
def test_the_loss_counts_answers_alone(tmp_path, ending, capsys, monkeypatch):
  monkeypatch.setattr(console, '_noted', set())
  rows = [{'messages': turns(f'question {i}', f'{i}.')} for i in range(12)] + [
    {'messages': turns('unanswered')}
  ]
  rows_in = None
  path = 'data'
  if ending in ('jsonl', 'parquet'):
    path = write(tmp_path, ending, rows)
  elif ending == 'python':
    rows_in = (row['messages'] for row in rows)  # Bare lists of messages, once.
  else:
    datasets = pytest.importorskip('datasets')
    rows_in = datasets.Dataset.from_list(rows)
  source = Source(path, format='chat', rows=rows_in)
  tokenizer = chat_tokenizer()
  got = counted_text(DataSpec((source,), epochs=1), tokenizer)
  assert got == sorted(f'{i}.' for i in range(12))
  assert '1 row without a conversation with an answer left out' in capsys.readouterr().err


def test_texts_from_python():
  tokenizer = runs.tokenizer()
  texts = [f'text {i}' for i in range(8)]
  datasets = pytest.importorskip('datasets')
  for rows, field in (
    (texts, 'text'),
    (iter(texts), 'text'),
    ([{'body': t} for t in texts], 'body'),
    (datasets.Dataset.from_dict({'body': texts, 'n': list(range(8))}), 'body'),
  ):
    spec = DataSpec((Source('data', field=field, rows=rows),), epochs=1, shuffle=False)
    (got,) = pipeline.batches(spec, tokenizer, batch=8, length=16, prefetch=0)
    assert [tokenizer.decode(r[r > 0]) for r in got['tokens']] == texts


@pytest.mark.parametrize(
  ('rows', 'format', 'reason'),
  [
    ('one text', 'text', 'give a list of texts'),
    ([1], 'text', 'row 0: is int; it must be a text'),
    (['a'], 'chat', 'row 0: is str; it must be a dict of fields or a list of messages'),
    ([], 'text', 'holds no text'),
    (
      [{'body': 'a'}],
      'text',
      "no row has a text in the field 'text' .the fields of the first: body",
    ),
    ([{'prompt': 'a'}], 'text', "or set format to 'chat'"),
    ([{'text': 'a'}], 'chat', 'no row has a conversation with an answer'),
    ([{'messages': turns('a', 'b')}], 'chat', '1 conversations are fewer than the rows'),
    ([{'messages': turns('a', 'b')}], 'chats', "format='chats': must be one of"),
  ],
)
def test_bad_rows_get_one_sentence(rows, format, reason):
  with pytest.raises(InputError, match=reason):
    spec = DataSpec((Source('data', format=format, rows=rows),))
    pipeline.batches(spec, chat_tokenizer(), batch=2, length=8)


def test_a_chat_needs_a_template_and_rows(tmp_path):
  rows = [{'messages': turns('a', 'b')}] * 4
  spec = DataSpec((Source('data', format='chat', rows=rows),))
  with pytest.raises(InputError, match='needs a tokenizer with a chat template'):
    pipeline.batches(spec, chat_tokenizer(None), batch=2, length=8)
  (tmp_path / 'a.txt').write_text('a text')
  spec = DataSpec((Source(str(tmp_path / 'a.txt'), format='chat'),))
  with pytest.raises(InputError, match="is text; format='chat' reads rows"):
    pipeline.batches(spec, chat_tokenizer(), batch=2, length=8)


def test_uptraining_on_conversations_and_on_texts_from_python(tmp_path):
  parent, child = runs.parent(), runs.child()
  tokenizer = chat_tokenizer()
  assert tokenizer.vocab_size <= parent.config.vocab_size
  parent = dataclasses.replace(parent, tokenizer=tokenizer)
  child = dataclasses.replace(child, tokenizer=tokenizer)
  rows = [{'messages': turns(f'q{i}', 'yes')} for i in range(16)]
  heldout = write(tmp_path, 'jsonl', rows)
  recipe = runs.recipe('unused', steps=12)
  recipe['data'] = {'format': 'chat'}
  recipe['heldout'] = {'path': heldout, 'format': 'chat', 'context': 32, 'max_tokens': 40}
  run = uptrain(parent, child, recipe, data=rows)
  nats = [r['eval/cross_entropy'] for r in run.history if 'eval/cross_entropy' in r]
  assert nats[-1] < nats[0] - 0.3
  assert all(r['train/tokens'] <= 8 * 32 / 3 for r in run.history if 'train/tokens' in r)

  recipe['data'], recipe['heldout'] = {}, {}
  run = uptrain(parent, child, recipe | {'steps': 2}, data=(f'text {i}' for i in range(40)))
  assert run.step == 2
  with pytest.raises(InputError, match='row 0: is int'):
    uptrain(parent, child, recipe, data=[1])
