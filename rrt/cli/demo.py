r"""A real model becomes a smaller one that still writes sentences.

    rrt demo                      # English text that is installed
    rrt demo --data=my_text.txt   # your own text
    rrt demo --exits              # also early exits and the engine

SmolLM2-135M is converted, calibrated on a little text, and distilled from its parent
for as many steps as `--minutes` allow. Parent and child are evaluated on held-out text
and continue the same prompts. Figures are printed and, with plots, written to
report.html.
"""

from __future__ import annotations

import json
from pathlib import Path
import time

from rrt import command, console, runtime
from rrt.checkpoints.load import check_save, load, save
from rrt.cli import demo_exits, plots
from rrt.convert.plan import recommended
from rrt.convert.recursive import to_recursive
from rrt.data import corpus, sources
from rrt.errors import InputError
from rrt.evals import gating, perplexity
from rrt.files import check_writable
from rrt.infer.generate import complete
from rrt.model import LanguageModel
from rrt.models.count import count_params

FLAGS = command.Flags(
  'Converts SmolLM2-135M, uptrains it and runs it.',
  'rrt demo\nrrt demo --data=my_text.txt --minutes=10',
)
_MODEL = FLAGS.usual.string('model', 'smollm2-135m', 'The parent, as rrt.load takes it.')
_DATA = FLAGS.usual.string(
  'data',
  'builtin',
  'Text to calibrate, train and measure on: a file, a '
  'directory, or "builtin" for text found in the installation.',
)
_OUT = FLAGS.usual.string('out', 'demo', 'Directory for report and model.')
_MINUTES = FLAGS.usual.float(
  'minutes', 2.75, 'Time for all but --exits; training takes what is left.'
)
_EXITS = FLAGS.usual.bool('exits', False, 'Also fit an exit gate, and run the engine three ways.')
_PRELUDE = FLAGS.rare.integer('prelude', None, 'Layers before the block; as rrt convert.')
_CODA = FLAGS.rare.integer('coda', None, 'Layers after the block; as rrt convert.')
_LOOPS = FLAGS.rare.integer('loops', 2, 'Times the block runs.')
_RANK = FLAGS.rare.integer('rank', 64, 'Rank of the per-loop LoRA.')
_CALIBRATION_TOKENS = FLAGS.rare.integer(
  'calibration_tokens', 8192, 'Calibration tokens of the conversion.'
)
_STEPS = FLAGS.usual.integer('steps', 1000, 'Steps of uptraining, at most.')
_BATCH = FLAGS.rare.integer('batch', 2, 'Batch size of training, in rows.')
_LENGTH = FLAGS.rare.integer('length', 512, 'Tokens of a training row.')
_CONTEXT = FLAGS.rare.integer('context', 512, 'Tokens of an evaluation row.')
_HELDOUT = FLAGS.rare.integer('heldout_tokens', 4096, 'Held-out tokens to evaluate on.')
_NEW = FLAGS.usual.integer('max_new_tokens', 40, 'Tokens to generate with each model.')
_PROMPT = FLAGS.usual.multi_string(
  'prompt',
  ['The city was founded in', 'Scientists have found that'],
  'Prompt of the samples; may be repeated.',
)
_EXIT_WEIGHT = FLAGS.rare.float(
  'exit_weight', 0.3, "Weight of the earlier loops' losses in uptraining."
)
_EXIT_LOSS = FLAGS.rare.float(
  'exit_loss', 0.1, 'Target of the gate: nats a token lost to early exits.'
)
_SEED = FLAGS.rare.integer('seed', 0, 'Seed of data order, gate and weights.')


def prepare_text(data: str, out: Path) -> tuple[Path, Path, Path]:
  """Splits the documents for training, gate calibration and evaluation.

  Returns:
    Three files of JSON lines with disjoint documents.

  Raises:
    InputError: the text is too short to be split.
  """
  rest, heldout = corpus.split(list(sources.stream(data)), seed=0)
  size = sum(map(len, rest))
  # Some 5 characters a token, and documents do not come in any size.
  share = 8 * _gate_tokens() / max(size, 1)
  train, gate = corpus.split(rest, min(max(share, 0.05), 0.2), seed=1)
  parts = train, gate, heldout
  least = 40_000, 2000, 2000
  if any(sum(map(len, p)) < n for p, n in zip(parts, least, strict=True)):
    raise InputError(
      f'--data={data}: holds too little text, '
      f'{size + sum(map(len, heldout)):,} characters; the demo needs '
      'several documents of 50,000 characters or more together.'
    )
  train_path, gate_path, heldout_path = paths = tuple(
    out / f'{name}.jsonl' for name in ('train', 'gate', 'heldout')
  )
  read = Path(data).expanduser().resolve()
  if any(p.resolve() == read or read in p.resolve().parents for p in paths):
    raise InputError(
      f'--out={out}: the demo would write into the text of --data={data}; choose another directory.'
    )
  for path, documents in zip(paths, parts, strict=True):
    lines = [json.dumps({'text': d}) + '\n' for d in documents]
    path.write_text(''.join(lines), 'utf-8')
  return train_path, gate_path, heldout_path


