"""Ouro, a natively looped model, against its formulas in torch.

transformers has no such model, and its published code needs a download: the reference is
written from the paper (arXiv 2510.25741) and the published configuration.
"""

import json

import jax
import numpy as np
import pytest

import rrt
from rrt.checkpoints import safetensors
from rrt.evals import every_loop
from rrt.exits import gate as gate_lib
from rrt.models import lm_head, transformer
from rrt.models.init import init_params
from rrt.tree import flatten
from tests.models.quantized_test import TOKENS_BxL
from tests.parity.hugging_face_test import random_tokens

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')

CONFIG = {
  'architectures': ['OuroForCausalLM'],
  'model_type': 'ouro',
  'auto_map': {'AutoModelForCausalLM': 'modeling_ouro.OuroForCausalLM'},
  'vocab_size': 61,
  'hidden_size': 24,
  'intermediate_size': 28,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'head_dim': 6,
  'hidden_act': 'silu',
  'max_position_embeddings': 64,
  'max_window_layers': 28,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1000.0,
  'rope_scaling': None,
  'sliding_window': None,
  'use_sliding_window': False,
  'layer_types': ['full_attention'] * 3,
  'tie_word_embeddings': False,
  'total_ut_steps': 4,
  'early_exit_threshold': 1.0,
}
D, F, H, L, R = 24, 28, 4, 3, 4


