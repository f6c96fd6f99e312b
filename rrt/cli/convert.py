"""Converts a model into a relaxed recursive one.

The block is the layers between prelude and coda: 30 - 8 - 8 = 14, so 7 layers
run twice. --init=calibrated (the default) fits the weights to text, which may
be any; the others are the paper's.
"""

from rrt import command, console
from rrt.checkpoints.load import check_apart, check_save, load, load_config, save
from rrt.config import ORDERS
from rrt.convert.calibration_data import calibration_text
from rrt.convert.plan import INITS, RELAX_INITS, ConvertConfig, plan
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError

FLAGS = command.Flags(
  'Converts a model into a relaxed recursive one.',
  'rrt convert --source=smollm2-135m --out=child \\\n    --prelude=8 --loops=2 --coda=8 --rank=64',
)
_DEFAULT = ConvertConfig()
_SOURCE = FLAGS.needed.string(
  'source',
  None,
  'The parent: a Hugging Face directory, a GGUF file, smollm2-135m, '
  'gemma3-270m, a hub id, or a vanilla rrt model.',
)
_OUT = FLAGS.needed.string(
  'out', None, 'The directory to write; new, empty or an earlier rrt model.'
)
_FIELDS = (
  FLAGS.usual.integer('prelude', _DEFAULT.prelude, 'Layers kept as they are before the block.'),
  FLAGS.usual.integer('loops', _DEFAULT.loops, 'How often the block runs.'),
  FLAGS.usual.integer('coda', _DEFAULT.coda, 'Layers of their own after the block.'),
  FLAGS.usual.string(
    'rank',
    '0',
    'LoRA rank of all seven linears, or by linear: q:32,v:32,down:64; each by '
    'loop where they differ: 32/96. Capped at the matrix; 0 for none.',
  ),
  FLAGS.usual.multi_string(
    'relax',
    [],
    'Another relaxation behind LoRA, such as gain or gain:components=o+down. '
    'Repeat it for several.',
  ),
  FLAGS.usual.enum('init', _DEFAULT.init, INITS, 'Where the shared weights come from.'),
  FLAGS.usual.string(
    'calibration',
    None,
    'Text to fit on and to measure on (plain, .jsonl, .jsonl.xz, ...); left '
    'out, English text found in the installation, if the parent has a '
    'tokenizer.',
  ),
  FLAGS.rare.integer('block', None, 'Layers of the block; worked out when left out.'),
  FLAGS.rare.enum(
    'order',
    _DEFAULT.order,
    ORDERS,
    'cycle runs the whole block again and again, sequence repeats each layer.',
  ),
  FLAGS.rare.integer(
    'budget', None, 'Instead of --rank: LoRA parameters to spend where they regain most.'
  ),
  FLAGS.rare.float(
    'alpha', None, "LoRA's scale is alpha / rank; the factors make up for it. 1 by default."
  ),
  FLAGS.rare.enum(
    'relax_init',
    _DEFAULT.relax_init,
    RELAX_INITS,
    'Relaxations start from what the shared weights lack, or without effect.',
  ),
  FLAGS.rare.bool('loop_norms', _DEFAULT.loop_norms, 'Every loop keeps its own norm gains.'),
  FLAGS.rare.integer('calibration_tokens', _DEFAULT.calibration_tokens, 'Tokens to fit on.'),
)
_DTYPE = FLAGS.usual.enum('dtype', 'float32', ['float32', 'bfloat16'], 'The type of the weights.')
_SEED = FLAGS.rare.integer('seed', 0, 'Of random weights.')


def main(_) -> None:
  """Loads, converts, reports, saves."""
  if not _SOURCE.value or not _OUT.value:
    raise InputError('--source and --out are both needed; see --help.')
  convert = ConvertConfig().replace(**{flag.name: flag.value for flag in _FIELDS})
  convert = convert.replace(relax=tuple(convert.relax))
  check_save(_OUT.value)
  check_apart(_SOURCE.value, _OUT.value)
  # Reading the weights takes long: mistakes are reported before.
  plan(load_config(_SOURCE.value), convert)
  text = None
  if convert.calibration is not None:
    text = calibration_text(convert.calibration, convert.calibration_tokens)
  parent = load(_SOURCE.value, dtype=_DTYPE.value)
  if text is None and parent.tokenizer is not None:
    text = calibration_text(None, convert.calibration_tokens)
  bar = console.Progress(0, 'convert', 'layers')
  child, report = to_recursive(parent, convert, calibration=text, seed=_SEED.value, progress=bar.to)
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
      'relaxations': report.relaxations,
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
