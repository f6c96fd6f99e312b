"""`rrt evaluate` from end to end on a tiny saved model."""

import json
import os

import pytest

from rrt.checkpoints.load import save
from tests import command, runs
from tests.evals import tasks_test


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  place = tmp_path_factory.mktemp('models')
  save(runs.parent(), place / 'parent')
  save(runs.child(), place / 'child')
  runs.write_text(place / 'text.jsonl')
  tasks_test.write(place / 'arc_easy.jsonl', tasks_test.ARC)
  return place


@pytest.mark.slow
def test_text_and_tasks_at_every_loop_count_against_the_parent(place):
  pytest.importorskip('lm_eval')
  status, printed, error = command.run(
    'evaluate',
    '--model=child',
    '--parent=parent',
    '--text=text.jsonl',
    '--max_tokens=200',
    '--loops=all',
    '--tasks=arc_easy',
    '--data=.',
    '--out=out.json',
    cwd=place,
  )
  assert status == 0, error
  final = command.final(printed)
  assert final['context'] == 32  # By default what the model was made for.
  assert {'nll_nats', 'bits_per_byte', 'tokens'} <= set(final)
  assert [f['loops'] for f in final['by_loops']] == [1, 2]
  assert final['nll_nats'] == final['by_loops'][1]['nll_nats']
  assert final['parent']['nll_nats'] > 0
  task = final['tasks']['arc_easy']
  assert 0 <= task['score'] <= 1 and task['stderr'] >= 0
  assert task['questions'] == 5
  assert '2 of 2 loops' in printed and 'parent' in printed
  assert json.loads((place / 'out.json').read_text()) == final


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_figures_are_printed_even_if_the_disk_is_full(place):
  status, printed, error = command.run(
    'evaluate',
    '--model=child',
    '--text=text.jsonl',
    '--max_tokens=64',
    '--out=/dev/full',
    cwd=place,
  )
  assert status == 2 and 'cannot be written (No space' in error
  assert command.final(printed)['nll_nats'] > 0


@pytest.mark.parametrize(
  ('flags', 'word'),
  [
    ([], '--model is missing'),
    (['--model=child'], 'give --text, --tasks'),
    (['--model=child', '--text=none.txt'], 'no such file'),
    (['--model=child', '--tasks=piqa', '--data=.'], 'holds no file piqa'),
    (['--model=child', '--text=text.jsonl', '--loops=3'], 'from 1 to 2'),
    (['--model=child', '--text=text.jsonl', '--context=33'], 'context=33'),
    (['--model=none', '--text=text.jsonl', '--out=no/a.json'], "out='no/a"),
    (['--model=child', '--text=text.jsonl', '--out=text.jsonl'], 'left alone'),
    (['--modell=child'], 'modell'),
    (['--max_tokens=many'], 'max_tokens'),
  ],
)
def test_bad_flags_end_with_one_sentence(place, flags, word):
  status, _, error = command.run('evaluate', *flags, cwd=place)
  assert status == 2
  assert error.startswith('error: ') and word in error


def test_help_is_no_failure(place):
  status, printed, _ = command.run('evaluate', '--help', cwd=place)
  assert status == 0 and '--max_tokens' in printed


@pytest.mark.slow
def test_the_deepest_loop_count_is_the_models_own(place):
  status, printed, error = command.run(
    'evaluate', '--model=child', '--text=text.jsonl', '--max_tokens=64', '--loops=2,1', cwd=place
  )
  assert status == 0, error
  assert command.final(printed)['loops'] == 2
