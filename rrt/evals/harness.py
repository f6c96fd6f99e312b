r"""The adapter to EleutherAI's lm-eval, and a front for the paper's tasks.

From Python, `run(model, tasks, data=...)`. From lm-eval's own command line,
with all of its tasks:

python -m rrt.evals.harness run --model rrt \
    --model_args pretrained=smollm2-135m,loops=1 --tasks hellaswag --limit 50

This is the only module that imports lm_eval and datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import logging
import sys
from typing import Any

from rrt.errors import InputError

try:
  import datasets
  from lm_eval import evaluator, utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
except ImportError as e:
  raise InputError(
    'Tasks need lm-eval: pip install "relaxed-recursive-transformers[eval]".'
  ) from e

from rrt import cli, pretrained
from rrt.evals import early_endings, endings, tasks
from rrt.infer import decode, gates, sample

_NEW_TOKENS = 256  # lm-eval's default for tasks that name no limit
_COUNTS = ('sample_len', 'sample_count')  # among lm-eval's scores
_ROW_TOKENS = 512  # what one row of lm-eval's batch_size stands for


@dataclasses.dataclass(frozen=True)
class Result:
  """A task's score.

  Attributes:
    task: its name.
    metric: what `score` is, such as 'acc'.
    score: a share, from 0 to 1.
    stderr: its standard error; None where lm-eval has none, as of one question.
    questions: how many were asked.
    metrics: all that lm-eval computed, by name.
  """

  task: str
  metric: str
  score: float
  stderr: float | None
  questions: int
  metrics: dict[str, float]


@register_model('rrt')
class RrtLM(TemplateLM):
  """A model of this package, as lm-eval sees one.

  Args of `--model_args`: `pretrained` (anything that `rrt.load` takes),
  `loops`, `dtype`, `max_length`, `batch_tokens`.

  Attributes:
    gate: lets the tokens of endings leave early, with full `loops`; None
      lets none.
    mean_loops: of those tokens, in what was scored last.
  """

  gate: gates.Gate | None = None
  mean_loops = 0.0

  def __init__(
    self,
    pretrained: Any = None,
    *,
    loops: int | None = None,
    dtype: str = 'float32',
    max_length: int | None = None,
    batch_tokens: int | None = None,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    super().__init__()
    del max_batch_size, device  # lm-eval passes them to every model.
    if pretrained is None:
      raise InputError('pretrained= is missing, such as smollm2-135m.')
    self.model = _loaded(pretrained)
    self.tokenizer = self.model.tokenizer
    if self.tokenizer is None:
      raise InputError('Tasks need a model with a tokenizer.')
    self.config = self.model.config
    if max_length is not None:
      if not 2 <= max_length <= self.config.max_context:
        raise InputError(
          f'max_length={max_length}: must lie between 2 and '
          f'{self.config.max_context}, the context of the model.'
        )
      self.config = dataclasses.replace(self.config, max_context=max_length)
    self.loops, self.dtype = loops, dtype
    if batch_tokens is None:
      rows = 8 if batch_size in (None, 'auto') else int(batch_size)
      batch_tokens = _ROW_TOKENS * rows
    self.batch_tokens = batch_tokens
    self._params = decode.cast(self.model.params, dtype)
    self._writer: sample.Writer | None = None

  @property
  def max_length(self) -> int:
    """Tokens that the model can see."""
    return self.config.max_context

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text."""
    if not self.tokenizer.eos_ids:
      raise InputError('The tokenizer has no end token.')
    return self.tokenizer.eos_ids[0]

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text that has no context."""
    bos = self.tokenizer.bos_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    """A name for lm-eval's cache of requests."""
    return f'rrt-{self.tokenizer.sha256[:16]}'

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The tokenizer's own template."""
    del chat_template
    return self.tokenizer.chat_template

  def apply_chat_template(
    self, chat_history, add_generation_prompt: bool = True
  ) -> str:
    """A dialogue as text."""
    return self.tokenizer.apply_chat(chat_history, add_generation_prompt)

  def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
    """Token ids; a begin token where the family has the habit."""
    del kwargs
    bos = add_special_tokens
    if bos is None and self.tokenizer.bos_id is not None:
      # A chat template has written it already.
      if string.startswith(self.tokenizer.token(self.tokenizer.bos_id)):
        bos = False
    return self.tokenizer.encode(
      string, bos=bos and self.tokenizer.bos_id is not None
    )

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
    del kwargs
    pairs = [(context, ending) for _, context, ending in requests]
    found = self._score(pairs, 'score', show=not disable_tqdm)
    for (text, _, _), answer in zip(requests, found, strict=True):
      if text is not None:
        self.cache_hook.add_partial('loglikelihood', text, answer)
    return found

  def _score(self, pairs, label, show=True):
    if not pairs:
      return []
    if self.gate is not None:
      with cli.Progress(len(pairs), label, 'endings') as progress:
        found, self.mean_loops = early_endings.score_endings(
          self.config, self._params, pairs, self.gate, dtype=self.dtype,
          batch_tokens=self.batch_tokens, progress=progress.update,
        )  # fmt: skip
      return found
    arguments: dict[str, Any] = {
        'loops': self.loops, 'dtype': self.dtype,
        'batch_tokens': self.batch_tokens,
    }  # fmt: skip
    if not show:
      return endings.score_endings(
        self.config, self._params, pairs, **arguments
      )
    with cli.Progress(len(pairs), label, 'endings') as progress:
      return endings.score_endings(
          self.config, self._params, pairs, progress=progress.update,
          **arguments,
      )  # fmt: skip

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    """Log-likelihoods of whole texts, in windows where they are long."""
    pairs, counts = [], []
    for request in requests:
      windows = [
        utils.make_disjoint_window(w)
        for w in utils.get_rolling_token_windows(
          token_list=self.tok_encode(request.args[0], False),
          prefix_token=self.prefix_token_id,
          max_seq_len=self.max_length,
          context_len=1,
        )
      ]
      pairs += windows
      counts.append(len(windows))
    found = iter(self._score(pairs, 'score', show=not disable_tqdm))
    sums = []
    for request, count in zip(requests, counts, strict=True):
      sums.append(sum(next(found)[0] for _ in range(count)))
      self.cache_hook.add_partial(
        'loglikelihood_rolling', request.args, sums[-1]
      )
    return sums

  def generate_until(self, requests, disable_tqdm=False):
    """What the model writes after each context."""
    if self._writer is None:
      limited = dataclasses.replace(self.model, config=self.config)
      self._writer = sample.Writer(limited, loops=self.loops, dtype=self.dtype)
    by_settings: dict[sample.Settings, list[int]] = {}
    for i, request in enumerate(requests):
      by_settings.setdefault(_settings(request.args[1]), []).append(i)
    texts = [''] * len(requests)
    with cli.Progress(len(requests), 'write', 'texts') as progress:
      for settings, indices in by_settings.items():
        settings.check()
        room = self.max_length - settings.max_new_tokens
        if room < 1:
          raise InputError(
            f'max_gen_toks={settings.max_new_tokens}: leaves no room in '
            f'the context of {self.max_length}.'
          )
        prompts = {
          i: self.tok_encode(requests[i].args[0])[-room:]
          or [self.prefix_token_id]
          for i in indices
        }
        # Rows of like length share a batch and waste little padding.
        indices.sort(key=lambda i: -len(prompts[i]))
        for first in range(0, len(indices), sample.BATCH):
          part = indices[first : first + sample.BATCH]
          done = self._writer.complete([prompts[i] for i in part], settings)
          for i, completion in zip(part, done, strict=True):
            texts[i] = completion.text
            self.cache_hook.add_partial(
              'generate_until', requests[i].args, completion.text
            )
          if not disable_tqdm:
            progress.update(len(part))
    return texts


