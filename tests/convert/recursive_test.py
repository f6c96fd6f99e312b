"""Conversion: identities, sources of weights, counts, errors."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from rrt.convert import calibration_data
from rrt.convert import plan as plan_lib
from rrt.convert.plan import INITS, ConvertConfig, plan, source_layers
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.models.count import count_params
from rrt.models.init import init_params
from rrt.models.untie import to_untied
from rrt.ops import least_squares
from rrt.relax.lora import Lora
from rrt.relax.ranks import parse_ranks
from tests.convert import tiny

TOKENS = tiny.tokens(40).reshape(2, 20)
FULL = 100  # Capped at each matrix.


def difference(a, b):
  return np.abs(tiny.logits(a, TOKENS) - tiny.logits(b, TOKENS)).max()


_OTHERS = ('gemma2', 'gemma3', 'olmo2', 'gpt_neox', 'qwen2_moe', 'grok1')
FAMILIES = ('llama', 'llama_biases', 'qwen2', 'qwen3', *_OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('init', ['calibrated', 'stepwise', 'average'])
def test_one_loop_is_the_parent(family, init):
  parent = tiny.parent(family)
  child, report = to_recursive(parent, prelude=1, loops=1, coda=1, init=init, rank=3)
  assert difference(parent, child) < 1e-4
  assert report.identity_error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('times', [0.5, 1, 2])
def test_full_rank_is_the_parent_at_any_alpha(family, times):
  parent = tiny.parent(family)
  child, report = to_recursive(
    parent, loops=2, rank=FULL, alpha=12 * times, calibration=tiny.tokens()
  )
  assert difference(parent, child) < 1e-4
  assert report.identity_error < 1e-4
  assert abs(report.nll_parent_nats - report.nll_child_nats) < 1e-4


@pytest.mark.parametrize('init', INITS)
@pytest.mark.parametrize('order', ['cycle', 'sequence'])
def test_full_rank_is_the_parent_from_any_start(init, order):
  parent = tiny.parent(layers=6)
  child, _ = to_recursive(parent, prelude=2, loops=2, order=order, init=init, rank=FULL)
  assert difference(parent, child) < 1e-4


@pytest.mark.parametrize(
  'depth, block, expected',
  [
    (6, 3, [0, 2, 5]),
    (18, 9, [0, 2, 4, 6, 8, 11, 13, 15, 17]),
    (18, 6, [0, 3, 7, 10, 14, 17]),
    (22, 11, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21]),
    (16, 8, [0, 2, 4, 6, 9, 11, 13, 15]),
    (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
    (28, 14, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]),
    (32, 16, [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31]),
  ],
)
def test_stepwise_takes_the_layers_of_the_paper(depth, block, expected):
  config = tiny.parent(layers=2).config
  config = dataclasses.replace(config, block_layers=block, loops=depth // block)
  assert source_layers(config, 'stepwise').tolist() == expected


def test_selection_stays_inside_the_block():
  config = tiny.parent(layers=2).config
  config = dataclasses.replace(config, prelude_layers=1, block_layers=3, loops=2, coda_layers=1)
  sources = lambda init: source_layers(config, init).tolist()
  assert sources('stepwise') == [1, 3, 6]
  assert sources('lower') == [1, 2, 3]
  assert sources('upper') == [4, 5, 6]


@pytest.mark.parametrize('init', ['stepwise', 'lower', 'upper', 'average'])
@pytest.mark.parametrize('loop_norms', [True, False])
def test_shared_weights_come_from_the_named_layers(init, loop_norms):
  parent = tiny.parent(layers=4)
  child, _ = to_recursive(parent, loops=2, init=init, rank=2, loop_norms=loop_norms)
  layers = parent.params['block']['layers']
  block = child.params['block']['layers']
  q = layers['attn']['q']['kernel']
  gains = layers['attn_norm']['scale']
  chosen = {'stepwise': q[[0, 3]], 'lower': q[:2], 'upper': q[2:], 'average': (q[:2] + q[2:]) / 2}[
    init
  ]
  np.testing.assert_allclose(block['attn']['q']['kernel'], chosen, atol=1e-6)
  own = {
    'stepwise': gains[[0, 3]],
    'lower': gains[:2],
    'upper': gains[2:],
    'average': (gains[:2] + gains[2:]) / 2,
  }[init]
  if loop_norms:
    own = gains[[[0, 2], [1, 3]]]
  np.testing.assert_allclose(block['attn_norm']['scale'], own, atol=1e-6)


def test_zero_residual_gets_the_usual_start():
  """Where the shared layer is the position's own: A random, B zero."""
  parent = tiny.parent(layers=4)
  child, _ = to_recursive(parent, loops=2, init='stepwise', rank=2)
  q = child.params['block']['layers']['attn']['q']
  assert not q['lora_b'][0, 0].any() and not q['lora_b'][1, 1].any()
  assert q['lora_a'][0, 0].all() and q['lora_a'][1, 1].all()
  assert q['lora_b'][0, 1].all() and q['lora_b'][1, 0].all()


