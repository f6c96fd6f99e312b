"""Checkpoints come back as they were, or say that they do not."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.train import checkpoint
from rrt.train.step import TrainState

CONFIG = {'steps': 9, 'seed': 0, 'loss': {'temperature': 1.0}, 'log_every': 1}


def state(step=3, sharding=None):
  rng = np.random.default_rng(step)
  everywhere = sharding and jax.NamedSharding(sharding.mesh, jax.P())
  put = lambda x: jax.device_put(x, sharding if x.ndim > 1 else everywhere)
  whole = TrainState(
    step=jnp.int32(step),
    params={
      'a': {'kernel': jnp.asarray(rng.standard_normal((64, 32)), 'f4')},
      'b': {'scale': jnp.arange(5.0)},
    },
    opt_state=({'a/kernel': jnp.ones((64, 32))}, jnp.int32(7)),
    skipped=jnp.int32(0),
    skipped_in_a_row=jnp.int32(0),
  )
  return jax.tree.map(put, whole)


def abstract(like):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def fill(directory, steps=(2, 4), keep=2):
  with checkpoint.Checkpoints(directory, keep) as c:
    for step in steps:
      c.save(step, state(step), {'lanes': {'0': [step, 1]}}, CONFIG)


def restore(directory, like=None, config=CONFIG, free=('log_every',)):
  with checkpoint.Checkpoints(directory, 2) as c:
    return c.restore(abstract(like or state()), config, free)


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def data_files(directory):
  """The files that hold arrays, largest last."""
  files = [p for p in (directory / 'state').rglob('*') if p.is_file()]
  return sorted((p for p in files if 'd' in p.parts), key=os.path.getsize)


def test_round_trip(tmp_path):
  fill(tmp_path)
  step, got, data = restore(tmp_path)
  assert step == 4 and data == [{'lanes': {'0': [4, 1]}}]
  assert_same(got, state(4))


def test_nothing_to_restore(tmp_path):
  assert restore(tmp_path) is None


def test_newest_are_kept(tmp_path):
  fill(tmp_path, steps=(1, 2, 3, 4))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['3', '4']


def test_another_mesh(tmp_path):
  fill(tmp_path)
  mesh = jax.make_mesh((4, 2), ('x', 'y'), (jax.sharding.AxisType.Auto,) * 2)
  sharding = jax.NamedSharding(mesh, jax.P('x', 'y'))
  like = state(0, sharding)
  _, got, _ = restore(tmp_path, like)
  assert got.params['a']['kernel'].sharding == sharding
  assert_same(got, state(4))
  # And back from there to one device.
  with checkpoint.Checkpoints(tmp_path, 2) as c:
    c.save(5, got, {}, CONFIG)
  assert_same(restore(tmp_path)[1], state(4))


def test_donated_buffers_are_saved_as_they_were(tmp_path):
  """The state may be donated right after `save` returns."""
  change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  s = state(4)
  with checkpoint.Checkpoints(tmp_path, 2) as c:
    c.save(4, s, {}, CONFIG)
    for _ in range(5):
      s = change(s)
  assert_same(restore(tmp_path)[1], state(4))


def test_digest_sees_every_element_and_its_place():
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  base = checkpoint.digest({'x': x})
  for i in range(x.size):
    y = x.copy()
    y.flat[i] = np.nextafter(y.flat[i], np.float32(99))
    assert checkpoint.digest({'x': y}) != base
  assert checkpoint.digest({'x': x[:, ::-1].copy()}) != base
  assert checkpoint.digest({'x': x.reshape(6, 4)}) == base
  assert checkpoint.digest({'x': -np.zeros(3, np.float32)}) != (
    checkpoint.digest({'x': np.zeros(3, np.float32)})
  )


@pytest.mark.parametrize('how', ['flip', 'truncate', 'remove'])
@pytest.mark.parametrize('item', ['arrays', 'run'])
def test_damage_is_told_and_the_whole_one_named(tmp_path, how, item):
  fill(tmp_path)
  file = data_files(tmp_path / '4')[-1]
  if item == 'run':
    file = tmp_path / '4' / 'run' / 'metadata'
  content = bytearray(file.read_bytes())
  if how == 'flip':
    content[len(content) // 2] ^= 4
  file.write_bytes(content[: len(content) // (2 if how == 'truncate' else 1)])
  if how == 'remove':
    file.unlink()
  with pytest.raises(InputError) as e:
    restore(tmp_path)
  message = str(e.value)
  assert f'{tmp_path}/4 is damaged' in message
  assert 'step 2 is whole' in message and '\n' not in message
  # The mend that is named works.
  (tmp_path / '4').rename(tmp_path.parent / f'{tmp_path.name}-away')
  step, got, _ = restore(tmp_path)
  assert step == 2
  assert_same(got, state(2))


def test_all_damaged(tmp_path):
  fill(tmp_path)
  for step in '24':
    data_files(tmp_path / step)[-1].write_bytes(b'')
  with pytest.raises(InputError, match='No other checkpoint is whole'):
    restore(tmp_path)
  assert (tmp_path / '2').is_dir() and (tmp_path / '4').is_dir()


def test_half_written_is_never_whole(tmp_path):
  """What a kill leaves: a directory without its last mark, or misnamed."""
  fill(tmp_path)
  shutil.copytree(tmp_path / '4', tmp_path / '6.orbax-checkpoint-tmp')
  assert restore(tmp_path)[0] == 4


def test_another_configuration(tmp_path):
  fill(tmp_path)
  with pytest.raises(InputError, match=r'loss.temperature=2.0.*started with 1'):
    restore(tmp_path, config={**CONFIG, 'loss': {'temperature': 2.0}})
  with pytest.raises(InputError, match=r'seed=1.*started with 0'):
    restore(tmp_path, config={**CONFIG, 'seed': 1})
  assert restore(tmp_path, config={**CONFIG, 'log_every': 5})[0] == 4


def test_unwritable_directory(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot be written to'):
    checkpoint.Checkpoints(tmp_path / 'file' / 'run', 2)


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tests.train import checkpoint_test as t
from pathlib import Path
where = Path(sys.argv[1])
t.fill(where, steps=(2,))
# Files may not grow beyond 1000 bytes: as good as a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
  t.fill(where, steps=(4,))
except t.InputError as e:
  print('told:', e)
"""


def test_a_full_disk_is_told_and_harms_nothing(tmp_path):
  out = subprocess.run(
    [sys.executable, '-c', FULL, str(tmp_path)],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  told = [x for x in out.stdout.splitlines() if x.startswith('told:')]
  assert told, out.stderr[-2000:]
  assert 'step 4' in told[0] and 'steps [2] are whole' in told[0]
  step, got, _ = restore(tmp_path)
  assert step == 2
  assert_same(got, state(2))


def test_versions_are_kept(tmp_path):
  fill(tmp_path)
  sealed = json.loads((tmp_path / '4' / 'run' / 'metadata').read_text())
  run = json.loads(sealed['text'])
  assert run['versions']['jax'] == jax.__version__
  assert run['config'] == CONFIG
