"""The quality-depth curve on a tiny model, and its two command lines."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from rrt.checkpoints.load import load, save
from rrt.errors import InputError
from rrt.evals import depth, every_loop, gating, perplexity
from rrt.exits import fit as fit_lib
from rrt.exits import gate as gate_lib
from rrt.exits import tune_lens
from rrt.infer import generate
from rrt.model import LanguageModel
from rrt.models import lm_head, transformer
from tests import command, runs
from tests.evals import tasks_test
from tests.models.configs import llama, perturbed


@pytest.fixture(scope='module')
def model():
  return runs.child()


@pytest.fixture(scope='module')
def rows(model):
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 120)
  return perplexity.make_rows(model, tokens.tolist(), 16, None)


@pytest.mark.slow
def test_full_depth_is_the_models_score(model, rows):
  static = every_loop.read_static(model, rows, batch=3)
  flat = [t for row in rows for t in row]
  want = perplexity.score(model, flat, context=16).nll_nats
  got = static.nll_NxL[static.scored_NxL].mean()
  assert got == pytest.approx(want, abs=1e-5)
  point = depth.measure(model, static, 'change', gate_lib.NEVER, batch=3)
  assert point.agreement == 1 and abs(point.lost_nats) < 1e-5
  assert point.mean_loops == model.config.loops


@pytest.mark.slow
def test_all_tokens_leaving_is_a_model_of_one_loop(model, rows):
  static = every_loop.read_static(model, rows, batch=3)
  flat = [t for row in rows for t in row]
  want = perplexity.score(model, flat, context=16, loops=1).nll_nats
  for kv in ('write_ahead', 'propagate', 'exact_fill'):
    point = depth.measure(model, static, 'change', -2.0, kv=kv, batch=3)
    assert point.nll_nats == pytest.approx(want, abs=1e-5)
    assert point.mean_loops == 1
    lost = point.nll_nats - static.nll_NxL[static.scored_NxL].mean()
    assert point.lost_nats == pytest.approx(lost, abs=1e-5)


@pytest.mark.slow
def test_the_oracle_changes_no_token_where_nothing_is_missing():
  # Without a coda, whose keys and values come from where tokens left.
  config = llama(prelude_layers=2, coda_layers=0)
  model = LanguageModel(config, perturbed(config), None, {})
  rows = np.random.default_rng(0).integers(0, 53, (6, 30)).tolist()
  static = every_loop.read_static(model, rows, batch=3)
  point = depth.measure(model, static, 'oracle', 1.0, kv='exact_fill', batch=3)
  right_RxN = static.right_RxNxL[:, static.scored_NxL]
  first = np.where(right_RxN[0], 1, np.where(right_RxN[1], 2, 3))
  # The first token of each row stays.
  first[:: len(rows[0]) - 1] = 3
  assert point.mean_loops == pytest.approx(first.mean())
  assert 1 < point.mean_loops < 3 and point.agreement == 1
  copied = depth.measure(model, static, 'oracle', 1.0, batch=3)
  assert copied.mean_loops == point.mean_loops and copied.agreement < 1


@pytest.mark.slow
def test_what_a_gate_is_fitted_on(model, rows):
  static = every_loop.read_static(model, rows, batch=3, fitting=True)
  R, scored = model.config.loops, static.scored_NxL
  assert static.states_RxNxLxD.shape[:1] == (R,)
  config, params = model.config, model.params

  def log_p_of(loops):
    out = transformer.forward(config, params, static.tokens_NxL, loops=loops)
    logits = lm_head.logits(config, params, out.hidden_BxLxD, 'float32')
    return np.asarray(jax.nn.log_softmax(logits))

  log_p = log_p_of(1), log_p_of(R)
  want = np.sum(np.exp(log_p[1]) * (log_p[1] - log_p[0]), -1)
  np.testing.assert_allclose(static.divergence_RxNxL[0][scored], want[scored], atol=1e-4)
  assert want[scored].max() > 1e-3


@pytest.mark.parametrize('promise', [{'loss': 9.0}, {'agreement': 0.01}])
def test_a_gate_learns_what_is_promised(model, rows, promise):
  gate, points = gating.fit_gate(model, rows[:8], lens=False, batch=4, **promise)
  read = every_loop.read_static(model, rows[:8:2], batch=4, fitting=True)
  scored = read.scored_NxL
  target = np.exp(-read.divergence_RxNxL)
  if 'agreement' in promise:
    target = read.right_RxNxL
  # `fit_gate` reads its half of the rows in two halves.
  order = [0, 2, 1, 3]
  flat = lambda t: np.concatenate([t[:, [i]][:, scored[[i]]] for i in order], 1)
  want = fit_lib.fit(flat(read.states_RxNxLxD[:-1]), flat(target), 30.0)
  np.testing.assert_allclose(gate.arrays['kernel'], want['kernel'], atol=1e-4)
  assert gate.threshold == points[-1].threshold


@pytest.mark.slow
def test_a_tuned_lens_is_nearer_to_full_depth(model, rows):
  read = lambda arrays: every_loop.read_static(model, rows, arrays, batch=3, fitting=True)
  apart = lambda seen: seen.divergence_RxNxL[:, seen.scored_NxL].mean(1)
  plain = read(None)
  scored, seen = plain.scored_NxL, []
  fitted = fit_lib.fit_lens(plain.states_RxNxLxD[:, scored])
  tuned = tune_lens.tune_lens(
    model, fitted, plain.states_RxNxLxD, scored, epochs=40, progress=seen.append
  )
  assert (apart(read(tuned)) < 0.9 * apart(read(fitted))).all()
  assert sum(seen) == 40 * scored.sum() * (model.config.loops - 1)


@pytest.mark.parametrize('share', [0.01, 0.5])
def test_a_share_of_the_rows_goes_on_as_the_model_does(model, rows, share):
  seen = []
  got = gating.continued(model, rows, share, slots=3, progress=lambda *at: seen.append(at))
  own = [i for i, row in enumerate(rows) if got[i] != list(row)]
  for half in (0, 1):
    of_half = [i for i in range(len(rows)) if i % 2 == half]
    count = 1 if share == 0.01 else (len(of_half) + 1) // 2
    assert len(set(own) & set(of_half)) == count
  written = sum(len(rows[i]) - len(rows[i]) // 4 for i in own)
  assert seen[-1] == (written, written) and seen[0][0] < written
  for i in own[:2]:
    kept = len(rows[i]) // 4
    assert got[i][:kept] == list(rows[i][:kept])
    want = generate.complete(
      model, [list(rows[i][:kept])], max_new_tokens=len(rows[i]) - kept, ignore_eos=True
    )
    assert got[i][kept:] == want[0].tokens


def test_thresholds_send_the_asked_share_away(model, rows):
  static = every_loop.read_static(model, rows, batch=3)
  for gate in ('change', 'margin', 'entropy'):
    points = depth.curve(model, static, [gate], shares=(0.25, 0.75), batch=3)
    shares = [2 - p.mean_loops for p in points]
    assert shares == pytest.approx([0.25, 0.75], abs=0.02)


def test_a_gate_that_is_not_there_is_asked_for(model, rows):
  static = every_loop.read_static(model, rows, batch=3)
  with pytest.raises(InputError, match='fit-gate'):
    depth.curve(model, static, ['learned'])


def test_a_model_without_loops_is_refused(rows):
  with pytest.raises(InputError, match='two loops'):
    every_loop.read_static(runs.parent(), rows)


@pytest.mark.slow
def test_fit_gate_then_evaluate(tmp_path):
  pytest.importorskip('matplotlib')
  save(runs.child(), tmp_path / 'child')
  runs.write_text(tmp_path / 'text.jsonl')
  status, printed, error = command.run(
    'fit-gate',
    '--model=child',
    '--text=text.jsonl',
    '--max_tokens=400',
    '--context=16',
    '--agreement=0.2',
    '--lens_epochs=2',
    '--self_generated=0.5',
    '--out=gated',
    cwd=tmp_path,
  )
  assert status == 0, error
  fitted = command.final(printed)
  assert fitted['bound'] is None or fitted['bound'] >= 0.2
  gate = gate_lib.stored(load(tmp_path / 'gated'))
  assert gate.threshold == fitted['threshold']
  assert (gate.calibration['confidence'], gate.calibration['self_generated']) == (0.95, 0.5)
  assert 'lens_in' in gate.arrays
  status, printed, error = command.run(
    'evaluate',
    '--model=gated',
    '--text=text.jsonl',
    '--max_tokens=200',
    '--context=16',
    '--exits=all',
    '--kv=write_ahead,propagate',
    '--curve=curve.svg',
    cwd=tmp_path,
  )
  assert status == 0, error
  points = command.final(printed)['exits']
  assert {p['gate'] for p in points} == {*depth.LIVE, *depth.WITH_HEAD} - {'hazard'}
  assert {p['kv'] for p in points} == {'write_ahead', 'propagate'}
  own = [p for p in points if p['threshold'] == gate.threshold]
  assert len(own) >= 2
  assert (tmp_path / 'curve.svg').read_text().startswith('<svg')
  json.dumps(points)
  if not importlib.util.find_spec('lm_eval'):
    return
  tasks_test.write(tmp_path / 'arc_easy.jsonl', tasks_test.ARC)
  status, printed, error = command.run(
    'evaluate',
    '--model=gated',
    '--text=text.jsonl',
    '--max_tokens=200',
    '--context=16',
    '--exits=learned',
    '--tasks=arc_easy',
    '--data=.',
    cwd=tmp_path,
  )
  assert status == 0, error
  final = command.final(printed)
  asked, points = final['tasks_by_exits'], final['exits']
  for field in ('gate', 'kv', 'threshold', 'lost_nats'):
    assert [a[field] for a in asked] == [p[field] for p in points]
  assert all(0 <= a['tasks']['arc_easy'] <= 1 for a in asked)
  # The lower the threshold, the sooner the tokens of the answers leave.
  loops = [n for _, n in sorted((a['threshold'], a['mean_loops']) for a in asked)]
  assert loops == sorted(loops) and loops[0] < loops[-1]


@pytest.mark.parametrize(
  'flags, word',
  [
    (['--exits=all'], 'needs --text'),
    (['--exits=luck', '--text=text.jsonl'], "exits='luck'"),
    (['--exits=all', '--text=text.jsonl', '--kv=full'], "kv='full'"),
  ],
)
def test_exits_that_cannot_work_are_refused(flags, word, tmp_path):
  runs.write_text(tmp_path / 'text.jsonl')
  status, _, error = command.run('evaluate', '--model=child', '--tasks=piqa', *flags, cwd=tmp_path)
  assert status == 2 and word in error
