"""The engine writes what a plain decoder writes, whatever shares its batch."""

import collections
import dataclasses
import functools
import itertools
import re
import types

import jax
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.exits import fit as fit_lib
from rrt.exits import gate as gate_lib
from rrt.exits import score as score_lib
from rrt.infer import generate
from rrt.infer.engine import engine as engines
from rrt.infer.engine import speculate
from rrt.infer.engine.batch import Batch
from rrt.infer.engine.config import EngineConfig
from rrt.infer.engine.engine import Engine, Request
from rrt.infer.engine.request import empty_table
from rrt.infer.engine.state import EMPTY, WAIT_PRELUDE, init_state
from rrt.infer.sampling import SamplingArrays, SamplingParams
from rrt.models import pages
from rrt.models import params as params_lib
from rrt.models.params import cast
from rrt.models.stack import unstack
from rrt.ops import matmul, paged_attention
from tests import runs
from tests.infer.engine import oracle
from tests.models.configs import CONFIGS, gemma3, llama, perturbed

RNG = np.random.default_rng(0)
# Lengths around the pages of 8 tokens and the windows of 2 and 3.
PROMPTS = [[int(t) for t in RNG.integers(0, 53, n)] for n in (1, 8, 5, 17, 9, 2, 30)]
ROOMS = [7, 12, 9, 3, 1, 16, 8]
MODELS = {'llama': llama(), 'gemma3': gemma3()}
each_model = pytest.mark.parametrize('name', MODELS)


@functools.cache
def model(name):
  config = MODELS[name] if name in MODELS else CONFIGS[name]
  return types.SimpleNamespace(config=config, params=perturbed(config), tokenizer=None, meta={})


@functools.cache
def learned_gate(name):
  """A gate whose rows leave after one, two and three loops."""
  config = model(name).config
  rng = np.random.default_rng(1)
  shape = (config.loops - 1, config.d_model)
  return {
    'kernel': rng.normal(0, 0.5, shape).astype(np.float32),
    'bias': np.zeros(config.loops - 1, np.float32),
  }


def expected(name, **rest):
  m = model(name)
  return [
    oracle.decode(m.config, m.params, p, n, **rest) for p, n in zip(PROMPTS, ROOMS, strict=True)
  ]


def written(engine, order=None, **settings):
  """What the engine makes of all prompts, submitted in some order."""
  order = range(len(PROMPTS)) if order is None else order
  requests = {i: Request.of(PROMPTS[i], ROOMS[i], ignore_eos=True, **settings) for i in order}
  engine.run(requests.values())
  assert all(r.finish == 'length' for r in requests.values())
  return [(requests[i].tokens, requests[i].loops) for i in range(len(PROMPTS))]


@pytest.mark.slow
@pytest.mark.parametrize('name', [*MODELS, 'llama-vanilla'])
def test_full_depth_equals_the_plain_decoder(name):
  want = expected(name)
  engine = Engine(model(name), slots=3, page=8, steps=4)
  for seed in range(3):
    order = np.random.default_rng(seed).permutation(len(PROMPTS))
    assert written(engine, order) == want


@pytest.mark.slow
@each_model
@pytest.mark.parametrize(
  'options',
  [dict(slots=1, steps=1), dict(slots=4, steps=5, max_sampled_tokens=2, min_sampled_tokens=1)],
)
def test_no_shape_of_the_engine_changes_a_token(name, options):
  engine = Engine(model(name), page=8, **options)
  assert written(engine) == expected(name)


@pytest.mark.slow
def test_the_kernel_over_pages_changes_no_token(monkeypatch):
  used = []
  record = lambda *args: used.append(1) or paged_attention.attend_pages(*args)
  monkeypatch.setattr(pages, 'attend_pages', record)
  with paged_attention.using('pallas'):
    # Of no other test's shape, whose program would be taken.
    engine = Engine(model('gemma3'), slots=5, page=8, steps=3)
    assert written(engine) == expected('gemma3')
  assert used


@pytest.mark.slow
@each_model
def test_many_slots_go_out_of_step(name):
  engine = Engine(
    model(name), slots=16, page=8, steps=4, max_sampled_tokens=8, min_sampled_tokens=3
  )
  assert written(engine) == expected(name)


