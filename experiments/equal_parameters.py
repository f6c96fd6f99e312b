r"""Children of one size, from deletion to recursion: nats, tasks, tokens a second.

Deleting layers is the baseline that a recursive child has to beat: it has as many
parameters and runs fewer layers. Every row is a child of `--params`, converted on
the same text and trained by the same recipe.

COMMAND
  python -m experiments.equal_parameters --params=120.4M --drop=15-18 \
      --calibration=wiki.jsonl.xz --train=news.jsonl.xz --text=other_news.jsonl.xz \
      --out=runs/equal_120
  --seeds=0,1 trains each row twice; --task_data=eval/ adds the tasks; --steps=1000
  with --rows='deleted and refitted,closed loops in their place' is the long run. A run that is started
  again goes on where it was.

HARDWARE
  Two CPU cores, 10 GiB; 4 to 8 s a training step of 1,024 tokens.

RESULT
  docs/results/equal_parameters.md
"""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

from absl import flags

from experiments import base
from experiments.measured import decode_speed
from rrt import command, console
from rrt.checkpoints.load import load, save
from rrt.checkpoints.native import is_native
from rrt.convert import drop, search, size
from rrt.convert.calibration_data import calibration_text
from rrt.convert.plan import ConvertConfig
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.evals import perplexity
from rrt.model import LanguageModel
from rrt.models.count import count_params
from rrt.train.loop import uptrain
from rrt.train.recipe import Recipe

FLAGS = flags.FLAGS
_PARENT = flags.DEFINE_string('parent', 'smollm2-135m', 'A vanilla model.')
_PARAMS = flags.DEFINE_string('params', '120.4M', 'Unique parameters of the children.')
_DROP = flags.DEFINE_string('drop', None, 'Layers that the deleted rows leave out.')
_ADDED = flags.DEFINE_list(
  'added', None, 'Prelude, block and loops of the row with added loops, such as 10,2,4.'
)
_CALIBRATION = flags.DEFINE_string('calibration', None, 'Text to fit on.')
_TRAIN = flags.DEFINE_string('train', None, 'Text to distil on.')
_TEXT = flags.DEFINE_string('text', None, 'Other text, to measure on.')
_TASK_DATA = flags.DEFINE_string('task_data', None, 'Directory of the tasks; none are run without.')
_TASKS = flags.DEFINE_string('tasks', 'paper,gsm8k', 'Tasks to run.')
_LIMIT = flags.DEFINE_integer('limit', 100, 'Questions of each task.')
_ROWS = flags.DEFINE_list('rows', None, 'Names of the rows to make; all by default.')
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Of the training text.')
_STEPS = flags.DEFINE_integer('steps', 40, 'Of training.')
_SPEED = flags.DEFINE_bool('speed', True, 'Measure decoding; the machine must be idle.')
_RATE = flags.DEFINE_float('learning_rate', 2e-4, 'The peak.')
_CACHE = flags.DEFINE_string(
  'teacher_cache', None, "Directory of the parent's predictions; --out/teacher by default."
)
_OUT = flags.DEFINE_string('out', None, 'Directory of models, runs and table.json.')


