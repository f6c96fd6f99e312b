"""Children of a size: what is considered, what is chosen, and what is refused."""

import numpy as np
import pytest

from rrt.convert import search, size
from rrt.convert.plan import ConvertConfig, plan
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.models.count import count_params
from tests.convert import tiny

MIDDLE = lambda count: [(12 - count) // 2, 1]


@pytest.mark.parametrize(
  'text, expected', [('0.5x', 0.5), ('12k', 12_000), (9000, 9000), ('0.009M', 9000)]
)
def test_a_size_is_read(text, expected):
  parent = tiny.parent(layers=12).config
  whole = count_params(parent).unique
  assert size.target(text, parent) == round(expected * whole if expected < 1 else expected)


@pytest.mark.parametrize('text', ['1x', '2M', 'much', '0.001x', '-3', ''])
def test_a_size_that_no_child_has_is_refused(text):
  with pytest.raises(InputError, match='params='):
    plan(tiny.parent(layers=12).config, ConvertConfig(params=text))


@pytest.mark.parametrize('family', ['llama', 'gemma3'])
@pytest.mark.parametrize('share', [0.6, 0.8, 0.95])
def test_all_candidates_have_the_size_and_differ(family, share):
  parent = tiny.parent(family, layers=12).config
  params = size.target(f'{share}x', parent)
  found = search.candidates(parent, params, MIDDLE, ConvertConfig())
  # In so small a model gains cost more than a layer leaves: few thin ones fit.
  assert {'deleted', 'thin'} <= {c.kind for c in found} or share == 0.6
  assert found[0].kind == 'deleted'
  assert len({c.name for c in found}) == len(found)
  for c in found:
    config = plan(parent, c.convert)
    assert c.params == count_params(config).unique <= params
    assert c.layers_run == config.depth
    # A low-rank term takes what deletion cannot: a step of rank at most is left.
    if c.kind == 'thin':
      assert params - c.params < 2 * 8 * sum(map(sum, parent.shapes().values()))


def test_layers_run_is_kept_to():
  parent = tiny.parent(layers=12).config
  params = size.target('0.7x', parent)
  found = search.candidates(parent, params, MIDDLE, ConvertConfig(), layers_run=10)
  assert found and all(c.layers_run <= 10 for c in found)
  assert any(c.kind == 'thin' and c.layers_run == 10 for c in found)
  with pytest.raises(InputError, match='no effect without params'):
    plan(parent, ConvertConfig(layers_run=10))


def test_without_text_there_is_nothing_to_search_on():
  with pytest.raises(InputError, match='no tokenizer'):
    to_recursive(tiny.parent(layers=8), params='0.8x', progress=None)


@pytest.mark.parametrize(
  'fields', [dict(prelude=1), dict(rank=2), dict(drop='2'), dict(loops=3), dict(init='average')]
)
def test_what_params_chooses_cannot_be_given(fields):
  with pytest.raises(InputError, match='params chooses it'):
    plan(tiny.parent(layers=12).config, ConvertConfig(params='0.8x', **fields))


def test_the_child_is_the_best_that_was_considered():
  parent = tiny.parent(layers=8)
  child, report = to_recursive(
    parent, params='0.8x', calibration=tiny.tokens(700), calibration_tokens=512
  )
  wanted = size.target('0.8x', parent.config)
  assert report.params_counted == report.params.unique <= wanted
  of_size = [row for row in report.considered if row[1] == report.params.unique]
  best = min((row for row in report.considered if row[1] <= wanted), key=lambda row: row[3])
  assert best in of_size and best[2] == child.config.depth
  assert np.isfinite(report.nll_child_nats)
  assert max(row[1] for row in report.considered) > wanted  # Points of the frontier.
