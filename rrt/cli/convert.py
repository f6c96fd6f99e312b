"""Converts a model into a relaxed recursive one.

The block is the layers between prelude and coda: 30 - 8 - 8 = 14, so 7 layers
run twice. --init=calibrated (the default) fits the weights to text, which may
be any; the others are the paper's.
"""

import os
from pathlib import Path

from rrt import command, console
from rrt.checkpoints.load import check_apart, check_save, load, load_config, save
from rrt.cli import plots
from rrt.config_checks import ORDERS, WEIGHTS
from rrt.convert.calibration_data import calibration_text
from rrt.convert.drop import count_of, parse
from rrt.convert.plan import CHOSEN, INITS, REFITS, RELAX_INITS, ConvertConfig, plan, recommended
from rrt.convert.recursive import to_recursive
from rrt.convert.report import Report
from rrt.convert.search import DEFAULT_PARAMS
from rrt.errors import InputError
from rrt.relax.memory import Memory

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
  FLAGS.usual.string(
    'params',
    None,
    'Unique parameters of the child, 103M or 0.75x of the parent: searches for the best '
    'arrangement of that size. Without any shape 0.75x.',
  ),
  FLAGS.usual.integer(
    'prelude',
    None,
    'Layers before the block, not shared; with --loops alone about a quarter of the layers.',
  ),
  FLAGS.usual.integer(
    'loops', None, 'Times that the block runs; by default 2, and 1 with --drop alone.'
  ),
  FLAGS.usual.integer('coda', None, 'Layers after the block, not shared.'),
  FLAGS.usual.string(
    'rank',
    '0',
    'LoRA rank of all seven linears, or by linear: q:32,v:32,down:64; a rank may '
    'differ by loop: 32/96. Capped at the smaller side of the matrix; 0 for none.',
  ),
  FLAGS.usual.multi_string(
    'relax',
    [],
    'Another relaxation, applied after LoRA, such as gain or '
    'gain:components=o+down. May be repeated.',
  ),
  FLAGS.usual.string(
    'drop',
    '',
    'Layers of the parent to delete before the rest is arranged: 16-19, 3,16-19, or auto:4 '
    'for the run of four whose deletion moves the residual stream least.',
  ),
  FLAGS.usual.enum(
    'weights',
    _DEFAULT.weights,
    WEIGHTS,
    'Quantizes all matrices (groups of 64; embeddings and head int8); LoRA is fitted to what '
    'rounding leaves.',
  ),
  FLAGS.usual.enum('init', _DEFAULT.init, INITS, 'Initial values of the shared weights.'),
  FLAGS.usual.string(
    'calibration',
    None,
    'Calibration text (plain, .jsonl, .jsonl.xz, ...). By default English text '
    'found in the installation, if the parent has a '
    'tokenizer.',
  ),
  FLAGS.rare.integer('block', None, 'Layers of the block; computed from the others by default.'),
  FLAGS.rare.enum(
    'order',
    _DEFAULT.order,
    ORDERS,
    'cycle repeats the whole block, sequence repeats each layer in place.',
  ),
  FLAGS.rare.integer(
    'budget',
    None,
    'Instead of --rank: total LoRA parameters, allocated to the ranks that '
    'reduce the calibration error most.',
  ),
  FLAGS.rare.float(
    'alpha',
    None,
    "LoRA's scale is alpha / rank, which the fitted factors compensate; 1 by default.",
  ),
  FLAGS.rare.enum(
    'relax_init',
    _DEFAULT.relax_init,
    RELAX_INITS,
    'Relaxations are fitted to the residual of the shared weights, or start at zero.',
  ),
  FLAGS.rare.bool('loop_norms', _DEFAULT.loop_norms, 'Separate norm gains for each loop.'),
  FLAGS.rare.integer('layers_run', None, 'With --params: the most layers that a token may pass.'),
  FLAGS.rare.enum(
    'refit',
    _DEFAULT.refit,
    REFITS,
    'Layers of their own that are refitted: after (the coda, and those behind a deleted '
    'layer), around (the two before it too), or none.',
  ),
  FLAGS.rare.bool(
    'add_loops',
    _DEFAULT.add_loops,
    'The loops after the first are added to the layers that --drop leaves, and start without '
    'effect; training opens them.',
  ),
  FLAGS.rare.integer(
    'sweeps',
    _DEFAULT.sweeps,
    'At most so many times through the layers: from the second on, shared weights are fitted '
    'to what the loops of the child got before.',
  ),
  FLAGS.rare.integer('calibration_tokens', _DEFAULT.calibration_tokens, 'Tokens to fit on.'),
)
_MEMORY = FLAGS.usual.string(
  'memory',
  '',
  'A memory layer at some layers of the block: positions,keys,heads,topk,dim, such as '
  '3,65536,4,32,576 or 1+4,16384,2,16,0 (dim 0: the width of the model).',
)
_DTYPE = FLAGS.usual.enum('dtype', 'float32', ['float32', 'bfloat16'], 'Dtype of the weights.')
_SEED = FLAGS.rare.integer('seed', 0, 'Seed of random weights.')


