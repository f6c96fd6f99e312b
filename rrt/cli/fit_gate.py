r"""Fits an exit gate and calibrates its threshold to a quality target.

rrt fit-gate --model=runs/a --text=news.jsonl.xz --agreement=0.95 \
    --out=gated

Half of the rows fit the gate and a lens, which maps the output of an early loop
to that of the last; the other half calibrate the lowest threshold whose
confidence bound meets the target. With --self_generated, a share of the rows is
continued greedily by the model itself, as the lossless mode's drafts are. The
model is written to --out with gate, threshold, target and bound;
`rrt evaluate --exits` measures them on other text.
"""

import dataclasses

from rrt import command, console
from rrt.errors import InputError

FLAGS = command.Flags(
  'Fits an exit gate and calibrates its threshold to a quality target.',
  'rrt fit-gate --model=runs/a --text=news.jsonl.xz \\\n    --agreement=0.95 --out=gated',
)
_MODEL = FLAGS.needed.string('model', None, 'A recursive model, as `rrt generate` takes one.')
_TEXT = FLAGS.needed.string(
  'text', None, 'Text to fit and calibrate on, as `rrt evaluate` takes it.'
)
_OUT = FLAGS.needed.string('out', None, 'Output directory of the model with its gate.')
_MAX_TOKENS = FLAGS.usual.integer('max_tokens', 16384, 'Tokens of the text to use.')
_CONTEXT = FLAGS.usual.integer('context', 256, 'Tokens in a row.')
_BATCH = FLAGS.rare.integer('batch', 4, 'Rows in a pass.')
_GATE = FLAGS.usual.enum(
  'gate',
  'learned',
  ['learned', 'change'],
  'learned: a logistic regression a loop; change: the relative change of the '
  'hidden state in the loop.',
)
_LENS = FLAGS.rare.bool(
  'lens',
  True,
  'Also fit, by least squares, an affine map from the hidden state after each '
  'loop to that after the last; coda and head run on its output.',
)
_LENS_EPOCHS = FLAGS.rare.integer(
  'lens_epochs',
  0,
  'Epochs of tuning the lens, with an added hidden layer, on the KL divergence from full depth.',
)
_SELF_GENERATED = FLAGS.rare.float(
  'self_generated',
  0.0,
  'Share of the rows to replace by the greedy continuation of their first '
  'quarter, for the drafts of the lossless mode, which are about the text that '
  'the model itself writes.',
)
_KV = FLAGS.rare.enum(
  'kv',
  'propagate',
  ['write_ahead', 'propagate', 'exact_fill'],
  'Cache policy for the loops that a token skipped.',
)
_AGREEMENT = FLAGS.usual.float(
  'agreement', None, 'Target: top-1 agreement with full depth; 0.95 by default.'
)
_LOSS = FLAGS.usual.float('loss', None, 'Target instead: nats a token lost against full depth.')
_CONFIDENCE = FLAGS.rare.float('confidence', 0.95, "Confidence of the target's bound.")
_RIDGE = FLAGS.rare.float('ridge', None, 'L2 penalty of the regression; 30 by default.')


def main(argv) -> None:
  """Fits, calibrates, saves and prints."""
  del argv
  source, path, out = (_needed(flag) for flag in (_MODEL, _TEXT, _OUT))
  if _AGREEMENT.value is not None and _LOSS.value is not None:
    raise InputError('Give --agreement or --loss, not both.')
  if not 0 < _CONFIDENCE.value < 1:
    raise InputError(f'confidence={_CONFIDENCE.value}: must lie in 0 to 1.')
  if _AGREEMENT.value is not None and not 0 < _AGREEMENT.value < 1:
    raise InputError(f'agreement={_AGREEMENT.value}: must lie in 0 to 1.')
  if _LOSS.value is not None and not _LOSS.value > 0:
    raise InputError(f'loss={_LOSS.value}: must be above 0.')
  if _BATCH.value < 1:
    raise InputError(f'batch={_BATCH.value}: must be 1 or more.')
  if _LENS_EPOCHS.value < 0:
    raise InputError(f'lens_epochs={_LENS_EPOCHS.value}: must be 0 or more.')
  command.check_effect(_LENS_EPOCHS, _LENS.value, '--lens')
  command.check_effect(_RIDGE, _GATE.value == 'learned', '--gate=learned')
  if not 0 <= _SELF_GENERATED.value <= 1:
    raise InputError(f'self_generated={_SELF_GENERATED.value}: must lie in 0 to 1.')
  agreement = _AGREEMENT.value
  if agreement is None and _LOSS.value is None:
    agreement = 0.95
  from rrt.checkpoints.load import load, save
  from rrt.evals import depth, every_loop, gating, perplexity
  from rrt.exits import fit as fit_lib
  from rrt.exits import gate as gate_lib
  from rrt.files import check_writable

  check_writable(out)
  model = load(source)
  every_loop.check(model.config)
  text = perplexity.read_text(path, _MAX_TOKENS.value)
  rows = perplexity.make_rows(model, text, _CONTEXT.value, _MAX_TOKENS.value)
  if _SELF_GENERATED.value:
    gating.split(rows)
    with console.Progress(0, 'writing', 'tokens') as progress:
      rows = gating.continued(model, rows, _SELF_GENERATED.value, progress=progress.to)
  gate, points = gating.fit_gate(
    model,
    rows,
    kind=_GATE.value,
    lens=_LENS.value,
    lens_epochs=_LENS_EPOCHS.value,
    kv=_KV.value,
    agreement=agreement,
    loss=_LOSS.value,
    confidence=_CONFIDENCE.value,
    ridge=fit_lib.RIDGE if _RIDGE.value is None else _RIDGE.value,
    batch=_BATCH.value,
  )
  about = {'text': path, 'self_generated': _SELF_GENERATED.value}
  gate = dataclasses.replace(gate, calibration=gate.calibration | about)
  console.table(depth.table(points), depth.HEADERS)
  if gate.threshold == gate_lib.NEVER:
    print('No threshold meets the target on this text: all tokens will run all loops.')
  save(dataclasses.replace(model, meta=gate_lib.store(model.meta, gate)), out)
  console.finish(
    {
      'model': out,
      'gate': _GATE.value,
      'kv': _KV.value,
      'threshold': gate.threshold,
      **gate.calibration,
      'points': [p.plain() for p in points],
      'peak_memory_bytes': console.peak_memory_bytes(),
    }
  )


def _needed(flag) -> str:
  if not flag.value:
    raise InputError(f'--{flag.name} is missing; see --help.')
  return flag.value
