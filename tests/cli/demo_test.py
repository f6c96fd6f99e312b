"""The demo, end to end on a tiny parent."""

import json
import os
import subprocess
import sys

import pytest

from rrt.checkpoints.load import load, save
from tests import runs


def run(tmp_path, *flags):
  return subprocess.run(
    [sys.executable, '-m', 'rrt', 'demo', f'--out={tmp_path / "out"}', *flags],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_demo_makes_a_model_and_a_page(tmp_path):
  save(runs.parent(), tmp_path / 'parent')
  text = runs.write_text(tmp_path / 'text.jsonl', documents=2000)
  done = run(
    tmp_path,
    f'--model={tmp_path / "parent"}',
    f'--data={text}',
    '--prelude=1',
    '--coda=1',
    '--rank=2',
    '--steps=3',
    '--exits',
    '--length=16',
    '--heldout_tokens=200',
    '--max_new_tokens=4',
    '--context=16',
  )
  assert done.returncode == 0, done.stderr[-3000:]
  figures = json.loads(done.stdout.splitlines()[-1])
  page = (tmp_path / 'out' / 'report.html').read_text()
  assert '<svg' in page
  assert f'{figures["nll_nats_uptrained"]:.3f}' in page
  child = load(tmp_path / 'out' / 'model')
  assert child.config.loops == 2
  assert figures['params_unique_uptrained'] < figures['params_unique_parent']
  assert child.meta['exits']['calibration']['loss'] == 0.1
  assert 1 <= figures['exits']['mean_loops'] <= 2
  ways = figures['engine']
  assert ways['full depth']['loops'] == ways['lossless']['loops'] == 2
  assert 1 <= ways['exits']['loops'] <= 2
  assert ways['lossless']['same'] == 8


def test_too_little_text_is_refused(tmp_path):
  (tmp_path / 'short.txt').write_text('Only one sentence.')
  done = run(tmp_path, f'--data={tmp_path / "short.txt"}')
  assert done.returncode == 2
  assert 'error: ' in done.stderr
  assert 'too little text' in done.stderr


def test_the_text_given_is_not_written_over(tmp_path):
  (tmp_path / 'out').mkdir()
  text = runs.write_text(tmp_path / 'out' / 'train.jsonl', documents=2000)
  before = open(text, 'rb').read()
  done = run(tmp_path, f'--data={text}')
  assert done.returncode == 2
  assert 'would write into the text' in done.stderr
  assert open(text, 'rb').read() == before
