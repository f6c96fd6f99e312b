"""Parents with experts: experts are matched, fitted on their own tokens, and exported again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.checkpoints import save_hf_tied, save_peft
from rrt.convert import experts
from rrt.convert.calibrate import ALL_STEPS
from rrt.convert.plan import ConvertConfig, plan
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.model import LanguageModel
from tests.convert import tiny

TOKENS = tiny.tokens(40).reshape(2, 20)
MIXTURES = ('mixtral', 'qwen2_moe', 'grok1')
# Shared experts stay behind the others.
ORDERS = {name: [2, 0, 3, 1] + [5, 4] * (name == 'qwen2_moe') for name in MIXTURES}


def difference(a, b):
  return np.abs(tiny.logits(a, TOKENS) - tiny.logits(b, TOKENS)).max()


def shuffled(model, order_E, seed=0):
  """The model of two layers whose second is its first with experts and units in another order."""
  rng = np.random.default_rng(seed)
  first = jax.tree.map(lambda t: np.asarray(t[0]), model.params['block']['layers'])
  E, F = model.config.copies('up'), model.config.d_ff
  units = np.stack([rng.permutation(F) for _ in range(E)])
  signs = rng.choice([-1.0, 1.0], (E, F)).astype(np.float32)
  second = {**first, 'mlp': experts.reorder(first['mlp'], order_E, units, signs)}
  layers = jax.tree.map(lambda a, b: np.stack([a, np.asarray(b)]), first, second)
  return dataclasses.replace(model, params={**model.params, 'block': {'layers': layers}})


@pytest.mark.parametrize('family', MIXTURES)
def test_another_order_of_experts_and_units_is_the_same_layer(family):
  parent = tiny.parent(family, layers=2)
  plain = shuffled(parent, np.arange(len(ORDERS[family])))
  other = shuffled(parent, np.array(ORDERS[family]), seed=1)
  assert difference(plain, other) < 1e-5
  kernels = lambda m: m.params['block']['layers']['mlp']['gate']['kernels'][1]
  assert np.abs(kernels(plain) - kernels(other)).max() > 0.1


@pytest.mark.parametrize('family', MIXTURES)
def test_layers_that_differ_by_order_alone_are_tied_without_loss(family):
  """Experts are found again by what they do; routers go with them."""
  parent = shuffled(tiny.parent(family, layers=2), np.array(ORDERS[family]))
  child, _ = to_recursive(parent, loops=2, calibration=tiny.tokens())
  assert child.config.block_layers == 1 and not child.config.relax
  assert difference(parent, child) < 2e-3
  unmatched = dataclasses.replace(ALL_STEPS, permute_units=False)
  other, _ = to_recursive(parent, loops=2, calibration=tiny.tokens(), steps=unmatched)
  assert difference(parent, other) > 0.1


@pytest.mark.parametrize('family', MIXTURES)
def test_a_calibrated_child_is_nearer_than_means(family):
  parent = tiny.parent(family)
  args = dict(prelude=1, loops=2, coda=1, rank=3, calibration=tiny.tokens(2000))
  near, _ = to_recursive(parent, **args)
  far, _ = to_recursive(parent, **args, init='average')
  assert difference(parent, near) < difference(parent, far)


def test_a_weight_is_fitted_where_its_expert_is_used():
  """The shared weight of an expert that one loop alone sends tokens to is that loop's own."""
  parent = tiny.parent('mixtral', layers=2)
  layers = jax.tree.map(np.array, parent.params['block']['layers'])
  # The first layer sends all tokens to experts 0 and 1, the second to 2 and 3.
  layers['mlp_norm']['scale'][:] = 1e-3
  layers['mlp']['router']['weights'][:] = 0
  one = LanguageModel(parent.config, parent.params | {'block': {'layers': layers}})
  looks = []
  rng = np.random.default_rng(0)
  x_TxD = rng.normal(size=(64, 12)).astype(np.float32)
  for depth, chosen in enumerate(([0, 1], [2, 3])):
    mlp = jax.tree.map(lambda t, d=depth: t[d], layers['mlp'])
    gate_TxE = np.zeros((64, 4), np.float32)
    gate_TxE[:, chosen] = 0.5
    looks.append(experts.Look(mlp, jnp.asarray(x_TxD), gate_TxE))
  from rrt.ops import least_squares

  mean = lambda name, e, cs, ws: least_squares.weighted_mean(cs, ws)
  layer = {'mlp': dict(looks[0].mlp)}
  experts.fit(one.config, layer, looks, 1e-2, mean)
  for e in range(4):
    got = np.asarray(layer['mlp']['up']['kernels'][e])
    own, rest = (layers['mlp']['up']['kernels'][d][e] for d in ((0, 1) if e < 2 else (1, 0)))
    assert np.abs(got - own).max() < 0.05 < np.abs(got - rest).max()


def test_added_loops_leave_a_mixture_as_it_is():
  parent = tiny.parent('mixtral')
  child, report = to_recursive(parent, prelude=1, block=1, coda=2, loops=2, add_loops=True)
  assert child.config.loops == 2 and report.identity_error < 1e-5


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    (dict(budget=1000), 'budget=1000: is not for parents with experts'),
    (dict(weights='int8'), "weights='int8': experts are not quantized"),
    (dict(relax=('bank',)), 'a bank of MLPs does not go with a parent that has experts'),
    (dict(relax=('experts:gate=2',)), "'experts' on gate, of which a layer has one an expert"),
  ],
)
def test_what_experts_do_not_go_with_is_one_sentence(changes, says):
  with pytest.raises(InputError, match=says) as e:
    plan(tiny.parent('mixtral').config, ConvertConfig(loops=2, **changes))
  assert '\n' not in str(e.value)


def test_exports_with_one_mlp_a_layer_refuse():
  config = plan(tiny.parent('mixtral').config, ConvertConfig(loops=2, rank=2))
  for check in (save_hf_tied.check_tied, save_peft.check_peft):
    with pytest.raises(InputError, match=r'num_experts=4.*--format=hf'):
      check(config)
