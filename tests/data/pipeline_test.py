"""Packing, mixing, sharding, and exact resumption of the batches."""

import collections
import itertools
import json
import re
import threading

import numpy as np
import pytest

from rrt.data.pipeline import DataSpec, batches, read_tokens, rows
from rrt.data.sources import Source
from rrt.errors import InputError

pytest.importorskip('grain')


class WordTokenizer:
  """One token a word with the space before it, in order of first sight."""

  bos_id = None
  eos_ids = (0,)

  def __init__(self):
    self._ids = {'<eos>': 0, '<bos>': 1}
    self._lock = threading.Lock()  # batches are made ahead by a thread
    self.sha256 = 'f' * 64

  @property
  def vocab_size(self):
    return 1_000_000

  def encode(self, text, bos=None):
    words = re.findall(r'\s*\S+|\s+$', text)
    with self._lock:
      return [self._ids.setdefault(w, len(self._ids)) for w in words]

  def decode(self, ids, skip_special=True):
    with self._lock:
      words = {i: w for w, i in self._ids.items()}
    keep = [int(i) for i in ids if not (skip_special and int(i) < 2)]
    return ''.join(words[i] for i in keep)


def documents(count, name='d', sizes=(3, 17, 1, 40, 8)):
  """Documents of different lengths whose every word is unlike all others."""
  return [' '.join(f'{name}{i}.{j}' for j in range(sizes[i % len(sizes)])) for i in range(count)]


def write(path, texts):
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return str(path)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_same(one, two):
  assert len(one) == len(two)
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
      assert a[name].dtype == b[name].dtype


@pytest.fixture
def path(tmp_path):
  return write(tmp_path / 'a.jsonl', documents(23))


def epoch(path, **options):
  return DataSpec((Source(path),), epochs=1, **options)


def test_shapes_and_types(path):
  got = next(batches(path, WordTokenizer(), batch=3, length=16))
  assert {n: (v.shape, v.dtype.name) for n, v in got.items()} == {
    'tokens': ((3, 16), 'int32'),
    'targets': ((3, 16), 'int32'),
    'segment_ids': ((3, 16), 'int32'),
    'positions': ((3, 16), 'int32'),
    'weights': ((3, 16), 'float32'),
  }


@pytest.mark.parametrize('batch', [1, 2, 5])
@pytest.mark.parametrize('length', [2, 16, 200])
def test_an_epoch_holds_every_token_once(path, batch, length):
  tokenizer = WordTokenizer()
  seen, targets = collections.Counter(), collections.Counter()
  for got in batches(epoch(path), tokenizer, batch=batch, length=length):
    real = got['segment_ids'] > 0
    seen.update(got['tokens'][real].tolist())
    counted = got['weights'] > 0
    targets.update(got['targets'][counted].tolist())
    assert not np.any(got['tokens'][~real]) and not np.any(counted & ~real)
    assert not np.any(got['targets'][~counted])
  expected, predicted = collections.Counter(), collections.Counter()
  for text in documents(23):
    tokens = [*tokenizer.encode(text), 0]
    expected.update(tokens)
    predicted.update(tokens[1:])
  assert seen == expected
  assert targets == predicted  # each token but a document's first, once


def test_targets_and_positions_stay_inside_a_document(path):
  tokenizer = WordTokenizer()
  follows = {}
  for text in documents(23):
    tokens = [*tokenizer.encode(text), 0]
    follows.update(itertools.pairwise(tokens))
  for got in batches(epoch(path), tokenizer, batch=2, length=16):
    for b in range(2):
      token, target, segment, position, weight = (
        got[n][b] for n in ('tokens', 'targets', 'segment_ids', 'positions', 'weights')
      )
      for i in range(16):
        if weight[i]:
          assert follows[token[i]] == target[i]
        elif segment[i]:
          assert token[i] == 0  # only a document's end lacks a target
        same = i > 0 and segment[i] == segment[i - 1]
        if segment[i]:
          assert position[i] == (position[i - 1] + 1 if same else 0)
        if weight[i] and i + 1 < 16:
          assert segment[i + 1] == segment[i] and token[i + 1] == target[i]


def test_a_long_document_goes_on_in_the_next_row(tmp_path):
  text = ' '.join(f'w{i}' for i in range(20))
  path = write(tmp_path / 'a.jsonl', [text])
  tokenizer = WordTokenizer()
  got = list(batches(epoch(path), tokenizer, batch=1, length=8))
  tokens = [*tokenizer.encode(text), 0]
  joined = np.concatenate([g['tokens'][0] for g in got])
  assert joined[:21].tolist() == tokens
  weights = np.concatenate([g['weights'][0] for g in got])
  assert weights.tolist() == [1] * 20 + [0] * 4
  assert [int(g['segment_ids'].max()) for g in got] == [1, 1, 1]


