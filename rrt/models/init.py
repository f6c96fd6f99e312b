"""Random parameters, and the names of their axes."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models.transformer import Transformer
from rrt.ops.quantize import cast_floats
from rrt.relax.trees import mask_all


def boxed_params(config: ModelConfig, key):
  """Random parameters, each boxed with the names of its axes."""
  variables = Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))
  return variables['params']


@functools.cache
def abstract_boxed(config: ModelConfig):
  """Shapes of the parameters, each boxed with the names of its axes; do not change the tree."""
  return jax.eval_shape(lambda: boxed_params(config, jax.random.key(0)))


def abstract_params(config: ModelConfig):
  """Shapes and dtypes that `init_params` gives."""
  return nn.unbox(abstract_boxed(config))


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
