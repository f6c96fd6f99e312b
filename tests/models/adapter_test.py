"""Task adapters: without effect at first, trained alone, saved alone, merged."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import rrt
from rrt import relax
from rrt.checkpoints.load import load, save
from rrt.infer.engine.engine import Engine
from rrt.infer.engine.request import Request
from rrt.infer.generate import complete
from rrt.models.adapter import adapter_leaves, merge_adapter, with_adapter, without_adapter
from rrt.models.quantized import quantize
from rrt.tree import flatten
from tests import command, runs
from tests.convert import tiny

TOKENS_BxL = tiny.tokens(60, seed=4).reshape(2, 30)
KINDS = ('rank=3', 'rank=3,by_loop=true,alpha=6', 'rank=2,components=all')


def recursive(**options):
  parent = tiny.parent('llama_biases', layers=6)
  options = {'rank': {'q': 2, 'v': (1, 3), 'down': 2}, 'alpha': 5.0, 'init': 'average'} | options
  return rrt.to_recursive(parent, prelude=1, loops=2, coda=1, progress=None, **options)[0]


def tuned(words, model=None):
  """A model whose adapter has an effect."""
  model = with_adapter(recursive() if model is None else model, words, seed=1)
  rng = np.random.default_rng(7)
  params = model.params
  for path, leaf in adapter_leaves(model).items():
    tree = params
    *parents, name = path.split('/')
    for key in parents:
      tree = tree[key]
    tree[name] = (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
  return model


def gap(a, b):
  return float(np.abs(tiny.logits(a, TOKENS_BxL) - tiny.logits(b, TOKENS_BxL)).max())


@pytest.mark.parametrize('words', KINDS)
def test_a_new_adapter_has_no_effect_and_comes_off(words):
  child = recursive()
  model = with_adapter(child, words)
  assert gap(model, child) == 0
  assert rrt.count_params(model.config).unique > rrt.count_params(child.config).unique
  bare = without_adapter(tuned(words))
  assert bare.config == child.config and gap(bare, child) == 0
  assert gap(tuned(words), child) > 0.1


@pytest.mark.parametrize('words', KINDS)
def test_merged_it_computes_the_same(words):
  model = tuned(words)
  merged = merge_adapter(model)
  assert gap(merged, model) < 1e-4
  assert 'adapter' not in [r.kind for r in merged.config.relax]
  if 'by_loop' not in words:
    assert merged.config == recursive().config
  assert gap(rrt.to_untied(model), model) < 1e-4


def test_an_adapter_by_loop_becomes_the_low_rank_terms():
  bare = recursive(rank=0, alpha=None)
  model = tuned('rank=2,by_loop=true,components=q+up', bare)
  merged = merge_adapter(model)
  assert [r.kind for r in merged.config.relax] == ['lora']
  assert gap(merged, model) < 1e-4


def test_what_cannot_be_merged():
  gains = recursive(relax=('gain:start=0.5',), rank=0, alpha=None, init='lower')
  with pytest.raises(rrt.InputError, match="'gain' stands between"):
    merge_adapter(tuned('rank=2,by_loop=true', gains))
  assert gap(merge_adapter(tuned('rank=2', gains)), tuned('rank=2', gains)) < 1e-4
  pytest.importorskip('qwix')
  with pytest.raises(rrt.InputError, match='into codes'):
    merge_adapter(tuned('rank=2', quantize(recursive(), 'int8')))


@pytest.mark.parametrize('words', KINDS[:2])
def test_saved_alone_and_loaded_beside_its_model(words, tmp_path):
  save(recursive(), tmp_path / 'child')
  model = tuned(words, load(tmp_path / 'child'))
  rrt.save_adapter(model, tmp_path / 'sums')
  assert (tmp_path / 'sums/adapter.safetensors').stat().st_size < 0.3 * (
    tmp_path / 'child/model.safetensors'
  ).stat().st_size
  again = load(tmp_path / 'child', adapter=tmp_path / 'sums')
  assert again.config == model.config and gap(again, model) == 0
  half = load(tmp_path / 'child', adapter=tmp_path / 'sums', dtype='bfloat16')
  assert {str(v.dtype) for v in adapter_leaves(half).values()} == {'bfloat16'}
  prompts = tiny.tokens(18, seed=2).reshape(2, 9).tolist()
  wanted = [c.tokens for c in complete(model, prompts, max_new_tokens=8)]
  assert wanted != [c.tokens for c in complete(recursive(), prompts, max_new_tokens=8)]
  engine = Engine(again, slots=2, page=8, steps=3)
  found = engine.run([Request.of(p, 8, ignore_eos=True) for p in prompts])
  assert [r.tokens for r in found] == wanted


def test_an_adapter_of_another_model_or_a_damaged_one(tmp_path):
  child = recursive()
  rrt.save_adapter(tuned('rank=2', child), tmp_path / 'sums')
  save(recursive(init='lower'), tmp_path / 'shape')
  with pytest.raises(rrt.InputError, match='norms differs'):
    other = jax.tree.map(np.array, child.params)
    other['final_norm']['scale'] = other['final_norm']['scale'] + 0.5
    save(dataclasses.replace(child, params=other), tmp_path / 'norms')
    load(tmp_path / 'norms', adapter=tmp_path / 'sums')
  save(recursive(rank=1), tmp_path / 'ranks')
  with pytest.raises(rrt.InputError, match='shape differs'):
    load(tmp_path / 'ranks', adapter=tmp_path / 'sums')
  with pytest.raises(rrt.InputError, match=r'has no adapter\.json'):
    load(tmp_path / 'ranks', adapter=tmp_path)
  with pytest.raises(rrt.InputError, match='has no adapter'):
    rrt.save_adapter(child, tmp_path / 'none')
  save(child, tmp_path / 'child')
  manifest = tmp_path / 'sums/adapter.json'
  fields = json.loads(manifest.read_text())
  fields['tensors'] = {k: v + 1 for k, v in fields['tensors'].items()}
  manifest.write_text(json.dumps(fields))
  with pytest.raises(rrt.InputError, match='checksum'):
    load(tmp_path / 'child', adapter=tmp_path / 'sums')


@pytest.mark.parametrize('weights', ['float', 'int8'])
def test_training_moves_the_adapter_alone(weights, tmp_path):
  from rrt.train.loop import uptrain

  text = runs.write_text(tmp_path / 'text.jsonl')
  child = runs.child()
  if weights != 'float':
    pytest.importorskip('qwix')
    child = quantize(child, weights)
  model = with_adapter(child, 'rank=2,by_loop=true')
  fields = runs.recipe(text, adapter='rank=2,by_loop=true')
  fields['optimizer'] = fields['optimizer'] | {'learning_rate': 0.1}
  fields['loss'] = fields['loss'] | {'distillation': 0.0, 'cross_entropy': 1.0}
  result = uptrain(None, model, fields)
  before, after = flatten(model.params), flatten(result.model.params)
  moved = {k for k in before if not np.array_equal(before[k], after[k])}
  assert moved and moved <= {*adapter_leaves(model)}
  losses = [r['train/loss'] for r in result.history if 'train/loss' in r]
  assert losses[-1] < losses[0]


def test_a_run_writes_its_adapter(tmp_path):
  file = runs.write_experiment(tmp_path)
  flags = ('--config.adapter=rank=2', '--config.steps=3', '--config.optimizer.warmup_steps=1')
  printed, _ = runs.finish(runs.start(file, tmp_path / 'run', *flags))
  assert 'adapter alone' in printed
  model = load(tmp_path / 'child', adapter=tmp_path / 'run/adapter')
  assert gap_of_params(model, load(tmp_path / 'run')) == 0
  out = tmp_path / 'out'
  for flags in (
    [f'--model={tmp_path / "run"}'],
    [f'--model={tmp_path / "child"}', f'--adapter={tmp_path / "run/adapter"}'],
  ):
    status, printed, error = command.run('export', *flags, '--format=hf-tied', f'--out={out}')
    assert status == 0, error
    assert command.final(printed)['format'] == 'hf-tied'


def gap_of_params(a, b):
  a, b = flatten(a.params), flatten(b.params)
  assert a.keys() == b.keys()
  return max(float(np.abs(a[k] - b[k]).max()) for k in a)


def test_words_that_make_no_adapter():
  for words, why in (
    ('rank=0', 'adapter.rank=0'),
    ('ranks=2', "no field 'ranks'"),
    ('rank=2,components=q+z', "names 'z'"),
    ('rank=2,by_loop=3', 'by_loop'),
  ):
    with pytest.raises(rrt.InputError, match=why):
      with_adapter(recursive(), words)
  assert relax.Adapter(components='all').components[0] == 'q'