@pytest.mark.parametrize('prefetch', [0, 3])
def test_resume_is_exact_at_every_step(path, prefetch):
  def make(tokenizer):
    return batches(path, tokenizer, batch=2, length=16, seed=5, prefetch=prefetch)

  tokenizer = WordTokenizer()
  iterator = make(tokenizer)
  states, expected = [iterator.get_state()], []
  for _ in range(30):
    expected.append(next(iterator))
    states.append(json.loads(json.dumps(iterator.get_state())))
  assert any(t for s in states for _, t in s['lanes'].values())  # mid-document
  fresh = make(tokenizer)
  for step, state in enumerate(states[:-1]):
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, min(3, 30 - step)), expected[step : step + 3])
  iterator.set_state(states[0])  # back, on an iterator that ran ahead
  assert_same(take(iterator, 30), expected)


def test_order_depends_on_the_seed_and_on_nothing_else(path):
  tokenizer = WordTokenizer()
  make = lambda seed: take(batches(path, tokenizer, batch=2, length=16, seed=seed), 8)
  assert_same(make(1), make(1))
  assert any((a['tokens'] != b['tokens']).any() for a, b in zip(make(1), make(2), strict=True))


def test_each_epoch_has_its_own_order(tmp_path):
  path = write(tmp_path / 'a.jsonl', documents(50, sizes=(3,)))
  spec = DataSpec((Source(path),), epochs=2)
  tokenizer = WordTokenizer()
  got = list(batches(spec, tokenizer, batch=1, length=4))
  order = [int(g['tokens'][0, 0]) for g in got]
  assert len(order) == 100
  assert sorted(order[:50]) == sorted(order[50:])
  assert order[:50] != order[50:]


def test_without_shuffle_the_order_is_the_files(path):
  tokenizer = WordTokenizer()
  got = list(batches(epoch(path, shuffle=False), tokenizer, batch=1, length=8))
  tokens = np.concatenate([g['tokens'][0] for g in got])
  expected = [t for d in documents(23) for t in [*tokenizer.encode(d), 0]]
  assert tokens[: len(expected)].tolist() == expected


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_the_global_batch(path, processes):
  tokenizer = WordTokenizer()
  whole = take(batches(path, tokenizer, batch=4, length=16, seed=3), 6)
  shares = [
    take(
      batches(
        path,
        tokenizer,
        batch=4 // processes,
        length=16,
        seed=3,
        process_index=p,
        process_count=processes,
      ),
      6,
    )
    for p in range(processes)
  ]
  joined = [{n: np.concatenate([s[i][n] for s in shares]) for n in whole[0]} for i in range(6)]
  assert_same(joined, whole)


def test_processes_are_disjoint_and_together_complete(path):
  tokenizer = WordTokenizer()
  seen = []
  for p in range(2):
    share = collections.Counter()
    for got in batches(
      epoch(path), tokenizer, batch=2, length=16, process_index=p, process_count=2
    ):
      share.update(got['tokens'][got['tokens'] > 0].tolist())
    seen.append(share)
  assert not seen[0] & seen[1]
  every = [t for d in documents(23) for t in tokenizer.encode(d)]
  assert seen[0] + seen[1] == collections.Counter(every)


def test_going_on_with_another_number_of_processes(path):
  tokenizer = WordTokenizer()

  def make(batch, p=0, n=1):
    return batches(path, tokenizer, batch=batch, length=16, process_index=p, process_count=n)

  whole = make(4)
  take(whole, 3)
  pair = [make(2, p, 2) for p in range(2)]
  for iterator in pair:
    take(iterator, 3)
  states = [iterator.get_state() for iterator in pair]
  expected = take(whole, 4)
  fresh = make(4)
  fresh.set_state(states)  # two processes to one
  assert_same(take(fresh, 4), expected)
  with pytest.raises(InputError, match='lacks row 2 of the global batch'):
    make(4).set_state(states[0])


@pytest.mark.parametrize(
  ('change', 'message'),
  [({'seed': 1}, 'seed'), ({'length': 8}, 'length'), ({'batch': 4}, 'global_batch')],
)
def test_state_of_another_run_is_refused(path, change, message):
  tokenizer = WordTokenizer()
  options = dict(batch=2, length=16, seed=0)
  state = batches(path, tokenizer, **options).get_state()
  other = batches(path, tokenizer, **{**options, **change})
  with pytest.raises(InputError, match=f'saved with {message} '):
    other.set_state(state)


