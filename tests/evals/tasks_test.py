"""Tasks from local files, and the adapter to lm-eval on them."""

import dataclasses
import functools
import gzip
import json
import lzma

import numpy as np
import pytest

from rrt.errors import InputError
from rrt.evals import tasks
from tests import runs

HELLASWAG = [
  {'query': f'A man {i}', 'choices': ['runs', 'is far away', 'x'], 'label': 1} for i in range(6)
]
WINOGRANDE = [
  {'context_options': [f'Ann {i}', f'Bob {i}'], 'continuation': 'won.', 'label': i % 2}
  for i in range(4)
]
LAMBADA = [{'text': 'the ship and the sea'}, {'text': 'one more word'}]
ARC = [{'query': f'Which {i}?', 'choices': ['a', 'bc'], 'label': 0} for i in range(5)]


def write(path, records):
  text = '\n'.join(json.dumps(r) for r in records)
  opened = {'.xz': lzma.open, '.gz': gzip.open}.get(path.suffix, open)
  with opened(path, 'wt') as f:
    f.write(text)


@pytest.fixture
def data(tmp_path):
  write(tmp_path / 'hellaswag_val.jsonl.xz', HELLASWAG)
  write(tmp_path / 'winogrande_xl_dev.jsonl.gz', WINOGRANDE)
  write(tmp_path / 'lambada_openai.jsonl', LAMBADA)
  write(tmp_path / 'arc_easy_test.jsonl', ARC)
  pool = [ARC[2] | {'query': 'which  2?'}]
  pool += [ARC[0] | {'query': f'Shot {i}?'} for i in range(3)]
  write(tmp_path / 'arc_easy_train.jsonl', pool)
  write(tmp_path / 'mine.jsonl', [r | {'gold': 2} for r in HELLASWAG])
  return tmp_path


def test_choices(data):
  task = tasks.load_task('hellaswag', data)
  assert (task.kind, task.metric) == ('choices', 'acc_bytes')
  assert task.docs[0] == {'text': 'A man 0', 'choices': ['runs', 'is far away', 'x'], 'gold': 1}
  assert not task.pool


def test_contexts_and_words_are_scored_plainly(data):
  task = tasks.load_task('winogrande', data)
  assert (task.kind, task.metric) == ('contexts', 'acc')
  assert task.docs[1]['ending'] == 'won.' and task.docs[1]['gold'] == 1
  task = tasks.load_task('lambada', data)
  assert (task.kind, task.metric) == ('word', 'acc')
  assert task.docs[0] == {'text': 'the ship and the', 'target': ' sea'}


def test_prompts_are_lm_evals(data):
  task = tasks.load_task('arc_easy', data)
  assert task.docs[0]['text'] == 'Question: Which 0?\nAnswer:'


def test_shots_that_are_asked_are_dropped(data):
  pool = tasks.load_task('arc_easy', data).pool
  assert [d['text'][10:14] for d in pool] == ['Shot'] * 3


def test_any_file_of_the_form_is_a_task(data):
  assert tasks.load_task('mine', data).docs[0]['gold'] == 1


def test_names():
  assert tasks.parse_names('paper') == list(tasks.PAPER)
  assert tasks.parse_names(' piqa, piqa,mine') == ['piqa', 'mine']


@pytest.mark.parametrize(
  ('line', 'word'),
  [
    ('{"query": "a"}', 'not a question'),
    ('{"query": "a", "choices": ["b"], "label": 1}', 'label 1'),
    ('{"query": ', 'not a JSON'),
    ('[1]', 'not a JSON'),
    ('', 'no question'),
    ('{"query": "a", "choices": "bc", "label": 1}', 'list of texts'),
    ('{"query": "a", "choices": ["b", 3], "label": 1}', 'list of texts'),
    ('{"query": "", "choices": [], "label": 0}', 'list of texts'),
    ('{"text": "oneword"}', 'two words'),
  ],
)
def test_bad_lines_are_refused(tmp_path, line, word):
  (tmp_path / 'piqa.jsonl').write_text(line)
  with pytest.raises(InputError, match=word):
    tasks.load_task('piqa', tmp_path)


