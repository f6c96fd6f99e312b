"""Calibrated conversion: its algebra, and that it beats plain averaging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.convert import activations, permute, sweeps
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.models import transformer
from rrt.ops import least_squares
from tests.convert import tiny


def covariance(rng, size, tokens=200):
  x = rng.normal(size=(tokens, size)) @ rng.normal(size=(size, size))
  return (x.T @ x / tokens).astype(np.float32)


def error(c, m):
  """||x M||^2 for inputs x of covariance c."""
  return float(np.trace(m.T @ c @ m))


@pytest.mark.parametrize('shape', [(9, 6), (6, 9)])
def test_low_rank_is_optimal_in_the_norm_of_the_inputs(shape):
  rng = np.random.default_rng(0)
  c, m = covariance(rng, shape[0]), rng.normal(size=shape).astype(np.float32)
  sigma, _, _ = least_squares.spectrum(c, m)
  a, b, kept = least_squares.low_rank(c, m, 3, 5)
  assert a.shape == (shape[0], 5) and not a[:, 3:].any() and not b[3:].any()
  tail = float(np.sum(np.asarray(sigma)[3:] ** 2))
  np.testing.assert_allclose(error(c, m - a @ b), tail, rtol=1e-3)
  np.testing.assert_allclose(kept, 1 - tail / error(c, m), rtol=1e-4)
  u, s, v = np.linalg.svd(m)
  plain = (u[:, :3] * s[:3]) @ v[:3]
  assert error(c, m - a @ b) < error(c, m - plain)


def tied_error(cs, ws, shared, ranks):
  total = 0.0
  for c, w, r in zip(cs, ws, ranks, strict=True):
    a, b, _ = least_squares.low_rank(c, w - shared, r, max(r, 1))
    total += error(c, np.asarray(w - shared - a @ b))
  return total


@pytest.mark.parametrize('ranks', [(0, 0), (2, 2), (1, 3), (0, 4)])
def test_two_loops_are_tied_optimally(ranks):
  rng = np.random.default_rng(1)
  cs = np.stack([covariance(rng, 8) for _ in range(2)])
  ws = rng.normal(size=(2, 8, 7)).astype(np.float32)
  shared = least_squares.tie(cs, ws, jnp.asarray(ranks))
  # What is left is the tail of the difference in the parallel norm.
  parallel = cs[0] @ np.linalg.solve(cs[0] + cs[1], cs[1])
  sigma, _, _ = least_squares.spectrum(parallel, ws[1] - ws[0])
  tail = float(np.sum(np.asarray(sigma)[sum(ranks) :] ** 2))
  found = tied_error(cs, ws, shared, ranks)
  np.testing.assert_allclose(found, tail, rtol=2e-3)
  mean = least_squares.weighted_mean(cs, ws)
  assert found <= tied_error(cs, ws, mean, ranks) * 1.001


def test_more_loops_are_tied_better_than_around_their_mean():
  rng = np.random.default_rng(2)
  cs = np.stack([covariance(rng, 10) for _ in range(3)])
  ws = rng.normal(size=(3, 10, 8)).astype(np.float32)
  ranks = (2, 2, 2)
  shared = least_squares.tie(cs, ws, jnp.asarray(ranks))
  mean = least_squares.weighted_mean(cs, ws)
  assert tied_error(cs, ws, shared, ranks) < 0.8 * tied_error(cs, ws, mean, ranks)


def test_refit_finds_the_weight_and_stays_near_it_without_evidence():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(400, 6)).astype(np.float32)
  truth = rng.normal(size=(6, 4)).astype(np.float32)
  center = truth + rng.normal(size=(6, 4)).astype(np.float32)
  x[:, 5] = 0  # The text never moves the last input.

  def refit(y):
    sums = [
      (part.T @ part / 400, part.T @ (want - part @ center) / 400)
      for part, want in ((x, y), (x[300:], y[300:]))
    ]
    return np.asarray(least_squares.refit(*sums[0], *sums[1], center))

  found = refit(x @ truth)
  wrong = np.abs(center - truth)[:5].max()
  assert np.abs(found - truth)[:5].max() < 0.15 * wrong
  np.testing.assert_allclose(found[5], center[5], atol=1e-3)
  # Targets that the inputs say nothing about: the center stays.
  noise = x @ center + rng.normal(size=(400, 4)).astype(np.float32)
  assert np.abs(refit(noise) - center).max() < 0.15


def test_units_are_found_again_in_another_order():
  rng = np.random.default_rng(5)
  mlp = {
    name: {'kernel': rng.normal(size=shape).astype(np.float32)}
    for name, shape in (('gate', (6, 9)), ('up', (6, 9)), ('down', (9, 6)))
  }
  order = rng.permutation(9)
  sign = rng.choice([-1.0, 1.0], 9).astype(np.float32)
  other = permute.reorder(mlp, order, sign)
  kernels = lambda tree: {k: jnp.asarray(v['kernel']) for k, v in tree.items()}
  found = permute.match_units(kernels(mlp), kernels(other), jnp.eye(6), np.ones(9), np.ones(9))
  back = permute.reorder(other, *found)
  jax.tree.map(np.testing.assert_array_equal, mlp, back)


def test_damping_makes_few_tokens_safe():
  rng = np.random.default_rng(4)
  x = rng.normal(size=(3, 20)).astype(np.float32)
  c = least_squares.damp(x.T @ x / 3, 1e-2)
  assert np.isfinite(np.linalg.cholesky(np.asarray(c))).all()
  assert np.isfinite(np.asarray(least_squares.damp(jnp.zeros((4, 4)), 1e-2))).all()


# ------------------------------------------------------------------- the whole


def drift(parent, child, tokens_BxL):
  """Relative error of the last hidden states."""
  run = lambda m: np.asarray(transformer.forward(m.config, m.params, tokens_BxL).hidden_BxLxD)
  a, b = run(parent), run(child)
  return float(np.sum((a - b) ** 2) / np.sum(a**2))


@pytest.mark.slow
@pytest.mark.parametrize(
  'family, arguments',
  [
    ('llama', dict(prelude=1, coda=1, rank=2)),
    ('llama', dict(rank=2, loops=3)),
    ('llama', dict(rank=2, loop_norms=False)),
    ('llama', dict(loops=2, order='sequence', rank=0)),
    ('gemma3', dict(prelude=2, coda=2, rank=2)),
    ('llama_biases', dict(prelude=1, coda=1, rank=2)),
    ('qwen3', dict(prelude=1, coda=1, rank=2)),
    ('gemma2', dict(prelude=1, coda=1, rank=2)),
    ('olmo2', dict(prelude=1, coda=1, rank=2)),
    ('gpt_neox', dict(prelude=1, coda=1, rank=2)),
    ('olmo2_biases', dict(prelude=1, coda=1, rank=2)),
  ],
)
def test_calibrated_is_nearer_to_the_parent_than_the_average(family, arguments):
  parent = tiny.parent(family, layers=6)
  text = tiny.tokens(1500)
  held_out = tiny.tokens(200, seed=5).reshape(2, 100)
  plain, _ = to_recursive(parent, init='average', **arguments)
  child, report = to_recursive(
    parent, init='calibrated', calibration=text, calibration_tokens=1024, **arguments
  )
  assert drift(parent, child, held_out) < 0.8 * drift(parent, plain, held_out)
  assert len(report.drift) == 6 - arguments.get('prelude', 0)
  assert report.calibration_tokens >= 1000


def test_few_tokens_do_no_harm():
  parent = tiny.parent(layers=6)
  arguments = dict(prelude=1, coda=1, rank=2)
  held_out = tiny.tokens(200, seed=5).reshape(2, 100)
  plain, _ = to_recursive(parent, init='average', **arguments)
  child, _ = to_recursive(parent, calibration=tiny.tokens(160), calibration_tokens=128, **arguments)
  assert drift(parent, child, held_out) < drift(parent, plain, held_out)


@pytest.mark.slow
def test_prelude_is_the_parent_and_the_embedding_is_carried():
  parent = tiny.parent(layers=6)
  child, _ = to_recursive(
    parent, prelude=2, coda=2, rank=1, calibration=tiny.tokens(), calibration_tokens=256
  )
  layers = parent.params['block']['layers']
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[:2], b), layers, child.params['prelude']['layers']
  )
  for part in ('embed', 'final_norm', 'head'):
    jax.tree.map(np.testing.assert_array_equal, parent.params[part], child.params[part])


@pytest.mark.parametrize('family', ['llama', 'llama_biases', 'gemma3'])
def test_changed_gains_are_made_up_for(family):
  """A pre-norm's new gain and its rescaled linears compute the same."""
  parent = tiny.parent(family, layers=2)
  c = parent.config
  layer = jax.tree.map(lambda t: t[0], parent.params['block']['layers'])
  norms = {
    k: jax.tree.map(lambda g: 0.5 + 0.7 * g, v)
    for k, v in layer.items()
    if k in ('attn_norm', 'mlp_norm')
  }
  other = activations.with_norms(c, layer, norms)
  tokens_BxL = tiny.tokens(40).reshape(2, 20)
  seen = activations.LayerActivations(c, lambda d: layer, tokens_BxL)
  x_BxLxD = np.random.default_rng(0).normal(size=(2, 20, 12))
  x_BxLxD = x_BxLxD.astype(np.float32)
  np.testing.assert_allclose(
    seen.step(0, layer, x_BxLxD).end, seen.step(0, other, x_BxLxD).end, atol=1e-4
  )


