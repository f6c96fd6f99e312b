"""Training memory layers: rates, moments by row, the slots of a new text, resuming, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rrt.checkpoints.load import load, save
from rrt.errors import InputError
from rrt.infer.engine.engine import Engine
from rrt.infer.generate import complete
from rrt.relax.memory import Memory
from rrt.relax.peer import Peer
from rrt.train import optim, slots
from rrt.train.loop import uptrain
from tests import runs

MEMORY = Memory((0, 1), 16, heads=2, topk=3, key_dim=4)
VALUES = 'block/memory_values'


def child(*relax):
  """A tiny child with memory layers that have an effect."""
  config = dataclasses.replace(runs.CHILD, relax=(*runs.CHILD.relax, *(relax or (MEMORY,))))
  return runs.model(config, 1)


def rise(o, steps, grads=None, **kwargs):
  """A table and a matrix after some steps with the same gradient."""
  params = {VALUES: jnp.ones((4, 3)), 'block/layers/mlp/up/kernel': jnp.ones((2, 4, 3))}
  grads = grads or jax.tree.map(lambda p: jnp.full_like(p, 0.1), params)
  transform = optim.make_optimizer(o, params, steps, **kwargs)
  state = transform.init(params)
  for _ in range(steps):
    updates, state = transform.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_values_have_their_own_rate_and_no_decay_unless_asked():
  o = optim.Optimizer(learning_rate=1e-3, schedule='constant', clip=0.0)
  params, _ = rise(o, 1)
  np.testing.assert_allclose(1 - params[VALUES], 1e-2, rtol=1e-4)
  np.testing.assert_allclose(1 - params['block/layers/mlp/up/kernel'], 1e-3, rtol=1e-4)
  still = {VALUES: jnp.zeros((4, 3)), 'block/layers/mlp/up/kernel': jnp.zeros((2, 4, 3))}
  decayed = dataclasses.replace(o, weight_decay=0.5)
  params, _ = rise(decayed, 1, still)
  np.testing.assert_array_equal(params[VALUES], 1.0)
  assert (params['block/layers/mlp/up/kernel'] < 1).all()
  asked = dataclasses.replace(
    o, rules=(('memory_values', {'multiplier': 2.0, 'weight_decay': 0.5}),)
  )
  params, _ = rise(asked, 1, still)
  np.testing.assert_allclose(params[VALUES], 1 - 2e-3 * 0.5, rtol=1e-6)


def test_a_second_moment_a_row():
  o = optim.Optimizer(
    learning_rate=1e-3, schedule='constant', rules=(('values', {'method': 'adamw_rows'}),)
  )
  grads = {
    VALUES: jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
    'block/layers/mlp/up/kernel': jnp.ones((2, 4, 3)),
  }
  params, state = rise(o, 2, grads)
  moments = next(
    s
    for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optim.RowMoments))
    if isinstance(s, optim.RowMoments)
  )
  assert moments.square[VALUES].shape == (4, 1) and moments.mean[VALUES].shape == (4, 3)
  g = np.asarray(grads[VALUES])
  want = 1 - 2 * 1e-3 * g / np.sqrt((g**2).mean(1, keepdims=True))
  np.testing.assert_allclose(params[VALUES], want, rtol=1e-5)


def test_rows_without_leave_stay_bit_for_bit():
  o = optim.Optimizer(
    learning_rate=1e-3, rules=(('memory_values', {'weight_decay': 0.5}),), clip=0.0
  )
  mask = np.array([[True], [False], [True], [False]])
  params, _ = rise(o, 3, rows={VALUES: mask})
  np.testing.assert_array_equal(np.asarray(params[VALUES] != 1).all(1), mask[:, 0])
  assert (params['block/layers/mlp/up/kernel'] != 1).all()


def test_tf_idf_takes_what_is_read_often_here_and_seldom_elsewhere():
  new = np.array([[4.0, 2.0, 0.0, 4.0], [4.0, 0.0, 0.0, 0.0]])
  background = np.array([[1.0, 0, 0, 0], [1.0, 0, 5, 0], [1.0, 0, 5, 3]])
  got = slots.tf_idf(new, background)
  want = np.array([8, 2, 0, 4]) / 14 * np.log(4 / np.array([4, 1, 3, 2]))
  np.testing.assert_allclose(got, want)


def test_usage_counts_the_reads_of_each_row():
  c = child()
  tokens_BxL = np.random.default_rng(0).integers(1, 264, (3, 8)).astype(np.int32)
  found = slots.usage(c.config, jax.tree.map(jnp.asarray, c.params), tokens_BxL)
  # 8 tokens, 2 loops, 2 layers, 2 heads of 3 slots.
  np.testing.assert_allclose(found['memory'].sum(1), 8 * 2 * 2 * 6)
  again = slots.usage(c.config, jax.tree.map(jnp.asarray, c.params), tokens_BxL[1:2])
  np.testing.assert_array_equal(found['memory'][1:2], again['memory'])


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return runs.write_text(tmp_path_factory.mktemp('text') / 'a.jsonl')


def recipe(text, **fields):
  return runs.recipe(text, **{'loss': {'cross_entropy': 1.0, 'distillation': 0.0}} | fields)


class Killed(BaseException):
  """Stands for whatever ends a process."""


def killed_at(step):
  def on_row(row):
    if row['step'] == step:
      raise Killed

  return on_row


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_the_model_serves(text, tmp_path):
  """Both kinds of table at once; then decoding, the engine, and the model read from disk."""
  c = child(Memory((1,), 16, 2, 3, key_dim=4, query_rank=1), Peer((0,), 9, 2, 3, key_dim=4))
  whole = uptrain(None, c, recipe(text))
  row = whole.history[-1]
  assert 0 < row['train/relax/memory/used'] < 1.0001 and row['train/relax/peer/kl'] >= 0
  with pytest.raises(Killed):
    uptrain(None, c, recipe(text), tmp_path / 'run', on_row=killed_at(5))
  run = uptrain(None, c, recipe(text), tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, run.model.params, whole.model.params)
  assert run.history[-1]['train/loss'] == whole.history[-1]['train/loss']
  kept = load(save(run.model, tmp_path / 'model'))
  prompts = [[3, 1, 4], [1], [5, 9, 2, 6]]
  want = complete(kept, prompts, max_new_tokens=8)
  got = Engine(kept, slots=2, context=24, page=8, steps=4).generate(prompts, max_new_tokens=8)
  assert [r.tokens for r in got] == [r.tokens for r in want]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 4}, {'fsdp': 2, 'tensor': 2, 'data': 2}])
def test_a_mesh_equals_one_device(text, sizes):
  """After three steps, with the rate of the values; their columns are on fsdp."""
  c = child(MEMORY, Peer((0,), 16, 2, 3, key_dim=4))
  settings = recipe(text, steps=3, mesh=sizes)
  got = uptrain(None, c, settings)
  # The same on one device of the eight.
  import rrt.sharding as sharding

  make = sharding.make_mesh
  sharding.make_mesh = lambda sizes=None, devices=None: make({'data': 1}, jax.devices()[:1])
  try:
    want = uptrain(None, c, settings | {'mesh': {'data': 1}})
  finally:
    sharding.make_mesh = make
  np.testing.assert_allclose(
    [r['train/loss'] for r in got.history], [r['train/loss'] for r in want.history], rtol=1e-5
  )
  for a, b in zip(
    jax.tree.leaves(got.model.params), jax.tree.leaves(want.model.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.slow
def test_sparse_fine_tuning_changes_the_chosen_slots_alone(text, tmp_path):
  c = child()
  settings = recipe(text, train_only='memory', slots={'top': 5, 'tokens': 256})
  with pytest.raises(Killed):
    uptrain(None, c, settings, tmp_path / 'run', on_row=killed_at(5))
  run = uptrain(None, c, settings, tmp_path / 'run')
  with np.load(tmp_path / 'run' / 'slots.npz') as kept:
    chosen_N = kept['memory']
  assert chosen_N.sum() == 5
  old, new = c.params['block'].copy(), run.model.params['block'].copy()
  moved_N = (old.pop('memory_values') != new.pop('memory_values')).any(1)
  assert moved_N.any() and not moved_N[~chosen_N].any()
  jax.tree.map(np.testing.assert_array_equal, old, new)
  for part in ('embed', 'prelude', 'coda', 'final_norm'):
    jax.tree.map(np.testing.assert_array_equal, c.params[part], run.model.params[part])
  whole = uptrain(None, c, settings, tmp_path / 'other')
  jax.tree.map(np.testing.assert_array_equal, run.model.params, whole.model.params)


def test_a_model_without_memory_is_told(text):
  with pytest.raises(InputError, match='the model has no memory layer; convert one with --memory'):
    uptrain(None, runs.child(), recipe(text, train_only='memory', optimizer={'train': 'lora'}))
  with pytest.raises(InputError, match="train_only='lora': must be 'memory'"):
    uptrain(None, child(), recipe(text, train_only='lora'))
  with pytest.raises(InputError, match=r'slots\.top=0'):
    uptrain(None, child(), recipe(text, train_only='memory', slots={'top': 0}))
