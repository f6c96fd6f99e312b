"""What commands set up: huge pages, the cache of compiled programs, one switch."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from rrt import runtime
runtime.prepare()
names = ('JAX_COMPILATION_CACHE_DIR', 'JAX_COMPILATION_CACHE_MAX_SIZE', 'GLIBC_TUNABLES')
print(json.dumps({n: os.environ.get(n) for n in names} | {'argv': sys.argv}))
"""


def prepared(tmp_path, **variables):
  file = tmp_path / 'program.py'
  file.write_text(PROGRAM)
  names = ('JAX_COMPILATION_CACHE_DIR', 'GLIBC_TUNABLES', 'RRT_TUNE', 'XDG_CACHE_HOME')
  environment = {k: v for k, v in os.environ.items() if k not in names}
  paths = os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [sys.executable, str(file), 'a b', '--c'],
    capture_output=True,
    text=True,
    check=True,
    env=environment | {'PYTHONPATH': paths, 'RRT_CACHE': str(tmp_path)} | variables,
  )
  return json.loads(done.stdout)


def test_programs_are_kept_within_a_bound(tmp_path):
  found = prepared(tmp_path)
  assert found['JAX_COMPILATION_CACHE_DIR'].startswith(f'{tmp_path}/programs-')
  assert found['JAX_COMPILATION_CACHE_MAX_SIZE'] == str(2 << 30)
  # The process was started again, with its arguments.
  assert found['argv'][1:] == ['a b', '--c']
  if 'glibc' in (os.confstr('CS_GNU_LIBC_VERSION') or ''):
    assert found['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'


@pytest.mark.parametrize(
  'variables, directory, tunables',
  [
    ({'RRT_TUNE': '0'}, None, None),
    ({'JAX_COMPILATION_CACHE_DIR': '/own', 'GLIBC_TUNABLES': 'x=1'}, '/own', 'x=1'),
  ],
)
def test_one_switch_and_the_users_own_variables(tmp_path, variables, directory, tunables):
  found = prepared(tmp_path, **variables)
  assert (found['JAX_COMPILATION_CACHE_DIR'], found['GLIBC_TUNABLES']) == (directory, tunables)


def test_memory_can_be_released():
  from rrt import runtime

  runtime.release_memory()
