"""What is written down, and the closed forms behind it."""

import dataclasses
import errno
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt import console
from rrt.models import lm_head, transformer
from rrt.models.init import init_params
from rrt.train import metrics
from rrt.train.recipe import Recipe
from tests import runs


def test_flops_against_xla():
  """The closed form is what XLA counts, less the parts it leaves out."""
  config = dataclasses.replace(runs.PARENT, d_model=128, d_ff=256, head_dim=32)
  L = 16
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

  def f(params, tokens):
    out = transformer.forward(config, params, tokens, scan=False)
    return lm_head.logits(config, params, out.hidden_BxLxD)

  tokens = jax.ShapeDtypeStruct((1, L), jnp.int32)
  cost = jax.jit(f).lower(params, tokens).compile().cost_analysis()
  want = metrics.forward_flops(config, L) * L
  # XLA multiplies with masked keys as well, and counts norms and softmaxes.
  assert 1.0 < cost['flops'] / want < 1.12


def test_windows_and_loops_cost_what_they_run():
  config = runs.PARENT
  far = metrics.forward_flops(config, 32)
  near = metrics.forward_flops(dataclasses.replace(config, windows=(4,) * 6), 32)
  keys = lambda w: (w * (w + 1) / 2 + (32 - w) * w) / 32
  saved = 6 * 4 * config.num_heads * config.head_dim * (keys(32) - keys(4))
  np.testing.assert_allclose(far - near, saved)
  plain = config.with_recursion(prelude=0, block=3, loops=2, coda=0)
  assert metrics.forward_flops(plain, 32) == far
  assert metrics.forward_flops(runs.CHILD, 32) > far
  assert metrics.step_flops(config, config, 10, 32) == 40 * far


def test_lora_norms_equal_the_products():
  params = runs.child().params
  want = np.zeros(2)
  for part in ('attn', 'mlp'):
    for linear in params['block']['layers'][part].values():
      ab = linear['lora_a'] @ linear['lora_b']
      want += np.sum(np.square(ab), axis=(0, 2, 3))
  norms = metrics.relaxation_norms(runs.CHILD, params)
  np.testing.assert_allclose(norms['lora'], np.sqrt(want), rtol=1e-5)


def test_peak_flops_of_a_cpu_is_unknown():
  assert metrics.peak_flops() is None
  assert metrics.memory_bytes() > 0


def test_writer_tells_one_uninterrupted_run(tmp_path):
  writer = metrics.Writer(tmp_path, 0, Recipe())
  for step in range(1, 5):
    writer.write({'step': step, 'loss': 1 / step, 'none': None})
  writer.close()
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 5, "lo')  # Killed while writing.
  writer = metrics.Writer(tmp_path, 3, Recipe())
  writer.write({'step': 4, 'loss': float('nan')})
  writer.close()
  rows = metrics.read(tmp_path / 'metrics.jsonl')
  assert [r['step'] for r in rows] == [1, 2, 3, 4]
  assert rows[-1]['loss'] == 'nan' and 'none' not in rows[0]
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    json.loads(line)


def test_damaged_lines_are_kept_aside(tmp_path, capsys):
  file = tmp_path / 'metrics.jsonl'
  text = '{"step": 1}\n{"st\x00\n[2]\n{"step": 4}\n{"step": 5'
  file.write_text(text)
  assert [r['step'] for r in metrics.read(file)] == [1, 4]
  writer = metrics.Writer(tmp_path, 4, Recipe())
  writer.write({'step': 5})
  writer.close()
  assert [r['step'] for r in metrics.read(file)] == [1, 4, 5]
  assert (tmp_path / 'metrics.jsonl.damaged').read_text() == text
  assert 'lines [2, 3] are damaged' in capsys.readouterr().err
  # A line that was only cut short is no damage.
  file.write_text('{"step": 1}\n{"step"')
  metrics.Writer(tmp_path, 1, Recipe()).close()
  assert capsys.readouterr().err == ''


