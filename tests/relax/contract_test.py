"""What every relaxation keeps, alone and together; see `rrt.relax.base`."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.checkpoints.load import load, save
from rrt.config import ModelConfig
from rrt.convert.report import count_arrays
from rrt.errors import InputError
from rrt.infer.engine.engine import Engine
from rrt.infer.generate import complete
from rrt.model import LanguageModel
from rrt.models import lm_head, passes, transformer
from rrt.models.cache import init_cache
from rrt.models.count import count_params
from rrt.models.init import init_params
from rrt.models.stack import unstack
from rrt.models.untie import to_untied
from rrt.relax.adapter import Adapter
from rrt.relax.bank import Bank, Pool
from rrt.relax.base import LAYOUTS
from rrt.relax.experts import Experts
from rrt.relax.gain import Gain
from rrt.relax.hosts import SITES
from rrt.relax.lora import Lora
from rrt.relax.memory import Memory
from rrt.relax.peer import Peer
from rrt.relax.trees import by_expert, own_leaves, prepare_all, relaxed_hosts, subtree
from rrt.tree import flatten
from tests import runs
from tests.models.configs import gemma3, llama, perturbed, tokens
from tests.relax.toys import Bottleneck, Crowd, KvGain, Shift, Skip

_RANKS = Lora(q=3, k=2, o=3, gate=4, up=((1, 2), (3, 0), (4, 4)), down=4, alpha=6.0)
_ALL = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
RELAX = {
  'none': (),
  'lora': (_RANKS,),
  'gain': (Gain(),),
  'gain everywhere': (Gain(_ALL),),
  'lora, gain': (_RANKS, Gain()),
  'gain, lora': (Gain(_ALL), _RANKS),
  'lora, gain on experts': (_RANKS, Gain(_ALL)),
  'shift': (Shift(),),
  'bottleneck': (Bottleneck(),),
  'task adapter': (Adapter(3, alpha=6.0), _RANKS),
  'task adapter by loop': (Adapter(2, by_loop=True, components='all'), _RANKS, Gain()),
  'kvgain': (KvGain(),),
  'skip': (Skip(),),
  'memory': (Memory((1,), 9, heads=2, topk=3, key_dim=6, dim=5),),
  'memory, two layers': (
    _RANKS,
    Memory((0, 1), 9, 2, 4, key_dim=4, query_rank=2, qk_norm=True, gated=False, loops=(0, 2)),
  ),
  'peer, memory': (Memory((1,), 9, 1, 4), Peer((0,), 4, 2, 3, activation='silu', gated=True)),
  'experts': (Experts(6, topk=4, normalise='all', q=2, gate=1, down=3),),
  'experts, loop prior annealed': (
    Experts(6, topk=4, score='sigmoid', balance_by='bias', anneal=4, noise=True, o=2, up=1),
    Gain(),
  ),
  'bank': (Bank(positions=(1,)),),
  'pool': (_RANKS, Pool(positions=(0, 1), segments=4, always=1, anneal=4)),
  'all': (_RANKS, Gain(('o', 'v')), Shift(), Bottleneck(), Memory((1,), 9, 2, 3), KvGain(), Skip()),
  'crowd': (Crowd(),),
}
INDEPENDENT = [n for n, relax in RELAX.items() if all(r.row_independent for r in relax)]
MERGEABLE = [n for n, relax in RELAX.items() if not any(r.unmergeable for r in relax)]
every = pytest.mark.parametrize('name', RELAX)


def config(name: str, **changes) -> ModelConfig:
  """A block alone; with post-norms and windows where relaxations are together."""
  alone = dict(prelude_layers=0, coda_layers=0)
  if 'on experts' in name:
    alone |= dict(num_experts=3, experts_per_token=2)
  if name not in ('all', 'lora, gain'):
    return llama(relax=RELAX[name], **alone | changes)
  by_depth = dict(windows=(3, 0, 3, 3, 0, 2), rope_index=(1, 0, 1, 1, 1, 0))
  return gemma3(relax=RELAX[name], **alone | by_depth | changes)


@functools.cache
def params(name: str):
  return perturbed(config(name))


@functools.partial(jax.jit, static_argnames=('config', 'scan', 'aux'))
def forward(params, tokens_BxL, *, config, scan=True, aux=False):
  out = transformer.forward(config, params, tokens_BxL, scan=scan, return_aux=aux)
  return lm_head.logits(config, params, out.hidden_BxLxD), out.aux


def test_the_cases_reach_every_site():
  assert {r.site for relax in RELAX.values() for r in relax} == set(SITES)


@every
def test_scan_equals_loop(name):
  c, p = config(name), params(name)
  got, aux = forward(p, tokens(c), config=c, aux=True)
  want, unrolled = forward(p, tokens(c), config=c, scan=False, aux=True)
  np.testing.assert_allclose(got, want, atol=2e-5)
  chex.assert_trees_all_close(aux, unrolled, atol=1e-6)
  plain, none = forward(p, tokens(c), config=c)
  np.testing.assert_array_equal(got, plain)
  assert not none.losses and not none.stats


@pytest.mark.parametrize('name', [n for n in RELAX if n not in ('skip', 'all')])
def test_scan_equals_loop_in_sequence_order(name):
  c, p = config(name, order='sequence'), params(name)
  got, aux = forward(p, tokens(c), config=c, aux=True)
  want, unrolled = forward(p, tokens(c), config=c, scan=False, aux=True)
  np.testing.assert_allclose(got, want, atol=2e-5)
  chex.assert_trees_all_close(aux, unrolled, atol=1e-6)
  if name == 'bottleneck':
    # The same positions as in the CYCLE order, so as many terms.
    assert float(aux.losses['bottleneck/size']) > 0


def test_aux_is_summed_and_averaged_over_positions():
  c, p = config('bottleneck'), params('bottleneck')
  _, aux = forward(p, tokens(c), config=c, aux=True)
  positions = c.loops * c.block_layers
  assert set(aux.losses) == {'bottleneck/size'}
  assert aux.stats['bottleneck/usage'].shape == (3,)
  mean = float(aux.stats['bottleneck/mean'])
  np.testing.assert_allclose(aux.losses['bottleneck/size'], 0.5 * positions * mean, rtol=1e-5)
  np.testing.assert_allclose(jnp.mean(aux.stats['bottleneck/usage']), mean, rtol=1e-5)


@functools.partial(jax.jit, static_argnames=('config', 'scan'))
def one_pass(params, x_BxLxD, loop, context, *, config, scan=True):
  return passes.block_pass(config, params, x_BxLxD, loop, context, scan=scan)[0]


@pytest.mark.parametrize('name', INDEPENDENT)
def test_rows_at_mixed_loops_equal_rows_alone(name):
  """In every layout: no row depends on the loops or values of the others."""
  c, p = config(name), params(name)
  rng = np.random.default_rng(0)
  x_BxLxD = jnp.asarray(rng.normal(size=(4, 5, c.d_model)), jnp.float32)
  loops = np.array([2, 0, 1, 0])
  context = transformer.make_context(c, tokens(c, 4, 5))
  alone = transformer.make_context(c, tokens(c, 1, 5))
  mixed = one_pass(p, x_BxLxD, jnp.asarray(loops), context, config=c)
  for row, loop in enumerate(loops):
    single = one_pass(p, x_BxLxD[row : row + 1], int(loop), alone, config=c)
    np.testing.assert_allclose(mixed[row], single[0], atol=2e-5)
  for layout in LAYOUTS:
    laid_out = prepare_all(c, unstack(p), layout)
    got = one_pass(laid_out, x_BxLxD, jnp.asarray(loops), context, config=c, scan=False)
    np.testing.assert_allclose(got, mixed, atol=2e-5)


def test_a_relaxation_that_couples_rows_does():
  """The toy of `crowd` would fail the test above, as it should."""
  c, p = config('crowd'), params('crowd')
  x_BxLxD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, c.d_model)), jnp.float32)
  context = transformer.make_context(c, tokens(c, 2, 5))
  alone = transformer.make_context(c, tokens(c, 1, 5))
  both = one_pass(p, x_BxLxD, 1, context, config=c)
  assert np.abs(both[0] - one_pass(p, x_BxLxD[:1], 1, alone, config=c)[0]).max() > 1e-3


@pytest.mark.parametrize('name', MERGEABLE)
def test_merged_equals_forward(name):
  c, p = config(name), params(name)
  model = LanguageModel(c, jax.tree.map(np.asarray, p))
  untied = to_untied(model)
  assert untied.config.relax == () and untied.config.loops == 1
  got, _ = forward(untied.params, tokens(c), config=untied.config)
  np.testing.assert_allclose(got, forward(p, tokens(c), config=c)[0], atol=2e-5)


@pytest.mark.parametrize('name', sorted(set(RELAX) - set(MERGEABLE)))
def test_what_cannot_be_merged_is_refused_with_the_reason(name):
  c = config(name)
  model = LanguageModel(c, jax.tree.map(np.asarray, params(name)))
  reason = next(r.unmergeable for r in c.relax if r.unmergeable)
  with pytest.raises(InputError, match=f'{reason}.*rrt.save'):
    to_untied(model)


@every
def test_counted_as_stored(name):
  c = config(name)
  plain = dataclasses.replace(c, relax=())
  stored = init_params(c, jax.random.key(0))
  assert count_arrays(c, stored) == count_params(c).unique
  added = sum(r.count(host) for r, host, _ in relaxed_hosts(c))
  assert count_params(c).unique == count_params(plain).unique + added
  chex.assert_trees_all_equal_structs(stored, params(name))


@every
def test_axes_are_known_to_the_sharding_rules(name):
  from rrt import sharding

  for _, _, leaves in relaxed_hosts(config(name)):
    for leaf in leaves.values():
      assert len(leaf.axes) == len(leaf.shape)
      sharding.spec(leaf.axes)


@every
def test_starts_without_effect(name):
  c = config(name)
  start = init_params(c, jax.random.key(1))
  plain = dataclasses.replace(c, relax=())
  bare = jax.tree.map(lambda t: t, start)
  for relaxation, host, _ in relaxed_hosts(c):
    tree = subtree(bare['block'], host)
    for leaf in own_leaves(tree, relaxation.kind):
      del tree[leaf]
  want, _ = forward(bare, tokens(c), config=plain)
  np.testing.assert_allclose(forward(start, tokens(c), config=c)[0], want, atol=1e-6)


@pytest.mark.parametrize('name', INDEPENDENT)
def test_decoding_equals_the_full_forward(name):
  c, p = config(name), params(name)
  tokens_BxL = tokens(c, 2, 8)
  want, _ = forward(p, tokens_BxL, config=c)

  @jax.jit
  def step(cache, tokens_BxL, position):
    positions_BxL = position + jnp.broadcast_to(
      jnp.arange(tokens_BxL.shape[1])[None, :], tokens_BxL.shape
    )
    out = transformer.forward(
      c, p, tokens_BxL, positions_BxL=positions_BxL, cache=cache, scan=False
    )
    return out.cache, lm_head.logits(c, p, out.hidden_BxLxD)

  cache, got = step(init_cache(c, 2, 8), tokens_BxL[:, :5], 0)
  np.testing.assert_allclose(got, want[:, :5], atol=2e-5)
  for t in range(5, 8):
    cache, got = step(cache, tokens_BxL[:, t : t + 1], t)
    np.testing.assert_allclose(got[:, 0], want[:, t], atol=2e-5)


@every
def test_saved_and_loaded_is_itself(name, tmp_path):
  c, p = config(name), params(name)
  model = LanguageModel(c, jax.tree.map(np.asarray, p))
  found = load(save(model, tmp_path / 'model'))
  assert found.config == c
  assert ModelConfig.from_json(c.to_json()) == c
  chex.assert_trees_all_equal(flatten(found.params), flatten(model.params))


@pytest.mark.slow
@pytest.mark.parametrize('name', INDEPENDENT)
def test_the_engine_writes_what_complete_writes(name):
  model = LanguageModel(config(name), jax.tree.map(np.asarray, params(name)))
  prompts = [[3, 1, 4], [1], [5, 9, 2, 6]]
  engine = Engine(model, slots=2, context=24, page=8, steps=4)
  got = engine.generate(prompts, max_new_tokens=8)
  want = complete(model, prompts, max_new_tokens=8)
  assert [r.tokens for r in got] == [r.tokens for r in want]


def test_the_engine_refuses_what_couples_rows():
  model = LanguageModel(config('crowd'), params('crowd'))
  with pytest.raises(InputError, match=r"'crowd' couples the rows.*rrt.complete"):
    Engine(model, slots=2, context=24, page=8)


@every
def test_trains(name):
  """Every leaf gets a gradient, padding none, and losses reach the metrics."""
  from rrt.train import optim, placement
  from rrt.train import step as step_lib
  from rrt.train.losses import Objective

  c, p = config(name), params(name)
  o = optim.Optimizer(learning_rate=1e-2, weight_decay=0.5, clip=0.0)
  mesh = jax.make_mesh(
    (1,) * 4,
    ('data', 'fsdp', 'expert', 'tensor'),
    (jax.sharding.AxisType.Auto,) * 4,
    devices=jax.devices()[:1],
  )
  trained = step_lib.trained_paths(optim.trainable(o, p))
  spec = step_lib.Step(
    config=c,
    objective=Objective(cross_entropy=1.0, distillation=0.0),
    optimizer=optim.make_optimizer(o, step_lib.split(p, trained)[0], 10),
    trained=trained,
    clip=0.0,
  )
  ids = np.asarray(tokens(c, 2, 8))
  zero = np.zeros_like(ids)
  batch = {
    'tokens': ids,
    'targets': np.roll(ids, -1, 1),
    'segment_ids': zero + 1,
    'positions': zero + np.arange(8)[None],
    'weights': np.ones(ids.shape, np.float32),
  }
  state = step_lib.init_state(spec, p, mesh)
  before = jax.tree.map(np.asarray, state.params)
  abstract = step_lib.abstract_state(spec, mesh)
  step = step_lib.jit_step(spec, mesh, jax.tree.map(lambda x: x.sharding, abstract))
  with jax.set_mesh(mesh):
    state, metrics = step(state, {}, placement.to_mesh(batch, mesh))
  after = jax.tree.map(np.asarray, state.params)
  total = float(metrics['cross_entropy'])
  added = {'relax/bottleneck/size'}
  added |= {
    f'relax/{kind}/{loss}' for kind in ('experts', 'bank', 'pool') for loss in ('z', 'switch')
  }
  total += sum(float(v) for k, v in metrics.items() if k in added)
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)
  for relaxation, host, leaves in relaxed_hosts(c):
    assert float(metrics[f'grad_norm/{relaxation.kind}']) > 0
    own = lambda tree, host=host, r=relaxation: by_expert(
      own_leaves(subtree(tree['block'], host), r.kind), host
    )
    old, new = own(before), own(after)
    ones = relaxation.mask({k: np.ones_like(v) for k, v in old.items()}, host)
    for leaf in leaves:
      if leaf.endswith('_start'):  # Fades by its temperature.
        continue
      moved = old[leaf] != new[leaf]
      assert not moved[np.asarray(ones[leaf]) == 0].any()
      assert moved[np.asarray(ones[leaf]) == 1].all()
  if 'bottleneck' in name:
    assert {'relax/bottleneck/usage/0', 'relax/bottleneck/usage/2', 'relax/bottleneck/mean'} <= set(
      metrics
    )


@pytest.mark.parametrize('name', ['lora, gain', 'all'])
def test_sharded_equals_one_device(name):
  from rrt import sharding
  from rrt.train.placement import param_shardings

  c, p = config(name, num_heads=4, num_kv_heads=2), params(name)
  want, _ = forward(p, tokens(c, 4, 8), config=c)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  placed = jax.device_put(p, param_shardings(c, mesh)) if c.vocab_size % 2 == 0 else None
  if placed is None:  # The vocabulary is odd: shard everything else.
    where = param_shardings(c, mesh)
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    where['embed'] = jax.tree.map(lambda _: one, where['embed'])
    placed = jax.device_put(p, where)
  with jax.set_mesh(mesh):
    got, _ = forward(placed, tokens(c, 4, 8), config=c)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_each_kind_can_be_given_once():
  with pytest.raises(InputError, match='given once'):
    llama(relax=(Gain(), Gain(('q',))))


def test_the_block_has_no_pass_in_sequence_order():
  with pytest.raises(InputError, match=r"'skip' relaxes a whole pass.*order=cycle"):
    llama(relax=(Skip(),), order='sequence')


@pytest.mark.slow
def test_runs_train_save_and_resume_with_gain(tmp_path):
  """`gain` by its words in a recipe: converted, trained, continued."""
  pytest.importorskip('ml_collections')
  text = runs.write_text(tmp_path / 'text.jsonl')
  from rrt.train.loop import uptrain
  from rrt.train.recipe import Recipe
  from rrt.train.setup import planned

  recipe = Recipe.from_dict(
    runs.recipe(text, steps=4) | {'convert': {'prelude': 1, 'coda': 1, 'relax': ('gain',)}}
  )
  child = planned(recipe, runs.PARENT)
  assert child.relax == (Gain(),)
  model = runs.model(child, 3)
  run = uptrain(runs.parent(), model, recipe)
  rows = [r for r in run.history if 'train/loss' in r]
  assert rows[-1]['train/gain_norm/2'] > 0 and rows[-1]['train/grad_norm/gain'] > 0