@pytest.mark.parametrize(
  'backend, alone, transposed', [('cpu', False, True), ('cpu', True, False), ('gpu', False, False)]
)
def test_kernels_are_transposed_where_it_pays(monkeypatch, backend, alone, transposed):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(matmul, '_avx512_alone', lambda: alone)
  lens = fit_lib.fit_lens(np.ones((2, 4, 8), np.float32))
  params = params_lib.transpose_kernels(unstack(model('llama').params))
  stacks = [params[k] for k in ('prelude', 'block', 'coda')]
  is_transposed = lambda x: isinstance(x, matmul.TransposedKernel)
  leaves = jax.tree_util.tree_leaves_with_path(stacks, is_leaf=is_transposed)
  kernels = [x for path, x in leaves if path[-1].key == 'kernel']
  lenses = list(score_lib.on_device(lens)['lens_kernel'])
  assert kernels and lenses
  assert {is_transposed(x) for x in kernels + lenses} == {transposed}


def test_a_step_without_a_draw_computes_no_head():
  """XLA moves out of a loop what does not depend on its rounds."""
  config = llama(vocab_size=61, prelude_layers=0, coda_layers=0, tie_embeddings=True)
  m = types.SimpleNamespace(config=config, params=perturbed(config), tokenizer=None, meta={})
  e = Engine(m, slots=3, page=8, steps=2)
  text = engines._call.lower(e.shape, e._params, e._gate, e._table, e._state).compile().as_text()
  products, computation = collections.defaultdict(set), ''
  for line in text.splitlines():
    if line.endswith('{'):
      computation = line.split()[0]
    elif 'dot_general' in line and 'fused_computation' not in computation:
      products[computation] |= set(re.findall(r'= f32\[([\d,]+)\]', line))
  head = [c for c, shapes in products.items() if '61,3' in shapes]
  wide = {f'3,{config.d_ff}', f'{config.d_ff},3'}
  block = [c for c, shapes in products.items() if wide & shapes]
  assert head and block and not set(head) & set(block)


def test_sampler_batches_are_sized_by_the_expected_depth(monkeypatch):
  config = dataclasses.replace(model('llama').config, prelude_layers=0, coda_layers=0)
  sized = lambda slots=32, **more: EngineConfig(slots=slots, **more).shape(config)
  shape = lambda shape: (shape.max_sampled_tokens, shape.min_sampled_tokens)
  # A draw of all costs little more than one of few, and waits for a third.
  assert shape(sized()) == (32, 10)
  exits = dict(gate='learned', threshold=0.5, kv='propagate')
  # The block costs more than the ends: room for all that leave a step.
  assert shape(sized(mean_loops=2.1, **exits)) == (16, 1)
  # An unknown depth: no token that leaves early waits for others.
  assert shape(sized(**exits)) == (16, 1)
  # Few slots pay for weights, and small ends are read in every step.
  assert shape(sized(**exits, slots=8)) == (8, 1)
  # The ends cost more: few rows, well filled, in tiles of 8; all in step where
  # no token leaves early.
  config = dataclasses.replace(config, prelude_layers=4, coda_layers=4)
  assert shape(sized(mean_loops=2.1, **exits)) == (16, 6)
  assert shape(sized(max_sampled_tokens=32, min_sampled_tokens=32)) == (32, 32)
  assert shape(sized()) == (32, 32)
  assert shape(sized(**exits, slots=8)) == (8, 6)
  many = sized(mean_loops=2.1, dtype='bfloat16', **exits)
  assert shape(many) == (32, 16)
  assert shape(sized(lossless=True)) == (32, 32)
  assert sized(lossless=True).max_batch_tokens == 32
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert shape(sized(**exits)) == (32, 24)
  assert shape(sized()) == (32, 32)
  with pytest.raises(InputError, match='mean_loops'):
    sized(mean_loops=0.5)


@pytest.mark.slow
@each_model
def test_tokens_sorted_by_loop_get_the_same_lora(name):
  gate = learned_gate(name)
  rest = dict(kv='write_ahead', gate='learned', threshold=0.5)
  engine = Engine(
    model(name), slots=3, page=8, steps=4, relax_layout='grouped', arrays=gate, **rest
  )
  assert 'lora_a' in str(jax.tree.structure(engine._params))
  assert written(engine) == expected(name, arrays=gate, **rest)


