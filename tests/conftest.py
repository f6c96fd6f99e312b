"""Strict settings: 8 CPU devices, no silent rank promotion."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests compile more than they compute.
jax.config.update('jax_disable_most_optimizations', True)