def test_a_new_run_drops_an_old_ones_rows(tmp_path):
  writer = metrics.Writer(tmp_path, 0, Recipe())
  writer.write({'step': 0, 'eval/cross_entropy': 1.0})
  writer.close()
  assert metrics.Writer(tmp_path, 0, Recipe()).rows == []


def test_tensorboard(tmp_path):
  pytest.importorskip('tensorboardX')
  writer = metrics.Writer(tmp_path, 0, Recipe(tensorboard=True))
  writer.write({'step': 1, 'loss': 0.5})
  writer.close()
  (file,) = (tmp_path / 'tensorboard').glob('events*')
  assert scalars(file) == [(1, 'loss', 0.5)]


def test_wandb_offline(tmp_path, monkeypatch):
  """Metrics reach wandb's own file; a run that goes on keeps its identity."""
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  for step in (1, 2):
    writer = metrics.Writer(tmp_path, step - 1, Recipe(wandb='project', steps=7))
    writer.write({'step': step, 'train/loss': 0.5 / step})
    writer.close()
  files = sorted(tmp_path.glob('wandb/offline-run-*/run-*.wandb'))
  name = (tmp_path / 'wandb_id').read_text().strip()
  assert len(files) == 2 and all(f.stem == f'run-{name}' for f in files)
  found, config = [], {}
  for record in (r for file in files for r in records(file)):
    for item in record.history.item:
      found.append(('/'.join([item.key, *item.nested_key]).strip('/'), item.value_json))
    for item in record.run.config.update:
      config[item.key] = item.value_json
  assert [json.loads(v) for k, v in found if k == 'train/loss'] == [0.5, 0.25]
  assert config['steps'] == '7'


def records(file):
  """wandb's records of a file: LevelDB's log format behind a header of 7 bytes."""
  from wandb.proto import wandb_internal_pb2

  data, place, whole = file.read_bytes(), 7, b''
  while place + 7 <= len(data):
    left = 32768 - place % 32768
    size = int.from_bytes(data[place + 4 : place + 6], 'little')
    kind = data[place + 6]
    if left < 7 or not kind:  # The rest of a block is padding.
      place += left
      continue
    whole += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # A whole record, or the last part of one.
      yield wandb_internal_pb2.Record.FromString(whole)
      whole = b''


def scalars(file):
  """(step, name, value) of an event file, by the record format's own rules."""
  from tensorboardX.proto import event_pb2

  data, found = file.read_bytes(), []
  while data:  # Length, its checksum, the event, its checksum.
    size = int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[16 + size :]
  return found


class FullDisk(io.StringIO):
  """A file whose disk is full until `free` is set; it keeps what was written."""

  free = False

  def flush(self):
    if not self.free:
      raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_does_not_end_a_run(tmp_path, capsys, monkeypatch):
  pytest.importorskip('tensorboardX')
  monkeypatch.setattr(console, '_noted', set())
  writer = metrics.Writer(tmp_path, 0, Recipe(tensorboard=True))
  writer._file, writer._board._file = FullDisk(), FullDisk()
  writer._board._file.write_event = lambda event: None
  for step in (1, 2):
    writer.write({'step': step, 'loss': 0.5})
  assert writer._board is None  # Its file may end in half an event.
  assert capsys.readouterr().err.count('No space left on device') == 1
  writer._file.free = True
  writer.write({'step': 3, 'loss': 0.5})
  lines = writer._file.getvalue().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 3]
  writer.close()


def test_revision(tmp_path):
  assert metrics.revision(tmp_path) == ''


@pytest.mark.parametrize(
  'kind,flops',
  [
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA L40S', 362e12),
    ('NVIDIA L4', 121e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5p', 459e12),
    ('cpu', None),
  ],
)
def test_peak_flops_by_name(kind, flops):
  assert metrics.peak_of(kind) == flops
