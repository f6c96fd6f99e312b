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
  writer = metrics.Writer(tmp_path, 0, tensorboard=False)
  for step in range(1, 5):
    writer.write({'step': step, 'loss': 1 / step, 'none': None})
  writer.close()
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 5, "lo')  # Killed while writing.
  writer = metrics.Writer(tmp_path, 3, tensorboard=False)
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
  writer = metrics.Writer(tmp_path, 4, tensorboard=False)
  writer.write({'step': 5})
  writer.close()
  assert [r['step'] for r in metrics.read(file)] == [1, 4, 5]
  assert (tmp_path / 'metrics.jsonl.damaged').read_text() == text
  assert 'lines [2, 3] are damaged' in capsys.readouterr().err
  # A line that was only cut short is no damage.
  file.write_text('{"step": 1}\n{"step"')
  metrics.Writer(tmp_path, 1, tensorboard=False).close()
  assert capsys.readouterr().err == ''


def test_a_new_run_drops_an_old_ones_rows(tmp_path):
  writer = metrics.Writer(tmp_path, 0, tensorboard=False)
  writer.write({'step': 0, 'heldout_nats': 1.0})
  writer.close()
  assert metrics.Writer(tmp_path, 0, tensorboard=False).rows == []


def test_tensorboard(tmp_path):
  pytest.importorskip('tensorboardX')
  writer = metrics.Writer(tmp_path, 0, tensorboard=True)
  writer.write({'step': 1, 'loss': 0.5})
  writer.close()
  (file,) = (tmp_path / 'tensorboard').glob('events*')
  assert scalars(file) == [(1, 'loss', 0.5)]


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
  writer = metrics.Writer(tmp_path, 0, tensorboard=True)
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
