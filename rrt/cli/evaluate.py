r"""Measures a model: cross-entropy of a text, and few-shot tasks.

rrt evaluate --model=child --parent=smollm2-135m \
    --text=news.jsonl.xz --max_tokens=8192 --context=1024 --loops=all

rrt evaluate --model=child --tasks=paper --data=eval/ --limit=200

rrt evaluate --model=gated --text=news.jsonl.xz --exits=all \
    --curve=curve.svg

Prints tables and, as the last line, one JSON object.
"""

import dataclasses
import json
import pathlib

from rrt import command, console
from rrt.errors import InputError
from rrt.files import check_file_writable

FLAGS = command.Flags(
  'Measures cross-entropy of a text, few-shot tasks, and early exits.',
  'rrt evaluate --model=child --parent=smollm2-135m \\\n'
  '    --text=news.jsonl.xz --max_tokens=8192 --loops=all',
)
_MODEL = FLAGS.needed.string(
  'model',
  None,
  'An rrt directory or training workdir, a Hugging Face directory, a GGUF '
  'file, smollm2-135m, gemma3-270m, or a hub id.',
)
_ADAPTER = FLAGS.usual.string(
  'adapter', None, "Directory of the model's task adapter (rrt.save_adapter)."
)
_PARENT = FLAGS.usual.string('parent', None, 'A model to compare with, evaluated in the same way.')
_TEXT = FLAGS.usual.string(
  'text',
  None,
  'Text to score: a file, directory or glob of text, parquet or JSON lines '
  'with a field "text" (also .gz, .xz, .zst), its documents joined by blank '
  'lines; builtin:heldout is text found in the installation.',
)
_MAX_TOKENS = FLAGS.usual.integer(
  'max_tokens', None, 'Score the first so many tokens; all by default.'
)
_CONTEXT = FLAGS.usual.integer(
  'context',
  None,
  'Tokens in a row; rows are independent, and the first token of a row is not '
  "scored. By default 1024, or the model's context if that is shorter.",
)
_BATCH = FLAGS.rare.integer('batch', 4, 'Rows (of --context, or of 512 tokens in tasks) in a pass.')
_LOOPS = FLAGS.usual.string(
  'loops',
  None,
  'How many loops of the block to run: a number, several (1,2), or all '
  'for a table of every count. The full depth by default.',
)
_TASKS = FLAGS.usual.string(
  'tasks',
  None,
  'Comma-separated task names; "paper" is LAMBADA, HellaSwag, PIQA, '
  'WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA.',
)
_DATA = FLAGS.usual.string(
  'data',
  None,
  'Directory for --tasks with a file TASK*.jsonl (also .gz, .xz) for each: '
  'lines with query, choices and label (WinoGrande: context_options, '
  'continuation and label; LAMBADA: text). The hub by default.',
)
_LIMIT = FLAGS.usual.integer(
  'limit', None, 'Evaluate only the first so many questions of each task.'
)
_SHOTS = FLAGS.rare.integer('shots', 0, 'Few-shot examples before each question.')
_EXITS = FLAGS.usual.string(
  'exits',
  None,
  'With --text: quality and mean loops of early exits by gate; all, or some of '
  'learned (needs a gate from rrt fit-gate), change, margin, entropy, '
  'oracle. With --tasks also their scores, by all but the oracle.',
)
_KV = FLAGS.rare.list(
  'kv',
  ['propagate'],
  'With --exits: cache policy for the loops that a token skipped; some of '
  'write_ahead, propagate, exact_fill.',
)
_CURVE = FLAGS.rare.string(
  'curve', None, 'With --exits: draw quality against depth to this SVG file.'
)
_DTYPE = FLAGS.rare.enum('dtype', 'float32', ['float32', 'bfloat16'], 'Dtype of the computation.')
_OUT = FLAGS.rare.string('out', None, 'Also write the JSON to this file.')


