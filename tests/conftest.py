"""Strict settings: 8 CPU devices, no silent rank promotion; a compilation cache."""

import os
import pathlib
import shutil

CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache'))
CACHE = CACHE / 'rrt' / 'jax-tests'
# For this process and those that tests start.
for name, value in {
  'JAX_PLATFORMS': 'cpu',
  # Tests compile more than they compute.
  'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
  # What several tests, processes or runs compile is compiled once.
  'JAX_COMPILATION_CACHE_DIR': str(CACHE),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
}.items():
  os.environ.setdefault(name, value)

import jax

# Half of the time to compile, where this jaxlib knows the flag: unknown ones end
# the process.
if jax.__version_info__ < (0, 11):
  FLAGS = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  os.environ.setdefault('XLA_FLAGS', FLAGS)

import pytest

from rrt.infer import decode

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def _release_programs():
  decode.forget_programs()
  jax.clear_caches()


@pytest.fixture(autouse=True, scope='module')
def release_programs():
  """Drops a module's compiled programs."""
  yield
  _release_programs()


@pytest.fixture(autouse=True)
def keep_maps_few():
  """Drops them within a module too, where they become too many.

  Each holds memory maps, of which Linux allows a process 65,530: one that
  passes this dies while compiling.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 30_000:
    _release_programs()


def pytest_sessionstart(session):
  """Empties a compilation cache of more than 2 GiB."""
  if hasattr(session.config, 'workerinput') or not CACHE.is_dir():
    return
  if sum(f.stat().st_size for f in CACHE.iterdir() if f.is_file()) > 2 << 30:
    shutil.rmtree(CACHE, ignore_errors=True)
