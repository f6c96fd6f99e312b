"""Deleted layers, and loops that start where deletion ends."""

import json

import jax
import numpy as np
import pytest

from rrt.checkpoints.load import load, save
from rrt.convert import drop
from rrt.convert.plan import ConvertConfig, plan
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.models.count import count_params
from rrt.models.untie import to_untied
from rrt.relax.gain import Gain
from tests.convert import tiny

FAMILIES = ('llama', 'llama_biases', 'gemma3', 'olmo2', 'gpt_neox')
TEXT = tiny.tokens(700)
TOKENS_BxL = tiny.tokens(60, seed=4).reshape(2, 30)


def convert(parent, **arguments):
  return to_recursive(parent, calibration=TEXT, calibration_tokens=512, **arguments)


def cut(parent, dropped):
  """The parent without some layers, by hand."""
  kept = [d for d in range(parent.config.depth) if d not in dropped]
  layers = jax.tree.map(lambda t: t[np.array(kept)], parent.params['block']['layers'])
  config = drop.config_without(parent.config, tuple(dropped))
  return type(parent)(config, {**parent.params, 'block': {'layers': layers}})


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('drops', ['', '2-3'], ids=['whole parent', 'deleted'])
def test_added_loops_change_nothing_at_the_start(family, drops):
  """The child is the model without them, to a gain's multiplication by 0."""
  parent = tiny.parent(family)
  depth = parent.config.depth - (2 if drops else 0)
  shape = dict(prelude=1, block=1, coda=depth - 2, loops=3)
  relax = ('gain:start=0,components=o+down',)
  child, report = convert(parent, drop=drops, add_loops=True, relax=relax, rank=2, **shape)
  vanilla, _ = convert(parent, drop=drops, loops=1)
  assert child.config.depth == depth + 2
  assert report.shape == f'1 + 1 x 3 + {depth - 2} layers in cycle order'
  assert report.params_counted == count_params(child.config).unique
  np.testing.assert_allclose(
    tiny.logits(child, TOKENS_BxL), tiny.logits(vanilla, TOKENS_BxL), atol=1e-5
  )
  # Unique parameters: the vanilla model's, and the relaxations with the loops' own norms.
  plain = count_params(vanilla.config).unique
  assert plain < report.params_counted < 1.5 * plain
  untied = to_untied(child)
  np.testing.assert_allclose(
    tiny.logits(untied, TOKENS_BxL), tiny.logits(child, TOKENS_BxL), atol=1e-4
  )
  if not drops:
    assert report.exact and report.identity_error < 1e-4


@pytest.mark.parametrize(
  'fields, words',
  [
    (dict(loops=1, prelude=2), 'no loop to add'),
    (dict(prelude=1, block=2), 'are there to add loops to'),
    (dict(prelude=1, relax=('gain',)), 'must start closed'),
    (dict(prelude=1, relax=('gain:start=0,components=o',)), 'must start closed'),
    (dict(prelude=1, init='average'), 'init='),
    (dict(prelude=1, order='sequence'), 'order='),
    (dict(prelude=1, budget=1000), 'budget='),
  ],
)
def test_loops_that_cannot_be_added(fields, words):
  with pytest.raises(InputError, match=words):
    plan(tiny.parent('llama').config, ConvertConfig(add_loops=True, **fields))


@pytest.mark.parametrize(
  'text, expected',
  [
    ('16-19', (16, 17, 18, 19)),
    ('3, 16-17', (3, 16, 17)),
    ('', ()),
    ((5, 2), (2, 5)),
    ('auto:4', 4),
  ],
)
def test_layers_to_delete_are_read(text, expected):
  assert drop.parse(text, 30) == expected


@pytest.mark.parametrize(
  'text, words',
  [
    ('16-30', 'layers 0 to 29'),
    ('19-16', 'ends before it begins'),
    ('3,3', 'names a layer twice'),
    ('x', 'no layer and no range'),
    ('-1', 'no layer and no range'),
    ('0-29', 'no layer would be left'),
    ('auto:0', 'a count from 1 to 29'),
    ('auto:30', 'a count from 1 to 29'),
    ((-2,), 'no layer and no range'),
  ],
)
def test_layers_that_cannot_be_deleted_are_refused(text, words):
  with pytest.raises(InputError, match=words):
    drop.parse(text, 30)


