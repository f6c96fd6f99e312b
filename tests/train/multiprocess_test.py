"""Two processes train as one does, save together and go on together."""

import contextlib
import dataclasses
from pathlib import Path
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from rrt.checkpoints.load import load, save
from rrt.models.count import count_params
from tests import runs
from tests.train.resume_test import until

pytest.importorskip('ml_collections')


def start_two(file, workdir, *flags, devices=2):
  return start(file, workdir, *flags, count=2, devices=devices)


def start(file, workdir, *flags, count, devices):
  if count == 1:
    return [runs.start(file, workdir, *flags, devices=devices)]
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  return [
    runs.start(
      file,
      workdir,
      f'--coordinator=127.0.0.1:{port}',
      f'--processes={count}',
      f'--process={i}',
      *flags,
      devices=devices,
    )
    for i in range(count)
  ]


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'then'), [(2, 2), (4, 1)])
def test_several_processes_equal_one_and_go_on_as_others(count, then, tmp_path):
  """Four devices of so many processes, and after a kill of others."""
  file = runs.write_experiment(tmp_path)
  flags = (
    *('--config.mesh.data=2', '--config.mesh.fsdp=2', '--config.steps=8'),
    *(f'--config.local_checkpoints={tmp_path}/disk', '--config.local_every=2'),
  )
  runs.finish(runs.start(file, tmp_path / 'one', *flags, devices=4))

  several = start(file, tmp_path / 'two', *flags, count=count, devices=4 // count)
  until(several[0], tmp_path / 'two', 5)
  for process in several:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  for process in start(file, tmp_path / 'two', *flags, count=then, devices=4 // then):
    runs.finish(process)
  got, want = runs.losses(tmp_path / 'two'), runs.losses(tmp_path / 'one')
  assert [s for s, _ in got] == list(range(1, 9))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  a, b = (load(tmp_path / x) for x in ('two', 'one'))
  table = lambda m: m.params['embed']['table']
  np.testing.assert_allclose(table(a), table(b), atol=1e-4)


@pytest.mark.slow
def test_no_process_holds_a_whole_model(tmp_path):
  """Loads, trains and saves models that together are larger than a process may hold."""
  wide = dict(d_model=512, d_ff=2048, num_heads=8, num_kv_heads=8, head_dim=64, block_layers=24)
  parent = runs.model(dataclasses.replace(runs.PARENT, **wide), 0)
  child = parent.config.with_recursion(prelude=0, block=12, loops=2, coda=0, loop_norms=True)
  whole = sum(x.nbytes for x in jax.tree.leaves(parent.params))
  whole += 4 * count_params(child).unique
  flags = (
    *('--config.mesh.data=1', '--config.mesh.fsdp=2', '--config.steps=2'),
    *('--config.optimizer.train=norm', '--config.gather=loop'),
  )
  file = runs.write_experiment(tmp_path)
  least = _peak_bytes(start_two(file, tmp_path / 'tiny_run', *flags, devices=1))
  save(parent, tmp_path / 'parent')
  save(runs.model(child, 1), tmp_path / 'child')
  most = _peak_bytes(start_two(file, tmp_path / 'run', *flags, devices=1))
  assert most - least < 0.8 * whole
  trained, start = (load(tmp_path / x) for x in ('run', 'child'))
  up = lambda m: m.params['block']['layers']['mlp']['up']['kernel']
  np.testing.assert_array_equal(up(trained), up(start))
  norm = lambda m: m.params['final_norm']['scale']
  assert not np.array_equal(norm(trained), norm(start))


def _peak_bytes(processes) -> int:
  """The most memory that one of them has of its own, files apart, until all end well."""
  most = 0
  while any(p.poll() is None for p in processes):
    for p in processes:
      with contextlib.suppress(OSError, TypeError):
        status = Path(f'/proc/{p.pid}/status').read_text()
        most = max(most, 1024 * int(re.search(r'RssAnon:\s*(\d+)', status)[1]))
    time.sleep(0.02)
  for p in processes:
    runs.finish(p)
  return most


@pytest.mark.slow
def test_a_tensor_group_may_span_processes(tmp_path):
  """Both feed the same rows: which ones follows from the sharding."""
  file = runs.write_experiment(tmp_path)
  flags = (
    '--config.mesh.data=1',
    '--config.steps=4',
    f'--config.heldout.path={tmp_path}/text.jsonl',
  )
  runs.finish(runs.start(file, tmp_path / 'one', *flags, devices=1))
  two = start_two(file, tmp_path / 'two', *flags, '--config.mesh.tensor=2', devices=1)
  for process in two:
    runs.finish(process)
  got, want = runs.losses(tmp_path / 'two'), runs.losses(tmp_path / 'one')
  assert [s for s, _ in got] == [1, 2, 3, 4]
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_sigterm_of_one_process_stops_both_within_a_few_steps(tmp_path):
  """Not only every log_every steps: a notice of 30 seconds may be shorter than those."""
  file = runs.write_experiment(tmp_path)
  workdir = tmp_path / 'run'
  flags = ('--config.mesh.data=2', '--config.steps=100000', '--config.checkpoint_every=5')
  processes = start_two(file, workdir, *flags, '--config.log_every=1000000', devices=1)
  checkpoints = workdir / 'checkpoints'
  end = time.monotonic() + 120
  while not (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
    assert time.monotonic() < end and all(p.poll() is None for p in processes)
    time.sleep(0.2)
  processes[1].send_signal(signal.SIGTERM)
  for process in processes:
    runs.finish(process, 128 + signal.SIGTERM)
  before = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  assert before < 100_000
  # The checkpoint is whole: the run goes on from it.
  processes = start_two(file, workdir, *flags, '--config.log_every=1', devices=1)
  until(processes[0], workdir, before + 2)
  for process in processes:
    process.send_signal(signal.SIGTERM)
  for process in processes:
    runs.finish(process, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_the_others_end_with_a_sentence_when_one_process_is_killed(tmp_path):
  file = runs.write_experiment(tmp_path)
  workdir = tmp_path / 'run'
  flags = ('--config.mesh.data=2', '--config.steps=100000', '--config.log_every=1')
  processes = start_two(file, workdir, *flags, devices=1)
  until(processes[0], workdir, 4)
  processes[1].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  _, err = processes[0].communicate(timeout=90)
  assert time.monotonic() - begin < 60
  assert processes[0].returncode == 75, err[-3000:]
  assert 'error: process 0 cannot reach the others' in err
  assert 'it resumes' in err
  processes[1].communicate()


@pytest.mark.slow
def test_the_text_may_end_at_different_steps(tmp_path):
  file = runs.write_experiment(tmp_path)
  flags = (
    '--config.mesh.data=2',
    '--config.mesh.fsdp=2',
    '--config.steps=5000',
    '--config.data.epochs=1',
    '--config.length=32',
    '--config.log_every=1',
  )
  outs = [runs.finish(p) for p in start_two(file, tmp_path / 'run', *flags)]
  steps = len(runs.losses(tmp_path / 'run'))
  assert steps > 1
  assert f'the text is used up after {steps} steps' in ''.join(outs[0])
