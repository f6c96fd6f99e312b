"""Cached predictions of the parent: the same steps, read instead of computed."""

import dataclasses

import jax
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.train import loop
from rrt.train import teacher_cache as cache_lib
from tests import runs


def recipe(tmp_path, cache='', **fields):
  text = tmp_path / 'text.jsonl'
  if not text.is_file():
    runs.write_text(text)
  loss = {'cross_entropy': 0.5, **fields.pop('loss', {})}
  return {
    'steps': 3,
    'batch': 8,
    'length': 32,
    'data': {'path': str(text)},
    'teacher_cache': str(cache),
    'loss': loss,
    **fields,
  }


def losses(run):
  return [row['train/loss'] for row in run.history if 'train/loss' in row]


def files(path):
  return sorted(path.rglob('*.npz'))


@pytest.mark.parametrize(
  'fields',
  [
    {'optimizer': {'train': 'relaxations'}},
    pytest.param({'loss': {'top_k': 5}}, marks=pytest.mark.slow),
    pytest.param({'dtype': 'bfloat16'}, marks=pytest.mark.slow),
  ],
  ids=['shared with the child', 'most likely tokens', 'bfloat16'],
)
def test_a_run_from_the_cache_is_the_run_without(tmp_path, monkeypatch, fields):
  cache = tmp_path / 'cache'
  plain = loop.uptrain(runs.parent(), runs.child(), recipe(tmp_path, **fields))
  first = loop.uptrain(runs.parent(), runs.child(), recipe(tmp_path, cache, **fields))
  assert len(files(cache)) == 3

  def never(*_):
    raise AssertionError('the parent ran')

  monkeypatch.setattr(cache_lib, 'teacher_outputs', never)
  second = loop.uptrain(runs.parent(), runs.child(), recipe(tmp_path, cache, **fields))
  assert losses(first) == losses(second)
  rtol = 1e-5 if 'dtype' not in fields else 2e-2
  np.testing.assert_allclose(losses(plain), losses(first), rtol=rtol)
  jax.tree.map(np.testing.assert_array_equal, first.model.params, second.model.params)


def test_another_parent_has_other_files():
  other = runs.parent()
  params = jax.tree.map(np.array, other.params)
  params['final_norm']['scale'][0] += 1
  other = dataclasses.replace(other, params=params)
  assert cache_lib.fingerprint(other) != cache_lib.fingerprint(runs.parent())
  same = jax.tree.map(np.array, runs.parent().params)
  same = dataclasses.replace(runs.parent(), params=same)
  assert cache_lib.fingerprint(same) == cache_lib.fingerprint(runs.parent())


def test_a_damaged_file_is_made_again(tmp_path):
  cache = tmp_path / 'cache'
  first = loop.uptrain(runs.parent(), runs.child(), recipe(tmp_path, cache))
  for path, content in zip(files(cache), (b'', b'PK\x03\x04', files(cache)[2].read_bytes()[:99])):
    path.write_bytes(content)
  again = loop.uptrain(runs.parent(), runs.child(), recipe(tmp_path, cache))
  assert losses(first) == losses(again)
  assert all(np.load(path).files for path in files(cache))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='teacher_cache='):
    loop.uptrain(runs.parent(), runs.child(), recipe(tmp_path, tmp_path / 'file'))
