"""Strict settings: 8 CPU devices, no silent rank promotion."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs that several tests, processes or runs compile are compiled once.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path('.jax_cache').absolute()))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax
import pytest

from rrt.infer import decode

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests compile more than they compute.
jax.config.update('jax_disable_most_optimizations', True)


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