def test_zero_init_leaves_the_shared_weights_alone():
  parent = tiny.parent(layers=4)
  plain, _ = to_recursive(parent, loops=2, init='average')
  child, _ = to_recursive(parent, loops=2, init='average', rank=2, relax_init='zero')
  assert difference(plain, child) < 1e-6


@pytest.mark.parametrize('alpha', [None, 1.0, 7.0])
def test_truncation_error_is_the_tail_of_the_singular_values(alpha):
  parent = tiny.parent(layers=4)
  child, report = to_recursive(
    parent, loops=2, init='average', rank={'up': 3, 'down': 5}, alpha=alpha
  )
  merged = to_untied(child).params['block']['layers']['mlp']
  layers = parent.params['block']['layers']['mlp']
  for name, rank in (('up', 3), ('down', 5)):
    w = layers[name]['kernel']
    for depth in range(4):
      residual = w[depth] - (w[depth % 2] + w[depth % 2 + 2]) / 2
      tail = np.linalg.svd(residual, compute_uv=False)[rank:]
      error = merged[name]['kernel'][depth] - w[depth]
      np.testing.assert_allclose(np.sum(error**2), np.sum(tail**2), rtol=1e-4, atol=1e-6)
      kept = report.kept[name][depth // 2][depth % 2]
      assert abs(kept - (1 - np.sum(tail**2) / np.sum(residual**2))) < 1e-4


@pytest.mark.parametrize('init', INITS)
@pytest.mark.parametrize('loop_norms', [True, False])
def test_the_count_is_the_closed_form(init, loop_norms):
  parent = tiny.parent(layers=5)
  child, report = to_recursive(
    parent,
    prelude=1,
    loops=2,
    init=init,
    rank=3,
    loop_norms=loop_norms,
    calibration=tiny.tokens(),
    calibration_tokens=256,
  )
  c = child.config
  assert report.params == count_params(c)
  assert report.params_counted == report.params.unique
  lora = sum(4 * 3 * (i + o) for i, o in c.shapes().values())
  layer = sum(i * o for i, o in c.shapes().values())
  gains = 2 * 12 * (1 + (4 if loop_norms else 2))
  assert report.params.unique == (3 * layer + gains + lora + 12 + 2 * tiny.VOCAB * 12)
  shapes = jax.eval_shape(lambda k: init_params(c, k), jax.random.key(0))
  jax.tree.map(
    lambda got, want: np.testing.assert_equal(got.shape, want.shape), child.params, shapes
  )
  assert np.isfinite(report.nll_child_nats)


@pytest.mark.slow
@pytest.mark.parametrize('init', ['average', 'calibrated'])
def test_a_budget_is_spent_where_it_regains_most(init):
  parent = tiny.parent(layers=4, d_model=32, d_ff=40)
  # The first block layer is the same in both loops: nothing to regain there.
  for part in ('attn', 'mlp'):
    for leaf in jax.tree.leaves(parent.params['block']['layers'][part]):
      leaf[2] = leaf[0]
  for norm in ('attn_norm', 'mlp_norm'):
    scale = parent.params['block']['layers'][norm]['scale']
    scale[2] = scale[0]
  budget = 6000
  child, report = to_recursive(
    parent, loops=2, init=init, budget=budget, calibration=tiny.tokens(), calibration_tokens=256
  )
  spent = {name: child.config.relax[0].table(name, 2, 2) for name in child.config.shapes()}
  used = sum(int(spent[name].sum()) * (i + o) for name, (i, o) in child.config.shapes().items())
  assert 0.8 * budget < used <= budget
  first = sum(int(table[:, 0].sum()) for table in spent.values())
  second = sum(int(table[:, 1].sum()) for table in spent.values())
  assert second > 2 * first if init == 'calibrated' else first == 0
  assert report.params_counted == count_params(child.config).unique


@pytest.mark.slow
@pytest.mark.parametrize('init', ['average', 'calibrated'])
def test_a_budget_for_everything_is_the_parent(init):
  parent = tiny.parent(layers=4)
  child, report = to_recursive(
    parent, loops=2, init=init, budget=10**6, calibration=tiny.tokens(), calibration_tokens=256
  )
  assert difference(parent, child) < 1e-4
  assert report.identity_error < 1e-4 and report.calibration_tokens == 0


def test_a_budget_buys_nothing_where_nothing_is_lacking():
  parent = tiny.parent(layers=2)
  child, report = to_recursive(parent, loops=1, init='average', budget=3000)
  assert child.config.relax == () and report.params == report.parent_params


@pytest.mark.parametrize('more', [dict(rank=0), dict(rank=2), dict(budget=900)])
def test_weights_taken_from_the_parent_show_progress(more):
  told = []
  to_recursive(
    tiny.parent(layers=4),
    loops=2,
    init='average',
    **more,
    progress=lambda *counts: told.append(counts),
  )
  assert told == sorted(told) and len(told) > 14
  assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize('norm', ['attn_norm', 'mlp_norm', 'attn_post_norm'])
def test_layers_whose_gains_are_zero(norm):
  """Their linears read nothing but zeros, so that no text says what to fit."""
  parent = tiny.parent('gemma3' if 'post' in norm else 'llama', layers=4)
  zero = -1.0 if parent.config.unit_offset_norm else 0.0
  parent.params['block']['layers'][norm]['scale'][[1, 3]] = zero
  child, report = to_recursive(
    parent, loops=2, rank=1, calibration=tiny.tokens(), calibration_tokens=256
  )
  assert np.isfinite(tiny.logits(child, TOKENS)).all()
  assert np.isfinite([*report.drift, report.nll_child_nats]).all()


def test_a_child_that_is_not_finite_is_refused():
  parent = tiny.parent(layers=4)
  half = jax.tree.map(lambda w: w.astype(np.float16), parent.params)
  parent = dataclasses.replace(parent, params=half)
  with np.errstate(over='ignore'):
    with pytest.raises(InputError, match=r'The child has NaN .*lora_.*dtype='):
      to_recursive(parent, loops=2, init='average', rank=1, alpha=1e-12)


def test_svd_factors_are_balanced():
  matrix = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
  a, b, kept = least_squares.truncated_svd(matrix, 7)
  np.testing.assert_allclose(a @ b, matrix, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)
  assert abs(kept - 1) < 1e-6


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (dict(prelude=1, loops=2), 'Choose .*prelude=1 block=2 loops=2 coda=1'),
    (dict(block=2, loops=2), 'The parent has 6 layers, which prelude 0 '),
    (dict(prelude=9), 'The parent has 6 layers'),
    (dict(loops=0), 'loops=0: must be'),
    (dict(prelude=-1), 'prelude=-1: must be'),
    (dict(order='spiral'), "order='spiral'"),
    (dict(init='best'), "init='best'"),
    (dict(relax_init='one'), "relax_init='one'"),
    (dict(seed=-1), 'seed=-1: must be'),
    (dict(rank=-1), 'rank=-1'),
    (dict(rank={'x': 1}), "rank names 'x'"),
    (dict(rank=2, alpha=0.0), 'alpha=0.0'),
    (dict(alpha=2.0), 'alpha=2.0: has no effect without a rank'),
    (dict(relax_init='zero'), "relax_init='zero': has no effect"),
    (dict(rank=2, alpha='8'), "alpha='8': must be"),
    (dict(rank=2, budget=100), 'choose one'),
    (dict(budget=-5), 'budget=-5'),
    (dict(calibration=[1, 2, 3]), 'has 3 tokens'),
    (dict(calibration=[]), 'has 0 tokens'),
    (dict(calibration=[99] * 500), 'vocabulary of 61'),
    (dict(calibration='some text'), 'no tokenizer'),
    (dict(calibration_tokens=3), 'calibration_tokens=3'),
  ],
)
def test_bad_input_gets_one_sentence(arguments, sentence):
  arguments = dict(calibration=tiny.tokens(400)) | arguments
  with pytest.raises(InputError) as error:
    to_recursive(tiny.parent(layers=6), **arguments)
  assert re.search(sentence, str(error.value)), error.value
  assert '\n' not in str(error.value)


