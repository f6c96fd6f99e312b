"""Chunked prefill: the same tokens, streams that go on, no program compiled late."""

import dataclasses
import itertools

import numpy as np
import pytest

from rrt.errors import InputError
from rrt.infer import decode, generate
from rrt.infer.engine import engine as engine_lib
from rrt.infer.engine import prefill
from rrt.infer.engine.engine import Engine
from rrt.infer.engine.request import Request
from tests import runs


@pytest.fixture(scope='module')
def model():
  """The child, for longer texts."""
  child = runs.child()
  return dataclasses.replace(child, config=dataclasses.replace(child.config, max_context=150))


def prompt(length: int, seed: int = 0) -> list[int]:
  return np.random.default_rng([seed, length]).integers(1, 257, length).tolist()


def run(engine, prompts, new=6):
  requests = [Request.of(p, new, ignore_eos=True) for p in prompts]
  return [r.tokens for r in engine.run(requests)]


@pytest.mark.parametrize('options', [{}, {'lossless': True}, {'penalties': True, 'slots': 1}])
def test_chunks_give_the_tokens_of_complete(model, options):
  # One token, a chunk exactly, one more, and past the last whole chunk of the cache.
  lengths = [1, 2, 17, 33, 34, 40, 65, 66, 100, 129, 140, 144]
  prompts = [prompt(n) for n in lengths]
  want = generate.complete(model, prompts, max_new_tokens=6, ignore_eos=True)
  options = {'slots': 3, 'page': 8, 'steps': 2, 'prefill_tokens': 32} | options
  assert run(Engine(model, **options), prompts) == [w.tokens for w in want]


def test_short_prompts_share_a_launch(model):
  engine = Engine(model, slots=8, page=8, prefill_tokens=64)
  take = lambda *lengths: engine._prefiller.take(
    [Request.of(prompt(n), 1) for n in lengths], range(8)
  )
  assert take(10, 12, 9, 17, 16).shape == (4, 16, 16)
  assert take(10, 12, 20).shape == (1, 16, 16)  # Four or one.
  assert take(10, 30, 10, 10).shape == (1, 16, 16)  # Four of 32 are more than a chunk.
  assert take(90, 10).shape == (1, 64, 128) and take(140).shape == (1, 64, 150)
  assert take(1, 1, 1, 1).shape == (4, 16, 16)


def test_a_long_prompt_does_not_stop_the_others(model):
  engine = Engine(model, slots=2, page=8, steps=2, prefill_tokens=16)
  stream = engine.submit(Request.of(prompt(3), 100, ignore_eos=True))
  while len(stream.tokens) < 4:
    engine.step()
  late = engine.submit(Request.of(prompt(120), 4, ignore_eos=True))
  counts = []
  while not late.tokens:
    engine.step()
    counts.append(len(stream.tokens))
  # Eight chunks, a call after each of them: none of these calls came without a token.
  assert len(counts) >= 8 and all(b > a for a, b in itertools.pairwise(counts))
  # Without a budget the whole prompt goes in at once.
  engine = Engine(model, slots=2, page=8, steps=2)
  stream = engine.submit(Request.of(prompt(3), 100, ignore_eos=True))
  while len(stream.tokens) < 4:
    engine.step()
  late = engine.submit(Request.of(prompt(120), 4, ignore_eos=True))
  steps = 0
  while not late.tokens:
    engine.step()
    steps += 1
  assert steps <= 3


def test_requests_that_are_cancelled_while_they_are_prefilled(model):
  engine = Engine(model, slots=2, page=8, steps=2, prefill_tokens=16)
  stream = engine.submit(Request.of(prompt(3), 60, ignore_eos=True))
  engine.step()
  gone = engine.submit(Request.of(prompt(100), 4))
  engine.step()
  engine.step()
  engine.cancel(gone)
  other = prompt(50, seed=1)
  next_one = engine.submit(Request.of(other, 6, ignore_eos=True))
  while engine.busy:
    engine.step()
  assert gone.finish == 'cancelled' and not gone.tokens and not engine._entering
  for request, ids, new in ((stream, prompt(3), 60), (next_one, other, 6)):
    want = generate.complete(model, [ids], max_new_tokens=new, ignore_eos=True)[0]
    assert request.tokens == want.tokens


def test_nothing_compiles_after_warming(model):
  engine = Engine(model, slots=4, page=8, steps=2, prefill_tokens=32, penalties=True)
  engine.warm()
  programs = (
    decode.extend,
    prefill._row,
    prefill._init_cache,
    engine_lib._insert,
    engine_lib._remove,
    engine_lib._call,
  )
  before = [p._cache_size() for p in programs]
  run(engine, [prompt(n) for n in range(1, 144)], new=2)
  request = engine.submit(Request.of(prompt(5), 20, ignore_eos=True))
  while not request.tokens:
    engine.step()
  engine.cancel(request)
  run(engine, [prompt(9)])
  assert [p._cache_size() for p in programs] == before
  assert len(engine._prefiller.shapes(149)) <= 8


def test_a_budget_must_be_a_number(model):
  with pytest.raises(InputError, match='prefill_tokens=0: must be a whole number'):
    Engine(model, prefill_tokens=0)


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    ({'nope': 1}, 'nope: an engine has no such option; there are slots'),
    ({'slot': 1}, 'slot: an engine has no such option; did you mean slots'),
    ({'gate': 'change', 'kv': 'propagate', 'threshold': 'a'}, "threshold='a': must be a finite"),
    ({'gate': 'change', 'kv': 'propagate', 'threshold': float('nan')}, 'threshold=nan'),
  ],
)
def test_options_that_are_none(model, options, reason):
  with pytest.raises(InputError, match=reason):
    Engine(model, **options)