def test_state_of_other_data_or_rubbish_is_refused(path, tmp_path):
  tokenizer = WordTokenizer()
  one = batches(path, tokenizer, batch=2, length=16)
  other = write(tmp_path / 'b.jsonl', documents(24))
  with pytest.raises(InputError, match='saved with data '):
    batches(other, tokenizer, batch=2, length=16).set_state(one.get_state())
  with pytest.raises(InputError, match='not one that this version'):
    one.set_state({'next_index': 3})


def test_data_may_move(path, tmp_path):
  tokenizer = WordTokenizer()
  one = batches(path, tokenizer, batch=2, length=16)
  take(one, 3)
  moved = write(tmp_path / 'moved.jsonl', documents(23))
  two = batches(moved, tokenizer, batch=2, length=16)
  two.set_state(one.get_state())
  assert_same(take(two, 3), take(one, 3))


def test_mix_gives_each_source_its_share_of_the_text(tmp_path):
  short = write(tmp_path / 's.jsonl', documents(40, 's', (5,)))
  long = write(tmp_path / 'l.jsonl', documents(15, 'l', (60,)))
  spec = DataSpec((Source(short, 3.0), Source(long, 1.0)))
  tokenizer = WordTokenizer()
  iterator = batches(spec, tokenizer, batch=2, length=64, seed=1)
  counts = collections.Counter()
  for got in take(iterator, 60):
    words = tokenizer.decode(got['tokens'].reshape(-1)).split()
    counts.update(word[0] for word in words)
  assert counts['s'] / (counts['s'] + counts['l']) == pytest.approx(0.75, abs=0.04)


def test_mix_without_weights_reads_all_once(tmp_path):
  one = write(tmp_path / 'a.jsonl', documents(7, 'a'))
  two = write(tmp_path / 'b.jsonl', documents(30, 'b'))
  spec = DataSpec((Source(one), Source(two)), epochs=1)
  tokenizer = WordTokenizer()
  seen = collections.Counter()
  for got in batches(spec, tokenizer, batch=2, length=16):
    seen.update(got['tokens'][got['tokens'] > 0].tolist())
  texts = documents(7, 'a') + documents(30, 'b')
  assert seen == collections.Counter(t for d in texts for t in tokenizer.encode(d))


def test_fewer_documents_than_rows_are_shared_out(tmp_path):
  text = ' '.join(f'w{i}' for i in range(400))
  path = write(tmp_path / 'a.jsonl', [text])
  tokenizer = WordTokenizer()
  got = next(batches(path, tokenizer, batch=4, length=32))
  firsts = {tuple(row) for row in got['tokens']}
  assert len(firsts) == 4
  seen = collections.Counter()
  for one in batches(epoch(path), tokenizer, batch=4, length=32):
    seen.update(one['tokens'][one['tokens'] > 0].tolist())
  assert seen == collections.Counter(tokenizer.encode(text))


def test_a_very_long_document_is_shared_out(tmp_path):
  texts = [' '.join(f'{k}{i}' for i in range(30000)) for k in 'ab']
  path = write(tmp_path / 'a.jsonl', texts)
  tokenizer = WordTokenizer()
  first = set(tokenizer.encode(texts[0]))
  seen, orders = collections.Counter(), []
  for got in batches(epoch(path), tokenizer, batch=1, length=32):
    tokens = got['tokens'][0][got['segment_ids'][0] > 0]
    seen.update(tokens.tolist())
    orders.append(bool(tokens[0] in first))
  expected = [t for d in texts for t in [*tokenizer.encode(d), 0]]
  assert seen == collections.Counter(expected)  # one separator a document
  changes = sum(a != b for a, b in itertools.pairwise(orders))
  assert changes > 20  # the two are interleaved, not one after the other


def test_separator(path):
  tokenizer = WordTokenizer()
  spec = epoch(path, separator=-1)
  got = list(batches(spec, tokenizer, batch=1, length=16))
  assert all((g['tokens'][g['segment_ids'] > 0] > 0).all() for g in got)
  with pytest.raises(InputError, match='separator is 9999999'):
    batches(epoch(path, separator=9999999), tokenizer, batch=1, length=16)


def test_a_document_does_not_end_like_a_turn(path):
  tokenizer = WordTokenizer()
  tokenizer.eos_ids = (7, 0)
  tokenizer.token = {7: '<|im_end|>', 0: '<|endoftext|>'}.get
  state = batches(path, tokenizer, batch=1, length=16).get_state()
  assert state['tokenizer'].endswith(':0')