def test_parents_that_cannot_be_converted():
  parent = tiny.parent(layers=4)
  child, _ = to_recursive(parent, loops=2, init='average')
  with pytest.raises(InputError, match='already recursive'):
    to_recursive(child, loops=2, init='average')
  child, _ = to_recursive(parent, loops=1, init='average', rank=1)
  with pytest.raises(InputError, match='has relaxations, although'):
    to_recursive(child, loops=2, init='average')
  parent.params['block']['layers']['mlp']['up']['kernel'][1, 2, 3] = np.nan
  with pytest.raises(InputError, match=r'NaN or infinity in .*mlp/up'):
    to_recursive(parent, loops=2, init='average')


def test_choices_add_up():
  config = tiny.parent(layers=4).config
  config = dataclasses.replace(config, block_layers=30)
  with pytest.raises(InputError) as error:
    plan_lib.arrange(config, ConvertConfig(prelude=8, loops=2, coda=7))
  found = re.findall(r'prelude=(\d+) block=(\d+) loops=(\d+) coda=(\d+)', str(error.value))
  assert len(found) == 3
  for choice in found:
    p, n, r, c = map(int, choice)
    assert p + n * r + c == 30 and r == 2


def test_a_single_layer_has_one_choice():
  with pytest.raises(InputError, match='Choose prelude=0 block=1 loops=1'):
    to_recursive(tiny.parent(layers=1), loops=2)


