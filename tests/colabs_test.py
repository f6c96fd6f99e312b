"""Every notebook runs, top to bottom, on a tiny model."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from rrt.checkpoints.load import save
from tests import runs

COLABS = Path(__file__).parent.parent / 'colabs'


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(p.stem for p in COLABS.glob('*.py')))
def test_notebook_runs(name, tmp_path):
  save(runs.parent(), tmp_path / 'parent')
  env = os.environ | {
    'RRT_MODEL': str(tmp_path / 'parent'),
    'RRT_STEPS': '2',
    'RRT_ROW': '16',
    'JAX_PLATFORMS': 'cpu',
    'MPLBACKEND': 'agg',
  }
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'pytest',
      '--nbmake',
      '-q',
      '-p',
      'no:cacheprovider',
      '--rootdir',
      str(tmp_path),
      str(COLABS / f'{name}.ipynb'),
    ],
    env=env,
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize('name', sorted(p.stem for p in COLABS.glob('*.py')))
def test_notebook_and_script_are_paired(name):
  import jupytext

  script = jupytext.read(COLABS / f'{name}.py')
  notebook = jupytext.read(COLABS / f'{name}.ipynb')
  cells = lambda nb: [(c.cell_type, c.source) for c in nb.cells]
  assert cells(script) == cells(notebook), f'run: jupytext --sync colabs/{name}.py'