def test_missing_files_are_told_apart(data, tmp_path):
  with pytest.raises(InputError, match='it has arc_easy_test'):
    tasks.load_task('piqa', data)
  with pytest.raises(InputError, match='not a directory'):
    tasks.load_task('piqa', tmp_path / 'none')
  (data / 'hellaswag_val.jsonl.xz').write_bytes(b'rubbish')
  with pytest.raises(InputError, match='damaged'):
    tasks.load_task('hellaswag', data)


# ------------------------------------------------------------- with lm-eval


@functools.cache
def model():
  return runs.model(dataclasses.replace(runs.CHILD, max_context=128), 3)


@pytest.fixture
def harness():
  pytest.importorskip('lm_eval')
  from rrt.evals import harness

  return harness


def by_hand(harness, doc):
  """The scores of a question's choices, one request each."""
  lm = harness.RrtLM(model())
  encode = model().tokenizer.encode
  pairs = [(encode(doc['text']), encode(' ' + c)) for c in doc['choices']]
  return [s for s, _ in lm._score(pairs, '', show=False)]


@pytest.mark.slow
def test_accuracy_is_by_bytes(harness, data):
  (result,) = harness.run(model(), 'hellaswag', data=str(data))
  docs = tasks.load_task('hellaswag', data).docs
  right = []
  for doc in docs:
    scores = by_hand(harness, doc)
    sizes = [len(c) for c in doc['choices']]
    right.append(int(np.argmax(np.divide(scores, sizes))) == doc['gold'])
  assert result.questions == 6 and result.metric == 'acc_bytes'
  np.testing.assert_allclose(result.score, np.mean(right))
  np.testing.assert_allclose(result.stderr, np.std(right, ddof=1) / np.sqrt(6), atol=1e-9)


@pytest.mark.slow
def test_all_kinds_with_shots_limit_and_loops(harness, data):
  names = 'lambada,winogrande,arc_easy,mine'
  results = harness.run(model(), names, data=str(data), shots=1, limit=2, loops=1)
  assert [r.task for r in results] == names.split(',')
  assert all(r.questions == 2 and 0 <= r.score <= 1 for r in results)


@pytest.mark.slow
def test_one_question_has_no_standard_error(harness, data):
  (result,) = harness.run(model(), 'hellaswag', data=str(data), limit=1)
  assert result.questions == 1 and result.stderr is None


@pytest.mark.parametrize(
  ('scores', 'metric', 'stderr'),
  [
    ({'acc': 0.1, 'acc_norm': 0.2, 'acc_norm_stderr': 0.3}, 'acc_norm', 0.3),
    ({'f1': 0.2, 'acc': 0.1, 'acc_stderr': 'N/A'}, 'acc', None),
    ({'f1': 0.2, 'f1_stderr': 0.1}, 'f1', 0.1),
  ],
)
def test_the_score_of_a_hub_task(harness, scores, metric, stderr):
  scores = {'alias': 'x', 'sample_len': 3} | {f'{k},none': v for k, v in scores.items()}
  found = {'results': {'x': scores}, 'n-samples': {'x': {'effective': 3}}}
  result = harness._result('x', found, 'x', '')
  assert (result.metric, result.stderr) == (metric, stderr)
  assert result.score == scores[f'{metric},none'] and result.questions == 3


def test_scores_of_a_filter_and_of_a_group(harness):
  scores = {'exact_match,strict': 0.5, 'exact_match_stderr,strict': 0.1}
  sizes = {'a': {'effective': 2}, 'b': {'effective': 3}}
  found = {'results': {'x': scores}, 'n-samples': sizes, 'group_subtasks': {'x': ['a', 'b']}}
  result = harness._result('x', found, 'x', '')
  assert result.metric == 'exact_match,strict' and result.stderr == 0.1
  assert result.questions == 5
  with pytest.raises(InputError, match='no score'):
    harness._result('x', {'results': {'x': {'alias': 'x'}}}, 'x', '')