def test_the_walk_is_the_forward_pass():
  parent = tiny.parent('gemma3', layers=4)
  tokens_BxL = tiny.tokens(60).reshape(3, 20)
  layers = parent.params['block']['layers']
  seen = activations.LayerActivations(
    parent.config, lambda d: jax.tree.map(lambda t: t[d], layers), tokens_BxL
  )
  embedded = parent.params['embed']['table'][tokens_BxL] * 12**0.5
  streams = seen.run(embedded.astype(np.float32), 2)
  assert sorted(streams) == [2, 3]
  out = transformer.forward(parent.config, parent.params, tokens_BxL)
  gain = parent.params['final_norm']['scale']
  h = streams[3].end
  h = h / np.sqrt(np.mean(h**2, -1, keepdims=True) + 1e-5) * (1 + gain)
  np.testing.assert_allclose(h, out.hidden_BxLxD, atol=1e-4)


def test_the_same_text_gives_the_same_child():
  arguments = dict(prelude=1, coda=1, rank=1, calibration=tiny.tokens(), calibration_tokens=256)
  a, _ = to_recursive(tiny.parent(layers=4), **arguments)
  b, _ = to_recursive(tiny.parent(layers=4), **arguments)
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.mark.parametrize(
  'family, arguments',
  [
    ('llama', dict(loops=2, rank=0)),
    pytest.param('llama', dict(prelude=1, coda=2, loops=3, rank=1), marks=pytest.mark.slow),
    pytest.param('gemma3', dict(prelude=2, coda=2, rank=2), marks=pytest.mark.slow),
    pytest.param('qwen2', dict(prelude=1, coda=1, rank=2), marks=pytest.mark.slow),
  ],
)
def test_a_second_sweep_comes_nearer(family, arguments):
  parent = tiny.parent(family, layers=6)
  held_out = tiny.tokens(2000, seed=5).reshape(20, 100)
  fitted = dict(calibration=tiny.tokens(3000), calibration_tokens=2048, **arguments)
  once, first = to_recursive(parent, **fitted)
  twice, second = to_recursive(parent, sweeps=2, **fitted)
  assert second.drift[-1] < first.drift[-1]
  assert drift(parent, twice, held_out) < drift(parent, once, held_out)


