"""What is trained, at what rate, with what decay: by path."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rrt.errors import InputError
from rrt.train import optim
from tests import runs


def leaves_by_path(tree):
  return dict(zip(jax.tree.leaves(optim.paths(tree)), jax.tree.leaves(tree), strict=True))


def chosen(train):
  mask = optim.trainable(optim.Optimizer(train=train), runs.child().params)
  return {p for p, yes in leaves_by_path(mask).items() if yes}


def one_update(o, params, steps=10, gradient=1.0):
  tx = optim.make_optimizer(o, params, steps)
  grads = jax.tree.map(lambda p: jnp.full(p.shape, gradient), params)
  updates, _ = tx.update(grads, tx.init(params), params)
  return leaves_by_path(updates)


def test_all_is_everything():
  assert chosen('all') == set(leaves_by_path(runs.child().params))


def test_relaxations_are_lora_and_norms():
  paths = chosen('relaxations')
  assert 'block/layers/attn/q/lora_a' in paths
  assert 'block/layers/attn_norm/scale' in paths
  assert 'final_norm/scale' in paths
  assert not [p for p in paths if p.endswith(('kernel', 'table'))]


def test_a_pattern_is_searched_for():
  assert chosen('^coda/.*up/') == {'coda/layers/mlp/up/kernel'}


@pytest.mark.parametrize('pattern', ['memory', 'lora_c'])
def test_a_pattern_without_a_match_is_told(pattern):
  with pytest.raises(InputError, match=f'{pattern}.*paths look like'):
    chosen(pattern)
  rules = ((pattern, {'multiplier': 2.0}),)
  with pytest.raises(InputError, match=f'{pattern}.*paths look like'):
    optim.make_optimizer(optim.Optimizer(rules=rules), runs.child().params, 9)


def test_schedule_warms_up_and_falls():
  o = optim.Optimizer(learning_rate=1.0, warmup_steps=4, final_rate=0.1)
  rate = [float(optim.schedule(o, 12)(i)) for i in range(12)]
  np.testing.assert_allclose(rate[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose(rate[7], (1.0 + 0.1) / 2, rtol=1e-6)
  np.testing.assert_allclose(rate[11], 0.1, rtol=1e-6)
  assert all(a > b for a, b in itertools.pairwise(rate[3:]))


@pytest.mark.parametrize('kind', ['cosine', 'linear'])
@pytest.mark.parametrize('warmup', [0, 1, 3, 7])
@pytest.mark.parametrize('final', [0.0, 0.25])
def test_the_last_step_has_the_final_rate(kind, warmup, final):
  o = optim.Optimizer(learning_rate=2.0, warmup_steps=warmup, schedule=kind, final_rate=final)
  rate = [float(optim.schedule(o, 8)(i)) for i in range(8)]
  np.testing.assert_allclose([max(rate), rate[7]], [2.0, 2.0 * final], atol=1e-6)


@pytest.mark.parametrize('warmup', [0, 1, 2])
def test_short_warmups(warmup):
  o = optim.Optimizer(learning_rate=1.0, warmup_steps=warmup, schedule='constant')
  assert float(optim.schedule(o, 5)(max(warmup - 1, 0))) == 1.0


def test_linear_schedule():
  o = optim.Optimizer(learning_rate=1.0, schedule='linear')
  rate = [float(optim.schedule(o, 5)(i)) for i in range(5)]
  np.testing.assert_allclose(rate, [1, 0.75, 0.5, 0.25, 0], atol=1e-6)


def test_equals_plain_adamw():
  """The weights' update is optax.adamw's; gains are not decayed."""
  params = {'a': {'kernel': jnp.ones(3)}, 'b': {'scale': jnp.ones(3)}}
  o = optim.Optimizer(learning_rate=0.1, weight_decay=0.5, schedule='constant')
  got = one_update(o, params, gradient=0.3)
  want = optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.5)
  grads = jax.tree.map(lambda p: 0.3 * p, params)
  updates, _ = want.update(grads, want.init(params), params)
  np.testing.assert_allclose(got['a/kernel'], updates['a']['kernel'], rtol=1e-6)
  np.testing.assert_allclose(got['b/scale'], updates['b']['scale'] + 0.1 * 0.5, rtol=1e-5)


def test_rules_override_by_path_and_the_first_wins():
  params = {'embed': {'table': jnp.ones(2)}, 'head': {'kernel': jnp.ones(2)}}
  o = optim.Optimizer(
    learning_rate=0.1,
    schedule='constant',
    rules=(('^embed', {'multiplier': 0.5}), ('e', {'learning_rate': 0.7, 'schedule': 'constant'})),
  )
  got = one_update(o, params)
  np.testing.assert_allclose(got['embed/table'], -0.05, rtol=1e-5)
  np.testing.assert_allclose(got['head/kernel'], -0.7, rtol=1e-5)


@pytest.mark.parametrize(
  'fields',
  [
    {'learning_rate': 0.0},
    {'schedule': 'exponential'},
    {'beta2': 1.0},
    {'weight_decay': -0.1},
    {'clip': -1.0},
    {'final_rate': 2.0},
    {'train': '('},
    {'rules': (('a', {'speed': 1.0}),)},
  ],
)
def test_wrong_values_are_named(fields):
  name = 'speed' if 'rules' in fields else next(iter(fields))
  with pytest.raises(InputError, match=r'\(' if name == 'train' else name):
    optim.Optimizer(**fields)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
  params = runs.child().params
  rng = np.random.default_rng(0)
  grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
  updates = {}
  for method in optim.METHODS:
    o = optim.Optimizer(method=method, learning_rate=1.0, schedule='constant', beta1=0.0, beta2=0.0)
    tx = optim.make_optimizer(o, params, 10)
    found, _ = tx.update(grads, tx.init(params), params)
    updates[method] = leaves_by_path(found)
  for path, update in updates['muon'].items():
    update = np.asarray(update)
    if not optim.is_matrix(path):
      np.testing.assert_allclose(update, updates['adamw'][path], rtol=1e-5)
      continue
    # Singular values near 1 (Newton-Schulz: 0.5 to 1.2), scaled to the size of AdamW's updates.
    size = 0.2 * np.sqrt(max(update.shape[-2:]))
    values = np.linalg.svd(update, compute_uv=False) / size
    assert values.min() > 0.3 and values.max() < 1.4, path
  assert any(optim.is_matrix(p) for p in updates['muon'] if 'lora' in p)
  assert not optim.is_matrix('embed/table') and not optim.is_matrix('head/kernel')


def test_a_rule_may_choose_the_method():
  params = runs.child().params
  rules = ((r'^block/', {'method': 'muon'}),)
  tx = optim.make_optimizer(optim.Optimizer(rules=rules), params, 10)
  state = tx.init(params)
  assert set(state.inner_states) == {'default', r'^block/'}
  with pytest.raises(InputError, match="method='sgd'"):
    optim.Optimizer(method='sgd')
