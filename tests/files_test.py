"""Directories that are written whole, and what a killed writer leaves."""

import os
import platform
import subprocess
import sys

import pytest

from rrt import files
from rrt.errors import InputError


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
    files.Path, 'write_text', lambda self, text: made.append(self.name) or real(self, text)
  )
  for _ in range(2):
    files.check_writable(tmp_path)
  assert len(set(made)) == 2 and names(tmp_path) == []


def test_a_lock_keeps_other_processes_out(tmp_path):
  code = (
    'import sys\n'
    'from rrt import files\n'
    'with files.lock(files.Path(sys.argv[1]), "run"): print("in")\n'
  )
  other = [sys.executable, '-c', code, str(tmp_path)]
  with files.lock(tmp_path, 'run'):
    done = subprocess.run(other, capture_output=True, text=True, check=False)
  assert done.returncode and 'another process is writing' in done.stderr
  done = subprocess.run(other, capture_output=True, text=True, check=True)
  assert done.stdout == 'in\n'


def test_a_link_means_what_it_leads_to(tmp_path):
  (tmp_path / 'big_disk').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'big_disk')
  (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
  write = lambda folder: (folder / 'a').write_text('a')
  yes = lambda folder: True
  files.write_directory(tmp_path / 'link', write, yes, 'ours')
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / 'big_disk' / 'a').read_text() == 'a'
  with pytest.raises(InputError, match='is a link to'):
    files.write_directory(tmp_path / 'dangling', write, yes, 'ours')
  with pytest.raises(InputError, match='too long a name'):
    files.write_directory(tmp_path / ('x' * 250), write, yes, 'ours')