@pytest.mark.parametrize(
  'fields, words',
  [
    (dict(refit='before'), 'must be one of after, around, none'),
    (dict(refit='around'), 'has no effect without deleted layers'),
    (dict(refit='none', init='average', drop='2-3'), "no effect with init='average'"),
    (dict(drop='2', prelude=1, coda=1), 'without those of drop'),
  ],
)
def test_deletions_that_have_no_effect_are_refused(fields, words):
  with pytest.raises(InputError, match=words):
    plan(tiny.parent(layers=6).config, ConvertConfig(loops=2, **fields))


@pytest.mark.parametrize('family', FAMILIES)
def test_without_refit_the_other_layers_stay_as_they_are(family):
  parent = tiny.parent(family, layers=6)
  child, report = convert(parent, drop='1,3-4', loops=1, refit='none')
  assert child.config.depth == 3 and report.dropped == [1, 3, 4]
  wanted = cut(parent, (1, 3, 4))
  np.testing.assert_array_equal(tiny.logits(child, TOKENS_BxL), tiny.logits(wanted, TOKENS_BxL))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('refit', ['after', 'around'])
def test_refitted_layers_come_nearer_to_the_parent(family, refit):
  parent = tiny.parent(family, layers=8)
  child, report = to_recursive(
    parent, drop='4-5', loops=1, refit=refit, calibration=tiny.tokens(5000), calibration_tokens=4096
  )
  plain = cut(parent, (4, 5))
  run = lambda model: tiny.logits(model, TOKENS_BxL)
  gap = lambda model: float(np.mean((run(model) - run(parent)) ** 2))
  assert gap(child) < 0.9 * gap(plain)
  changed = {'after': range(4, 6), 'around': range(2, 6)}[refit]
  kept = [0, 1, 2, 3, 6, 7]
  for i in range(6):
    same = jax.tree.map(
      lambda a, b, i=i: np.array_equal(a[i], b[kept[i]]),
      child.params['block']['layers'],
      parent.params['block']['layers'],
    )
    assert all(jax.tree.leaves(same)) == (i not in changed), i
  assert report.params_counted == report.params.unique == count_params(child.config).unique


def test_auto_deletes_the_run_that_does_nothing():
  parent = tiny.parent(layers=7)
  layers = parent.params['block']['layers']
  for part, name in (('attn', 'o'), ('mlp', 'down')):
    layers[part][name]['kernel'][3:5] = 0
  child, report = convert(parent, drop='auto:2', loops=1)
  assert report.dropped == [3, 4]
  error = tiny.logits(child, TOKENS_BxL) - tiny.logits(parent, TOKENS_BxL)
  assert np.abs(error).max() < 1e-4


@pytest.mark.parametrize('family', FAMILIES)
def test_deletion_goes_with_prelude_block_and_coda(family):
  """A gap in the prelude, in the block and in the coda; all is refitted behind the first."""
  parent = tiny.parent(family, layers=12)
  child, report = convert(parent, drop='1,5,10', prelude=2, loops=2, coda=3, rank=2)
  c = child.config
  assert (c.prelude_layers, c.block_layers, c.loops, c.coda_layers) == (2, 2, 2, 3)
  assert report.params_counted == report.params.unique
  if c.windows:
    kept = [d for d in range(12) if d not in (1, 5, 10)]
    assert c.windows == tuple(parent.config.windows[d] for d in kept)
  first = jax.tree.map(lambda t: t[0], parent.params['block']['layers'])
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[0], b), child.params['prelude']['layers'], first
  )
  untied = to_untied(child)
  np.testing.assert_allclose(
    tiny.logits(untied, TOKENS_BxL), tiny.logits(child, TOKENS_BxL), atol=1e-4
  )


# A bias of o or down is kept where it helps, so that those start nearer.
@pytest.mark.parametrize('family', ['llama', 'qwen2', 'gemma3'])
@pytest.mark.parametrize('loops', [2, 3])
def test_closed_loops_start_as_the_deleted_and_refitted_model(family, loops):
  """Looped positions without effect: the function of deletion and refit, and exactly it."""
  parent = tiny.parent(family, layers=8)
  gone = f'3-{1 + 2 * loops - 1}'
  coda = 8 - 1 - 2 * loops
  child, _ = convert(
    parent, prelude=1, loops=loops, coda=coda, relax=('gain:start=0,components=all',)
  )
  deleted, _ = convert(parent, drop=gone, loops=1)
  assert child.config.depth == 8 and deleted.config.depth == 3 + coda
  np.testing.assert_allclose(
    tiny.logits(child, TOKENS_BxL), tiny.logits(deleted, TOKENS_BxL), atol=2e-4
  )


