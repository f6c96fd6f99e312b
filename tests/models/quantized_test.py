"""Models with quantized weights: run, saved, trained around, exported."""

import dataclasses

import jax
import numpy as np
import pytest

import rrt
from rrt import relax
from rrt.checkpoints.load import load, save
from rrt.infer.engine.engine import Engine
from rrt.infer.engine.request import Request
from rrt.infer.generate import complete
from rrt.models.count import count_params
from rrt.models.init import init_params
from rrt.models.quantized import dequantized, quantize
from rrt.tree import flatten
from tests import runs
from tests.convert import tiny

pytest.importorskip('qwix')
KINDS = ('int8', 'int4', 'nf4')
TOKENS_BxL = tiny.tokens(60, seed=4).reshape(2, 30)


def recursive(family='llama', **options):
  parent = tiny.parent(family, layers=6)
  options = {'rank': 3, 'init': 'average'} | options
  return rrt.to_recursive(parent, prelude=1, loops=2, coda=1, progress=None, **options)[0]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('family', ['llama', 'gemma3', 'qwen2'])
def test_codes_compute_what_they_stand_for(kind, family):
  child = quantize(recursive(family), kind)
  same = dequantized(child)
  assert child.config.weights == kind and same.config.weights == 'float'
  found, wanted = tiny.logits(child, TOKENS_BxL), tiny.logits(same, TOKENS_BxL)
  np.testing.assert_array_equal(found, wanted)
  assert np.abs(wanted - tiny.logits(recursive(family), TOKENS_BxL)).max() > 1e-3


@pytest.mark.parametrize('kind', KINDS)
def test_arrays_are_those_that_the_configuration_describes(kind):
  child = quantize(recursive(), kind)
  shapes = jax.eval_shape(lambda key: init_params(child.config, key), jax.random.key(0))
  described = {k: (v.shape, v.dtype) for k, v in flatten(shapes).items()}
  assert {k: (v.shape, v.dtype) for k, v in flatten(child.params).items()} == described
  assert f'{count_params(child.config).unique:,}' in repr(child)


@pytest.mark.parametrize('kind', KINDS)
def test_saved_loaded_and_smaller(kind, tmp_path):
  child = quantize(recursive(), kind)
  save(child, tmp_path / 'child')
  for dtype in ('float32', 'bfloat16'):
    again = load(tmp_path / 'child', dtype=dtype)
    for path, leaf in flatten(again.params).items():
      of_codes = path.endswith(('/step', *(f'/{k}' for k in KINDS)))
      assert leaf.dtype == (flatten(child.params)[path].dtype if of_codes else dtype), path
      if of_codes:
        np.testing.assert_array_equal(leaf, flatten(child.params)[path])
  save(recursive(), tmp_path / 'whole')
  size = lambda name: (tmp_path / name / 'model.safetensors').stat().st_size
  assert size('child') < 0.8 * size('whole')


@pytest.mark.parametrize('kind', KINDS)
def test_decoded_and_served_as_what_they_stand_for(kind):
  child = quantize(recursive(), kind)
  prompts = tiny.tokens(27, seed=2).reshape(3, 9).tolist()
  wanted = [c.tokens for c in complete(dequantized(child), prompts, max_new_tokens=8)]
  assert [c.tokens for c in complete(child, prompts, max_new_tokens=8)] == wanted
  engine = Engine(child, slots=2, page=8, steps=3)
  found = engine.run([Request.of(p, 8, ignore_eos=True) for p in prompts])
  assert [r.tokens for r in found] == wanted


def test_training_leaves_codes_bit_for_bit(tmp_path):
  text = runs.write_text(tmp_path / 'text.jsonl')
  child = quantize(
    dataclasses.replace(runs.child(), params=jax.tree.map(np.array, runs.child().params)), 'int4'
  )
  from rrt.train.loop import uptrain

  fields = runs.recipe(text)
  fields['optimizer'] = fields['optimizer'] | {'train': 'relaxations'}
  result = uptrain(runs.parent(), child, fields)
  before, after = flatten(child.params), flatten(result.model.params)
  assert before.keys() == after.keys()
  moved = [k for k in before if not np.array_equal(before[k], after[k])]
  assert moved and all('lora' in k or k.endswith('scale') for k in moved)
  with pytest.raises(rrt.InputError, match='quantized'):
    uptrain(runs.parent(), child, runs.recipe(text))


