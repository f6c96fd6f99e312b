"""Converts a model into a relaxed recursive one.

rrt convert --source=smollm2-135m --out=child \
    --prelude=8 --loops=2 --coda=8 --rank=64

The block is the layers between prelude and coda: 30 - 8 - 8 = 14, so 7 layers
run twice. --init=calibrated (the default) fits the weights to text, which may
be any; the others are the paper's.
"""

from typing import Any

from rrt import command, console
from rrt.checkpoints.load import check_apart, check_save, load, load_config, save
from rrt.config import ORDERS
from rrt.convert import recursive
from rrt.convert.calibration_data import calibration_text
from rrt.convert.plan import LoopRanks
from rrt.errors import InputError

FLAGS = command.Flags(
  'Converts a model into a relaxed recursive one.',
  'rrt convert --source=smollm2-135m --out=child \\\n    --prelude=8 --loops=2 --coda=8 --rank=64',
)
_SOURCE = FLAGS.needed.string(
  'source',
  None,
  'The parent: a Hugging Face directory, a GGUF file, smollm2-135m, '
  'gemma3-270m, a hub id, or a vanilla model of ours.',
)
_OUT = FLAGS.needed.string(
  'out', None, 'The directory to write; new, empty or an earlier model of ours.'
)
_PRELUDE = FLAGS.usual.integer('prelude', 0, 'Layers kept as they are before the block.')
_BLOCK = FLAGS.rare.integer('block', None, 'Layers of the block; worked out when left out.')
_LOOPS = FLAGS.usual.integer('loops', 2, 'How often the block runs.')
_CODA = FLAGS.usual.integer('coda', 0, 'Layers of their own after the block.')
_ORDER = FLAGS.rare.enum(
  'order',
  'cycle',
  ORDERS,
  'cycle runs the whole block again and again, sequence repeats each layer.',
)
_INIT = FLAGS.usual.enum(
  'init', 'calibrated', recursive.INITS, 'Where the shared weights come from.'
)
_RANK = FLAGS.usual.string(
  'rank',
  '0',
  'LoRA rank of all seven linears, or by linear: q:32,v:32,down:64; each by '
  'loop where they differ: 32/96. Capped at the matrix; 0 for none.',
)
_BUDGET = FLAGS.rare.integer(
  'budget', None, 'Instead of --rank: LoRA parameters to spend where they regain most.'
)
_ALPHA = FLAGS.rare.float(
  'alpha', None, "LoRA's scale is alpha / rank; the factors make up for it. 1 by default."
)
_LORA_INIT = FLAGS.rare.enum(
  'lora_init',
  'svd',
  ['svd', 'zero'],
  'LoRA starts from what the shared weights lack, or from zero.',
)
_LOOP_NORMS = FLAGS.rare.bool('loop_norms', True, 'Every loop keeps its own norm gains.')
_CALIBRATION = FLAGS.usual.string(
  'calibration',
  None,
  'Text to fit on and to measure on (plain, .jsonl, .jsonl.xz, ...); left '
  'out, English text found in the installation, if the parent has a '
  'tokenizer.',
)
_CALIBRATION_TOKENS = FLAGS.rare.integer(
  'calibration_tokens', recursive.CALIBRATION_TOKENS, 'Tokens to fit on.'
)
_SEED = FLAGS.rare.integer('seed', 0, 'Of random weights.')
_DTYPE = FLAGS.usual.enum('dtype', 'float32', ['float32', 'bfloat16'], 'The type of the weights.')


def parse_rank(text: str) -> LoopRanks | dict[str, LoopRanks]:
  """'64', '32/96' by loop, or 'q:32,down:32/96' by linear.

  Raises:
    InputError: it is none of them.
  """

  def one(text: str) -> LoopRanks:
    ranks_R = tuple(map(int, text.split('/')))
    return ranks_R if len(ranks_R) > 1 else ranks_R[0]

  try:
    if ':' not in text:
      return one(text)
    pairs = [pair.split(':') for pair in text.split(',')]
    ranks = {name.strip(): one(value) for name, value in pairs}
  except ValueError as e:
    raise InputError(
      f'rank={text!r}: give a whole number, q:32,v:32,... by linear, or 32/96 by loop.'
    ) from e
  if len(ranks) < len(pairs):
    raise InputError(f'rank={text!r}: give each linear once.')
  return ranks


def main(_) -> None:
  """Loads, converts, reports, saves."""
  if not _SOURCE.value or not _OUT.value:
    raise InputError('--source and --out are both needed; see --help.')
  arguments: dict[str, Any] = dict(
    prelude=_PRELUDE.value,
    block=_BLOCK.value,
    loops=_LOOPS.value,
    coda=_CODA.value,
    order=_ORDER.value,
    init=_INIT.value,
    rank=parse_rank(_RANK.value),
    budget=_BUDGET.value,
    alpha=_ALPHA.value,
    lora_init=_LORA_INIT.value,
    loop_norms=_LOOP_NORMS.value,
    calibration_tokens=_CALIBRATION_TOKENS.value,
    seed=_SEED.value,
  )
  check_save(_OUT.value)
  check_apart(_SOURCE.value, _OUT.value)
  # Reading the weights takes long: what cannot work is told before.
  recursive.plan(load_config(_SOURCE.value), **arguments)
  text = None
  if _CALIBRATION.value is not None:
    text = calibration_text(_CALIBRATION.value, _CALIBRATION_TOKENS.value)
  parent = load(_SOURCE.value, dtype=_DTYPE.value)
  if text is None and parent.tokenizer is not None:
    text = calibration_text(None, _CALIBRATION_TOKENS.value)
  bar = console.Progress(0, 'convert', 'layers')
  child, report = recursive.to_recursive(parent, calibration=text, progress=bar.to, **arguments)
  if bar.done:
    bar.__exit__()
  out = save(child, _OUT.value)
  report.show()
  print(f'written to {out}')
  console.finish(
    {
      'out': str(out),
      'params_unique': report.params.unique,
      'params_unique_non_embedding': report.params.unique_non_embedding,
      'params_total': report.params.total,
      'params_total_non_embedding': report.params.total_non_embedding,
      'params_counted': report.params_counted,
      'params_parent': report.parent_params.unique,
      'ranks': report.ranks,
      'kept': report.kept,
      'calibration_tokens': report.calibration_tokens,
      'nll_parent_nats': report.nll_parent_nats,
      'nll_child_nats': report.nll_child_nats,
      'held_out_tokens': report.held_out_tokens,
      'identity_error': report.identity_error,
      'seconds': report.seconds,
      'peak_memory_bytes': report.peak_memory_bytes,
    }
  )