def weights(seed=0):
  """Tensors under the published names; norms and the gate are not trivial."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
  gain = lambda: (1 + 0.3 * rng.normal(size=D)).astype(np.float32)
  found = {'model.embed_tokens.weight': draw(61, D) * 5, 'lm_head.weight': draw(61, D) * 2}
  found['model.norm.weight'] = gain()
  found['model.early_exit_gate.weight'] = draw(1, D)
  found['model.early_exit_gate.bias'] = np.array([-0.7], np.float32)
  for i in range(L):
    p = f'model.layers.{i}.'
    for name in ('q', 'k', 'v', 'o'):
      found[f'{p}self_attn.{name}_proj.weight'] = draw(D, D)
    found[f'{p}mlp.gate_proj.weight'], found[f'{p}mlp.up_proj.weight'] = draw(F, D), draw(F, D)
    found[f'{p}mlp.down_proj.weight'] = draw(D, F)
    for name in ('input_layernorm', 'post_attention_layernorm'):
      found[f'{p}{name}.weight'], found[f'{p}{name}_2.weight'] = gain(), gain()
  return found


def write(folder, **fields):
  folder.mkdir()
  safetensors.write(folder / 'model.safetensors', weights(), {'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(CONFIG | fields))
  return folder


def reference(tokens_L, steps=R):
  """(logits [R, L, V], exit probabilities [R, L]) of one text."""
  w = {k: torch.from_numpy(v) for k, v in weights().items()}

  def norm(x, name):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f'{name}.weight']

  def rotate(x):  # [L, H, Dh]
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None] * 1000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  h = w['model.embed_tokens.weight'][torch.as_tensor(tokens_L)]
  length = h.shape[0]
  causal = torch.ones(length, length, dtype=torch.bool).tril()
  logits, hazards = [], []
  for _ in range(steps):
    for i in range(L):
      p = f'model.layers.{i}.'
      x = norm(h, p + 'input_layernorm')
      q, k, v = (
        (x @ w[f'{p}self_attn.{n}_proj.weight'].T).view(length, H, -1) for n in ('q', 'k', 'v')
      )
      att = torch.einsum('lhd,mhd->hlm', rotate(q), rotate(k)) * (D // H) ** -0.5
      att = att.masked_fill(~causal, -torch.inf).softmax(-1)
      x = torch.einsum('hlm,mhd->lhd', att, v).reshape(length, D)
      h = h + norm(x @ w[f'{p}self_attn.o_proj.weight'].T, p + 'input_layernorm_2')
      x = norm(h, p + 'post_attention_layernorm')
      x = torch.nn.functional.silu(x @ w[p + 'mlp.gate_proj.weight'].T) * (
        x @ w[p + 'mlp.up_proj.weight'].T
      )
      h = h + norm(x @ w[p + 'mlp.down_proj.weight'].T, p + 'post_attention_layernorm_2')
    h = norm(h, 'model.norm')
    logits.append(h @ w['lm_head.weight'].T)
    gate = h @ w['model.early_exit_gate.weight'].T + w['model.early_exit_gate.bias']
    hazards.append(torch.sigmoid(gate)[:, 0])
  stay, exits = torch.ones(length), []
  for hazard in hazards[:-1]:
    exits.append(stay * hazard)
    stay = stay * (1 - hazard)
  return torch.stack(logits).numpy(), torch.stack([*exits, stay]).numpy()


def test_logits_of_every_loop(tmp_path):
  model = rrt.load(write(tmp_path / 'ouro'))
  c = model.config
  assert (c.loops, c.block_layers, c.depth, c.relax) == (4, 3, 12, ())
  (tokens,) = random_tokens(c, rows=1)
  wanted, _ = reference(tokens)
  for scan in (True, False):
    out = transformer.forward(c, model.params, tokens[None], return_exits=True, scan=scan)
    found = np.asarray(lm_head.logits(c, model.params, out.exits_RxBxLxD))[:, 0]
    assert np.abs(found - wanted).max() < 1e-4
  for loops in (1, 3):
    found = rrt.score(model, tokens.tolist(), context=21, loops=loops).nll_nats
    log_p = torch.log_softmax(torch.from_numpy(wanted[loops - 1]), -1).numpy()
    assert found == pytest.approx(-log_p[np.arange(20), tokens[1:]].mean(), abs=1e-4)


def test_parameters_and_shapes(tmp_path):
  model = rrt.load(write(tmp_path / 'ouro'))
  count = sum(t.size for t in weights().values())
  assert rrt.count_params(model.config).unique == count
  shapes = jax.eval_shape(lambda key: init_params(model.config, key), jax.random.key(0))
  assert {k: v.shape for k, v in flatten(shapes).items()} == {
    k: v.shape for k, v in flatten(model.params).items()
  }


def test_saved_and_written_back(tmp_path):
  model = rrt.load(write(tmp_path / 'ouro', early_exit_threshold=0.6))
  rrt.save(model, tmp_path / 'native')
  rrt.save_hf(rrt.load(tmp_path / 'native'), tmp_path / 'out')
  file = safetensors.SafetensorsFile(tmp_path / 'out/model.safetensors')
  assert {k: i.shape for k, i in file.infos.items()} == {k: v.shape for k, v in weights().items()}
  again = rrt.load(tmp_path / 'out')
  assert again.config == model.config
  assert gate_lib.stored(again).threshold == 0.6
  for path, leaf in flatten(model.params).items():
    np.testing.assert_array_equal(leaf, flatten(again.params)[path])


def test_greedy_texts_at_full_depth(tmp_path):
  model = rrt.load(write(tmp_path / 'ouro'))
  prompts = random_tokens(model.config, rows=3, length=7).tolist()
  wanted = []
  for prompt in prompts:
    text = list(prompt)
    for _ in range(12):
      text.append(int(reference(text)[0][-1, -1].argmax()))
    wanted.append(text[7:])
  written = rrt.complete(model, prompts, max_new_tokens=12, ignore_eos=True)
  assert [w.tokens for w in written] == wanted
  for options in ({}, {'lossless': True}, {'gate': 'stored', 'kv': 'propagate'}):
    engine = rrt.Engine(model, slots=2, page=8, steps=3, **options)
    requests = [rrt.Request.of(p, 12, ignore_eos=True) for p in prompts]
    assert [r.tokens for r in engine.run(requests)] == wanted


@pytest.mark.parametrize('threshold', [0.4, 0.7, 0.9])
def test_its_own_gate_exits_as_published(threshold, tmp_path):
  """All loops' keys and values are computed, and the exit's logits are read."""
  model = rrt.load(write(tmp_path / 'ouro', early_exit_threshold=threshold))
  prompt = random_tokens(model.config, rows=1, length=5)[0].tolist()
  text, depths = list(prompt), []
  for _ in range(16):
    logits, exits = reference(text)
    depth = int(np.argmax(np.append(exits[:-1, -1].cumsum() >= threshold, True)))
    depths.append(depth + 1)
    text.append(int(logits[depth, -1].argmax()))
  engine = rrt.Engine(model, slots=2, page=8, steps=2, gate='stored', kv='exact_fill')
  (found,) = engine.run([rrt.Request.of(prompt, 16, ignore_eos=True)])
  assert (found.tokens, found.loops) == (text[5:], depths)
  assert len({*depths}) > 1


def test_exits_by_threshold_are_evaluated(tmp_path):
  from rrt.evals import depth

  model = rrt.load(write(tmp_path / 'ouro'))
  arrays = gate_lib.stored(model).arrays
  static = every_loop.read_static(model, [random_tokens(model.config, rows=1)[0].tolist()], arrays)
  _, exits = reference(random_tokens(model.config, rows=1)[0])
  found = np.asarray(static.scores['hazard'])[:, 0, 1:21]
  assert np.abs(found - exits[:-1].cumsum(0)[:, 1:21]).max() < 1e-5
  points = depth.curve(model, static, ['hazard'], arrays, shares=(0.5,))
  assert 1 < points[0].mean_loops < 4


def test_what_does_not_fit_is_refused(tmp_path):
  model = rrt.load(write(tmp_path / 'ouro'))
  with pytest.raises(rrt.InputError, match='already recursive'):
    rrt.to_recursive(model, loops=2, init='average')
  with pytest.raises(rrt.InputError, match='a norm ends every loop'):
    rrt.to_untied(model)
  with pytest.raises(rrt.InputError, match='a norm ends every loop'):
    rrt.save_peft(model, tmp_path / 'out')
  folder = tmp_path / 'huginn'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({'model_type': 'huginn_raven'}))
  with pytest.raises(rrt.InputError, match=r"'huginn_raven' is not supported: .*adapter"):
    rrt.load(folder)


def test_quantized(tmp_path):
  model = rrt.load(write(tmp_path / 'ouro'))
  small = rrt.quantize(model, 'int8')
  logits = lambda m: np.asarray(
    lm_head.logits(
      m.config, m.params, transformer.forward(m.config, m.params, TOKENS_BxL).hidden_BxLxD
    )
  )
  assert 1e-4 < np.abs(logits(small) - logits(model)).max() < 0.5
