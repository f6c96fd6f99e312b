"""`rrt`: the list of commands, their help, and what is said of mistakes."""

from pathlib import Path
import subprocess
import sys

import pytest

from rrt.cli import main
from rrt.train.recipe import Recipe
from rrt.train.recipe_fields import describe_fields
from tests import command

ROOT = Path(__file__).parents[2]


def rrt(*arguments, cwd=None):
  """(status, standard output, standard error) of `python -m rrt`."""
  done = subprocess.run(
    [sys.executable, '-m', 'rrt', *arguments],
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
    env=command.environment(),
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('arguments', [(), ('--help',), ('-h',), ('help',)])
def test_alone_it_lists_the_commands(arguments):
  status, printed, _ = rrt(*arguments)
  assert status == 0
  for name in ('convert', 'train', 'evaluate', 'generate', 'export', 'fit-gate', 'serve', 'demo'):
    assert sum(line.split()[:1] == [name] for line in printed.splitlines()) == 1


def test_an_unknown_command_gets_a_suggestion():
  status, _, error = rrt('trian')
  assert status == 2 and error == "error: rrt has no command 'trian'; did you mean train?\n"
  status, _, error = rrt('xyz')
  assert status == 2 and 'convert, train, evaluate' in error


@pytest.mark.parametrize('name', main.COMMANDS)
def test_help_lists_the_flags_of_a_command_in_groups(name):
  """Its own alone; an example of two lines at most."""
  if name == 'train':
    pytest.importorskip('ml_collections')
  status, printed, error = rrt(name, '--help')
  assert status == 0, error
  assert f'  rrt {name} ' in printed or name == 'demo'
  assert 'Needed:' in printed or name == 'demo'
  assert '--helpfull' in printed and '--verbosity' not in printed and 'absl.' not in printed
  example = printed.split('\n\n')[1]
  assert len(example.splitlines()) <= 2
  assert max(map(len, printed.splitlines())) <= 80


def test_helpfull_lists_the_flags_of_absl_too():
  status, printed, _ = rrt('export', '--helpfull')
  assert status == 0 and '--[no]logtostderr' in printed and '--out' in printed


def test_the_console_script_finds_what_lies_beside_a_config(tmp_path):
  """As `python -m rrt train` does: experiments import each other."""
  pytest.importorskip('ml_collections')
  (tmp_path / 'beside.py').write_text('STEPS = 3\n')
  (tmp_path / 'mine.py').write_text(
    'import beside\nfrom rrt.train import recipe\n\n\n'
    'def get_config():\n  c = recipe.config()\n  c.steps = beside.STEPS\n  return c\n'
  )
  script = 'from rrt.cli.main import main; main()'
  done = subprocess.run(
    [sys.executable, '-P', '-c', script, 'train', '--config=mine.py', '--workdir='],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env=command.environment() | {'PYTHONPATH': str(ROOT)},
  )
  assert done.stderr.strip() == 'error: --workdir is not given; see --help.'


def test_flags_of_several_commands_live_side_by_side():
  from rrt.cli import convert, evaluate, export  # noqa: F401

  assert convert.FLAGS.values['out'].help != export.FLAGS.values['out'].help


@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      ('convert', '--source=smollm2-135m', '--out={out}', '--seed=3'),
      '--seed has no effect without --init=random, --relax_init=zero or --add_loops.',
    ),
    (('evaluate', '--model=x', '--tasks=piqa', '--kv=exact_fill', '--text=a'), '--kv has no'),
    (('evaluate', '--model=x', '--text=a', '--shots=3'), '--shots has no effect without --tasks.'),
    (('evaluate', '--model=x', '--tasks=piqa', '--context=3'), '--context has no effect'),
    (('generate', '--model=x', '--prompt=a', '--top_p=0.9'), '--top_p has no effect without a'),
    (('serve', '--model=x', '--threshold=0.5'), '--threshold has no effect without --gate.'),
    (
      ('fit-gate', '--model=x', '--text=a', '--out=b', '--nolens', '--lens_epochs=1'),
      '--lens_epochs has no effect without --lens.',
    ),
    (
      ('fit-gate', '--model=x', '--text=a', '--out=b', '--gate=change', '--ridge=1'),
      '--ridge has no effect without --gate=learned.',
    ),
  ],
)
def test_flags_without_effect_are_refused(tmp_path, arguments, message):
  status, _, error = rrt(*(a.format(out=tmp_path / 'out') for a in arguments))
  assert status == 2 and error.startswith(f'error: {message}') and error.count('\n') == 1


