"""Uptraining as one call, and as a command."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rrt import sharding
from rrt.checkpoints.load import load, save
from rrt.checkpoints.save_hf import save_hf
from rrt.errors import InputError
from rrt.models.count import count_params
from rrt.train import checkpoint, setup
from rrt.train import recipe as recipe_lib
from rrt.train.loop import uptrain
from tests import runs


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return runs.write_text(tmp_path_factory.mktemp('text') / 'a.jsonl')


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
  return runs.write_experiment(tmp_path_factory.mktemp('experiment'))


def held(config, params):
  """Numbers in a tree, the padding of rank tables left out."""
  ones = jax.tree.map(lambda x: np.ones(x.shape), params)
  from rrt.relax.trees import mask_all

  return sum(int(x.sum()) for x in jax.tree.leaves(mask_all(config, ones)))


@pytest.mark.slow
def test_a_child_learns(text, tmp_path):
  rows = []
  run = uptrain(
    runs.parent(),
    runs.child(),
    runs.recipe(
      text, steps=30, heldout={'path': text, 'context': 16, 'max_tokens': 400, 'every': 10}
    ),
    on_row=rows.append,
  )
  assert rows == run.history and run.step == 30 and not run.stopped
  trained = [r for r in rows if 'train/loss' in r]
  assert [r['step'] for r in trained] == list(range(1, 31))
  assert trained[-1]['train/cross_entropy'] < trained[0]['train/cross_entropy'] - 0.5
  heldout = {r['step']: r['eval/cross_entropy'] for r in rows if 'eval/cross_entropy' in r}
  assert list(heldout) == [0, 10, 20, 30]
  assert heldout[30] < heldout[0] - 0.5
  for name in (
    'train/distillation',
    'train/learning_rate',
    'train/grad_norm',
    'train/grad_norm/lora',
    'train/loop_change/2',
    'train/lora_norm/1',
    'train/lora_norm/2',
    'train/skipped',
    'throughput/tokens_per_second',
    'memory/peak_bytes',
  ):
    assert name in trained[-1], name
  times = [r['throughput/wall_time'] for r in rows]
  assert times == sorted(times) and times[0] > 0
  recipe = runs.recipe(text)
  assert trained[-1]['throughput/total_tokens'] == 30 * recipe['batch'] * recipe['length']
  # The child that was passed in is as it was, and tying held.
  model = run.model
  before = jax.tree.leaves(runs.child().params)
  assert all(isinstance(x, np.ndarray) for x in before)
  assert held(model.config, model.params) == count_params(model.config).unique
  save(model, tmp_path / 'model')
  again = load(tmp_path / 'model')
  assert held(again.config, again.params) == count_params(model.config).unique
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.slow
def test_the_text_ends_first(text):
  run = uptrain(
    runs.parent(), runs.child(), runs.recipe(text, steps=10_000, data={'path': text, 'epochs': 1})
  )
  assert 5 < run.step < 100


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_the_reason(text, tmp_path):
  bad = dataclasses.replace(
    runs.child(), params=jax.tree.map(lambda x: x * np.float32('nan'), runs.child().params)
  )
  with pytest.raises(InputError, match='not finite in steps 1 to 3') as e:
    uptrain(runs.parent(), bad, runs.recipe(text, max_skipped=3), tmp_path / 'run')
  assert 'learning_rate' in str(e.value)


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'stepps': 3}, 'did you mean steps'),
    ({'loss': {'divergence': 'l2'}}, 'loss.divergence'),
    ({'loss': {'chunk': 5}}, 'config.loss.chunk'),
    ({'steps': 1.5}, 'config.steps=1.5'),
    ({'steps': 0}, 'steps=0'),
    ({'batch': 9}, 'batch=9'),
    ({'batch': 8, 'accumulate': 3}, 'accumulate=3'),
    ({'batch': 8, 'accumulate': 2}, 'batch=4'),
    ({'length': 33}, 'length=33'),
    ({'mesh': {'tensor': 8}}, 'num_heads=4'),
    ({'mesh': {'data': 3}}, 'devices'),
    ({'mesh': {'expert': 8}}, 'mesh.expert'),
    ({'optimizer': {'train': 'router'}}, 'router'),
    ({'optimizer': {'warmup_steps': 7}}, 'warmup_steps=7'),
    ({'optimizer': {'rules': ('lora', {'multiplier': 2})}}, 'not a pair'),
    ({'optimizer': {'rules': (('lora', {'eps': 'x'}),)}}, "eps='x'"),
    ({'data': {'weights': ('a',)}}, r"data.weights=\('a',\)"),
    ({'mesh': 'data'}, "mesh='data'"),
    ({'mesh': {'data': 'x'}}, 'mesh='),
    ({'heldout': {'batch': -2}}, 'heldout.batch=-2'),
    ({'heldout': {'every': -1}}, 'heldout.every=-1'),
    ({'heldout': {'max_tokens': 0}}, 'heldout.max_tokens=0'),
    ({'dtype': 'float16'}, 'dtype'),
    ({'remat': 'some'}, 'remat'),
    ({'data': {'path': '/nowhere/x.txt'}}, '/nowhere/x.txt'),
    ({'heldout': {'path': '/nowhere/x.txt'}}, 'heldout|/nowhere/x.txt'),
    ({'heldout': {'path': 'TEXT', 'context': 99}}, 'heldout.context=99'),
    ({'heldout': {'path': 'TEXT', 'context': 9, 'batch': 3}}, 'heldout.batch'),
  ],
  ids=str,
)
def test_wrong_settings_are_told_before_work(text, fields, message):
  if fields.get('heldout', {}).get('path') == 'TEXT':
    fields['heldout']['path'] = text
  with pytest.raises(InputError, match=message) as e:
    uptrain(runs.parent(), runs.child(), runs.recipe(text) | fields)
  assert '\n' not in str(e.value)


def test_wrong_models_are_told(text):
  other = dataclasses.replace(runs.PARENT, vocab_size=272)
  with pytest.raises(InputError, match='vocab_size=272'):
    uptrain(runs.model(other, 0), runs.child(), runs.recipe(text))
  with pytest.raises(InputError, match='no parent'):
    uptrain(None, runs.child(), runs.recipe(text))
  blank = dataclasses.replace(runs.child(), tokenizer=None)
  with pytest.raises(InputError, match='no tokenizer'):
    uptrain(runs.parent(), blank, runs.recipe(text))


@pytest.mark.slow
def test_without_a_parent(text):
  run = uptrain(None, runs.child(), runs.recipe(text, loss={'distillation': 0.0}))
  assert all(r['train/distillation'] == 0 for r in run.history)


@pytest.mark.slow
def test_command(experiment, tmp_path):
  pytest.importorskip('ml_collections')
  flags = ('--config.steps=4', '--config.tensorboard=True')
  out, _ = runs.finish(runs.start(experiment, tmp_path / 'run', *flags))
  figures = json.loads(out.splitlines()[-1])
  assert figures['steps'] == 4 and figures['tokens'] == 4 * 8 * 16
  assert figures['params_unique'] == count_params(runs.CHILD).unique
  model = load(tmp_path / 'run')
  assert model.config == runs.CHILD
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert saved['config']['steps'] == 4 and saved['versions']['jax']
  # Again: nothing is left to do, and nothing changes.
  out, _ = runs.finish(runs.start(experiment, tmp_path / 'run', *flags))
  assert json.loads(out.splitlines()[-1])['loss'] == figures['loss']
  # With another setting it is another run.
  flags = ('--config.steps=4', '--config.seed=1')
  _, err = runs.finish(runs.start(experiment, tmp_path / 'run', *flags), 2)
  told = err.strip().splitlines()[-1]
  assert told.startswith('error: config.seed=1') and 'workdir' in told


@pytest.mark.slow
def test_command_converts(experiment, tmp_path):
  """From the parent alone: calibration text is a path, as data.path is."""
  pytest.importorskip('ml_collections')
  text = experiment.parent / 'text.jsonl'
  flags = [
    '--config.child=',
    '--config.steps=2',
    '--config.convert.prelude=1',
    '--config.convert.coda=1',
    '--config.convert.rank=2',
    f'--config.convert.calibration={text}',
    '--config.convert.calibration_tokens=256',
  ]
  out, _ = runs.finish(runs.start(experiment, tmp_path / 'run', *flags))
  model = load(tmp_path / 'run')
  assert (model.config.block_layers, model.config.loops) == (2, 2)
  figures = json.loads(out.splitlines()[-1])
  assert figures['params_unique'] == count_params(model.config).unique
  # Started again, it begins with the child that is kept, not with another.
  again, _ = runs.finish(runs.start(experiment, tmp_path / 'run', *flags))
  assert 'residual kept' not in again


@pytest.mark.parametrize(
  'flags,message',
  [
    (('--config.optimizer.learning_rate=-1',), 'learning_rate'),
    (('--workdir=/proc/nothing',), 'cannot be written to'),
    (('--config.parent=/nowhere',), '/nowhere'),
    (('--config.stepps=3',), 'there is no such field; did you mean steps'),
    (('--config=FOLDER/none.py', '--config.steps=20'), 'none.py'),
    (('--config=FOLDER/bad.py', '--config.steps=20'), "name 'oops'"),
    (('--config=FOLDER/value.py',), 'ValueError: invalid literal for int()'),
  ],
)
def test_command_tells_in_one_line(experiment, tmp_path, flags, message):
  pytest.importorskip('ml_collections')
  (tmp_path / 'bad.py').write_text('oops\n')
  (tmp_path / 'value.py').write_text('def get_config():\n  int("x")\n')
  if flags[0].startswith('--config=FOLDER'):
    experiment = tmp_path / flags[0].split('/')[1]
    flags = flags[1:]
  process = runs.start(experiment, tmp_path / 'run', *flags)
  _, err = runs.finish(process, 2)
  told = [x for x in err.splitlines() if x.startswith('error: ')]
  assert len(told) == 1 and message in told[0] and 'Traceback' not in err


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'loops': 4}, r'Choose prelude=.* loops=.*; or '),
    ({'loops': 0}, 'loops=0'),
    ({'block': 3, 'loops': 3}, 'block 3'),
    ({'alpha': 0.0}, 'alpha=0.0'),
    ({'rank': 2, 'budget': 100}, 'rank and budget'),
  ],
  ids=str,
)
def test_wrong_conversions_are_told(fields, message):
  with pytest.raises(InputError, match=message):
    setup.planned(recipe_lib.Recipe.from_dict({'convert': fields}), runs.PARENT)


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'heldout': {'path': '/nowhere/x.txt'}}, '/nowhere/x.txt'),
    ({'optimizer': {'rules': (('router', {}),)}}, "'router'"),
    ({'data': {'path': '/nowhere/y.txt'}}, '/nowhere/y.txt'),
  ],
  ids=str,
)
def test_what_would_fail_later_is_told_before_the_conversion(text, fields, message):
  shape = {'prelude': 1, 'block': 2, 'loops': 2, 'coda': 1, 'rank': 2}
  settings = runs.recipe(text) | {'convert': shape, **fields}
  mesh = sharding.make_mesh({'data': -1})
  with pytest.raises(InputError, match=message):
    setup.check_all(recipe_lib.Recipe.from_dict(settings), runs.parent(), mesh)


@pytest.mark.slow
def test_settings_may_change_until_there_is_a_checkpoint(text, tmp_path):
  for name in ('parent', 'child'):
    save(getattr(runs, name)(), tmp_path / name)
  models = {n: str(tmp_path / n) for n in ('parent', 'child')}

  def settings(rate):
    optimizer = {'learning_rate': rate, 'warmup_steps': 2}
    fields = runs.recipe(text) | models | {'optimizer': optimizer}
    return recipe_lib.Recipe.from_dict(fields)

  workdir = tmp_path / 'run'
  workdir.mkdir()
  for rate in (1e-3, 3e-3):
    parent, child = setup.prepare(settings(rate), workdir)
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['config']['optimizer']['learning_rate'] == 3e-3
  assert saved['versions'] and saved['devices']
  uptrain(parent, child, settings(3e-3), workdir)
  setup.prepare(settings(3e-3), workdir)
  with pytest.raises(InputError, match=r'learning_rate=0\.001'):
    setup.prepare(settings(1e-3), workdir)


def test_a_run_whose_steps_are_raised_is_told_how_to_go_on(tmp_path):
  with pytest.raises(InputError, match=r'--config\.child=.*/model and another --workdir'):
    checkpoint.check_same(tmp_path, {'steps': 6}, {'steps': 9}, ())
  with pytest.raises(InputError, match=r'config\.steps=3, but .* give that value'):
    checkpoint.check_same(tmp_path, {'steps': 6}, {'steps': 3}, ())


@pytest.mark.parametrize('text', ['{"config": {"st', '{}', '[]', '{"config": 1}'])
def test_damaged_settings_are_told(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(InputError, match=r'config\.json is damaged'):
    setup.prepare(recipe_lib.Recipe(), tmp_path)


@pytest.mark.slow
def test_heldout_rows_shrink_to_the_model(text):
  settings = runs.recipe(text, steps=1, optimizer={}, heldout={'path': text})
  run = uptrain(runs.parent(), runs.child(), settings)
  assert 'eval/cross_entropy' in run.history[0]


def test_recipes_survive_json():
  r = recipe_lib.Recipe.from_dict(
    {'optimizer': {'rules': (('lora', {'multiplier': 2.0}),)}, 'steps': 5.0}
  )
  assert recipe_lib.Recipe.from_dict(r.to_dict()).to_dict() == r.to_dict()


def test_special_tokens_beyond_the_vocabulary_are_told(tmp_path):
  child = runs.child()
  small = dataclasses.replace(child.config, vocab_size=230)
  table = {'table': child.params['embed']['table'][:230]}
  child = dataclasses.replace(child, config=small, params=child.params | {'embed': table})
  (tmp_path / 'a.txt').write_text('à' * 2000)
  fields = runs.recipe(str(tmp_path / 'a.txt')) | {'loss': {'distillation': 0.0}}
  with pytest.raises(InputError, match='outside the vocabulary of 230'):
    uptrain(None, child, fields)
  text = runs.write_text(tmp_path / 'b.jsonl')
  heldout = {'heldout': {'path': str(tmp_path / 'a.txt'), 'context': 16}}
  with pytest.raises(InputError, match=r'heldout\.path=.*vocabulary of 230'):
    uptrain(None, child, fields | {'data': {'path': text}} | heldout)


def test_a_parent_that_reads_otherwise_is_told(text):
  swapped = runs.other_tokenizer()
  parent = dataclasses.replace(runs.parent(), tokenizer=swapped)
  with pytest.raises(InputError, match='has the id'):
    uptrain(parent, runs.child(), runs.recipe(text))


def test_a_model_is_no_work_directory(tmp_path):
  save(runs.child(), tmp_path / 'own')
  save_hf(runs.parent(), tmp_path / 'hf')
  for name in ('own', 'hf'):
    with pytest.raises(InputError, match='holds a model'):
      setup.check_workdir(tmp_path / name)
  setup.check_workdir(tmp_path / 'new')