def test_what_needs_no_weights_is_checked_without_them():
  config = tiny.parent(layers=6).config
  child = plan(config, ConvertConfig(prelude=1, loops=2, coda=1, rank=3))
  assert (child.block_layers, child.relax[0].q) == (2, 3)
  assert plan(config, ConvertConfig(loops=2, budget=100)).relax == ()
  for arguments, sentence in (
    (dict(prelude=3, loops=4), 'The parent has 6 layers'),
    (dict(rank=2, budget=100), 'choose one'),
    (dict(calibration_tokens=3), 'calibration_tokens=3'),
  ):
    with pytest.raises(InputError, match=sentence):
      plan(config, ConvertConfig(**arguments))


def test_no_text_is_asked_for_where_nothing_is_fitted():
  _, report = to_recursive(tiny.parent(layers=4), loops=1, calibration=[1, 2, 3])
  assert report.identity_error < 1e-4 and report.nll_child_nats is None


def test_an_empty_path_is_no_text():
  with pytest.raises(InputError, match="calibration='': give"):
    calibration_data.calibration_text('', 500)


def test_rank_flag():
  assert parse_ranks('64') == 64
  assert parse_ranks('q:8, down:16') == {'q': 8, 'down': 16}
  assert parse_ranks('0/16') == (0, 16)
  assert parse_ranks('q:8,down:0/16') == {'q': 8, 'down': (0, 16)}
  for text in ('q', 'q:x', '', '1.5', 'q:4,q:8', '4/', '/4', 'q:4/x'):
    with pytest.raises(InputError, match='rank='):
      parse_ranks(text)


@pytest.mark.parametrize('init', ['calibrated', 'average'])
def test_loops_have_ranks_of_their_own(init):
  parent = tiny.parent(layers=4)
  child, report = to_recursive(
    parent, loops=2, init=init, rank={'q': (0, 3), 'down': 2}, calibration=tiny.tokens()
  )
  (lora,) = child.config.relax
  assert (lora.q, lora.down, lora.v) == (((0, 0), (3, 3)), 2, 0)
  assert report.ranks['q'] == '0/3' and report.ranks['down'] == 2
  assert report.params_counted == report.params.unique
  q = child.params['block']['layers']['attn']['q']
  norms_R = np.abs(q['lora_b']).sum((0, 2, 3))
  assert norms_R[0] == 0 and norms_R[1] > 0


def test_ranks_by_loop_must_fit_the_loops():
  for rank in ((1, 2, 3), {'q': (1, 2, 3)}):
    with pytest.raises(InputError, match='has 3 numbers; the model has 2'):
      to_recursive(tiny.parent(layers=4), loops=2, rank=rank)
  with pytest.raises(InputError, match='whole number'):
    to_recursive(tiny.parent(layers=4), loops=2, rank=(4, -1))


# ------------------------------------------------------------ calibration rows


class Letters:
  """A tokenizer whose tokens are characters."""

  bos_id, add_bos = 60, True

  def encode(self, text, bos=None):
    return [ord(c) % 50 for c in text]


def test_rows_come_from_all_over_a_long_text():
  text = ''.join(chr(ord('a') + i % 26) for i in range(100_000))
  rows = calibration_data.split_rows(text, Letters(), tokens=700, length=64, vocab_size=61)
  assert rows[0].shape[1] == rows[1].shape[1] == 64
  assert 650 <= rows[0].size <= 750 and rows[1].size >= 64
  for part in rows:
    assert (part[:, 0] == 60).all() and (part[:, 1:] < 50).all()


def test_ranks_of_a_table_pad_with_zeros():
  config = tiny.parent(layers=2).config
  lora = Lora(q=((1, 3), (2, 0)))
  config = dataclasses.replace(config, loops=2, block_layers=2, relax=(lora,))
  assert lora.width('q') == 3
  assert count_params(config).unique > 0