@pytest.mark.slow
def test_weights_are_rounded_and_the_arithmetic_is_not():
  m = model('llama')
  rounded = types.SimpleNamespace(
    config=m.config,
    tokenizer=None,
    meta={},
    params=jax.tree.map(np.asarray, cast(cast(m.params, 'bfloat16'), 'float32')),
  )
  want = written(Engine(rounded, slots=3, page=8))
  assert want != expected('llama')
  assert written(Engine(m, slots=3, page=8, weight_dtype='bfloat16')) == want


@pytest.mark.slow
@each_model
def test_bfloat16_does_not_depend_on_the_batch_either(name):
  engine = Engine(model(name), slots=3, page=8, steps=4, dtype='bfloat16')
  want = written(engine)
  order = np.random.default_rng(5).permutation(len(PROMPTS))
  assert written(engine, order) == want
  for slots in (1, 3):
    exact = Engine(model(name), slots=slots, page=8, steps=4, dtype='bfloat16', lossless=True)
    assert written(exact) == want


@pytest.mark.slow
@each_model
@pytest.mark.parametrize('kv', ['write_ahead', 'propagate', 'exact_fill'])
def test_tokens_that_leave_early_follow_the_policy(name, kv):
  gate = learned_gate(name)
  want = expected(name, kv=kv, gate='learned', arrays=gate, threshold=0.5)
  depths = {n for _, loops in want for n in loops}
  assert depths == {1, 2, 3}
  options = EngineConfig(
    slots=3, page=8, steps=4, gate='learned', threshold=0.5, kv=kv, max_sampled_tokens=2
  )
  engine = Engine(model(name), options, arrays=gate)
  assert written(engine) == want
  counted = engine.figures()['depths_R']
  assert counted == [sum(loops.count(n) for _, loops in want) for n in (1, 2, 3)]


@pytest.mark.slow
@each_model
@pytest.mark.parametrize(('kv', 'tuned'), [('write_ahead', False), ('propagate', True)])
def test_what_leaves_early_goes_through_the_lens(name, kv, tuned):
  config, gate = model(name).config, learned_gate(name)
  rng = np.random.default_rng(2)
  shape = (config.loops - 1, config.d_model)
  lens = {
    'lens_kernel': rng.normal(0, 0.3, (*shape, config.d_model)),
    'lens_bias': rng.normal(0, 0.3, shape),
  }
  if tuned:
    H = gate_lib.LENS_WIDTH
    lens |= {
      'lens_in': rng.normal(0, 0.2, (*shape, H)),
      'lens_out': rng.normal(0, 0.05, (shape[0], H, shape[1])),
    }
  lens = {k: v.astype(np.float32) for k, v in lens.items()}
  rest = dict(kv=kv, gate='learned', threshold=0.5)
  want = expected(name, arrays=gate | lens, **rest)
  assert want != expected(name, arrays=gate, **rest)
  engine = Engine(model(name), slots=3, page=8, steps=4, arrays=gate | lens, **rest)
  assert written(engine) == want
  # A lens changes drafts and never the text.
  exact = Engine(model(name), slots=3, page=8, steps=4, lossless=True, arrays=lens)
  assert written(exact) == expected(name)


@pytest.mark.slow
def test_policies_differ_where_tokens_leave_early():
  gate = learned_gate('llama')
  found = {
    kv: str(expected('llama', kv=kv, gate='learned', arrays=gate, threshold=0.5))
    for kv in ('write_ahead', 'propagate', 'exact_fill')
  }
  assert len(set(found.values())) == 3


@each_model
def test_a_hidden_state_that_changes_little_leaves(name):
  want = expected(name, kv='write_ahead', gate='change', threshold=0.8)
  options = EngineConfig(slots=4, page=8, steps=4, gate='change', kv='write_ahead', threshold=2)
  engine = Engine(model(name), options)
  assert written(engine, threshold=0.8) == want
  assert written(engine) == expected(name)


@pytest.mark.slow
@each_model
@pytest.mark.parametrize(
  'options',
  [
    dict(slots=3),
    dict(slots=4, max_batch_tokens=5, max_sampled_tokens=3, lookup=0),
    dict(slots=2, steps=1, draft_loop=2),
    dict(slots=2, steps=1, draft_vocab=20),
  ],
)
def test_lossless_equals_full_depth(name, options):
  options = {'steps': 4, 'page': 8} | options
  engine = Engine(model(name), lossless=True, **options)
  assert written(engine) == expected(name)
  figures = engine.figures()
  assert 0 < figures['num_accepted'] < figures['draft_tokens']
  assert bool(figures['num_revised']) == (options.get('draft_loop', 1) == 1)
  # Accepted drafts save steps; even rejected ones cost none.
  alone = Engine(model(name), slots=options['slots'], page=8, steps=options['steps'])
  written(alone)
  assert figures['steps'] < alone.figures()['steps']