def _loaded(source):
  return source if hasattr(source, 'params') else pretrained.load(source)


def _settings(arguments: dict[str, Any]) -> sample.Settings:
  """lm-eval's generation arguments as ours."""
  until = arguments.get('until') or ()
  temperature = float(arguments.get('temperature') or 0.0)
  if not arguments.get('do_sample', temperature > 0):
    temperature = 0.0
  return sample.Settings(
    max_new_tokens=int(
      arguments.get('max_gen_toks')
      or arguments.get('max_new_tokens')
      or _NEW_TOKENS
    ),
    temperature=temperature,
    top_k=int(arguments.get('top_k') or 0),
    top_p=float(arguments.get('top_p') or 1.0),
    min_p=float(arguments.get('min_p') or 0.0),
    stop=(until,) if isinstance(until, str) else tuple(filter(None, until)),
  )


def run(
  model: pretrained.LanguageModel | RrtLM,
  names: str | Sequence[str] = 'paper',
  *,
  data: str | None = None,
  shots: int = 0,
  limit: int | None = None,
  loops: int | None = None,
  dtype: str = 'float32',
  batch_tokens: int | None = None,
  gate: gates.Gate | None = None,
  seed: int = 1234,
) -> list[Result]:
  """Asks a model the questions of some tasks.

  Args:
    model: what `rrt.load` gives.
    names: task names, comma-separated or a list; 'paper' is the seven.
    data: directory of JSON lines (see `rrt.evals.tasks`); None fetches
      lm-eval's own tasks of these names from the hub.
    shots: solved questions before each one; the harness' standard for the
      paper's tasks is 0.
    limit: ask only the first so many questions of each.
    loops: how many loops of the block to run; None for all.
    dtype: of the computation.
    batch_tokens: padded tokens of a pass, about.
    gate: lets the tokens of answers leave early.
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
  if not isinstance(model, RrtLM):
    model = RrtLM(model, loops=loops, dtype=dtype, batch_tokens=batch_tokens)
  model.gate = gate
  found = _evaluate(model, chosen, shots, limit, seed)
  keys = names if data is not None else chosen
  return [
    _result(name, found, key, metric)
    for name, key, metric in zip(names, keys, metrics, strict=True)
  ]


def _evaluate(lm, chosen, shots, limit, seed):
  """lm-eval's own loop, without its chatter."""
  loud = logging.getLogger('lm_eval')
  before = loud.level
  loud.setLevel(logging.ERROR)
  try:
    return evaluator.simple_evaluate(
        model=lm, tasks=chosen, num_fewshot=shots, limit=limit,
        log_samples=False, bootstrap_iters=100, fewshot_random_seed=seed,
    )  # fmt: skip
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
  """One task's figures; metric '' is the best known that it has."""
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
      name, metric, figures[metric],
      figures.get(f'{base}_stderr{comma}{kind}'),
      _questions(found, key), figures,
  )  # fmt: skip


def _questions(found, key) -> int:
  """How many were asked in a task, or in all tasks of a group."""
  if key in found['n-samples']:
    return found['n-samples'][key]['effective']
  parts = found.get('group_subtasks', {}).get(key, ())
  return sum(_questions(found, part) for part in parts)


def main() -> None:
  """lm-eval's command line, where `--model rrt` is known."""
  from lm_eval.__main__ import cli_evaluate

  try:
    cli_evaluate()
  except InputError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
