r"""A real model becomes a smaller one that still writes sentences.

    rrt demo                      # English text that is installed
    rrt demo --data=my_text.txt   # your own text

SmolLM2-135M is converted twice: with the paper's initialization (mean of the tied
layers, plain SVD) and calibrated. The calibrated child is then distilled from its
parent for a few dozen steps, with losses after both loops. All four models are
evaluated on held-out text and continue the same prompts. Then an exit gate is
fitted, and the engine decodes eight sequences at full depth, with early exits, and
in the lossless mode. Figures are printed and, with plots, written to report.html.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
import time
from typing import Any

from rrt import command, console
from rrt.checkpoints.load import check_save, load, save
from rrt.cli import plots
from rrt.convert.recursive import to_recursive
from rrt.data import corpus, sources
from rrt.errors import InputError
from rrt.evals import depth, every_loop, gating, perplexity
from rrt.exits import gate as gate_lib
from rrt.files import check_writable
from rrt.infer.engine.engine import Engine, Request
from rrt.infer.generate import complete
from rrt.model import LanguageModel
from rrt.models.count import count_params

FLAGS = command.Flags(
  'Converts SmolLM2-135M, uptrains it and runs it with early exits.',
  'rrt demo\nrrt demo --data=my_text.txt',
)
_MODEL = FLAGS.usual.string('model', 'smollm2-135m', 'The parent, as rrt.load takes it.')
_DATA = FLAGS.usual.string(
  'data',
  'builtin',
  'Text to calibrate, train and measure on: a file, a '
  'directory, or "builtin" for text found in the installation.',
)
_OUT = FLAGS.usual.string('out', 'demo', 'Directory for report and model.')
_PRELUDE = FLAGS.usual.integer('prelude', 8, 'Layers before the block.')
_CODA = FLAGS.usual.integer('coda', 8, 'Layers after the block.')
_LOOPS = FLAGS.usual.integer('loops', 2, 'Times the block runs.')
_RANK = FLAGS.usual.integer('rank', 64, 'Rank of the per-loop LoRA.')
_CALIBRATION_TOKENS = FLAGS.rare.integer(
  'calibration_tokens', 8192, 'Calibration tokens of the conversion.'
)
_STEPS = FLAGS.usual.integer('steps', 20, 'Steps of uptraining.')
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
    'optimizer': {
      'learning_rate': 2e-4,
      'warmup_steps': min(2, _STEPS.value),
      'schedule': 'cosine',
      'final_rate': 0.0,
      'beta2': 0.98,
      'rules': (('lora_[ab]$', {'multiplier': 0.5}),),
    },
    'exits': {'coefficients': 'aggressive', 'weight': _EXIT_WEIGHT.value},
    'data': {'path': str(train)},
    'heldout': {
      'path': str(heldout),
      'max_tokens': _HELDOUT.value,
      'context': _CONTEXT.value,
      'batch': 2,
      'every': max(_STEPS.value // 3, 1),
    },
  }


def measure(model: LanguageModel, heldout: str, seconds: float) -> dict:
  """Size, held-out quality and samples of one model."""
  quality = perplexity.score(
    model, heldout, context=_CONTEXT.value, batch=2, max_tokens=_HELDOUT.value
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
  steps = 8

  def say(step, text):
    gone = time.monotonic() - begin
    print(f'[{step}/{steps}] {gone:5.0f} s  {text}', flush=True)

  say(1, f'loading {_MODEL.value} and the text')
  # The text first: too little of it is seen before a model is read.
  train, apart, heldout = prepare_text(_DATA.value, out)
  parent = load(_MODEL.value)
  gate_rows = perplexity.make_rows(
    parent, '\n\n'.join(sources.stream(apart)), _gate_context(), _gate_tokens()
  )
  gating.split(gate_rows)
  heldout_text = '\n\n'.join(sources.stream(heldout))
  calibration = '\n\n'.join(sources.stream(train))
  shape: dict[str, Any] = dict(
    prelude=_PRELUDE.value,
    loops=_LOOPS.value,
    coda=_CODA.value,
    rank=_RANK.value,
    calibration=calibration,
    seed=_SEED.value,
    calibration_tokens=_CALIBRATION_TOKENS.value,
  )
  rows = {}
  say(2, 'the parent: held-out text, and what it writes')
  rows['parent'] = measure(parent, heldout_text, 0.0)

  say(3, "the paper's start: mean of the tied layers, plain SVD")
  plain, plain_report = to_recursive(parent, init='average', **shape)
  rows['plain SVD'] = measure(plain, heldout_text, plain_report.seconds)
  del plain

  say(4, 'the calibrated start')
  with console.Progress(parent.config.depth, 'calibrate', 'layers') as progress:
    child, report = to_recursive(parent, init='calibrated', progress=progress.to, **shape)
  rows['calibrated'] = measure(child, heldout_text, report.seconds)

  say(5, f'uptraining it: {_STEPS.value} steps of distillation')
  start = time.monotonic()
  run = uptrain(parent, child, recipe(train, heldout))
  rows['uptrained'] = measure(run.model, heldout_text, report.seconds + time.monotonic() - start)

  say(6, f'a gate calibrated to lose less than {_EXIT_LOSS.value} nats a token')
  gated, exits = leave_early(run.model, gate_rows, heldout_text)
  save(gated, out / 'model')

  say(7, 'the engine: eight texts at once, three ways')
  ways = serve(gated, heldout_text)

  say(8, 'done')
  show(rows)
  show_exits(exits, ways)
  total = time.monotonic() - begin
  page = plots.demo_page(
    title=f'{_MODEL.value}: {report.shape}',
    prompts=_PROMPT.value,
    rows=rows,
    history=run.history,
    seconds=total,
    tokens_a_step=_BATCH.value * _LENGTH.value,
    exits=exits,
    ways=ways,
  )
  (out / 'report.html').write_text(page, 'utf-8')
  print(
    f'The curves are in {out / "report.html"}. Go on with the model:\n'
    f'  rrt generate --model={out / "model"} --prompt="..."\n'
    f'  rrt serve --model={out / "model"} --gate=stored --lossless\n'
  )
  console.finish(
    {
      'seconds': total,
      'peak_memory_bytes': console.peak_memory_bytes(),
      'report': str(out / 'report.html'),
      'model': str(out / 'model'),
      **{
        f'{k}_{name.replace(" ", "_")}': row[k]
        for name, row in rows.items()
        for k in ('params_unique', 'nll_nats', 'bits_per_byte')
      },
      'nats_first_loop': exits['first'].nll_nats,
      'exits': exits['held'].plain(),
      'engine': {
        name: {k: w[k] for k in ('tokens_per_second', 'loops', 'same')} for name, w in ways.items()
      },
    }
  )


def leave_early(model: LanguageModel, rows: list[list[int]], heldout: str):
  """Fits a gate and measures early exits on held-out text.

  Args:
    model: trained with losses after all loops.
    rows: of unseen text, to fit and calibrate the gate.
    heldout: rows of other text, to evaluate on.
  """
  shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
  with console.Progress(
    gating.work(rows, 'learned', shares=shares), 'calibrate', 'tokens'
  ) as progress:
    gate, _ = gating.fit_gate(
      model, rows, loss=_EXIT_LOSS.value, shares=shares, progress=progress.update
    )
  rows = perplexity.make_rows(model, heldout, _gate_context(), _HELDOUT.value)
  static = every_loop.read_static(model, rows, gate.arrays)
  held = depth.measure(model, static, 'learned', gate.threshold, gate.arrays)
  first = depth.measure(model, static, 'change', -2.0)
  gated = dataclasses.replace(model, meta=gate_lib.store(model.meta, gate))
  return gated, {
    'held': held,
    'first': first,
    'exit_loss': _EXIT_LOSS.value,
    'loops': model.config.loops,
  }


def serve(model: LanguageModel, heldout: str) -> dict[str, dict]:
  """Decodes eight sequences in each mode of the engine, without compilation time."""
  size = max(min(_CONTEXT.value // 32, 16), 2)
  new = min(_NEW.value, model.config.max_context - size)
  rows = perplexity.make_rows(model, heldout, 2 * size, 16 * size)
  prompts = [row[:size] for row in rows[:8]]
  ways: dict[str, dict[str, Any]] = {}
  each: dict[str, dict[str, Any]] = {
    'full depth': {},
    'exits': {'gate': 'stored'},
    'lossless': {'lossless': True},
  }
  for name, options in each.items():
    engine = Engine(model, slots=8, context=size + new, **options)

    def write(engine=engine):
      return engine.run([Request.of(p, new, ignore_eos=True) for p in prompts])

    write()
    began = time.monotonic()
    done = write()
    took = time.monotonic() - began
    tokens = [r.tokens for r in done]
    loops = [n for r in done for n in r.loops]
    full = ways.get('full depth', {'tokens': tokens})['tokens']
    say = lambda ids: model.tokenizer.decode(ids) if model.tokenizer else str(ids)
    ways[name] = {
      'tokens': tokens,
      'tokens_per_second': len(loops) / took,
      'loops': sum(loops) / len(loops),
      'same': sum(a == b for a, b in zip(tokens, full, strict=True)),
      'pieces': [[(say([t]), n) for t, n in zip(r.tokens, r.loops, strict=True)] for r in done],
      'prompts': [say(p) for p in prompts],
    }
  return ways


def show_exits(exits: dict, ways: dict) -> None:
  """Prints cost and speed of early exits."""
  held, first = exits['held'], exits['first']
  print(
    f'All tokens leave after loop 1: {first.lost_nats:+.3f} nats a token, '
    f'{100 * first.agreement:.0f} % as at full depth.\n'
    f'The gate: {held.mean_loops:.2f} loops a token, {held.lost_nats:+.3f} '
    f'nats, {100 * held.agreement:.0f} % as at full depth.\n'
  )
  console.table(
    [(name, w['tokens_per_second'], w['loops'], f'{w["same"]} of 8') for name, w in ways.items()],
    ('engine, 8 texts', 'tokens/s', 'loops a token', 'as full depth'),
  )


def show(rows: dict) -> None:
  """Prints the four models side by side, then their samples."""
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