@pytest.mark.slow
@each_model
@pytest.mark.parametrize('kv', ['write_ahead', 'propagate'])
def test_lossless_requests_and_early_ones_share_an_engine(name, kv):
  gate = learned_gate(name)
  early = expected(name, kv=kv, gate='learned', arrays=gate, threshold=0.5)
  exact = expected(name)
  engine = Engine(
    model(name),
    arrays=gate,
    lossless=True,
    gate='learned',
    threshold=2,
    kv=kv,
    slots=3,
    page=8,
    steps=4,
  )
  kinds = [dict(threshold=0.5), {}, dict(threshold=0.5, lossless=True)]
  requests = [
    Request.of(p, n, ignore_eos=True, **kinds[i % 3])
    for i, (p, n) in enumerate(zip(PROMPTS, ROOMS, strict=True))
  ]
  engine.run(requests)
  for i, r in enumerate(requests):
    assert (r.tokens, r.loops) == (exact[i] if i % 3 else early[i])
  assert engine.figures()['draft_tokens']


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    dict(max_batch_tokens=12, max_sampled_tokens=2),
    dict(max_batch_tokens=9, max_sampled_tokens=3),
    dict(max_batch_tokens=4),
  ],
)
def test_a_guess_stays_a_loop_behind_its_predecessor(options):
  engine = Engine(model('llama'), lossless=True, slots=4, page=8, steps=1, **options)
  waiting = [Request.of(p, n, ignore_eos=True) for p, n in zip(PROMPTS, ROOMS, strict=True)]
  pairs = 0
  for step in itertools.count():
    # Not all at once, so that drafts are in flight when new sequences arrive.
    if step % 7 == 0:
      for request in (waiting.pop() for _ in waiting[:3]):
        engine.submit(request)
    if not waiting and not engine.busy:
      break
    engine.step()
    state = jax.device_get(engine._state)
    f = state.in_flight
    for slot in range(4):
      under_way = [
        (int(f.position_SxK[slot, k]), int(f.stage_SxK[slot, k]), int(f.loop_SxK[slot, k]))
        for k in range(engine.shape.tokens_per_slot)
        if f.stage_SxK[slot, k] != EMPTY
      ]
      under_way.sort()
      for older, younger in itertools.pairwise(under_way):
        pairs += 1
        assert younger[0] == older[0] + 1
        assert older[1] != WAIT_PRELUDE
        assert younger[2] < older[2]
      if under_way:
        assert under_way[0][0] == state.base_S[slot]
  assert pairs > 10


@pytest.mark.slow
def test_two_hundred_prompts_lossless_as_at_full_depth():
  rng = np.random.default_rng(7)
  prompts = [[int(t) for t in rng.integers(0, 53, n)] for n in rng.integers(1, 12, 200)]
  texts = {}
  for lossless in (False, True):
    engine = Engine(model('llama'), slots=6, page=8, steps=8, context=24, lossless=lossless)
    done = engine.run(Request.of(p, 12, ignore_eos=True) for p in prompts)
    texts[lossless] = [r.tokens for r in done]
  assert engine.figures()['num_accepted'] > 50
  assert engine.figures()['draft_tokens'] - engine.figures()['num_accepted'] > 50
  assert texts[True] == texts[False]


