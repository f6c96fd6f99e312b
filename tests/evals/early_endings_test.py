"""Endings scored with exits are what the engine wrote with them."""

import numpy as np
import pytest

from rrt.evals import depth, early_endings, endings, every_loop
from rrt.exits.gate import NEVER, Gate
from rrt.infer.engine.engine import Engine, Request
from tests.infer.engine.engine_test import PROMPTS, learned_gate, model


@pytest.mark.slow
@pytest.mark.parametrize('kv', ['write_ahead', 'propagate', 'exact_fill'])
def test_they_have_the_log_probabilities_of_the_engine(kv):
  m, arrays = model('llama'), learned_gate('llama')
  engine = Engine(
    m, arrays=arrays, gate='learned', threshold=0.5, kv=kv, slots=3, page=8, logprobs=0
  )
  done = engine.run(Request.of(p, 6, ignore_eos=True, logprobs=0) for p in PROMPTS)
  found, loops = early_endings.score_endings(
    m.config,
    m.params,
    [(r.prompt, r.tokens) for r in done],
    Gate('learned', 0.5, arrays, kv),
    batch_tokens=64,
  )
  for request, (score, greedy) in zip(done, found, strict=True):
    assert score == pytest.approx(sum(p for p, _ in request.logprobs), abs=1e-4)
    assert greedy
  assert loops == pytest.approx(np.mean([r.loops for r in done]))
  assert 1 < loops < 3


@pytest.mark.slow
def test_without_exits_they_are_those_of_full_depth():
  m = model('gemma3')
  pairs = [(p, [3, 1, 4, 1][: 1 + i % 4]) for i, p in enumerate(PROMPTS)]
  found, loops = early_endings.score_endings(m.config, m.params, pairs, Gate('change', NEVER))
  want = endings.score_endings(m.config, m.params, pairs)
  assert loops == m.config.loops
  np.testing.assert_allclose([s for s, _ in found], [s for s, _ in want], atol=1e-4)
  assert [g for _, g in found] == [g for _, g in want]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['margin', 'entropy'])
def test_confident_heads_let_tokens_leave(kind):
  m = model('llama')
  rows = [p for p in PROMPTS if len(p) > 4]
  static = every_loop.read_static(m, rows)
  threshold = float(np.median(static.scores[kind][0][static.scored_NxL]))
  pairs = [(row[:1], row[1:]) for row in rows]
  gate = Gate(kind, threshold, kv='exact_fill')
  found, loops = early_endings.score_endings(m.config, m.params, pairs, gate)
  point = depth.measure(m, static, kind, threshold, kv='exact_fill')
  assert loops == pytest.approx(point.mean_loops) and 1 < loops < 3
  scores = [score for score, _ in found]
  assert -sum(scores) / point.tokens == pytest.approx(point.nll_nats, abs=1e-4)
