"""Every experiment is a recipe that fits its parent; nothing is allocated."""

import dataclasses
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from rrt.config import ModelConfig, Rope
from rrt.errors import InputError
from rrt.models.init import init_params
from rrt.train import optim, setup
from rrt.train import recipe as recipe_lib
from rrt.train import step as step_lib
from rrt.train.recipe import Recipe
from tests import runs

pytest.importorskip('ml_collections')

FOLDER = Path(__file__).parent.parent / 'experiments'
NAMES = sorted(
  p.stem
  for p in FOLDER.glob('*.py')
  if 'RESULT' in p.read_text() and 'def get_config' in p.read_text()
)

# The parents' shapes as published: nothing is loaded here.
PARENTS = {
  'smollm2-135m': ModelConfig(
    family='llama',
    vocab_size=49152,
    d_model=576,
    d_ff=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    block_layers=30,
    max_context=8192,
    tie_embeddings=True,
  ),
  'gemma3-270m': ModelConfig(
    family='gemma3',
    vocab_size=262144,
    d_model=640,
    d_ff=2048,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    block_layers=18,
    max_context=32768,
    unit_offset_norm=True,
    post_norms=True,
    qk_norm=True,
    activation='gelu_tanh',
    scale_embeddings=True,
    tie_embeddings=True,
    windows=(512, 512, 512, 512, 512, 0) * 3,
    ropes=(Rope(), Rope(base=1e6)),
    rope_index=(0, 0, 0, 0, 0, 1) * 3,
  ),
  'TinyLlama/TinyLlama-1.1B-step-50K-105b': ModelConfig(
    family='llama',
    vocab_size=32000,
    d_model=2048,
    d_ff=5632,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    block_layers=22,
    max_context=2048,
  ),
  'google/gemma-2b': ModelConfig(
    family='gemma',
    vocab_size=256000,
    d_model=2048,
    d_ff=16384,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    block_layers=18,
    max_context=8192,
    unit_offset_norm=True,
    activation='gelu_tanh',
    scale_embeddings=True,
    tie_embeddings=True,
  ),
}


def load(name, *args):
  module = importlib.import_module(f'experiments.{name}')
  return Recipe.from_dict(module.get_config(*args).to_dict())


@pytest.mark.parametrize('name', NAMES)
def test_builds(name):
  """The whole train step of the real sizes, abstractly."""
  recipe = load(name)
  parent = PARENTS[recipe.parent]
  if recipe.child:  # Made by the experiment itself, of half the layers.
    child = dataclasses.replace(parent, block_layers=parent.depth // 2)
  else:
    child = setup.planned(recipe, parent)
    assert child.depth == parent.depth
    assert (child.loops > 1) == (name != 'baseline_parent')
  mesh = jax.make_mesh(
    (1,) * 4,
    ('data', 'fsdp', 'expert', 'tensor'),
    (jax.sharding.AxisType.Auto,) * 4,
    devices=jax.devices()[:1],
  )
  setup.check(recipe, parent, child, mesh)

  shapes = lambda c: jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
  trained = step_lib.trained_paths(optim.trainable(recipe.optimizer, shapes(child)))
  weights, _ = step_lib.split(shapes(child), trained)
  spec = step_lib.Step(
    child,
    dataclasses.replace(recipe.loss, chunk_tokens=64),
    optim.make_optimizer(recipe.optimizer, weights, recipe.steps),
    trained,
    teacher_config=parent if recipe.loss.distillation else None,
    dtype=recipe.dtype,
    remat=recipe.remat,
  )
  state = step_lib.abstract_state(spec, mesh)
  own = step_lib.split(shapes(parent), frozenset())[1]
  array = lambda dtype: jax.ShapeDtypeStruct((2, 64), dtype)
  batch = {k: array('int32') for k in ('tokens', 'targets', 'positions')}
  batch |= {'segment_ids': array('int32'), 'weights': array('float32')}
  after, metrics = jax.eval_shape(
    lambda s, t, b: step_lib.train_step(spec, s, t, b), state, own, batch
  )
  assert metrics['loss'].shape == ()
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)


@pytest.mark.parametrize('name', NAMES)
def test_docstrings_tell_command_hardware_and_result(name):
  text = importlib.import_module(f'experiments.{name}').__doc__
  for part in ('COMMAND', 'HARDWARE', 'RESULT', f'experiments/{name}.py'):
    assert part in text


@pytest.mark.parametrize('name', [n for n in NAMES if 'smol' in n])
def test_accelerator_variant(name):
  assert load(name, 'accelerator').dtype == 'bfloat16'


def test_an_unknown_variant_is_refused():
  with pytest.raises(InputError, match='accelerater'):
    load('smollm2_15x2', 'accelerater')


def test_a_reduced_model_is_layers_of_the_parent():
  from experiments import baseline_reduced

  parent = runs.parent()
  child = baseline_reduced.reduced(parent, 3)
  assert child.config == dataclasses.replace(parent.config, block_layers=3)
  jax.tree.map(
    lambda new, old: np.testing.assert_array_equal(new, old[[0, 2, 5]]),
    child.params['block'],
    parent.params['block'],
  )


def test_config_holds_every_field():
  assert Recipe.from_dict(recipe_lib.config().to_dict()) == Recipe()