@pytest.mark.parametrize('lookup', [1, 2, 3])
def test_what_followed_before_is_guessed(lookup):
  rng = np.random.default_rng(lookup)
  shape = EngineConfig(slots=8, context=24, page=8, lossless=True, lookup=lookup).shape(
    model('llama').config
  )
  K = shape.tokens_per_slot
  text_SxC = rng.integers(0, 4, (8, 24))
  position_SxK = rng.integers(0, 24, (8, K))
  # What the one that draws at random would find anywhere.
  text_SxC[7], position_SxK[7] = 3, 20
  state = init_state(shape)
  state = state._replace(
    text_SxC=jax.numpy.asarray(text_SxC),
    in_flight=state.in_flight._replace(position_SxK=jax.numpy.asarray(position_SxK)),
  )
  table = empty_table(8, 1)
  table.sampling.temperature_B[7] = 0.5
  rows = Batch(np.repeat(np.arange(8), K), np.tile(np.arange(K), 8), np.ones(8 * K, bool))
  got = speculate.from_text(shape, table, state, rows)
  want = []
  for slot, k in zip(rows.slot_B, rows.k_B, strict=True):
    text, p = text_SxC[slot].tolist(), position_SxK[slot, k]
    ends = [
      j
      for j in range(lookup - 1, p)
      if text[j - lookup + 1 : j + 1] == text[p - lookup + 1 : p + 1]
    ]
    found = ends and slot != 7
    want.append(text[ends[-1] + 1] if found else speculate.UNKNOWN)
  assert got.tolist() == want
  assert speculate.UNKNOWN in want[: 7 * K] and max(want) >= 0


def test_text_that_is_looked_through_is_that_of_the_slots_last_sequence():
  engine = Engine(model('llama'), slots=2, page=8, steps=4, context=64, lossless=True)
  rooms = 24, 3, 9, 5, 2
  requests = [Request.of(p, n, ignore_eos=True) for p, n in zip(PROMPTS, rooms, strict=False)]
  last = {}
  for request in requests:
    engine.submit(request)
  while engine.busy:
    engine.step()
    last |= {s: r for s, r in enumerate(engine.running) if r}
  text_SxC = np.asarray(engine._state.text_SxC)
  assert len(last) == 2 < len(requests)
  for slot, request in last.items():
    # The last token drawn is behind what any flight has read.
    text = [*request.prompt, *request.tokens[:-1]]
    assert text_SxC[slot, : len(text)].tolist() == text


@pytest.mark.slow
def test_text_that_repeats_itself_is_guessed_from_it():
  figures, texts = {}, {}
  for lookup in (0, 2):
    engine = Engine(
      model('llama'), slots=1, page=8, steps=4, context=64, lossless=True, lookup=lookup
    )
    done = engine.run(Request.of(p, 32, ignore_eos=True) for p in PROMPTS[:3])
    texts[lookup] = [r.tokens for r in done]
    figures[lookup] = engine.figures()
  assert texts[2] == texts[0]
  assert figures[2]['num_accepted'] > figures[0]['num_accepted']
  assert figures[2]['steps'] < figures[0]['steps']


def test_speculation_ends_where_no_lane_is_free():
  engine = Engine(model('llama'), lossless=True, slots=2, max_batch_tokens=2, page=8, steps=4)
  request = lambda: Request.of(PROMPTS[1], ROOMS[1], ignore_eos=True)
  engine.run([request(), request()])
  assert engine.figures()['draft_tokens'] == 0
  engine.run([request()])
  assert engine.figures()['draft_tokens'] > 0


@pytest.mark.slow
def test_lossless_sampling_equals_full_depth_sampling():
  one = lambda v, kind: np.array([v], kind)
  sampling = SamplingArrays(
    one(0.7, np.float32),
    one(9, np.int32),
    one(0.95, np.float32),
    one(0.01, np.float32),
    one(11, np.uint32),
  )
  want = expected('llama', sampling=sampling)
  assert want != expected('llama')
  settings = dict(temperature=0.7, top_k=9, top_p=0.95, min_p=0.01, seed=11)
  for more in ({}, {'draft_vocab': 20}):
    engine = Engine(model('llama'), lossless=True, slots=3, page=8, steps=4, **more)
    assert written(engine, **settings) == want