def parse_loops(text: str | None, loops: int) -> list[int]:
  """The loop counts that --loops asks for, of a model with `loops`."""
  if text is None:
    return [loops]
  if text == 'all':
    return list(range(1, loops + 1))
  try:
    counts = [int(part) for part in text.split(',')]
  except ValueError:
    raise InputError(f'loops={text!r}: must be a number, several like 1,2, or all.') from None
  for count in counts:
    if not 1 <= count <= loops:
      raise InputError(f'loops={count}: this model runs from 1 to {loops} loops.')
  return counts


def measure(model, text: str | None, context: int, loops: int, label: str) -> dict:
  """Scores of one model at one loop count, as the flags ask."""
  from rrt.evals import perplexity

  figures: dict = {'loops': loops}
  if text is not None:
    rows = perplexity.make_rows(model, text, context, _MAX_TOKENS.value)
    total = sum(map(len, rows))
    with console.Progress(total, label, 'tokens') as progress:
      score = perplexity.score(
        model,
        text,
        context=context,
        loops=loops,
        batch=_BATCH.value,
        max_tokens=_MAX_TOKENS.value,
        dtype=_DTYPE.value,
        progress=progress.update,
      )
    figures |= dataclasses.asdict(score)
  if _TASKS.value:
    from rrt.evals import harness

    found = harness.run(model, loops=loops, **_task_settings())
    figures['tasks'] = {
      r.task: {
        'metric': r.metric,
        'score': r.score,
        'stderr': r.stderr,
        'questions': r.questions,
        **r.metrics,
      }
      for r in found
    }
    figures['mean_score'] = sum(r.score for r in found) / len(found)
  return figures


def _task_settings() -> dict:
  return {
    'names': _TASKS.value,
    'data': _DATA.value,
    'shots': _SHOTS.value,
    'limit': _LIMIT.value,
    'dtype': _DTYPE.value,
    'batch_tokens': 512 * _BATCH.value,
  }


def main(argv) -> None:
  """Measures what the flags ask for, prints and writes it."""
  del argv
  if not _MODEL.value:
    raise InputError('--model is missing; try --model=smollm2-135m.')
  if not (_TEXT.value or _TASKS.value):
    raise InputError('Nothing to measure; give --text, --tasks or both.')
  for flag in (_MAX_TOKENS, _CONTEXT):
    command.check_effect(flag, bool(_TEXT.value), '--text')
  for flag in (_DATA, _LIMIT, _SHOTS):
    command.check_effect(flag, bool(_TASKS.value), '--tasks')
  for flag in (_KV, _CURVE):
    command.check_effect(flag, bool(_EXITS.value), '--exits')
  from rrt.checkpoints.load import load
  from rrt.cli import exit_report
  from rrt.evals import perplexity

  if _EXITS.value:
    exit_report.check(_TEXT.value, _EXITS.value, _KV.value, _CURVE.value)
  if _OUT.value:
    _check_out(pathlib.Path(_OUT.value))
  text = None
  if _TEXT.value:
    text = perplexity.read_text(_TEXT.value, _MAX_TOKENS.value)
  if _TASKS.value and _DATA.value:
    from rrt.evals import tasks

    for name in tasks.parse_names(_TASKS.value):
      tasks.find_files(name, _DATA.value)

  measured: list[tuple[str, dict]] = []
  context = None
  if _PARENT.value:
    parent = load(_PARENT.value)
    context = _context(parent)
    figures = measure(parent, text, context, parent.config.loops, 'parent')
    measured.append(('parent', figures))
    del parent
  model = load(_MODEL.value, adapter=_ADAPTER.value)
  if _EXITS.value:
    exit_report.check_model(model, _EXITS.value)
  context = _context(model, context)
  for loops in parse_loops(_LOOPS.value, model.config.loops):
    label = f'{loops} of {model.config.loops} loops'
    measured.append((label, measure(model, text, context, loops, label)))
  _print(measured)
  points = []
  if _EXITS.value and text is not None:
    rows = perplexity.make_rows(model, text, context, _MAX_TOKENS.value)
    points = exit_report.measure(
      model, rows, _EXITS.value, _KV.value, _CURVE.value, batch=_BATCH.value, dtype=_DTYPE.value
    )
  by_exits = []
  if points and _TASKS.value:
    by_exits = exit_report.ask_tasks(model, points, **_task_settings())

  # The deepest measurement is the model's own; the others stand beside it.
  own = [figures for name, figures in measured if name != 'parent']
  deepest = max(own, key=lambda figures: figures['loops'])
  final = {'model': _MODEL.value, 'context': context} | deepest
  if len(own) > 1:
    final['by_loops'] = own
  if points:
    final['exits'] = [p.plain() for p in points]
  if by_exits:
    final['tasks_by_exits'] = by_exits
  if _PARENT.value:
    final['parent'] = {'model': _PARENT.value} | measured[0][1]
  final['peak_memory_bytes'] = console.peak_memory_bytes()
  failed = None
  if _OUT.value:
    try:
      pathlib.Path(_OUT.value).write_text(json.dumps(final, indent=1) + '\n')
    except OSError as e:
      failed = e
  console.finish(final)  # Printed in any case: measuring may have taken hours.
  if failed:
    raise InputError(_unwritable(failed)) from failed