def _gate_context() -> int:
  """Row length for fitting, calibrating and evaluating the gate, in tokens."""
  return max(_CONTEXT.value // 4, 8)


def _gate_tokens() -> int:
  """Number of tokens for fitting and calibrating the gate."""
  return 64 * _gate_context()


def recipe(train: Path, heldout: Path) -> dict:
  """The recipe of the uptraining."""
  return {
    'steps': _STEPS.value,
    'batch': _BATCH.value,
    'length': _LENGTH.value,
    'seed': _SEED.value,
    # Activations are computed again, and only LoRA and norms have moments: this
    # fits into 4 GiB. The number of steps is not known yet, so the rate is constant.
    'remat': 'full',
    'loss': {'chunk_tokens': 256},
    'optimizer': {
      'train': 'relaxations',
      'learning_rate': 5e-4,
      'warmup_steps': min(3, _STEPS.value),
      'schedule': 'constant',
      'beta2': 0.98,
    },
    'exits': {
      'coefficients': 'aggressive' if _EXITS.value else 'none',
      'weight': _EXIT_WEIGHT.value,
    },
    'data': {'path': str(train)},
    'heldout': {
      'path': str(heldout),
      'max_tokens': _HELDOUT.value,
      'context': _CONTEXT.value,
      'batch': 1,
      'every': 10,
    },
  }


def measure(model: LanguageModel, heldout: str, seconds: float) -> dict:
  """Size, held-out quality and samples of one model."""
  quality = perplexity.score(
    model, heldout, context=_CONTEXT.value, batch=1, max_tokens=_HELDOUT.value
  )
  texts = complete(model, _PROMPT.value, max_new_tokens=_NEW.value, temperature=0.0)
  return {
    'params_unique': count_params(model.config).unique,
    'nll_nats': quality.nll_nats,
    'bits_per_byte': quality.bits_per_byte,
    'seconds': seconds,
    'texts': [c.text for c in texts],
  }


def main(argv):
  """Runs the demo from the flags."""
  del argv
  from rrt.train.loop import uptrain  # needs the train extra

  begin = time.monotonic()
  if not _MINUTES.value > 0:
    raise InputError(f'--minutes={_MINUTES.value}: must be above 0.')
  for flag, least in (
    (_STEPS, 1),
    (_BATCH, 1),
    (_LENGTH, 2),
    (_CONTEXT, 2),
    (_HELDOUT, 2),
    (_NEW, 1),
  ):
    if flag.value < least:
      raise InputError(f'--{flag.name}={flag.value}: must be {least} or more.')
  out = Path(_OUT.value)
  check_writable(out)
  check_save(out / 'model')
  plots.open_pyplot()  # Missing, it ends the demo here and not at its end.
  say = Steps(begin, 8 if _EXITS.value else 6)

  say(f'loading {_MODEL.value} and the text')
  # The text first: too little of it is seen before a model is read.
  train, apart, heldout = prepare_text(_DATA.value, out)
  parent = load(_MODEL.value)
  heldout_text = '\n\n'.join(sources.stream(heldout))
  gate_rows: list[list[int]] = []
  if _EXITS.value:
    gate_rows = perplexity.make_rows(
      parent, '\n\n'.join(sources.stream(apart)), _gate_context(), _gate_tokens()
    )
    gating.split(gate_rows)
  rows = {}
  say('the parent: loss on held-out text, and two texts')
  rows['parent'] = measure(parent, heldout_text, 0.0)
  runtime.release_memory()

  prelude, coda = _PRELUDE.value, _CODA.value
  if prelude is None and coda is None:
    prelude, coda = recommended(parent.config.depth, _LOOPS.value)
  say('the child: shared weights fitted to a text')
  child, report = to_recursive(
    parent,
    prelude=prelude or 0,
    loops=_LOOPS.value,
    coda=coda or 0,
    rank=_RANK.value,
    calibration='\n\n'.join(sources.stream(train)),
    calibration_tokens=_CALIBRATION_TOKENS.value,
    seed=_SEED.value,
  )
  start = time.monotonic()
  rows['calibrated'] = measure(child, heldout_text, report.seconds)

  runtime.release_memory()
  # What is left, less the time of measuring once more.
  spent = time.monotonic() - begin + (time.monotonic() - start)
  # Of short budgets a first run, which compiles, would leave nothing to train in.
  least = min(30.0, 60 * _MINUTES.value / 4)
  seconds = max(0.9 * (60 * _MINUTES.value - spent), least)
  say(f'training it with the parent as teacher, for {seconds:.0f} s')
  start = time.monotonic()
  run = uptrain(parent, child, recipe(train, heldout), seconds=seconds)
  rows['uptrained'] = measure(run.model, heldout_text, report.seconds + time.monotonic() - start)
  model, exits, ways = run.model, {}, {}
  if _EXITS.value:
    say(f'a gate calibrated to lose less than {_EXIT_LOSS.value} nats a token')
    model, exits = demo_exits.leave_early(
      model,
      gate_rows,
      heldout_text,
      loss=_EXIT_LOSS.value,
      context=_gate_context(),
      max_tokens=_HELDOUT.value,
    )
    say('the engine: eight texts at once, three ways')
    ways = demo_exits.serve(model, heldout_text, _CONTEXT.value, _NEW.value)
  say(f'writing {out}')
  save(model, out / 'model')

  total = time.monotonic() - begin
  tokens = run.step * _BATCH.value * _LENGTH.value
  title = f'{_MODEL.value}: {report.shape}'
  page = plots.demo_page(
    title=title,
    prompts=_PROMPT.value,
    rows=rows,
    history=run.history,
    seconds=total,
    tokens_a_step=_BATCH.value * _LENGTH.value,
    exits=exits,
    ways=ways,
  )
  (out / 'report.html').write_text(page, 'utf-8')
  say('done')
  show(rows)
  if exits:
    demo_exits.show_exits(exits, ways)
  print('\n'.join(verdict(model, rows, tokens, out)), end='\n\n')
  console.finish(
    {
      'seconds': total,
      'peak_memory_bytes': console.peak_memory_bytes(),
      'steps': run.step,
      'report': str(out / 'report.html'),
      'model': str(out / 'model'),
      **{
        f'{k}_{name}': row[k]
        for name, row in rows.items()
        for k in ('params_unique', 'nll_nats', 'bits_per_byte')
      },
    }
    | (demo_exits.figures_of_exits(exits, ways) if exits else {})
  )


class Steps:
  """Prints the demo's steps, numbered and timed."""

  def __init__(self, begin: float, count: int):
    self._begin, self._count, self._step = begin, count, 0

  def __call__(self, text: str) -> None:
    self._step += 1
    gone = time.monotonic() - self._begin
    print(f'[{self._step}/{self._count}] {gone:4.0f} s  {text}', flush=True)


def verdict(model: LanguageModel, rows: dict, tokens: int, out: Path) -> list[str]:
  """What was saved and lost, what speed is to be had, and how to go on."""
  parent, start, child = rows['parent'], rows['calibrated'], rows['uptrained']
  c = model.config
  stored = c.prelude_layers + c.block_layers + c.coda_layers
  less = 1 - child['params_unique'] / parent['params_unique']
  mib = [4 * r['params_unique'] / 2**20 for r in (parent, child)]
  worse = child['bits_per_byte'] / parent['bits_per_byte'] - 1
  return [
    f'Smaller by {100 * less:.0f} %: {mib[1]:.0f} of {mib[0]:.0f} MiB in float32. {stored} layers '
    f'are stored, {c.depth} run ({c.block_layers} of them {c.loops} times).',
    f'Worse by {100 * worse:.0f} %: {child["bits_per_byte"]:.3f} bits a byte on text it has not '
    f'seen, the parent {parent["bits_per_byte"]:.3f}.',
    f'Training on {tokens:,} tokens changed {start["bits_per_byte"]:.3f} to '
    f'{child["bits_per_byte"]:.3f}; more steps help (--minutes=20), the paper takes billions.',
    f'Not faster: all {c.depth} layers run. Where leaving early pays, and deleting layers is '
    'better: README, "Where we lose".',
    f'Try it:     rrt generate --model={out / "model"} --prompt="The sea is"',
    'Your model: rrt convert --source=MODEL --rank=64 --calibration=TEXT --out=child',
    'Your text:  rrt demo --data=TEXT, then rrt train --help',
    f'The curves: {out / "report.html"}',
  ]


def show(rows: dict) -> None:
  """Prints the models side by side, then their samples."""
  print()
  console.table(
    [
      [name, r['params_unique'], r['nll_nats'], r['bits_per_byte'], round(r['seconds'])]
      for name, r in rows.items()
    ],
    ['model', 'parameters', 'nats a token', 'bits a byte', 'seconds to make'],
  )
  for i, prompt in enumerate(_PROMPT.value):
    print(f'"{prompt}" ...')
    for name, r in rows.items():
      text = ' '.join(r['texts'][i].split())
      print(f'  {name:<11} {text}')
    print()