@pytest.mark.slow
@pytest.mark.parametrize('lossless', [False, True])
def test_requests_keep_their_own_rules_side_by_side(lossless):
  m = model('llama')
  one = lambda v, kind: np.array([v], kind)
  sampling = SamplingArrays(
    one(0.9, np.float32),
    one(0, np.int32),
    one(1, np.float32),
    one(0, np.float32),
    one(5, np.uint32),
  )
  costs = (0.3, 0.2, 1.3)
  plain, hot, dear, told = (
    Request.of(PROMPTS[2], 14, ignore_eos=True),
    Request.of(PROMPTS[2], 14, 0.9, seed=5, ignore_eos=True),
    Request.of(
      PROMPTS[2],
      14,
      presence_penalty=0.3,
      frequency_penalty=0.2,
      repetition_penalty=1.3,
      ignore_eos=True,
    ),
    Request.of(PROMPTS[2], 14, logprobs=3, ignore_eos=True),
  )
  engine = Engine(m, slots=3, page=8, steps=4, penalties=True, logprobs=5, lossless=lossless)
  engine.run(
    [plain, hot, dear, told, second := dataclasses.replace(dear, tokens=[], loops=[], finish='')]
  )
  logprobs = []
  decode = lambda **rest: oracle.decode(m.config, m.params, PROMPTS[2], 14, **rest)[0]
  assert plain.tokens == told.tokens == decode(logprobs=logprobs)
  assert hot.tokens == decode(sampling=sampling)
  # A slot's counts begin anew with each sequence in it.
  assert dear.tokens == second.tokens == decode(penalties=costs)
  assert len({str(r.tokens) for r in (plain, hot, dear)}) == 3
  assert not plain.logprobs and len(told.logprobs) == 14
  for token, (own, top), want in zip(told.tokens, told.logprobs, logprobs, strict=True):
    assert own == pytest.approx(want[token], abs=1e-4)
    order = np.argsort(-want)[:3]
    assert [t for t, _ in top] == order.tolist()
    assert [p for _, p in top] == pytest.approx(want[order], abs=1e-4)


@pytest.mark.slow
def test_replayed_depths_are_kept():
  loops = np.random.default_rng(3).integers(1, 4, (3, 20)).astype(np.int32)
  options = EngineConfig(slots=3, page=8, gate='replay', threshold=1, kv='propagate')
  engine = Engine(model('llama'), options, arrays={'loops': loops})
  requests = [Request.of(p, 12, ignore_eos=True) for p in (PROMPTS[1], PROMPTS[2])]
  engine.run(requests)
  for slot, request in enumerate(requests):
    assert request.loops == loops[slot, :12].tolist()
    m = model('llama')
    want = oracle.decode(
      m.config,
      m.params,
      request.prompt,
      12,
      kv='propagate',
      gate='replay',
      arrays={'loops': loops},
      threshold=1,
      slot=slot,
    )
    assert (request.tokens, request.loops) == want


@pytest.mark.parametrize('lossless', [False, True])
def test_an_end_token_ends_a_sequence(lossless):
  tokens, _ = expected('llama')[1]
  end = tokens[4]
  m = model('llama')
  ending = types.SimpleNamespace(
    config=m.config, params=m.params, tokenizer=types.SimpleNamespace(eos_ids=[end]), meta={}
  )
  engine = Engine(ending, slots=2, page=8, steps=4, lossless=lossless)
  ended, beyond = engine.run(
    [Request.of(PROMPTS[1], 12), Request.of(PROMPTS[1], 12, ignore_eos=True)]
  )
  first = tokens.index(end)
  assert (ended.tokens, ended.finish) == (tokens[: first + 1], 'end')
  assert (beyond.tokens, beyond.finish) == (tokens, 'length')


def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody():
  engine = Engine(model('llama'), slots=2, page=8, steps=2)
  want = expected('llama')
  long = engine.submit(Request.of(PROMPTS[0], 40, ignore_eos=True))
  waits = engine.submit(Request.of(PROMPTS[1], ROOMS[1], ignore_eos=True))
  third = engine.submit(Request.of(PROMPTS[2], ROOMS[2], ignore_eos=True))
  never = engine.submit(Request.of(PROMPTS[3], ROOMS[3], ignore_eos=True))
  for _ in range(3):
    engine.step()
  engine.cancel(long)
  engine.cancel(never)
  while engine.busy:
    engine.step()
  assert (long.finish, never.finish) == ('cancelled', 'cancelled')
  assert 0 < len(long.tokens) < 40 and not never.tokens
  assert (waits.tokens, third.tokens) == (want[1][0], want[2][0])


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(slots=0), 'slots=0'),
    (dict(kv='mine'), "kv='mine'"),
    (dict(gate='change'), "kv='full': tokens that leave early"),
    (dict(gate='oracle', kv='propagate'), "gate='oracle'"),
    (dict(context=65), 'context=65: the model was made for 64'),
    (dict(lossless=True, draft_loop=3), 'draft_loop=3'),
    (dict(lossless=True, lookup=-1), 'lookup=-1'),
    (dict(lossless=True, gate='change', kv='exact_fill', threshold=1), "kv='exact_fill'"),
    (dict(slots=10**9), 'GiB are free'),
    (dict(logprobs=-2), 'logprobs=-2'),
    (dict(page=2), 'page=2'),
    (dict(max_batch_tokens=3), 'max_batch_tokens=3'),
    (dict(relax_layout='deep'), "relax_layout='deep'"),
    (dict(weight_dtype='int8'), "weight_dtype='int8'"),
    (dict(gate='change', kv='propagate'), 'threshold=None'),
    (dict(gate='learned', kv='propagate', threshold=1), "gate='learned'"),
  ],
)
def test_what_cannot_work_is_refused(options, message):
  with pytest.raises(InputError, match=message):
    Engine(model('llama'), **options)


