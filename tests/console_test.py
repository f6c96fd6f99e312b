"""Terminal output: failures to print never reach the program."""

import contextlib
import errno
import io
import os
import subprocess
import sys

import pytest

from rrt import console


class Broken(io.StringIO):
  """A stream whose reader is gone."""

  def write(self, text):
    raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

  def flush(self):
    raise BrokenPipeError(errno.EPIPE, 'Broken pipe')


def test_a_stream_that_fails_drops_what_is_written():
  stream = console.SafeStream(Broken())
  print('a', file=stream, flush=True)
  assert isinstance(stream.error, BrokenPipeError)
  closed = io.StringIO()
  closed.close()
  stream = console.SafeStream(closed)
  assert stream.write('ab') == 2 and isinstance(stream.error, ValueError)
  kept = io.StringIO()
  stream = console.SafeStream(kept)
  print('a', file=stream, flush=True)
  assert kept.getvalue() == 'a\n' and stream.error is None and not stream.isatty()


def test_progress_and_notes_survive_a_broken_stderr(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Broken())
  with console.Progress(2, 'work') as progress:
    progress.update(2)
  console.note('never seen')
  monkeypatch.setattr(sys, 'stderr', None)
  with console.Progress(1, 'work') as progress:
    progress.update()
  console.say('a')


@pytest.mark.parametrize('redirect', ['| head -1', '>&-', '2>&- >&-', '>/dev/null 2>/dev/full'])
def test_a_command_whose_output_has_no_reader(redirect):
  if '/dev/full' in redirect and not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full')
  done = subprocess.run(
    f'set -o pipefail; {sys.executable} -m rrt {redirect}',
    shell=True,
    executable='/bin/bash',
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0 and not done.stderr


def test_output_that_is_lost_to_a_full_disk_is_an_error():
  if not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full')
  program = 'from rrt import command; command.run(lambda argv: print("x" * 99), argv=["x"])'
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
      [sys.executable, '-c', program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
    )
  assert done.returncode == 2
  assert done.stderr == 'error: [Errno 28] No space left on device: the output is incomplete\n'


def test_time_left_counts_neither_compilation_nor_an_earlier_run(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
  with console.Progress(110, 'work', 'steps') as progress:
    progress.skip(100)  # Of an earlier run.
    now[0] = 60.0  # The first step compiles.
    progress.update()
    now[0] = 75.0
    progress.update()
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == 'work 101/110 steps, 0:01:00 gone, ? left'
  assert lines[1] == 'work 102/110 steps, 0:01:15 gone, 0:02:00 left'
  # A total that was an upper bound is reached.
  assert len(lines) == 2 and progress.total == 102


ON_A_TERMINAL = """
import time
from rrt import console
with console.Progress(0, 'convert', 'layers'):
  pass  # Nothing was done: nothing is shown.
with console.Progress(9, 'convert', 'layers') as progress:
  for done in range(1, 8):
    progress.to(done, 9, 'held-out 3.2 nats')  # An upper bound.
console.say('after')
with console.Progress(9, 'broken', 'layers') as progress:
  progress.update()
  raise KeyboardInterrupt
"""


def test_a_bar_on_a_terminal_ends_at_its_total():
  pty = pytest.importorskip('pty')
  ours, theirs = pty.openpty()
  env = os.environ | {'TERM': 'xterm', 'COLUMNS': '100'}
  with subprocess.Popen([sys.executable, '-c', ON_A_TERMINAL], stderr=theirs, env=env) as process:
    os.close(theirs)
    text = b''
    with contextlib.suppress(OSError):  # The terminal is closed.
      while part := os.read(ours, 4096):
        text += part
    assert process.wait() != 0
  os.close(ours)
  before, after = text.decode().split('after')
  assert '7/7 layers' in before and 'held-out 3.2 nats' in before
  # An interrupted bar gives the cursor back, and claims no total.
  assert '1/9 layers' in after and '1/1 layers' not in after
  assert after.rindex('\x1b[?25h') > after.rindex('\x1b[?25l')
