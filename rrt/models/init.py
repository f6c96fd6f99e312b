"""Random parameters, and the names of their axes."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.models.transformer import Transformer


def boxed_params(config: ModelConfig, key):
  """Random parameters, each boxed with the names of its axes."""
  variables = Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))
  return variables['params']


def init_params(config: ModelConfig, key, dtype=jnp.float32):
  """Random parameters; LoRA starts at zero output.

  Returns:
    The parameter tree, without boxes.
  """

  @jax.jit
  def init(key):
    params = nn.unbox(boxed_params(config, key))
    params = clear_padding(config, params)
    return jax.tree.map(lambda p: p.astype(dtype), params)

  return init(key)


def clear_padding(config: ModelConfig, params):
  """Zeroes the columns of LoRA factors beyond each position's own rank.

  Zero on both sides, they get no gradient and stay zero in training.
  """
  if config.lora is None:
    return params
  params = jax.tree.map(lambda p: p, params)
  for part in ('attn', 'mlp'):
    for name, linear in params['block']['layers'][part].items():
      if 'lora_a' not in linear or config.lora.uniform(name):
        continue
      table_RxN = config.lora.table(name, config.loops, config.block_layers)
      width = config.lora.width(name)
      own_NxRxr = np.arange(width) < table_RxN.T[:, :, None]
      linear['lora_a'] = linear['lora_a'] * own_NxRxr[:, :, None, :]
      linear['lora_b'] = linear['lora_b'] * own_NxRxr[:, :, :, None]
  return params