@pytest.fixture
def recipes(tmp_path):
  pytest.importorskip('ml_collections')
  good = 'from rrt.train.recipe import config\n\ndef get_config():\n  c = config()\n'
  (tmp_path / 'good.py').write_text(good + '  return c\n')
  (tmp_path / 'child.py').write_text(good + "  c.child = 'child'\n  return c\n")
  (tmp_path / 'none.py').write_text('x = 1\n')
  return tmp_path


def test_help_of_train_lists_every_field():
  pytest.importorskip('ml_collections')
  status, printed, _ = rrt('train', '--help')
  fields = describe_fields(Recipe)
  assert status == 0 and len(fields) > 50
  for path, _, meaning in fields:
    assert f'  --config.{path}=' in printed and meaning, path
  assert '--config.optimizer.learning_rate=0.0003\n      the peak.' in printed


def test_a_recipe_in_yaml(recipes):
  (recipes / 'a.yaml').write_text(
    'parent: /nowhere\nsteps: 3\noptimizer: {learning_rate: 1.0e-3}\nconvert: {rank: 2}\n'
  )
  flags = f'--config={recipes / "a.yaml"}', f'--workdir={recipes / "run"}'
  status, _, error = rrt('train', *flags, '--config.steps=4')
  assert status == 2 and '/nowhere' in error  # It got as far as the parent.
  status, _, error = rrt('train', *flags, '--config.optimizer.lr=4')
  assert status == 2 and 'did you mean optimizer.learning_rate?' in error
  for text, message in (
    ('step: 3', 'did you mean steps?'),
    ('steps: x', "config.steps='x': must be int"),
    ('[1]', 'holds no fields'),
    ('a: [', 'while parsing'),
  ):
    (recipes / 'a.yaml').write_text(text)
    status, _, error = rrt('train', *flags)
    assert status == 2 and message in error and error.count('\n') == 1, error


@pytest.mark.parametrize(
  'file, overrides, message',
  [
    (
      'good',
      ['optimizer.lr=1'],
      '--config.optimizer.lr: there is no such field; did you mean optimizer.learning_rate?',
    ),
    (
      'good',
      ['lr=1'],
      '--config.lr: there is no such field; did you mean optimizer.learning_rate?',
    ),
    ('good', ['batch_size=1'], '--config.batch_size: there is no such field; did you mean batch?'),
    (
      'good',
      ['optimizer.xyz=1'],
      '--config.optimizer.xyz: there is no such field; there are optimizer.train, ',
    ),
    # Of several mistakes the first is reported, in one line.
    ('good', ['stepz=1', 'optimizer.lr=1', 'steps=x'], '--config.stepz: there is no such field'),
    ('good', ['steps=x', 'batch=y'], 'flag --config.steps=x: '),
    ('none', [], '--config={folder}/none.py: defines no function get_config().'),
    ('none', ['lr=1'], '--config={folder}/none.py: defines no function get_config().'),
    (
      'child',
      ['convert.rank=3'],
      '--config.convert.rank has no effect beside config.child; leave one of them out.',
    ),
  ],
)
def test_mistakes_in_a_config_get_one_line(recipes, file, overrides, message):
  flags = [f'--config.{o}' for o in overrides]
  status, _, error = rrt(
    'train', f'--config={recipes / file}.py', f'--workdir={recipes / "run"}', *flags
  )
  assert status == 2 and error.count('\n') == 1
  assert error.startswith('error: ' + message.format(folder=recipes))


def test_a_recipe_without_variants(recipes):
  path = recipes / 'good.py'
  status, _, error = rrt('train', f'--config={path}:fast', f'--workdir={recipes / "run"}')
  assert status == 2
  assert error == f'error: --config={path}: has no variants; leave ":fast" out.\n'