def _context(model, parent: int | None = None) -> int:
  """--context, or its default: the same for a model as for its parent."""
  if _CONTEXT.value is not None:
    return _CONTEXT.value
  limit = model.config.max_context
  if parent and limit < parent and _TEXT.value:
    raise InputError(
      f'The model was made for {limit} tokens, the parent for more; give '
      f'--context={limit} to measure both alike.'
    )
  return min(parent or 1024, limit)


def _check_out(path: pathlib.Path) -> None:
  """Raises InputError unless the file can be written; leaves it as it is."""
  if path.is_file() and not _is_result(path):
    raise InputError(
      f'out={_OUT.value!r}: exists and is not a result of this command, so it '
      'is left alone; choose another file.'
    )
  try:
    check_file_writable(path)
  except OSError as e:
    raise InputError(_unwritable(e)) from e


def _is_result(path: pathlib.Path) -> bool:
  """Whether a file is empty or holds what this command wrote."""
  try:
    with open(path, encoding='utf-8') as file:
      begin = file.read(16)
      return not begin or {'model', 'peak_memory_bytes'} <= set(json.loads(begin + file.read()))
  except (OSError, ValueError, TypeError):
    return False


def _unwritable(error: OSError) -> str:
  why = error.strerror or error
  return f'out={_OUT.value!r}: cannot be written ({why}); choose another file.'


def _print(measured) -> None:
  """Tables of text scores and of tasks, a column or row a measurement."""
  if 'nll_nats' in measured[0][1]:
    console.table(
      [
        (name, f['nll_nats'], f['perplexity'], f['bits_per_byte'], f['tokens'])
        for name, f in measured
      ],
      ('model', 'nats/token', 'perplexity', 'bits/byte', 'tokens'),
    )
  if 'tasks' not in measured[0][1]:
    return
  names = list(measured[0][1]['tasks'])
  rows = []
  for name in names:
    cells = [f['tasks'][name] for _, f in measured]
    rows.append(
      (
        name,
        cells[0]['metric'],
        cells[0]['questions'],
        *(f'{_percent(c["score"])} +- {_percent(c["stderr"])}' for c in cells),
      )
    )
  rows.append(('mean', '', None, *(f'{100 * f["mean_score"]:.1f}' for _, f in measured)))
  console.table(rows, ('task', 'score', 'questions', *(n for n, _ in measured)))


def _percent(share: float | None) -> str:
  return '-' if share is None else f'{100 * share:.1f}'