def test_sequence_order_is_refused():
  with pytest.raises(InputError, match='order=cycle'):
    Engine(model('llama-sequence'))


@pytest.mark.parametrize(
  'request_, message',
  [
    (Request.of([], 3), 'a prompt'),
    (Request.of([1], 0), 'max_new_tokens'),
    (Request.of([1], 2, lossless=True), 'lossless'),
    (Request.of([1] * 60, 5), 'context of 64'),
    (Request.of([53], 5), '0..52'),
    (Request.of([1], 5, presence_penalty=0.5), 'penalties=True'),
    (Request.of([1], 5, logprobs=2), 'logprobs=2: this engine returns up to -1'),
    (Request.of([1], '5'), 'max_new_tokens'),
    (Request.of([1], 5, 'hot'), 'temperature'),
    (Request.of([1], 5, 0.7, top_k=2**40), 'top_k'),
    (Request.of([1], 5, 0.7, top_p=-1), 'top_p'),
    (Request.of([1], 5, 0.7, min_p=float('nan')), 'min_p'),
    (Request.of([1], 5, seed=-1), 'seed'),
    (Request.of([1], 5, seed='a'), 'seed'),
    (Request.of([1], 5, seed=[1, 2]), 'seed'),
    (Request.of([1], 5, logprobs=-0.5), 'logprobs'),
    (Request.of([1], 5, presence_penalty=1e300), 'presence'),
    (Request.of([1], 5, presence_penalty=float('inf')), 'presence'),
    (Request.of([1], 5, threshold=float('nan')), 'threshold'),
  ],
)
def test_requests_that_do_not_fit_are_refused(request_, message):
  engine = Engine(model('llama'), slots=1, page=8)
  with pytest.raises(InputError, match=message):
    engine.run([Request.of([1], 5), request_])
  assert not engine.busy


@pytest.fixture(scope='module')
def child():
  return runs.child()


def _keep(parts):
  return lambda index, text: parts.append((index, text))


@pytest.mark.slow
def test_texts_equal_those_of_complete(child):
  prompts = ['The sea', 'x', 'a b c d e']
  for settings in (
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=40, ignore_eos=True),
    SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3),
  ):
    want = generate.Generator(child).complete(prompts, settings)
    engine = Engine(child, slots=2, page=8, steps=3)
    parts: list[tuple[int, str]] = []
    got = engine.generate(prompts, settings, _keep(parts))
    assert got == want
    for i, completion in enumerate(got):
      assert ''.join(t for j, t in parts if j == i) == completion.text


@pytest.mark.slow
def test_a_stop_string_frees_its_slot(child):
  whole = Engine(child, slots=1, page=8, steps=2).generate(
    'The sea', max_new_tokens=24, ignore_eos=True
  )[0]
  stop = whole.text[3:5]
  want = generate.complete(child, ['The sea', 'x'], max_new_tokens=24, stop=stop, ignore_eos=True)
  engine = Engine(child, slots=1, page=8, steps=2)
  got = engine.generate(['The sea', 'x'], max_new_tokens=24, stop=(stop,), ignore_eos=True)
  assert got == want and got[0].finish_reason == 'stop'
  assert engine.figures()['depths_R'][-1] < 2 * 24


