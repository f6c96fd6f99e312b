"""Gates: fitted, judged, kept with the model."""

import dataclasses

import numpy as np
import pytest

from rrt.errors import InputError
from rrt.evals.depth import Point
from rrt.evals.threshold import choose, lower_bound
from rrt.exits import fit as fit_lib
from rrt.exits import gate as gate_lib
from rrt.exits import score as score_lib


def test_a_fit_finds_the_states_that_agree():
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(2, 6))
  states = rng.normal(size=(2, 4000, 6)).astype(np.float32)
  unit = states / np.linalg.norm(states, axis=-1, keepdims=True) * 6**0.5
  chance = 1 / (1 + np.exp(-np.einsum('rnd,rd->rn', unit, truth) - 0.5))
  right = rng.random(chance.shape) < chance
  gate = fit_lib.fit(states, right)
  np.testing.assert_allclose(gate['kernel'], truth, atol=0.25)
  np.testing.assert_allclose(gate['bias'], 0.5, atol=0.25)
  # The engine's score is the same function.
  for r in range(2):
    score = score_lib.score(
      'learned', gate, states[r], states[r], np.full(4000, r + 1), np.full(4000, 7), None, None
    )
    z = unit[r] @ gate['kernel'][r] + gate['bias'][r]
    np.testing.assert_allclose(score, 1 / (1 + np.exp(-z)), atol=1e-5)
  first = score_lib.score(
    'learned', gate, states[0], states[0], np.ones(4000, int), np.zeros(4000, int), None, None
  )
  assert not np.any(first)


def test_a_lens_finds_an_affine_map_among_giant_states():
  rng = np.random.default_rng(1)
  kernel, bias = rng.normal(0, 0.3, (2, 5, 5)), rng.normal(size=(2, 5))
  x = rng.normal(size=(3, 2000, 5))
  x[:, ::50] *= 100
  for r in (1, 0):
    x[2] = x[r] + x[r] @ kernel[r] + bias[r]
    lens = fit_lib.fit_lens(np.stack([x[r], x[2]]), ridge=1e-6)
    np.testing.assert_allclose(lens['lens_kernel'][0], kernel[r], atol=1e-3)
    np.testing.assert_allclose(lens['lens_bias'][0], bias[r], atol=1e-2)
  # The engine's reading is the same map, for rows before the last loop only.
  loops = np.array([1, 2, 2])
  rows = x[0, :3].astype(np.float32)
  got = score_lib.through_lens(lens, rows, loops)
  np.testing.assert_allclose(got[0], x[2, 0], rtol=1e-3, atol=1e-2)
  np.testing.assert_array_equal(got[1:], rows[1:])


def test_a_fit_bears_states_that_always_agree():
  states = np.random.default_rng(0).normal(size=(1, 50, 4)).astype(np.float32)
  gate = fit_lib.fit(states, np.ones((1, 50), bool))
  assert np.isfinite(gate['kernel']).all() and gate['bias'][0] > 3


def point(threshold, agreements, lost=(0.0, 0.0)):
  return Point(
    'learned',
    'write_ahead',
    threshold,
    1.5,
    float(np.mean(agreements)),
    3.0,
    float(np.mean(lost)),
    10,
    tuple(agreements),
    tuple(lost),
  )


def test_the_bound_is_students():
  # Of 9 values with mean 0 and deviation 1, t(8, 0.95) = 1.8595.
  values = np.array([-1.5, -1, -0.5, -0.5, 0, 0.5, 0.5, 1, 1.5])
  values /= values.std(ddof=1)
  assert lower_bound(values, 0.95) == pytest.approx(-1.8595 / 3, abs=2e-3)
  assert lower_bound([1.0], 0.95) == -np.inf


def test_the_lowest_threshold_that_keeps_the_promise_is_chosen():
  points = [
    point(0.5, [0.80, 0.99]),
    point(0.9, [0.99, 0.991]),
    point(0.7, [0.97, 0.971]),
    # Good by luck behind one that is not: never reached.
    point(0.3, [0.999, 0.999]),
  ]
  chosen, bound = choose(points, agreement=0.96)
  assert chosen.threshold == 0.7 and 0.96 < bound < 0.97
  assert choose(points, agreement=0.995) is None


def test_a_loss_can_be_promised():
  points = [
    point(0.9, [1, 1], [0.001, 0.002]),
    point(0.7, [1, 1], [0.010, 0.011]),
    point(0.5, [1, 1], [0.10, 0.11]),
  ]
  chosen, bound = choose(points, loss=0.02)
  assert chosen.threshold == 0.7 and 0.011 < bound < 0.02
  with pytest.raises(InputError, match='either'):
    choose(points)


@dataclasses.dataclass
class Model:
  meta: dict
  config: object


def test_a_gate_is_kept_with_its_model():
  config = type('Config', (), {'loops': 3, 'd_model': 4, 'exit_gate': False})
  arrays = {'kernel': np.arange(8, dtype=np.float32).reshape(2, 4), 'bias': np.ones(2, np.float32)}
  arrays |= fit_lib.fit_lens(np.random.default_rng(0).normal(size=(3, 40, 4)), ridge=0.1)
  gate = gate_lib.Gate('learned', 0.8, arrays, 'propagate', {'agreement': 0.9})
  again = gate_lib.stored(Model(gate_lib.store({'a': 1}, gate), config))
  assert again.calibration == gate.calibration and again.kv == 'propagate'
  np.testing.assert_array_equal(again.arrays['kernel'], arrays['kernel'])
  lens = gate_lib.stored_lens(Model(gate_lib.store({}, gate), config))
  assert lens.keys() == {'lens_kernel', 'lens_bias'}
  np.testing.assert_array_equal(lens['lens_kernel'], arrays['lens_kernel'])
  assert gate_lib.stored(Model({}, config)) is None
  assert gate_lib.stored_lens(Model({}, config)) is None
  config.d_model = 5
  with pytest.raises(InputError, match='gate cannot be used'):
    gate_lib.stored(Model(gate_lib.store({}, gate), config))
