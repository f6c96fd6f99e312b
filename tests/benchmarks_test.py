"""The benchmarks that wait for hardware, rehearsed without it."""

import json
import subprocess
import sys

import pytest

PARTS = ['roof', 'attention', 'grouped', 'train 135M', 'engine 135M', 'generate 135M']


def gpu(*flags, timeout=900):
  return subprocess.run(
    [sys.executable, '-m', 'benchmarks.gpu', *flags],
    capture_output=True,
    text=True,
    timeout=timeout,
  )


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path):
  out = tmp_path / 'gpu.json'
  done = gpu('--tiny', '--minutes=14', f'--parts={",".join(PARTS)}', f'--out={out}')
  assert done.returncode == 0, done.stderr[-2000:]
  figures = json.loads(out.read_text())
  assert set(figures) == {*PARTS, 'tiny', 'machine'}
  for part in PARTS:
    assert 'not_measured' not in figures[part], (part, figures[part])
  assert figures['roof']['tflops'] > 0
  for title in ('uptraining', 'parent'):
    assert figures['train 135M'][title]['tokens_per_second'] > 0
  assert figures['engine 135M']['2 slots']['tokens_per_second'] > 0
  assert figures['generate 135M']['2 rows']['decode_tokens_per_second'] > 0
  # A line a part, as it ends.
  lines = [line.partition(': ') for line in done.stdout.splitlines()]
  assert [name for name, _, rest in lines if name in PARTS and json.loads(rest)] == PARTS


@pytest.mark.slow
def test_what_the_time_does_not_allow_is_named(tmp_path):
  out = tmp_path / 'gpu.json'
  done = gpu('--tiny', '--minutes=0.05', '--parts=roof,grouped', f'--out={out}')
  assert done.returncode == 0, done.stderr[-2000:]
  figures = json.loads(out.read_text())
  assert 'no time was left' in figures['grouped']['not_measured']


def test_an_unknown_part_is_refused():
  done = gpu('--parts=rof')
  assert done.returncode == 2
  assert "names 'rof'" in done.stderr