def test_the_gate_kept_with_a_model_is_used(child):
  config = child.config
  arrays = {'kernel': np.zeros((1, config.d_model), np.float32), 'bias': np.ones(1, np.float32)}
  gate = gate_lib.Gate('learned', 0.5, arrays, 'propagate')
  gated = dataclasses.replace(child, meta=gate_lib.store(child.meta, gate))
  engine = Engine(gated, slots=1, page=8, gate='stored')
  engine.generate('The sea', max_new_tokens=6, ignore_eos=True)
  assert engine.figures()['depths_R'] == [6, 0]
  assert engine.config.kv == 'propagate'
  with pytest.raises(InputError, match='fit-gate'):
    Engine(child, gate='stored')


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(6))
def test_any_shape_and_order_of_arrival_gives_the_same_tokens(seed):
  rng = np.random.default_rng(100 + seed)
  name = list(MODELS)[seed % 2]
  slots = int(rng.integers(2, 6))
  kind = ('exact', 'early', 'full')[seed // 2]
  options = dict(
    slots=slots,
    steps=int(rng.integers(1, 7)),
    page=int(rng.choice([4, 8])),
    max_sampled_tokens=int(rng.integers(1, slots + 1)),
    min_sampled_tokens=int(rng.integers(1, slots + 1)),
  )
  rest, arrays = {}, None
  if kind == 'early':
    arrays = learned_gate(name)
    kv = str(rng.choice(['write_ahead', 'propagate', 'exact_fill']))
    rest = dict(kv=kv, gate='learned', threshold=0.5)
  if kind == 'exact':
    options |= dict(lossless=True, max_batch_tokens=int(rng.integers(slots, 3 * slots)))
  want = expected(name, arrays=arrays, **rest)
  engine = Engine(model(name), arrays=arrays, **options, **rest)
  numbers = rng.permutation(np.repeat(np.arange(len(PROMPTS)), 2))
  asked = [(int(i), Request.of(PROMPTS[i], ROOMS[i], ignore_eos=True)) for i in numbers]
  gone = {int(i) for i in rng.choice(len(asked), 3, replace=False)}
  late = list(asked)
  while late or engine.busy:
    for _ in range(int(rng.integers(0, 4))):
      if late:
        engine.submit(late.pop()[1])
    engine.step()
    for n in gone:
      if n >= len(late) and rng.random() < 0.3:
        engine.cancel(asked[n][1])
  for n, (i, request) in enumerate(asked):
    tokens, loops = want[i]
    if request.finish == 'cancelled':
      assert n in gone and request.tokens == tokens[: len(request.tokens)]
    else:
      assert (request.tokens, request.loops) == (tokens, loops)
  assert sum(r.finish == 'length' for _, r in asked) >= len(asked) - len(gone)


def test_counts_go_on_where_the_devices_overflow():
  engine = Engine(model('llama'), slots=2, page=8, steps=2)
  near = jax.tree.map(lambda n: np.full_like(n, 2**31 - 3), engine._state.counters)
  engine._state = engine._state._replace(counters=near)
  engine._counters = near
  figures = []
  for _ in range(2):
    engine.run([Request.of(PROMPTS[1], 6, ignore_eos=True)])
    figures.append(engine.figures())
  assert [f['depths_R'][2] for f in figures] == [6, 12]
  assert figures[0]['batch_tokens'] == 18 and figures[1]['batch_tokens'] == 36


@pytest.mark.parametrize(
  'arrays, word',
  [
    (None, 'kernel'),
    ({'kernel': np.zeros((2, 24))}, 'bias'),
    ({'kernel': np.zeros((2, 5)), 'bias': np.zeros(2)}, 'shape'),
    ({'lens_kernel': np.zeros((2, 24, 24))}, 'kernel'),
  ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, word):
  with pytest.raises(InputError, match=word):
    Engine(model('llama'), gate='learned', threshold=0.5, kv='propagate', arrays=arrays)


@pytest.mark.parametrize('names', ['lens_in', 'lens_in lens_out'])
def test_a_tuned_lens_is_whole(names):
  config = model('llama').config
  shape = config.loops - 1, config.d_model
  arrays = {
    'lens_in': np.zeros((*shape, gate_lib.LENS_WIDTH)),
    'lens_out': np.zeros((shape[0], gate_lib.LENS_WIDTH, shape[1])),
  }
  with pytest.raises(InputError, match='A tuned lens needs'):
    gate_lib.check_arrays('none', {n: arrays[n] for n in names.split()}, config)


def test_a_threshold_needs_a_gate():
  engine = Engine(model('llama'), slots=2, page=8)
  with pytest.raises(InputError, match='threshold'):
    engine.submit(Request.of([1], 2, threshold=0.5))
