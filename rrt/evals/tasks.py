"""The seven few-shot tasks of the paper, from local JSON lines or the hub.

LAMBADA, HellaSwag, PIQA, WinoGrande, ARC-Easy, ARC-Challenge, OpenBookQA
(Relaxed Recursive Transformers, section 3 and appendix E: the harness'
standard prompts and shots, accuracy normalised by the byte length of the
answer except for LAMBADA and WinoGrande).

Local files, plain or compressed, hold one question a line:

  {"query": ..., "choices": [...], "label": 2}                 most tasks
  {"context_options": [a, b], "continuation": ..., "label": 0} WinoGrande
  {"text": ...} or {"context": ..., "target": " word"}         LAMBADA

Shots are sampled from a file `NAME*_train*`. Any other file of the first two
forms is a task under its own name, whose query is the prompt unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import gzip
import json
import lzma
from pathlib import Path
from typing import Any
import zlib

from rrt.errors import InputError

PAPER = ('lambada', 'hellaswag', 'piqa', 'winogrande', 'arc_easy', 'arc_challenge', 'openbookqa')
_ON_HUB = {'lambada': 'lambada_openai'}
_OPEN: dict[str, Any] = {'.jsonl': open, '.gz': gzip.open, '.xz': lzma.open}
_ENDINGS = ('.jsonl', '.jsonl.gz', '.jsonl.xz')
PLAIN_SCORE = ('lambada', 'winogrande')
# The prompt around a query, as lm-eval's own tasks write it.
_PROMPTS = {
  'piqa': 'Question: {}\nAnswer:',
  'arc_easy': 'Question: {}\nAnswer:',
  'arc_challenge': 'Question: {}\nAnswer:',
}


@dataclasses.dataclass(frozen=True)
class Task:
  """One task with its questions.

  Attributes:
    name: 'hellaswag', ...
    kind: 'choices' (one context, several endings), 'contexts' (several
      contexts, one ending) or 'word' (the ending must be the greedy one).
    docs: questions: 'text', 'choices' and 'gold'; for kind 'word' 'target'.
    pool: questions to sample shots from; empty for none.
    metric: of the score: 'acc' or 'acc_bytes'.
  """

  name: str
  kind: str
  docs: list[dict[str, Any]]
  pool: list[dict[str, Any]]
  metric: str


def parse_names(names: str | Sequence[str]) -> list[str]:
  """Task names from a comma-separated list; 'all' or 'paper' is the seven."""
  if isinstance(names, str):
    names = [n.strip() for n in names.split(',') if n.strip()]
  found = [n for name in names for n in _expand(name)]
  return list(dict.fromkeys(found))


def _expand(name: str) -> Sequence[str]:
  return PAPER if name in ('all', 'paper') else [name]


def hub_name(name: str) -> str:
  """The task's name in lm-eval."""
  return _ON_HUB.get(name, name)


def load_task(name: str, directory: str | Path) -> Task:
  """Reads a task's questions and its pool of shots.

  Questions of the pool that the task has too are removed from the pool.

  Raises:
    InputError: no such file, or a line that is not a question.
  """
  tests, pools = find_files(name, directory)
  docs = [_doc(name, r, at) for f in tests for at, r in _records(f)]
  if not docs:
    raise InputError(f'{tests[0]}: holds no question.')
  pool = [_doc(name, r, at) for f in pools for at, r in _records(f)]
  asked = {_key(d) for d in docs}
  pool = [d for d in pool if _key(d) not in asked]
  kind = 'choices'
  if 'target' in docs[0]:
    kind = 'word'
  elif not docs[0]['text']:
    kind = 'contexts'
  metric = 'acc' if kind != 'choices' or name in PLAIN_SCORE else 'acc_bytes'
  return Task(name, kind, docs, pool, metric)


def find_files(name: str, directory: str | Path) -> tuple[list[Path], list[Path]]:
  """The files of a task's questions, and those of its pool of shots."""
  directory = Path(directory).expanduser()
  if not directory.is_dir():
    raise InputError(f'data={str(directory)!r}: is not a directory.')
  files = sorted(p for p in directory.iterdir() if p.name.endswith(_ENDINGS))
  own = [p for p in files if _is_of(p, name)]
  pools = [p for p in own if 'train' in _words(p)[len(name.split('_')) :]]
  tests = [p for p in own if p not in pools]
  if not tests:
    have = sorted({_stem(p) for p in files})
    raise InputError(
      f'tasks={name!r}: {directory} holds no file {name}*.jsonl (or .gz, '
      f'.xz of it); it has {", ".join(have) or "none"}.'
    )
  if len(tests) > 1:
    raise InputError(
      f'tasks={name!r}: {directory} holds several files of it '
      f'({", ".join(p.name for p in tests)}); name one of them in full.'
    )
  return tests, pools


