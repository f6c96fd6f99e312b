"""`rrt`: the list of commands, their help, and what is said of mistakes."""

from pathlib import Path
import subprocess
import sys

import pytest

from rrt.cli import main
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