def _draw(report: Report, depth: int, path: Path) -> None:
  """The children considered, as a picture, where matplotlib is there."""
  try:
    parent = report.parent_params.unique, depth, report.nll_parent_nats or 0.0
    path.write_text(plots.frontier(report.considered, parent))
    print(f'frontier drawn in {path}')
  except InputError as e:
    console.note(f'frontier.svg was not drawn: {e}')


def memory_of(text: str, d_model: int) -> list[Memory]:
  """The relaxation that --memory asks for.

  Raises:
    InputError: not five fields, or a pool larger than this machine's memory.
  """
  if not text:
    return []
  words = text.split(',')
  try:
    positions = tuple(int(p) for p in words[0].split('+'))
    slots, heads, topk, dim = map(int, words[1:])
  except ValueError:
    raise InputError(
      f'--memory={text!r}: must be positions,keys,heads,topk,dim, such as 3,65536,4,32,576.'
    ) from None
  has = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  needs = 4 * slots * (dim or d_model)
  if needs > has:
    raise InputError(
      f'--memory={text!r}: {slots} values of {dim} take {needs / 2**30:.1f} GiB, and this machine '
      f'has {has / 2**30:.1f}; take fewer keys or a smaller dim.'
    )
  return [Memory(positions, slots, heads, topk, dim=dim)]


def main(_) -> None:
  """Loads, converts, reports, saves."""
  if not _SOURCE.value or not _OUT.value:
    raise InputError('--source and --out are both needed; see --help.')
  fields = {flag.name: flag.value for flag in _FIELDS}
  random = fields['init'] == 'random' or fields['relax_init'] == 'zero' or fields['add_loops']
  command.check_effect(_SEED, random, '--init=random, --relax_init=zero or --add_loops')
  shape = [fields[name] for name in ('prelude', 'coda', 'block')]
  if fields['params'] is None and not any(f.present for f in _FIELDS if f.name in CHOSEN):
    fields['params'] = DEFAULT_PARAMS
  if fields['rank'] == '0':
    fields['rank'] = 0
  for name in ('prelude', 'coda'):
    fields[name] = fields[name] or 0
  loops = fields['loops']
  if loops is None:
    alone = fields['drop'] and shape == [None] * 3 and not fields['add_loops']
    fields['loops'] = 1 if alone else _DEFAULT.loops
  convert = ConvertConfig().replace(**fields | {'relax': tuple(fields['relax'])})
  check_save(_OUT.value)
  check_apart(_SOURCE.value, _OUT.value)
  # Reading the weights takes long: mistakes are reported before.
  config = load_config(_SOURCE.value)
  convert = convert.replace(relax=(*convert.relax, *memory_of(_MEMORY.value, config.d_model)))
  if shape == [None] * 3 and convert.params is None:
    layers = config.depth - count_of(parse(convert.drop, config.depth))
    prelude, coda = recommended(layers, convert.loops)
    convert = convert.replace(prelude=prelude, coda=coda)
  plan(config, convert)
  text = None
  if convert.calibration is not None:
    text = calibration_text(convert.calibration, convert.calibration_tokens)
  parent = load(_SOURCE.value, dtype=_DTYPE.value)
  if text is None and parent.tokenizer is not None:
    text = calibration_text(None, convert.calibration_tokens)
  child, report = to_recursive(parent, convert, calibration=text, seed=_SEED.value)
  out = save(child, _OUT.value)
  report.show()
  print(f'written to {out}')
  if report.considered:
    _draw(report, config.depth, out / 'frontier.svg')
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
      'dropped': report.dropped,
      'considered': report.considered,
      'calibration_tokens': report.calibration_tokens,
      'nll_parent_nats': report.nll_parent_nats,
      'nll_child_nats': report.nll_child_nats,
      'held_out_tokens': report.held_out_tokens,
      'identity_error': report.identity_error,
      'seconds': report.seconds,
      'peak_memory_bytes': report.peak_memory_bytes,
    }
  )
