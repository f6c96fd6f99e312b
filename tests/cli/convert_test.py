"""The command lines: convert, export, and load again what they wrote."""

import json
from pathlib import Path
import re

import numpy as np
import pytest

import rrt
from rrt.checkpoints.load import load, save
from rrt.checkpoints.save_hf import MARK
from rrt.convert.report import identity_error
from tests import command

GOLDEN = Path(__file__).parents[1] / 'golden'
FIGURES = {
  'params_unique',
  'params_total',
  'nll_parent_nats',
  'nll_child_nats',
  'seconds',
  'peak_memory_bytes',
  'kept',
  'ranks',
  'calibration_tokens',
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, flags',
  [
    ('llama3', ['--loops=1', '--init=calibrated']),
    ('gemma3', ['--loops=2', '--init=average', '--rank=24', '--alpha=48']),
  ],
)
def test_an_exact_child_is_the_parent_after_its_export(name, flags, tmp_path):
  child, out = tmp_path / 'child', tmp_path / 'out'
  status, printed, error = command.run(
    'convert', f'--source={GOLDEN / name}', f'--out={child}', *flags
  )
  assert status == 0, error
  figures = command.final(printed)
  assert FIGURES <= set(figures)
  parent = rrt.load(GOLDEN / name)
  assert figures['params_parent'] == rrt.count_params(parent.config).unique
  assert figures['identity_error'] < 1e-4
  assert all(np.min(kept) > 0.9999 for kept in figures['kept'].values())
  status, printed, error = command.run('export', f'--model={child}', f'--out={out}')
  assert status == 0, error
  with np.load(GOLDEN / name / 'logits.npz') as stored:
    tokens = stored['tokens']
  exported = rrt.load(out)
  assert exported.config == parent.config
  assert identity_error(parent, exported, tokens) < 1e-4


@pytest.mark.slow
def test_loops_added_to_a_whole_parent_compute_what_it_does(tmp_path):
  child, out = tmp_path / 'child', tmp_path / 'out'
  flags = ('--add_loops', '--prelude=1', '--coda=1', '--loops=2', '--rank=2')
  status, printed, error = command.run(
    'convert', f'--source={GOLDEN / "llama3"}', f'--out={child}', *flags
  )
  assert status == 0, error
  figures = command.final(printed)
  parent, made = rrt.load(GOLDEN / 'llama3'), rrt.load(child)
  assert figures['identity_error'] < 1e-5
  assert figures['params_counted'] == figures['params_unique'] > figures['params_parent']
  assert made.config.depth == 2 * parent.config.depth - 2
  status, _, error = command.run('export', f'--model={child}', f'--out={out}')
  assert status == 0, error
  with np.load(GOLDEN / 'llama3' / 'logits.npz') as stored:
    tokens = stored['tokens']
  assert identity_error(parent, rrt.load(out), tokens) < 1e-4


def test_what_cannot_work_is_told_in_one_sentence(tmp_path):
  """A taken directory before anything is loaded; text without a tokenizer."""
  (tmp_path / 'work.txt').write_text('mine')
  for source, out, sentence in (
    ('nowhere', tmp_path, 'is not just an rrt model'),
    (GOLDEN / 'llama3', tmp_path / 'new', 'no tokenizer .*--init=average'),
  ):
    status, _, error = command.run('convert', f'--source={source}', f'--out={out}')
    assert status == 2 and re.search(sentence, error), error
  assert [p.name for p in tmp_path.iterdir()] == ['work.txt']


def test_arguments_are_checked_before_weights_are_read(tmp_path):
  """And nothing is written where the source is."""
  source = tmp_path / 'source'
  source.mkdir()
  config = (GOLDEN / 'llama3' / 'config.json').read_text()
  (source / 'config.json').write_text(config)
  (source / 'model.safetensors').write_bytes(b'cannot be read')
  status, _, error = command.run(
    'convert', f'--source={source}', f'--out={tmp_path / "new"}', '--prelude=3', '--loops=4'
  )
  assert status == 2 and 'The parent has 4 layers' in error, error
  (source / 'config.json').write_text(json.dumps(json.loads(config) | {MARK: 'rrt'}))
  status, _, error = command.run('export', f'--model={source}', f'--out={source}')
  assert status == 2 and 'would replace the source' in error, error
  model = save(load(GOLDEN / 'llama3'), tmp_path / 'own')
  status, _, error = command.run('convert', f'--source={model}', f'--out={model}', '--init=average')
  assert status == 2 and 'would replace the source' in error, error
  assert sorted(p.name for p in tmp_path.iterdir()) == ['own', 'source']


def test_the_table_of_calibrations_starts():
  status, printed, error = command.run('experiments.calibration_table', '--help')
  assert '--calibration' in printed, (status, error)
