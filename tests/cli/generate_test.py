"""`rrt generate` from end to end on a tiny saved model."""

import pytest

from rrt.checkpoints.load import save
from rrt.infer.generate import complete
from tests import command, runs

PROMPTS = ['the sea', 'a', 'ships']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  place = tmp_path_factory.mktemp('models')
  save(runs.child(), place / 'child')
  return place


@pytest.mark.slow
@pytest.mark.parametrize('stream', ['--stream', '--nostream'])
def test_prints_what_complete_gives(place, stream):
  status, printed, error = command.run(
    'generate',
    '--model=child',
    '--max_new_tokens=8',
    '--loops=1',
    *(f'--prompt={p}' for p in PROMPTS),
    stream,
    cwd=place,
  )
  assert status == 0, error
  final = command.final(printed)
  want = complete(runs.child(), PROMPTS, max_new_tokens=8, loops=1)
  assert [c['tokens'] for c in final['completions']] == [c.tokens for c in want]
  assert final['loops'] == 1
  assert final['decode_tokens'] == sum(len(c.tokens) - 1 for c in want)
  places = [printed.index(f'[{i + 1}/3] {p}') for i, p in enumerate(PROMPTS)]
  assert places == sorted(places) and 'tokens/s' in printed


@pytest.mark.parametrize(
  ('flags', 'word'),
  [
    (['--prompt=a'], '--model is missing'),
    (['--model=child'], '--prompt is missing'),
    (['--model=child', '--prompt='], 'Prompt 0 is empty'),
    (['--model=child', '--prompt=a', '--top_p=0'], 'top_p=0.0'),
  ],
)
def test_bad_flags_end_with_one_sentence(place, flags, word):
  status, _, error = command.run('generate', *flags, cwd=place)
  assert status == 2
  assert error.startswith('error: ') and word in error
