"""Runs in buckets, and checkpoints on a second disk."""

import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from rrt.checkpoints.load import load
from rrt.errors import InputError
from rrt.train.loop import uptrain
from rrt.train.workdir import Workdir
from tests import buckets, runs
from tests.train.resume_test import until

pytest.importorskip('ml_collections')


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('ftp://host/run', r'give a directory, or a bucket by gs:// and s3://'),
    ('gs://bucket/run', r'pip install "relaxed-recursive-transformers\[gcs\]"'),
  ],
)
def test_what_is_no_work_directory(name, words, monkeypatch):
  monkeypatch.setitem(sys.modules, 'google.cloud', None)
  with pytest.raises(InputError, match=words):
    Workdir(name)


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_from_another_machine(tmp_path, monkeypatch):
  file = runs.write_experiment(tmp_path)
  runs.finish(runs.start(file, tmp_path / 'local'))
  root = tmp_path / 'buckets'
  bucket = root / 'bucket'
  bucket.mkdir(parents=True)
  # The config file runs in each process, and so gives it the buckets.
  file.write_text(
    f'from tests import buckets\nbuckets.register({str(root)!r})\n' + file.read_text()
  )
  with buckets.serve(root) as environment:
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    for machine in ('first', 'second'):
      (tmp_path / machine).mkdir()
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'first'))
    process = runs.start(file, 'gs://bucket/run')
    until(process, bucket / 'run', 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / 'first')
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'second'))
    out, _ = runs.finish(runs.start(file, 'gs://bucket/run'))
  assert 'gs://bucket/run/model' in out.replace('\n', '')
  assert runs.losses(bucket / 'run') == runs.losses(tmp_path / 'local')
  assert {'config.json', 'child', 'checkpoints', 'model'} <= {
    p.name for p in (bucket / 'run').iterdir()
  }
  ours, wanted = (load(p / 'model') for p in (bucket / 'run', tmp_path / 'local'))
  table = lambda m: m.params['embed']['table']
  np.testing.assert_array_equal(table(ours), table(wanted))


class Killed(Exception):
  pass


def test_a_run_goes_on_from_the_newer_of_its_two_directories(tmp_path):
  text = runs.write_text(tmp_path / 'text.jsonl')
  fields = dict(checkpoint_every=100, local_every=2, local_checkpoints=str(tmp_path / 'disk'))
  recipe = runs.recipe(text, **fields)
  whole = uptrain(runs.parent(), runs.child(), runs.recipe(text))

  def kill(row):
    if row.get('step') == 5:
      raise Killed

  with pytest.raises(Killed):
    uptrain(runs.parent(), runs.child(), recipe, tmp_path / 'run', on_row=kill)
  rows = []
  run = uptrain(runs.parent(), runs.child(), recipe, tmp_path / 'run', on_row=rows.append)
  assert rows[0]['step'] == 5
  for a, b in zip(*(jax.tree.leaves(r.model.params) for r in (run, whole)), strict=True):
    np.testing.assert_array_equal(a, b)
  # Another run of the same recipe begins anew.
  rows.clear()
  uptrain(runs.parent(), runs.child(), recipe, tmp_path / 'other', on_row=rows.append)
  assert rows[0]['step'] == 1
