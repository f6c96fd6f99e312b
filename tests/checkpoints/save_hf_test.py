"""Export: the untied model computes the same function, and round trips."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.checkpoints import safetensors
from rrt.checkpoints import save_hf as save_hf_lib
from rrt.checkpoints.load import load
from rrt.checkpoints.save_hf import save_hf
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models import lm_head, transformer
from rrt.models.init import init_params
from rrt.models.untie import to_untied
from rrt.relax.lora import Lora
from rrt.tree import flatten

GOLDEN = Path(__file__).parents[1] / 'golden'
NAMES = ('llama3', 'mistral', 'gemma', 'gemma3')


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  out = transformer.forward(config, params, tokens)
  return lm_head.logits(config, params, out.hidden_BxLxD, jnp.float32)


def logits(model, tokens):
  return np.asarray(_logits(model.config, model.params, tokens))


def recursive(name, **recursion):
  """A random recursive model with the shape of a golden one, all leaves set."""
  config = family_config(name).with_recursion(**recursion)
  shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda w: rng.normal(0, 0.3, w.shape).astype(np.float32), shapes)
  clear_padding(config, params)
  return LanguageModel(config, params)


def clear_padding(config, params):
  """Zeros behind a position's own rank, as conversion leaves them."""
  layer = params['block']['layers']
  for part in ('attn', 'mlp'):
    for name, leaves in layer[part].items():
      if 'lora_a' in leaves:
        table = config.relax[0].table(name, config.loops, config.block_layers)
        for (loop, n), rank in np.ndenumerate(table):
          leaves['lora_a'][n, loop, :, rank:] = 0
          leaves['lora_b'][n, loop, rank:] = 0


def family_config(name):
  config = load(GOLDEN / name).config
  if name == 'llama3':  # Six layers divide in more ways than four.
    config = dataclasses.replace(config, block_layers=6)
  return config


@pytest.mark.parametrize('name', ['llama3', 'gemma3'])
@pytest.mark.parametrize('order, loop_norms', [('cycle', False), ('sequence', True)])
def test_untied_computes_the_same(name, order, loop_norms):
  lora = Lora(q=3, k=((1, 2), (0, 3)), v=2, o=4, gate=3, up=((0, 5), (5, 0)), alpha=7.0)
  model = recursive(
    name, prelude=1, block=2, loops=2, coda=1, order=order, loop_norms=loop_norms, relax=(lora,)
  )
  untied = to_untied(model)
  assert untied.config.depth == untied.config.block_layers == 6
  assert untied.config.relax == () and untied.config.loops == 1
  tokens = np.random.default_rng(2).integers(0, 61, (2, 20))
  np.testing.assert_allclose(logits(untied, tokens), logits(model, tokens), atol=1e-4, rtol=0)


def test_untied_model_is_left_as_it_is():
  model = load(GOLDEN / 'llama3')
  assert to_untied(model) is model


@pytest.mark.parametrize('name', NAMES)
def test_round_trip_is_bit_exact(name, tmp_path):
  model = load(GOLDEN / name)
  out = save_hf(model, tmp_path / 'out')
  ours = safetensors.SafetensorsFile(out / 'model.safetensors')
  theirs = safetensors.SafetensorsFile(GOLDEN / name / 'model.safetensors')
  assert ours.infos == theirs.infos
  for tensor in theirs.infos:
    for (_, a), (_, b) in zip(ours.chunks(tensor), theirs.chunks(tensor)):
      np.testing.assert_array_equal(a, b)
  again = load(out)
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_bfloat16_round_trip(tmp_path):
  model = load(GOLDEN / 'gemma3', dtype='bfloat16')
  out = save_hf(model, tmp_path / 'out')
  assert json.loads((out / 'config.json').read_text())['dtype'] == 'bfloat16'
  again = load(out, dtype='bfloat16')
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_shards_have_an_index_and_load(tmp_path, monkeypatch):
  monkeypatch.setattr(save_hf_lib, 'SHARD_BYTES', 20_000)
  model = load(GOLDEN / 'llama3')
  out = save_hf(model, tmp_path / 'out')
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  assert len(set(index['weight_map'].values())) > 2
  assert not (out / 'model.safetensors').exists()
  assert index['metadata']['total_size'] == sum(
    leaf.nbytes for leaf in flatten(model.params).values()
  )
  again = load(out)
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_an_export_is_replaced_but_nothing_else(tmp_path):
  model = load(GOLDEN / 'gemma')
  out = save_hf(model, tmp_path / 'out')
  save_hf(model, out)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes.txt').write_text('keep me')
  with pytest.raises(InputError, match='left alone'):
    save_hf(model, tmp_path / 'mine')
  assert (tmp_path / 'mine' / 'notes.txt').read_text() == 'keep me'
  with pytest.raises(InputError, match='left alone'):
    save_hf(model, GOLDEN / 'gemma')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'out']