def test_sweeps_end_where_they_come_no_nearer(monkeypatch):
  """Of sweeps that get worse the one before is kept."""
  gaps, made = iter([0.3, 0.2, 0.25, 0.1]), []
  real = sweeps.calibrate

  def scripted(activations, weights, *args, sweep, **kwargs):
    real(activations, weights, *args, sweep=sweep, **kwargs)
    made.append({name: kernel.copy() for name, kernel in weights.shared.items()})
    sweep.gap = next(gaps)

  monkeypatch.setattr(sweeps, 'calibrate', scripted)
  child, _ = to_recursive(
    tiny.parent(layers=4), sweeps=4, calibration=tiny.tokens(300), calibration_tokens=256
  )
  assert len(made) == 3
  kernel = child.params['block']['layers']['mlp']['up']['kernel']
  np.testing.assert_array_equal(kernel, made[1]['up'])
  assert np.abs(made[1]['up'] - made[2]['up']).max() > 1e-5


@pytest.mark.parametrize(
  'arguments, says',
  [
    (dict(sweeps=0), 'whole number, 1 or more'),
    (dict(sweeps=2, init='average'), 'no effect with init'),
    (dict(sweeps=2, drop='2-3', loops=1), 'no effect on one loop'),
    (dict(sweeps=2, relax=('gain:start=0,components=all',)), 'start closed'),
    (dict(sweeps=2, drop='2', add_loops=True, prelude=1, block=1, coda=1), 'no effect with add_l'),
    (dict(sweeps=2, params='0.9x'), 'params chooses it'),
  ],
)
def test_sweeps_without_effect_are_refused(arguments, says):
  with pytest.raises(InputError, match=says):
    to_recursive(tiny.parent(layers=4), calibration=tiny.tokens(300), **arguments)
