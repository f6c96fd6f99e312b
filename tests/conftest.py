"""Strict settings: 8 CPU devices, no silent rank promotion."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

from rrt.infer import decode

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests compile more than they compute.
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(autouse=True, scope='module')
def release_programs():
  """Drops a module's compiled programs.

  Each holds memory maps, of which Linux allows a process 65,530: one that
  runs all of these tests would die while compiling.
  """
  yield
  decode.forget_programs()
  jax.clear_caches()