class Request:
  """What lm-eval passes: an instance with arguments."""

  def __init__(self, *args):
    self.args = args


@pytest.mark.slow
def test_rolling_adds_up_over_windows(harness):
  text = 'the old ship sails on to a far green shore. ' * 5
  short = harness.RrtLM(model(), max_length=32)
  (got,) = short.loglikelihood_rolling([Request(text)], disable_tqdm=True)
  tokens = model().tokenizer.encode(text)
  pairs, seen = [], 0
  while seen < len(tokens):
    new = tokens[seen : seen + 32]
    # A last, shorter window sees as much of the text before as fits.
    begin = max(seen + len(new) - 33, 0) if seen else 0
    context = tokens[begin:seen] if seen else [0]
    pairs.append((context, new))
    seen += len(new)
  want = sum(s for s, _ in short._score(pairs, '', show=False))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_generate_until(harness):
  lm = harness.RrtLM(model())
  free = {'until': [], 'max_gen_toks': 12, 'do_sample': False}
  (text,) = lm.generate_until([Request('the sea', free)], disable_tqdm=True)
  stop = text[2:4]
  got = lm.generate_until(
    [Request('the sea', free | {'until': [stop]}), Request('a', free), Request('x' * 300, free)],
    disable_tqdm=True,
  )
  assert got[0] == text[: text.index(stop)] and len(got) == 3


def test_blank_lines_of_a_task_file_are_skipped(tmp_path):
  line = '{"query": "a", "choices": ["b", "c"], "label": 1}\n'
  (tmp_path / 'quiz.jsonl').write_text(f'\n{line}  \n{line.replace("1}", "0}")}\n\n')
  assert len(tasks.load_task('quiz', tmp_path).docs) == 2


def test_repeated_sampled_requests_differ(harness):
  lm = harness.RrtLM(model())
  hot = {'max_gen_toks': 6, 'do_sample': True, 'temperature': 3.0, 'seed': 5}
  requests = [Request('the sea', hot) for _ in range(40)]  # More than a batch.
  texts = lm.generate_until(requests, disable_tqdm=True)
  assert len(set(texts)) > 35 and all(a != b for a, b in zip(texts, texts[32:]))
  # The batch that a request falls into makes no difference.
  assert lm.generate_until(requests[:3], disable_tqdm=True) == texts[:3]
  other = [Request('the sea', hot | {'seed': 6}) for _ in range(3)]
  assert lm.generate_until(other, disable_tqdm=True) == texts[1:4]


def test_generation_arguments_without_support_are_refused(harness):
  lm = harness.RrtLM(model())
  neutral = {'until': [], 'max_gen_toks': 2, 'repetition_penalty': 1.0, 'num_beams': 1}
  assert len(lm.generate_until([Request('a', neutral)], disable_tqdm=True)) == 1
  for name, value in (('repetition_penalty', 1.2), ('num_beams', 4), ('sampler', 'x')):
    with pytest.raises(InputError, match=f'generation_kwargs: {name}=.* is not supported'):
      lm.generate_until([Request('a', neutral | {name: value})], disable_tqdm=True)


def test_lm_eval_knows_the_model_by_name(harness):
  from lm_eval.api.registry import get_model

  assert get_model('rrt') is harness.RrtLM


@pytest.mark.parametrize(
  ('settings', 'word'),
  [
    ({'names': ''}, 'tasks is empty'),
    ({'shots': -1}, 'shots=-1'),
    ({'limit': 0}, 'limit=0'),
    ({'loops': 3}, '1 to 2 loops'),
  ],
)
def test_bad_settings_are_refused(harness, data, settings, word):
  with pytest.raises(InputError, match=word):
    harness.run(model(), **({'names': 'hellaswag', 'data': str(data)} | settings))