def children(parent: LanguageModel, params: str) -> dict[str, ConvertConfig | None]:
  """The rows: name -> how the child is made; None for the parent itself."""
  c = parent.config
  most = size.target(params, c)
  middle = lambda count: [(c.depth - count) // 2] * 2
  found = search.candidates(c, most, middle, ConvertConfig())
  tied = next((one.convert for one in found if one.kind == 'tied'), None)
  gone = drop.parse(_DROP.value, c.depth) if _DROP.value else found[0].convert.drop
  deleted = ConvertConfig(loops=1, drop=gone)
  rows: dict[str, ConvertConfig | None] = {
    'parent': None,
    'deleted': deleted.replace(refit='none'),
    'deleted and refitted': deleted.replace(refit='around'),
  }
  count, start = len(gone), gone[0]
  closed = ConvertConfig(
    prelude=start - count, loops=2, coda=c.depth - start - count, relax=(search.CLOSED,)
  )
  rank = search.fill(c, closed, search.EVEN, most)
  rows['closed loops in their place'] = closed.replace(rank=rank or 0)
  prelude, block, loops = map(int, _ADDED.value or (start - count, count, 2))
  rows['closed loops added'] = deleted.replace(
    refit='around',
    add_loops=True,
    prelude=prelude,
    block=block,
    loops=loops,
    coda=c.depth - count - prelude - block,
  )
  if tied is not None:
    rows['mean and plain SVD'] = tied.replace(init='average')
    rows['tied and calibrated'] = tied
    rows['tied in further sweeps'] = tied.replace(sweeps=3)
  return rows | {'nearest at the start': ConvertConfig(params=params)}


def recipe(model: LanguageModel, seed: int) -> Recipe:
  """The training of every row: forward KL from the parent, as `base` has it."""
  c = base.get_config()
  c.parent, c.seed, c.steps = _PARENT.value, seed, _STEPS.value
  c.data.path, c.heldout.path = _TRAIN.value, _TEXT.value
  c.heldout.every = max(_STEPS.value // 20, 20)
  c.checkpoint_every, c.remat = 50, 'none'
  c.teacher_cache = _CACHE.value or str(Path(_OUT.value) / 'teacher')
  c.optimizer.learning_rate = _RATE.value
  c.optimizer.warmup_steps = min(4, _STEPS.value)
  kinds = {r.kind for r in model.config.relax}
  # A gain of 0 opens within tens of steps only at a rate of its own.
  rules = {'lora': (r'lora_[ab]$', {'multiplier': 0.5}), 'gain': (r'/gain$', {'multiplier': 50.0})}
  if any(r.leads for r in model.config.relax):
    rules['lora'] = (r'lora_[ab]$', {'multiplier': 1.0})
  c.optimizer.rules = tuple(rules[kind] for kind in rules if kind in kinds)
  return Recipe.from_dict(c.to_dict())


def nats(model: LanguageModel) -> float:
  """Cross-entropy of the first 8,192 tokens of --text, rows of 1,024."""
  text = perplexity.read_text(_TEXT.value, 8192)
  return perplexity.score(model, text, context=1024, batch=2, max_tokens=8192).nll_nats


def tasks(model: LanguageModel) -> dict[str, float]:
  """Accuracy by task, in per cent."""
  from rrt.evals import harness

  found = harness.run(model, _TASKS.value.split(','), data=_TASK_DATA.value, limit=_LIMIT.value)
  return {r.task: 100 * r.score for r in found}


def main(_) -> None:
  """Makes, trains and measures the rows that table.json does not have yet."""
  for name in ('calibration', 'train', 'text', 'out'):
    if not FLAGS[name].value:
      raise InputError(f'--{name} is needed; see --help.')
  out = Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  parent = load(_PARENT.value)
  made = children(parent, _PARAMS.value)
  for name in _ROWS.value or ():
    if name not in made:
      raise InputError(f'--rows names {name!r}; the rows are {", ".join(made)}.')
  path = out / 'table.json'
  table: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
  for name in _ROWS.value or made:
    row = table.setdefault(name, {})

    def once(key: str, figure: Callable[[], Any], row=row, name=name) -> Any:
      if key not in row:
        row[key] = figure()
        path.write_text(json.dumps(table, indent=1) + '\n')
        print(f'{name}: {key} {row[key]}', flush=True)
      return row[key]

    start = _start(name, made[name], parent, out)
    once('parameters', lambda start=start: count_params(start.config).unique)
    once('layers_run', lambda start=start: start.config.depth)
    once('relaxations', lambda start=start: [r.kind for r in start.config.relax])
    once('nats_start', lambda start=start: nats(start))
    for rows in (1, 32) if _SPEED.value else ():
      once(f'tokens_per_second_{rows}', lambda start=start, rows=rows: decode_speed(start, rows))
    for seed in map(int, _SEEDS.value):
      trained = f'{_STEPS.value}_steps_seed_{seed}'
      if f'nats_{trained}' in row and not _TASK_DATA.value:
        continue
      workdir = out / folder(name) / trained
      run = uptrain(parent, start, recipe(start, seed), workdir)
      if run.stopped:
        raise SystemExit(128 + run.stopped)
      once(f'nats_{trained}', lambda run=run: nats(run.model))
      if _TASK_DATA.value and seed == int(_SEEDS.value[0]):
        once(f'tasks_{trained}', lambda run=run: tasks(run.model))
  _show(table)
  console.finish(table)


def folder(name: str) -> str:
  """A row's directory."""
  return ''.join(ch if ch.isalnum() else '_' for ch in name)


def _start(
  name: str, convert: ConvertConfig | None, parent: LanguageModel, out: Path
) -> LanguageModel:
  """The child before training, made once."""
  where = out / folder(name) / 'start'
  if convert is None:
    return parent
  if is_native(where):
    return load(str(where))
  text = calibration_text(_CALIBRATION.value, convert.calibration_tokens)
  child, report = to_recursive(parent, convert, calibration=text)
  report.show()
  save(child, where)
  return child


def _show(table: dict[str, dict[str, Any]]) -> None:
  ends = sorted({k for row in table.values() for k in row if k.startswith('nats_')})
  columns = ['parameters', 'layers_run', *ends, 'tokens_per_second_1', 'tokens_per_second_32']
  console.table([[n, *(row.get(c) for c in columns)] for n, row in table.items()], ['', *columns])


if __name__ == '__main__':
  command.run(main)
