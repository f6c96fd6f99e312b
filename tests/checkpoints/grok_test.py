"""Grok-1, against its published formulas in numpy."""

import json

import jax
import numpy as np
import pytest

import rrt
from rrt.checkpoints import safetensors
from rrt.checkpoints.save_hf import hf_tensors
from rrt.families.registry import family_for
from rrt.models import lm_head, transformer
from rrt.models.count import count_params

D, F, H, G, L, E, V = 24, 14, 4, 2, 3, 5, 61
CONFIG = {
  'architectures': ['Grok1ModelForCausalLM'],
  'auto_map': {'AutoModelForCausalLM': 'modeling_grok1.Grok1ModelForCausalLM'},
  'model_type': 'grok-1',
  'vocab_size': V,
  'hidden_size': D,
  'intermediate_size': F,
  'num_hidden_layers': L,
  'num_attention_heads': H,
  'num_key_value_heads': G,
  'num_experts': E,
  'num_experts_per_tok': 2,
  'max_attn_value': 3.0,
  'attn_output_multiplier': 0.4,
  'embedding_multiplier_scale': 24**0.5,
  'output_multiplier_scale': 3**-0.5,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
}


def weights(seed=0):
  """Tensors under the names of the port to PyTorch; no norm is trivial."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
  gain = lambda: (1 + 0.3 * rng.normal(size=D)).astype(np.float32)
  found = {'model.embed_tokens.weight': draw(V, D), 'model.norm.scale': 5 * gain()}
  for i in range(L):
    p = f'model.layers.{i}.'
    for name, rows in (('q', D), ('k', D * G // H), ('v', D * G // H), ('o', D)):
      found[f'{p}attn.{name}_proj.weight'] = draw(rows, D)
    for name in ('rms_norm', 'rms_norm_1', 'rms_norm_2', 'rms_norm_3'):
      found[f'{p}{name}.scale'] = gain()
    found[f'{p}moe_block.gate.weight'] = draw(E, D)
    for e in range(E):
      expert = f'{p}moe_block.experts.{e}.'
      found[f'{expert}linear.weight'], found[f'{expert}linear_v.weight'] = draw(F, D), draw(F, D)
      found[f'{expert}linear_1.weight'] = draw(D, F)
  return found


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / 'grok'
  path.mkdir()
  safetensors.write(path / 'model.safetensors', weights(), {'format': 'pt'})
  (path / 'config.json').write_text(json.dumps(CONFIG))
  return path


def softmax(z):
  p = np.exp(z - z.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def gelu(z):
  return 0.5 * z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))


def rotate(x):
  """Of [L, heads, Dh]."""
  half = x.shape[-1] // 2
  angle = np.arange(x.shape[0])[:, None] * 1e4 ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def reference(tokens_L):
  """Logits of one text, [L, V]."""
  w = {k: v.astype(np.float64) for k, v in weights().items()}

  def norm(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f'{name}.scale']

  table = w['model.embed_tokens.weight']
  h = table[tokens_L] * CONFIG['embedding_multiplier_scale']
  length = len(h)
  for i in range(L):
    p = f'model.layers.{i}.'
    x = norm(h, p + 'rms_norm')
    q, k, v = ((x @ w[f'{p}attn.{n}_proj.weight'].T).reshape(length, -1, D // H) for n in 'qkv')
    k, v = (np.repeat(t, H // G, axis=1) for t in (rotate(k), v))
    z = np.einsum('lhd,mhd->hlm', rotate(q), k) * CONFIG['attn_output_multiplier']
    z = CONFIG['max_attn_value'] * np.tanh(z / CONFIG['max_attn_value'])
    z = np.where(np.tril(np.ones((length, length), bool)), z, -np.inf)
    x = np.einsum('hlm,mhd->lhd', softmax(z), v).reshape(length, D)
    h = h + norm(x @ w[f'{p}attn.o_proj.weight'].T, p + 'rms_norm_1')
    x = norm(h, p + 'rms_norm_2')
    gate = softmax(x @ w[f'{p}moe_block.gate.weight'].T)
    y = np.zeros_like(x)
    for t in range(length):
      for e in np.argsort(-gate[t])[:2]:
        one = lambda name, e=e, p=p: w[f'{p}moe_block.experts.{e}.{name}.weight'].T
        hidden = gelu(x[t] @ one('linear')) * (x[t] @ one('linear_v'))
        y[t] += gate[t, e] * (hidden @ one('linear_1'))
    h = h + norm(y, p + 'rms_norm_3')
  return norm(h, 'model.norm') @ table.T * CONFIG['output_multiplier_scale']


def logits(model, tokens_BxL):
  params = jax.tree.map(np.asarray, model.params)
  hidden = transformer.forward(model.config, params, tokens_BxL).hidden_BxLxD
  return np.asarray(lm_head.logits(model.config, params, hidden))


def test_logits_are_those_of_the_formulas(folder):
  tokens_L = np.random.default_rng(1).integers(0, V, 19)
  wanted = reference(tokens_L)
  assert np.abs(wanted).max() > 1
  found = logits(rrt.load(folder), tokens_L[None])[0]
  np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_an_export_is_the_same_model(folder, tmp_path):
  model = rrt.load(folder)
  rrt.save_hf(model, tmp_path / 'out')
  again = rrt.load(tmp_path / 'out')
  tokens_BxL = np.random.default_rng(2).integers(0, V, (2, 11))
  np.testing.assert_array_equal(logits(again, tokens_BxL), logits(model, tokens_BxL))
  theirs, ours = weights(), hf_tensors(model)
  assert theirs.keys() == ours.keys()
  # The multiplier of the logits lies in the last norm.
  for name in theirs.keys() - {'model.norm.scale'}:
    np.testing.assert_array_equal(theirs[name], ours[name])


def test_the_published_model_has_its_count_of_parameters():
  large = dict(vocab_size=131_072, hidden_size=6144, intermediate_size=32_768)
  large |= dict(num_hidden_layers=64, num_attention_heads=48, num_key_value_heads=8)
  large |= dict(num_experts=8, embedding_multiplier_scale=78.38367176906169)
  config = family_for('grok-1').from_hf(CONFIG | large)
  assert count_params(config).unique == 315_684_820_992


@pytest.mark.parametrize(
  'fields, match',
  [
    ({'embedding_multiplier_scale': 2.0}, 'embedding_multiplier_scale=2.0 .* square root'),
    ({'num_experts_per_tok': 6}, 'num_experts_per_tok=6 must be no more than num_experts=5'),
    ({'num_experts': 4}, '9 unexpected'),
  ],
)
def test_what_does_not_fit_is_refused(folder, fields, match):
  (folder / 'config.json').write_text(json.dumps(CONFIG | fields))
  with pytest.raises(rrt.InputError, match=match):
    rrt.load(folder)
