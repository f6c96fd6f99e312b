"""Random parameters, and the names of their axes."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models.transformer import Transformer
from rrt.ops.quantize import cast_floats
from rrt.relax.base import mask_all


def boxed_params(config: ModelConfig, key):
  """Random parameters, each boxed with the names of its axes."""
  variables = Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))
  return variables['params']


def init_params(config: ModelConfig, key, dtype=jnp.float32):
  """Random parameters; relaxations start without effect.

  Returns:
    The parameter tree, without boxes.
  """

  @jax.jit
  def init(key):
    params = nn.unbox(boxed_params(config, key))
    params = mask_all(config, params)
    return cast_floats(params, dtype)

  return init(key)
