"""Runs `python -m rrt COMMAND` in a process of its own."""

import json
import os
import subprocess
import sys


def environment() -> dict[str, str]:
  """In which this package is found from any directory."""
  paths = [os.getcwd(), *filter(None, [os.environ.get('PYTHONPATH')])]
  path = os.pathsep.join(paths)
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path}


def run(name: str, *flags: str, cwd=None):
  """Returns (status, standard output, last line of standard error).

  Args:
    name: a command of `rrt`, or a module that is run as a program.
    *flags: its arguments.
    cwd: where it runs.
  """
  program = [name] if '.' in name else ['rrt', name]
  done = subprocess.run(
    [sys.executable, '-m', *program, *flags],
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
    env=environment(),
  )
  errors = done.stderr.strip().split('\n')
  return done.returncode, done.stdout, errors[-1]


def final(printed: str):
  """The JSON object of the last line."""
  return json.loads(printed.strip().split('\n')[-1])