def test_text_without_tokens_does_not_hang(path):
  tokenizer = WordTokenizer()
  tokenizer.encode = lambda text: []
  for prefetch in (0, 2):
    iterator = batches(path, tokenizer, batch=1, length=4, prefetch=prefetch)
    with pytest.raises(InputError, match='no token'):
      next(iterator)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch': 0}, 'batch is 0'),
    ({'length': 0}, 'length is 0'),
    ({'seed': -1}, 'seed is -1'),
    ({'process_index': 2, 'process_count': 2}, 'process_index is 2 of 2'),
  ],
)
def test_bad_sizes(path, options, message):
  with pytest.raises(InputError, match=message):
    batches(path, WordTokenizer(), **{'batch': 1, 'length': 8, **options})


def test_bad_specs():
  with pytest.raises(InputError, match='no source'):
    DataSpec(())
  with pytest.raises(InputError, match='weight of a is 0'):
    DataSpec((Source('a', 0.0),))
  with pytest.raises(InputError, match='to all sources or none'):
    DataSpec((Source('a', 1.0), Source('b')))
  with pytest.raises(InputError, match='epochs is 0'):
    DataSpec((Source('a'),), epochs=0)


def test_missing_file_before_any_work(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    batches(tmp_path / 'none.txt', WordTokenizer(), batch=1, length=8)


def test_close_keeps_the_place(path):
  tokenizer = WordTokenizer()
  one = batches(path, tokenizer, batch=1, length=8)
  two = batches(path, tokenizer, batch=1, length=8)
  take(one, 3), take(two, 3)
  one.close()
  assert_same(take(one, 3), take(two, 3))


# ------------------------------------------------------------------ evaluation


def test_read_tokens_joins_documents_by_blank_lines(path):
  tokenizer = WordTokenizer()
  expected = tokenizer.encode('\n\n'.join(documents(23)))
  assert read_tokens(path, tokenizer).tolist() == expected
  for count in (1, 7, 50, len(expected), 10**6):
    got = read_tokens(path, tokenizer, count)
    assert got.dtype == np.int32
    assert got.tolist() == expected[:count]


def test_read_tokens_takes_text(tmp_path):
  tokenizer = WordTokenizer()
  text = 'The cat sat on the mat.'
  assert read_tokens(text, tokenizer).tolist() == tokenizer.encode(text)
  with pytest.raises(InputError, match='no such file'):
    read_tokens('missing.txt', tokenizer)
  with pytest.raises(InputError, match='max_tokens is 0'):
    read_tokens(text, tokenizer, 0)
  with pytest.raises(InputError, match='no token'):
    read_tokens('', tokenizer)
  long = 'A line.\n' * 5000
  (tmp_path / 'a.txt').write_text(long)
  got = read_tokens(tmp_path / 'a.txt', tokenizer)
  assert got.tolist() == tokenizer.encode(long)


def test_rows():
  tokens = np.arange(1, 11)
  assert rows(tokens, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
  assert rows(tokens, 4, bos=0).tolist()[-1] == [0, 7, 8, 9]
  assert rows(tokens, 4, bos=1).tolist()[0] == [1, 2, 3, 4]
  assert rows(tokens, 100).tolist() == [tokens.tolist()]
  assert rows(tokens, 4).dtype == np.int32
  with pytest.raises(InputError, match='length is 1'):
    rows(tokens, 1)
  with pytest.raises(InputError, match='no token'):
    rows(np.zeros(0), 4)


class BeginTokenizer(WordTokenizer):
  """The same with a begin token."""

  bos_id = start_id = 1

  def encode(self, text, bos=None):
    return [1, *super().encode(text)]


def test_a_document_that_goes_on_begins_with_the_begin_token(tmp_path):
  path = write(tmp_path / 'a.jsonl', [' '.join(f'w{i}' for i in range(20))])
  tokenizer = BeginTokenizer()
  rows_of = take(batches(epoch(path), tokenizer, batch=1, length=8, prefetch=0), 3)
  words = [2 + i for i in range(20)]
  assert rows_of[0]['tokens'][0].tolist() == [1, *words[:7]]
  assert rows_of[1]['tokens'][0].tolist() == [1, *words[7:14]]
  assert rows_of[2]['tokens'][0].tolist() == [1, *words[14:], 0]
  # Every token is a target once: of the begin token only where text begins.
  targets = [t for row in rows_of for t in row['targets'][row['weights'] > 0].tolist()]
  assert targets == [*words, 0]
  for row in rows_of:
    assert row['segment_ids'][0].tolist() == [1] * 8
    assert row['positions'][0].tolist() == list(range(8))


def test_an_empty_batch_has_no_weight(path):
  batch = batches(path, WordTokenizer(), batch=3, length=16).empty()
  assert batch['tokens'].shape == (3, 16)
  assert not any(array.any() for array in batch.values())
