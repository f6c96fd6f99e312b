"""Directories that are written whole, and what a killed writer leaves."""

import os
import platform
import subprocess
import sys

import pytest

from rrt import files


def write(directory, text):
  return files.write_directory(
    directory,
    lambda folder: (folder / 'a').write_text(text) and None,
    lambda folder: (folder / 'a').is_file(),
    'a test',
  )


@pytest.fixture
def dead():
  """The id of a process that has ended."""
  with subprocess.Popen([sys.executable, '-c', '']) as process:
    pass
  return process.pid


def names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('host', ['', f'{platform.node()}-'])
def test_what_a_killed_writer_left_is_cleared_up(tmp_path, dead, host):
  (tmp_path / f'.m-{host}{dead}.new').mkdir()
  write(tmp_path / f'.m-{host}{dead}.old', 'old')
  # Of a live process, of another host, of another directory.
  others = [f'.m-{os.getppid()}.new', '.m-elsewhere-1.new', f'.n-{dead}.new']
  for name in others:
    (tmp_path / name).mkdir()
  write(tmp_path / 'm', 'new')
  assert names(tmp_path) == sorted([*others, 'm'])
  assert (tmp_path / 'm' / 'a').read_text() == 'new'


def test_a_kill_between_the_renames_loses_nothing(tmp_path, dead):
  write(tmp_path / f'.m-{dead}.old', 'old')

  def full(_):
    raise OSError(28, 'No space left on device')

  with pytest.raises(files.InputError, match='No space left'):
    files.write_directory(tmp_path / 'm', full, lambda _: True, 'a test')
  assert names(tmp_path) == ['m']
  assert (tmp_path / 'm' / 'a').read_text() == 'old'


def test_probes_of_equal_process_ids_do_not_meet(tmp_path, monkeypatch):
  made = []
  real = files.Path.write_text
  monkeypatch.setattr(
    files.Path,
    'write_text',
    lambda self, text: made.append(self.name) or real(self, text),
  )
  for _ in range(2):
    files.check_writable(tmp_path)
  assert len(set(made)) == 2 and names(tmp_path) == []
