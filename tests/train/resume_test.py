"""A run that is interrupted is the run that was not, bit for bit."""

import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rrt.checkpoints.load import load
from rrt.train.loop import uptrain
from tests import runs


class Killed(BaseException):
  """Stands for whatever ends a process."""


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return runs.write_text(tmp_path_factory.mktemp('text') / 'a.jsonl')


@pytest.fixture(scope='module')
def whole(text):
  """The uninterrupted run."""
  return uptrain(runs.parent(), runs.child(), runs.recipe(text))


def series(rows):
  names = ('step', *map('train/'.__add__, ('loss', 'cross_entropy', 'distillation', 'grad_norm')))
  return [[r[n] for n in names] for r in rows if 'train/loss' in r]


@pytest.mark.slow
@pytest.mark.parametrize('every', [1, 2, 4])
@pytest.mark.parametrize('at', [2, 5])
def test_resumed_equals_uninterrupted(text, whole, tmp_path, at, every):
  settings = runs.recipe(text, checkpoint_every=every)

  def kill(row):
    if row['step'] == at:
      raise Killed

  with pytest.raises(Killed):
    uptrain(runs.parent(), runs.child(), settings, tmp_path / 'run', on_row=kill)
  run = uptrain(runs.parent(), runs.child(), settings, tmp_path / 'run')
  assert series(run.history) == series(whole.history)
  jax.tree.map(np.testing.assert_array_equal, run.model.params, whole.model.params)


@pytest.mark.slow
def test_resumed_on_another_mesh(text, whole, tmp_path):
  """Not to the bit, for sums are split differently, but the same run."""
  settings = runs.recipe(text, mesh={'data': 2, 'fsdp': 2, 'tensor': 2})

  def kill(row):
    if row['step'] == 5:
      raise Killed

  with pytest.raises(Killed):
    uptrain(runs.parent(), runs.child(), settings, tmp_path / 'run', on_row=kill)
  settings['mesh'] = {'fsdp': 8}
  run = uptrain(runs.parent(), runs.child(), settings, tmp_path / 'run')
  np.testing.assert_allclose(series(run.history), series(whole.history), rtol=1e-4)


def until(process, workdir, step, seconds=900):
  """Waits until a run has written a row of this step, or has ended."""
  end = time.monotonic() + seconds
  while time.monotonic() < end and process.poll() is None:
    file = workdir / 'metrics.jsonl'
    if file.exists() and file.read_text().count('\n') >= step:
      return
    time.sleep(0.02)
  if process.poll() is None:
    process.kill()
    pytest.fail(f'step {step} was not reached in {seconds} seconds')


def kill_and_finish(tmp_path, kills, steps, seed):
  pytest.importorskip('ml_collections')
  rng = random.Random(seed)
  file = runs.write_experiment(tmp_path)
  flags = (f'--config.steps={steps}',)
  want, _ = runs.finish(runs.start(file, tmp_path / 'whole', *flags))
  run = tmp_path / 'killed'
  killed = 0
  for i in range(kills):
    process = runs.start(file, run, *flags)
    # Anywhere: while loading, compiling, between steps, while saving; the
    # last kill falls into the first half, so that none comes too late.
    if rng.random() < 0.3:
      time.sleep(rng.uniform(0, 2))
    else:
      until(process, run, (i + 1) * steps // (2 * kills))
      time.sleep(rng.uniform(0, 0.1))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
    process.communicate()
    killed += process.returncode == -signal.SIGKILL
  assert killed == kills and not (run / 'model').exists()
  got, _ = runs.finish(runs.start(file, run, *flags))
  got, want = (json.loads(x.splitlines()[-1]) for x in (got, want))
  assert got['loss'] == want['loss']
  assert runs.losses(run) == runs.losses(tmp_path / 'whole')
  a, b = (load(tmp_path / x) for x in ('killed', 'whole'))
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.mark.slow
def test_sigkill(tmp_path):
  kill_and_finish(tmp_path, kills=2, steps=24, seed=0)


@pytest.mark.manual
def test_sigkill_ten_times(tmp_path):
  kill_and_finish(tmp_path, kills=10, steps=400, seed=time.time_ns())


@pytest.mark.slow
def test_a_run_whose_terminal_goes_away_saves(tmp_path):
  """SIGHUP comes, and both of the streams fail from then on."""
  pytest.importorskip('ml_collections')
  file = runs.write_experiment(tmp_path)
  run, flags = tmp_path / 'run', ('--config.steps=20000', '--config.checkpoint_every=20000')
  process = runs.start(file, run, *flags)
  until(process, run, 2)
  process.stdout.close()
  process.stderr.close()
  process.send_signal(signal.SIGHUP)
  assert process.wait(600) == 128 + signal.SIGHUP
  step = runs.losses(run)[-1][0]
  assert (run / 'checkpoints' / str(step)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize('streams', ['pipes without a reader', 'closed', 'a full disk'])
def test_a_run_ends_well_if_nothing_can_be_printed(tmp_path, streams):
  pytest.importorskip('ml_collections')
  file = runs.write_experiment(tmp_path)
  run = tmp_path / 'run'
  command = f'{sys.executable} -m rrt.train --config={file} --workdir={run}'
  if streams == 'closed':
    command += ' >&- 2>&-'
  elif streams == 'a full disk':
    if not os.path.exists('/dev/full'):
      pytest.skip('no /dev/full')
    command += ' >/dev/full 2>/dev/full'
  process = subprocess.Popen(
    command,
    shell=True,
    cwd=Path(__file__).parents[2],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  process.stdout.close()
  process.stderr.close()
  # Output that is lost to a full disk is no success, but the work is done.
  assert process.wait(600) == (2 if streams == 'a full disk' else 0)
  assert len(runs.losses(run)) == 12
  load(run)


@pytest.mark.slow
def test_sigterm_saves_and_leaves(tmp_path):
  pytest.importorskip('ml_collections')
  file = runs.write_experiment(tmp_path)
  run, flags = tmp_path / 'run', ('--config.steps=20000', '--config.checkpoint_every=20000')
  process = runs.start(file, run, *flags)
  until(process, run, 2)
  process.send_signal(signal.SIGTERM)
  out, _ = runs.finish(process, 143)
  assert 'stopped by SIGTERM after step' in out and 'saved' in out
  step = int(out.split('after step ')[1].split(',')[0])
  assert runs.losses(run)[-1][0] == step
  assert (run / 'checkpoints' / str(step)).is_dir()
  process = runs.start(file, run, *flags)
  until(process, run, step + 2)
  process.send_signal(signal.SIGTERM)
  runs.finish(process, 143)
  steps = [s for s, _ in runs.losses(run)]
  assert steps == list(range(1, len(steps) + 1)) and len(steps) > step
