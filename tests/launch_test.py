"""The launchers: commands as they would run, and names that exist."""

import os
from pathlib import Path
import re
import subprocess

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'


def shell(*args, **env):
  return subprocess.run(args, capture_output=True, text=True, env=os.environ | env, timeout=60)


@pytest.mark.parametrize('name', ['tpu_vm.sh', 'slurm.sbatch'])
def test_a_script_parses_and_says_what_it_needs(name):
  assert shell('bash', '-n', str(LAUNCH / name)).returncode == 0
  bare = shell('bash', str(LAUNCH / name))
  assert bare.returncode == 2
  assert 'CONFIG WORKDIR' in bare.stderr


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='a checkout is what it copies')
def test_a_tpu_vm_runs_the_command_on_every_worker():
  flags = ("--config.parent=it's", '--config.mesh.fsdp=16')
  args = ('pod', 'zone', 'a.py', '/mnt/a run', *flags)
  done = shell('bash', str(LAUNCH / 'tpu_vm.sh'), *args, DRY='1')
  assert done.returncode == 0, done.stderr
  copy, install, run = done.stdout.strip().splitlines()
  for line in (copy, install, run):
    assert line.startswith('gcloud compute tpus tpu-vm ')
    assert '--worker=all' in line and '--zone=zone' in line
  # What the worker's own shell makes of it.
  words = shell('bash', '-c', f'for w in {run}; do printf "%s\\n" "$w"; done').stdout
  command = next(w for w in words.splitlines() if w.startswith('--command='))
  remote = command.removeprefix('--command=').partition('&& ')[2]
  found = shell('bash', '-c', f'printf "%s\\n" {remote}').stdout.splitlines()
  assert found[1:5] == ['-m', 'rrt.train', '--distributed', '--config=a.py']
  assert found[5:] == ['--workdir=/mnt/a run', *flags]


def test_slurm_queues_a_run_that_was_preempted_or_lost_a_node(tmp_path):
  for name, script in (('srun', 'exit $SRUN_STATUS'), ('scontrol', 'echo "$@"')):
    (tmp_path / name).write_text(f'#!/bin/sh\n{script}\n')
    (tmp_path / name).chmod(0o755)
  path = f'{tmp_path}:{os.environ["PATH"]}'
  for status, queued in ((0, ''), (1, ''), (143, 'requeue 7\n'), (75, 'requeue 7\n')):
    args = ('bash', str(LAUNCH / 'slurm.sbatch'), 'a.py', 'w')
    done = shell(*args, PATH=path, SRUN_STATUS=str(status), SLURM_JOB_ID='7')
    assert (done.returncode, done.stdout) == (status, queued)


def test_a_jobset_names_our_command():
  spec = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  job = spec['spec']['replicatedJobs'][0]['template']['spec']
  container = job['template']['spec']['containers'][0]
  assert job['parallelism'] == job['completions']
  assert container['args'][:2] == ['train', '--distributed']
  mounts = {m['name'] for m in container['volumeMounts']}
  assert mounts == {v['name'] for v in job['template']['spec']['volumes']}


def test_the_experiments_and_extras_that_they_name_exist():
  extras = re.findall(r'(?m)^(\w+) = \[', (ROOT / 'pyproject.toml').read_text())
  for path in LAUNCH.iterdir():
    text = path.read_text()
    for name in re.findall(r'experiments/\w+\.py', text):
      assert (ROOT / name).is_file(), (path, name)
    for names in re.findall(r'\[([a-z,]+)\]', text):
      assert set(names.split(',')) <= set(extras), (path, names)