@pytest.mark.parametrize('family', FAMILIES)
def test_thin_layers_start_no_worse_than_deletion(family):
  """Stream error of the calibration text after the looped layers, deleted and thin."""
  parent = tiny.parent(family, layers=8)
  arguments = dict(prelude=1, loops=2, coda=1, relax=('gain:start=0,components=all',))
  closed, closed_report = convert(parent, **arguments)
  thin, thin_report = convert(parent, rank='0/4', **arguments)
  full, _ = convert(parent, rank='0/20', **arguments)
  block = slice(3, 6)  # Depths of the second loop; the first three are the first loop's.
  for a, b in zip(thin_report.drift[block], closed_report.drift[block], strict=True):
    assert a <= b * 1.001
  run = lambda model: tiny.logits(model, TOKENS_BxL)
  assert np.abs(run(full) - run(parent)).max() < 1e-3
  assert np.mean((run(thin) - run(parent)) ** 2) < np.mean((run(closed) - run(parent)) ** 2)


def test_a_useless_low_rank_term_is_left_out():
  """What does not bring unseen tokens nearer is zero, as a deleted layer is."""
  parent = tiny.parent(layers=4)
  layers = parent.params['block']['layers']
  rng = np.random.default_rng(0)
  text = rng.integers(0, tiny.VOCAB, 200)  # Too few, and nothing to learn from them.
  for part, name in (('attn', 'o'), ('mlp', 'down')):
    layers[part][name]['kernel'][2:] *= 1e-4
    layers[part][name]['kernel'][2:] += 1e-6 * rng.normal(
      size=layers[part][name]['kernel'][2:].shape
    )
  child, report = to_recursive(
    parent,
    loops=2,
    rank='0/3',
    relax=('gain:start=0,components=all',),
    calibration=text,
    calibration_tokens=128,
  )
  assert np.isfinite(tiny.logits(child, TOKENS_BxL)).all()
  deleted = cut(parent, (2, 3))
  run = lambda model: tiny.logits(model, TOKENS_BxL)
  assert np.abs(run(child) - run(parent)).max() <= np.abs(run(deleted) - run(parent)).max() + 1e-2


def test_gains_start_at_zero_behind_the_first_loop_and_lead():
  config = plan(
    tiny.parent(layers=6).config,
    ConvertConfig(loops=3, rank=2, relax=('gain:start=0,components=all',)),
  )
  assert [r.kind for r in config.relax] == ['gain', 'lora']
  assert config.relax[0] == Gain(('q', 'k', 'v', 'o', 'gate', 'up', 'down'), 0)
  with pytest.raises(InputError, match='finite number'):
    plan(tiny.parent().config, ConvertConfig(relax=(Gain(start=float('nan')),)))


@pytest.mark.parametrize(
  'fields, words',
  [(dict(init='average'), 'init=calibrated, or init=lower'), (dict(budget=500), 'give rank')],
)
def test_closed_loops_need_the_first_loops_own_weights(fields, words):
  convert_config = ConvertConfig(relax=('gain:start=0,components=all',), **fields)
  with pytest.raises(InputError, match=words):
    plan(tiny.parent(layers=6).config, convert_config)


def test_a_deleted_child_is_an_ordinary_model(tmp_path):
  """Saved, loaded, converted again; the exported directory has fewer layers."""
  parent = tiny.parent('gemma3', layers=6)
  child, _ = convert(parent, drop='2-3', loops=1)
  save(child, tmp_path / 'child')
  again = load(tmp_path / 'child')
  np.testing.assert_array_equal(tiny.logits(again, TOKENS_BxL), tiny.logits(child, TOKENS_BxL))
  from rrt.checkpoints.save_hf import save_hf

  save_hf(again, tmp_path / 'hf')
  config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert config['num_hidden_layers'] == 4
  back = load(tmp_path / 'hf')
  np.testing.assert_allclose(
    tiny.logits(back, TOKENS_BxL), tiny.logits(child, TOKENS_BxL), atol=1e-5
  )
  recursive, _ = convert(back, loops=2, rank=2)
  assert recursive.config.depth == 4


def test_a_vanilla_parent_may_have_a_prelude_and_a_coda():
  """One that was converted with one loop and saved so."""
  parent = tiny.parent(layers=6)
  split, _ = to_recursive(parent, prelude=2, loops=1, coda=1, loop_norms=False)
  assert plan(split.config, ConvertConfig(loops=2, drop='2-3')).depth == 4
  child, _ = to_recursive(split, loops=1, drop='2-3', refit='none')
  np.testing.assert_array_equal(
    tiny.logits(child, TOKENS_BxL), tiny.logits(cut(parent, (2, 3)), TOKENS_BxL)
  )