def test_exports_are_dense(tmp_path):
  child = quantize(recursive(), 'int8')
  rrt.save_hf(child, tmp_path / 'out')
  wanted = tiny.logits(dequantized(child), TOKENS_BxL)
  assert np.abs(tiny.logits(load(tmp_path / 'out'), TOKENS_BxL) - wanted).max() < 1e-4


def test_what_is_quantized_is_not_quantized_or_converted_again():
  small = quantize(tiny.parent(), 'int8')
  with pytest.raises(rrt.InputError, match='already'):
    quantize(small, 'int4')
  with pytest.raises(rrt.InputError, match='rounded from'):
    rrt.to_recursive(small, loops=2, init='average')
  with pytest.raises(rrt.InputError, match="weights='int3'"):
    quantize(tiny.parent(), 'int3')
  with pytest.raises(rrt.InputError, match='must be even'):
    quantize(tiny.parent(d_ff=21), 'nf4')


# ---- fitted to what rounding left -------------------------------------------


def error_of(model, parent):
  return float(np.mean((tiny.logits(model, TOKENS_BxL) - tiny.logits(parent, TOKENS_BxL)) ** 2))


@pytest.mark.parametrize('kind', ['int4', 'nf4'])
@pytest.mark.parametrize('init', ['average', 'calibrated'])
def test_fitted_beats_rounded_afterwards(kind, init):
  parent = tiny.parent('llama', layers=6)
  text = {'calibration': tiny.tokens(4000)} if init == 'calibrated' else {}
  shape = dict(prelude=1, loops=2, coda=1, rank=4, init=init, progress=None, **text)
  after = quantize(rrt.to_recursive(parent, **shape)[0], kind)
  fitted, report = rrt.to_recursive(parent, weights=kind, **shape)
  assert fitted.config == after.config
  assert report.params_counted == count_params(fitted.config).unique
  assert error_of(fitted, parent) < 0.9 * error_of(after, parent)


def test_turns_never_keep_a_worse_weight():
  from rrt.convert.plan import ConvertConfig, plan
  from rrt.convert.rounding import round_shared
  from rrt.convert.weights import ChildWeights, energy

  parent = tiny.parent('llama', layers=6)
  convert = ConvertConfig(loops=2, rank=3, weights='nf4')
  config = plan(parent.config, convert)
  weights = ChildWeights(config, parent.params['block']['layers'], 'average', 0, True)
  ws = np.stack([parent.params['block']['layers']['mlp']['up']['kernel'][d] for d in (0, 3)])
  weights.shared['up'][0] = ws.mean(0)
  errors = round_shared(weights, 'up', 0, None, ws)
  merged = [weights.fit('up', (r, 0), ws[r]) for r in range(2)]
  kept = sum(energy(ws[r] - merged[r], None) for r in range(2))
  assert kept == pytest.approx(min(errors), rel=1e-5)
  assert min(errors) < errors[0]


def test_gains_stand_behind_rounded_weights():
  child = recursive(relax=(relax.Gain(),), weights='int8')
  parent = tiny.parent('llama', layers=6)
  assert error_of(child, parent) < 1.2 * error_of(recursive(relax=(relax.Gain(),)), parent)


def test_one_loop_is_the_parent_rounded():
  parent = tiny.parent('llama', layers=4)
  child, report = rrt.to_recursive(parent, loops=1, init='average', weights='int8', progress=None)
  assert not report.exact
  np.testing.assert_array_equal(
    tiny.logits(child, TOKENS_BxL), tiny.logits(quantize(parent, 'int8'), TOKENS_BxL)
  )


def test_an_int8_cache_is_half_a_bfloat16_one_and_changes_little():
  child = recursive('gemma3')
  prompts = tiny.tokens(27, seed=2).reshape(3, 9).tolist()
  runs_of = {}
  for kv_dtype in (None, 'int8'):
    engine = Engine(child, slots=2, page=8, steps=3, kv_dtype=kv_dtype)
    found = engine.run([Request.of(p, 24, ignore_eos=True) for p in prompts])
    runs_of[kv_dtype] = [r.tokens for r in found]
  same = [a == b for x, y in zip(*runs_of.values(), strict=True) for a, b in zip(x, y, strict=True)]
  assert np.mean(same) > 0.8