def _stem(path: Path) -> str:
  return path.name[: path.name.index('.jsonl')]


def _words(path: Path) -> list[str]:
  return _stem(path).split('_')


def _is_of(path: Path, name: str) -> bool:
  stem = _stem(path)
  return stem == name or stem.startswith(name + '_')


def _records(file: Path):
  """Yields ('file:line', object) for each line."""
  try:
    with _OPEN[file.suffix](file, 'rb') as f:
      lines = f.read().splitlines()
  except (EOFError, OSError, lzma.LZMAError, zlib.error) as e:
    raise InputError(f'{file}: cannot be read, or is damaged ({e}).') from e
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f'{file}, line {number}'
    try:
      record = json.loads(line)
    except ValueError as e:
      raise InputError(f'{where}: not a JSON object ({e}).') from e
    if not isinstance(record, dict):
      raise InputError(f'{where}: not a JSON object.')
    yield where, record


def _doc(name: str, record: dict[str, Any], where: str) -> dict[str, Any]:
  """Normalizes one question to the form of `Task.docs`."""
  try:
    if 'choices' in record or 'context_options' in record:
      gold = int(record['label'] if 'label' in record else record['gold'])
      options = record.get('choices', record.get('context_options'))
      if (
        not isinstance(options, list)
        or not options
        or not all(isinstance(o, str) and o for o in options)
      ):
        raise InputError(f'{where}: its choices must be a list of texts.')
      if 'choices' in record:
        text = _PROMPTS.get(name, '{}').format(record['query'])
        doc = {'text': text, 'choices': list(record['choices'])}
      else:
        doc = {
          'text': '',
          'choices': list(record['context_options']),
          'ending': record['continuation'],
        }
      if not 0 <= gold < len(doc['choices']):
        raise InputError(
          f'{where}: label {gold} does not name one of the {len(doc["choices"])} choices.'
        )
      return doc | {'gold': gold}
    if 'target' in record:
      return {'text': record['context'], 'target': record['target']}
    text, space, word = record['text'].rpartition(' ')
    if not text or not word:
      raise InputError(f'{where}: its text must have two words or more.')
    return {'text': text, 'target': space + word}
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(
      f'{where}: not a question; it needs query, choices and label, or '
      'context_options, continuation and label, or text.'
    ) from e


def _key(doc: dict[str, Any]) -> str:
  """Key by which two questions are equal."""
  text = doc['text'] or ' / '.join(doc['choices'])
  return ' '.join(text.casefold().split())


def lm_eval_config(task: Task, dataset, shots: int) -> dict[str, Any]:
  """lm-eval's configuration of the task.

  Args:
    task: its questions.
    dataset: constructs a dataset from lists of questions by split.
    shots: solved questions before each one.
  """
  splits = {'test': task.docs}
  if shots > len(task.pool or task.docs[1:]):
    raise InputError(
      f'shots={shots}: {task.name} has only '
      f'{len(task.pool or task.docs[1:])} other questions to show.'
    )
  if task.pool:
    splits['train'] = task.pool
  config: dict[str, Any] = {
    'task': task.name,
    'custom_dataset': lambda **_: dataset(splits),
    'test_split': 'test',
    'num_fewshot': shots,
    'fewshot_split': 'train' if task.pool else 'test',
    'metadata': {'version': 1.0},
  }
  if task.kind == 'word':
    metrics = ['acc']
    config |= {
      'output_type': 'loglikelihood',
      'target_delimiter': '',
      'doc_to_text': lambda doc: doc['text'],
      'doc_to_target': lambda doc: doc['target'],
    }
  else:
    metrics = ['acc', 'acc_norm', 'acc_bytes']
    config |= {
      'output_type': 'multiple_choice',
      'doc_to_text': lambda doc: doc['text'],
      'doc_to_target': lambda doc: doc['gold'],
      'doc_to_choice': lambda doc: doc['choices'],
    }
  if task.kind == 'contexts':
    # lm-eval's several-contexts form: the text is the right index.
    config['doc_to_text'] = lambda doc: doc['gold']
    config['doc_to_target'] = lambda doc: doc['ending']
    metrics = ['acc']
  config['metric_list'] = [
    {'metric': m, 'aggregation': 'mean', 'higher_is_better': True} for m in metrics
  ]
  return config
