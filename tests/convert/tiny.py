"""Tiny random parents, with gains that are not all ones."""

import jax
import numpy as np

from rrt.config import ModelConfig, Rope
from rrt.config_checks import COMPONENTS
from rrt.model import LanguageModel
from rrt.models import lm_head, transformer
from rrt.models.init import init_params

VOCAB = 61


def parent(family='llama', layers=4, seed=0, **fields):
  """A vanilla model of odd sizes; 'llama_biases' has biases of all linears."""
  if family == 'llama_biases':
    family, fields = 'llama', {'biases': COMPONENTS} | fields
  if family == 'olmo2_biases':
    family, fields = 'olmo2', {'biases': ('q', 'k', 'v', 'o')} | fields
  shape = dict(
    family=family,
    vocab_size=VOCAB,
    d_model=12,
    d_ff=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    block_layers=layers,
    max_context=128,
  )
  if family == 'gemma3':
    shape |= dict(
      unit_offset_norm=True,
      post_norms=True,
      qk_norm=True,
      activation='gelu_tanh',
      scale_embeddings=True,
      tie_embeddings=True,
      windows=(5, 0) * (layers // 2),
      ropes=(Rope(), Rope(1e6)),
      rope_index=(0, 1) * (layers // 2),
    )
  if family == 'qwen2':
    shape |= dict(biases=('q', 'k', 'v'), windows=(0,) * (layers // 2) + (5,) * (layers // 2))
  if family == 'qwen3':
    shape |= dict(qk_norm=True)
  if family == 'gemma2':
    shape |= dict(
      unit_offset_norm=True,
      post_norms=True,
      activation='gelu_tanh',
      scale_embeddings=True,
      attn_softcap=2.0,
      final_softcap=4.0,
      windows=(5, 0) * (layers // 2),
    )
  if family == 'olmo2':
    shape |= dict(pre_norms=False, post_norms=True, qk_norm=True, qk_norm_all=True)
  if family == 'gpt_neox':
    shape |= dict(norm='layer', parallel=True, gated=False, activation='gelu', rotary_dim=2)
    shape |= dict(biases=('q', 'k', 'v', 'o', 'up', 'down'))
  if family in ('mixtral', 'qwen2_moe', 'grok1'):
    shape |= dict(num_experts=4, experts_per_token=2, d_ff=10)
  if family == 'qwen2_moe':
    shape |= dict(shared_experts=2, norm_topk=False, biases=('q', 'k', 'v'))
  if family == 'grok1':
    shape |= dict(post_norms=True, activation='gelu_tanh', norm_topk=False, attn_softcap=2.0)
    shape |= dict(scale_embeddings=True, tie_embeddings=True)
  config = ModelConfig(**shape | fields)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(0, 1, leaf.shape)
    if path[-1].key == 'scale':
      leaf = (not config.unit_offset_norm) + 0.2 * noise
    else:
      leaf = noise * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.3 * noise
    return leaf.astype(np.float32)

  shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  return LanguageModel(config, jax.tree_util.tree_map_with_path(draw, shapes))


def tokens(count=600, seed=1):
  """Token ids that depend on those before them."""
  rng = np.random.default_rng(seed)
  steps = rng.integers(0, 7, count)
  return (np.cumsum(steps) % VOCAB).astype(np.int32)


def logits(model, tokens_BxL):
  """The model's logits, as an array."""
  hidden = transformer.forward(model.config, model.params, tokens_BxL).hidden_BxLxD
  return np.asarray(lm_head.logits(model.config, model.params, hidden))
