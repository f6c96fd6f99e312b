"""Model cards: what they say, and whose they are."""

import pytest

from rrt.checkpoints import card
from rrt.checkpoints.load import load, save
from rrt.checkpoints.save_hf import save_hf
from rrt.convert.recursive import to_recursive
from tests.convert import tiny


@pytest.fixture(scope='module')
def child():
  parent = tiny.parent(layers=6)
  parent.meta.update(source='some/parent', license='apache-2.0')
  made, _ = to_recursive(
    parent, drop='3', prelude=1, loops=2, rank=2, calibration=tiny.tokens(), calibration_tokens=256
  )
  training = dict(
    step=7,
    batch=2,
    length=64,
    data={'path': 'news'},
    loss={'cross_entropy': 0.0, 'distillation': 1.0},
  )
  made.meta['uptraining'] = training
  return made


def test_a_card_says_what_the_model_is(child, tmp_path):
  text = (save(child, tmp_path / 'small') / card.NAME).read_text()
  conversion = child.meta['conversion']
  for words in (
    'base_model: some/parent',
    'license: apache-2.0',
    'library_name: rrt',
    '1 + 2 x 2 + 0 layers',
    'without the layers 3',
    f'{conversion["nll_parent_nats"]:.3f}',
    f'{conversion["nll_child_nats"]:.3f}',
    '7 steps (896 tokens) on news',
    "rrt.load('small')",
  ):
    assert words in text, words


def test_an_export_has_one_too_and_hands_the_licence_on(child, tmp_path):
  out = save_hf(child, tmp_path / 'hf')
  text = (out / card.NAME).read_text()
  assert 'library_name: transformers' in text and "from_pretrained('hf')" in text
  assert load(out).meta['license'] == 'apache-2.0'


@pytest.mark.parametrize('writer', [save, save_hf])
def test_a_card_of_the_users_own_is_kept(child, tmp_path, writer):
  out = writer(child, tmp_path / 'model')
  (out / card.NAME).write_text('# Mine')
  writer(child, tmp_path / 'model')
  assert (out / card.NAME).read_text() == '# Mine'
  (out / card.NAME).write_text(f'{card.MARK} old')
  writer(child, tmp_path / 'model')
  assert 'old' not in (out / card.NAME).read_text()


@pytest.mark.parametrize(
  'text, licence',
  [
    ('---\nbase_model: x\nlicense: MIT\n---\n# A', 'mit'),
    ('---\nlicense: "gemma"\n---', 'gemma'),
    ('# license: mit', ''),
    ('', ''),
  ],
)
def test_the_licence_of_a_card(text, licence):
  assert card.license_in(text) == licence
