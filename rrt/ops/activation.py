"""Activation functions of MLPs."""

import jax


def activate(x, activation: str):
  """'silu', 'gelu' (by the error function) or 'gelu_tanh', of any array."""
  if activation == 'silu':
    return jax.nn.silu(x)
  return jax.nn.gelu(x, approximate=activation == 'gelu_tanh')
