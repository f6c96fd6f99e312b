r"""Runs the paper's few-shot tasks through EleutherAI's lm-eval.

From Python, `run(model, tasks, data=...)`. From lm-eval's own command line,
with all of its tasks:

python -m rrt.evals.harness run --model rrt \
    --model_args pretrained=smollm2-135m,loops=1 --tasks hellaswag --limit 50

This module and `lm_eval_model` are the only ones that import lm_eval.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import logging
import sys
from typing import TYPE_CHECKING, Any

from rrt.errors import InputError

try:
  import datasets
  from lm_eval import evaluator

  from rrt.evals.lm_eval_model import RrtLM
except ImportError as e:
  raise InputError('Tasks need lm-eval: pip install "relaxed-recursive-transformers[eval]".') from e

from rrt.evals import tasks

if TYPE_CHECKING:
  from rrt.exits import gate as gate_lib
  from rrt.model import LanguageModel

_COUNTS = ('sample_len', 'sample_count')  # among lm-eval's scores


@dataclasses.dataclass(frozen=True)
class Result:
  """A task's score.

  Attributes:
    task: its name.
    metric: name of the metric in `score`, such as 'acc'.
    score: a share, from 0 to 1.
    stderr: its standard error; None where lm-eval has none, as for one question.
    questions: number of questions.
    metrics: all metrics of lm-eval by name.
    mean_loops: of the endings' tokens, over all tasks of the run; None without
      a gate.
  """

  task: str
  metric: str
  score: float
  stderr: float | None
  questions: int
  metrics: dict[str, float]
  mean_loops: float | None = None


def run(
  model: LanguageModel,
  names: str | Sequence[str] = 'paper',
  *,
  data: str | None = None,
  shots: int = 0,
  limit: int | None = None,
  loops: int | None = None,
  dtype: str = 'float32',
  batch_tokens: int | None = None,
  gate: gate_lib.Gate | None = None,
  seed: int = 1234,
) -> list[Result]:
  """Evaluates a model on tasks.

  Args:
    model: what `rrt.load` gives.
    names: task names, comma-separated or a list; 'paper' is the seven.
    data: directory of JSON lines (see `rrt.evals.tasks`); None fetches
      lm-eval's own tasks of these names from the hub.
    shots: solved questions before each one; the harness' standard for the
      paper's tasks is 0.
    limit: evaluate only the first so many questions of each.
    loops: how many loops of the block to run; None for all.
    dtype: of the computation.
    batch_tokens: padded tokens of a pass, about.
    gate: early exits of the endings' tokens; None runs all loops.
    seed: of the choice of shots.

  Raises:
    InputError: a task or its data is missing or damaged.
  """
  names = tasks.parse_names(names)
  if not names:
    raise InputError(f'tasks is empty; try {",".join(tasks.PAPER)}.')
  if shots < 0:
    raise InputError(f'shots={shots}: must be 0 or more.')
  if limit is not None and limit < 1:
    raise InputError(f'limit={limit}: must be 1 or more.')
  chosen: list[Any] = [tasks.hub_name(n) for n in names]
  metrics = ['acc' if n in tasks.PLAIN_SCORE else '' for n in names]
  if data is not None:
    local = [tasks.load_task(n, data) for n in names]
    chosen = [tasks.lm_eval_config(t, _dataset, shots) for t in local]
    metrics = [t.metric for t in local]
  lm = RrtLM(model, loops=loops, dtype=dtype, batch_tokens=batch_tokens, gate=gate)
  found = _evaluate(lm, chosen, shots, limit, seed)
  keys = names if data is not None else chosen
  depth = lm.mean_loops if gate else None
  return [
    dataclasses.replace(_result(name, found, key, metric), mean_loops=depth)
    for name, key, metric in zip(names, keys, metrics, strict=True)
  ]


def _evaluate(lm, chosen, shots, limit, seed):
  """lm-eval's evaluation loop, with its logging silenced."""
  loud = logging.getLogger('lm_eval')
  before = loud.level
  loud.setLevel(logging.ERROR)
  try:
    return evaluator.simple_evaluate(
      model=lm,
      tasks=chosen,
      num_fewshot=shots,
      limit=limit,
      log_samples=False,
      bootstrap_iters=100,
      fewshot_random_seed=seed,
    )
  except (KeyError, ConnectionError, OSError, ValueError) as e:
    if isinstance(e, InputError):
      raise
    if all(isinstance(c, str) for c in chosen):
      raise InputError(
        f'The tasks could not be fetched from the hub ({e}); give --data, '
        'a directory with their JSON lines.'
      ) from e
    raise
  finally:
    loud.setLevel(before)


def _dataset(splits: dict[str, list[dict[str, Any]]]):
  return datasets.DatasetDict(
    {name: datasets.Dataset.from_list(docs) for name, docs in splits.items()}
  )


def _result(name, found, key, metric) -> Result:
  """One task's result; metric '' takes acc_norm, acc or the first one."""
  figures = {
    k.removesuffix(',none'): v
    for k, v in found['results'][key].items()
    if isinstance(v, (int, float)) and k not in _COUNTS
  }
  scores = [k for k in figures if not k.partition(',')[0].endswith('_stderr')]
  if not scores:
    raise InputError(f'tasks={name!r}: lm-eval gives no score of it.')
  if not metric:
    known = [k for k in ('acc_norm', 'acc') if k in scores]
    metric = (known + scores)[0]
  base, comma, kind = metric.partition(',')
  return Result(
    name,
    metric,
    figures[metric],
    figures.get(f'{base}_stderr{comma}{kind}'),
    _questions(found, key),
    figures,
  )


def _questions(found, key) -> int:
  """Number of questions of a task, or of all tasks of a group."""
  if key in found['n-samples']:
    return found['n-samples'][key]['effective']
  parts = found.get('group_subtasks', {}).get(key, ())
  return sum(_questions(found, part) for part in parts)


def main() -> None:
  """lm-eval's command line with `--model rrt` registered."""
  from lm_eval.__main__ import cli_evaluate

  try:
    cli_evaluate()
  except InputError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
