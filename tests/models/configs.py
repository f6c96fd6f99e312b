"""Tiny models of odd sizes, one for each thing that may go wrong."""

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig, Rope
from rrt.models.init import init_params
from rrt.relax.lora import Lora
from rrt.relax.trees import mask_all

_SIZES = dict(vocab_size=53, d_model=24, d_ff=40, max_context=64)
_HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=6)
_LORA = Lora(q=3, k=2, v=2, o=3, gate=4, up=((1, 2), (3, 0), (4, 4)), down=4, alpha=6.0)


def llama(**changes) -> ModelConfig:
  fields = dict(
    family='llama',
    block_layers=2,
    prelude_layers=1,
    loops=3,
    coda_layers=1,
    loop_norms=True,
    relax=(_LORA,),
    **_SIZES,
    **_HEADS,
  )
  return ModelConfig(**(fields | changes))


def gemma3(**changes) -> ModelConfig:
  """Windows and rotary tables that differ between the loops of a layer."""
  fields = dict(
    family='gemma3',
    unit_offset_norm=True,
    post_norms=True,
    qk_norm=True,
    activation='gelu_tanh',
    scale_embeddings=True,
    tie_embeddings=True,
    windows=(0, 3, 0, 3, 3, 3, 0, 2),
    ropes=(Rope(), Rope(base=1e6)),
    rope_index=(0, 1, 0, 1, 1, 1, 1, 0),
  )
  return llama(**(fields | changes))


CONFIGS = {
  'llama-cycle': llama(),
  'llama-sequence': llama(order='sequence'),
  'llama-vanilla': llama(
    prelude_layers=0, coda_layers=0, block_layers=4, loops=1, relax=(), loop_norms=False
  ),
  'llama-biases': llama(biases=('q', 'k', 'v', 'o', 'gate', 'up', 'down'), qk_norm=True),
  'llama-capped': llama(
    attn_softcap=1.5,
    final_softcap=2.0,
    ropes=(Rope(100.0, 'yarn', factor=4.0, original_context=16, attention_factor=1.2),)
    + (Rope(scaling='none'),),
    rope_index=(0, 1, 0, 1, 0, 1, 0, 1),
  ),
  'pythia-cycle': llama(
    norm='layer', parallel=True, gated=False, activation='gelu', rotary_dim=2, biases=('q', 'up')
  ),
  'olmo2-cycle': llama(pre_norms=False, post_norms=True, qk_norm=True, qk_norm_all=True),
  'mixtral-cycle': llama(num_experts=5, experts_per_token=2, d_ff=14),
  'qwen2-moe-sequence': llama(
    order='sequence', num_experts=4, experts_per_token=2, shared_experts=2, norm_topk=False, d_ff=14
  ),
  'gemma3-cycle': gemma3(),
  'gemma3-sequence': gemma3(order='sequence'),
}


def perturbed(config: ModelConfig, seed: int = 0):
  """Random parameters in which nothing is left at zero or one."""
  rng = np.random.default_rng(seed)
  abstract = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))

  def draw(path, leaf):
    gain = path[-1].key == 'scale' and not config.unit_offset_norm
    sigma = 0.1 if path[-1].key == 'scale' else max(leaf.shape[-2:]) ** -0.5
    values = rng.normal(float(gain), sigma, leaf.shape)
    return jnp.asarray(values, jnp.float32)

  params = jax.tree_util.tree_map_with_path(draw, abstract)
  return mask_all(config, params)


def tokens(config: ModelConfig, batch: int = 2, length: int = 9, seed: int = 7):
  shape = (batch, length)
  return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size, jnp.int32)
