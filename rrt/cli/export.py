"""Writes a model as an untied checkpoint that Hugging Face loads.

rrt export --model=child --out=child-hf
"""

import time

from rrt import command, console
from rrt.checkpoints.load import check_apart, load
from rrt.checkpoints.save_hf import check_save_hf, save_hf
from rrt.errors import InputError
from rrt.models.count import count_params
from rrt.models.untie import to_untied

FLAGS = command.Flags(
  'Writes a model as an untied checkpoint that Hugging Face loads.',
  'rrt export --model=child --out=child-hf',
)
_MODEL = FLAGS.needed.string(
  'model',
  None,
  'What to export: an rrt directory, a training run, a Hugging Face '
  'directory, a GGUF file, smollm2-135m, gemma3-270m, or a hub id.',
)
_OUT = FLAGS.needed.string('out', None, 'The directory to write; new, empty or an earlier export.')
_DTYPE = FLAGS.usual.enum(
  'dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Dtype of the written weights.'
)


def main(_) -> None:
  """Loads, unties, writes, and reports."""
  if not _MODEL.value or not _OUT.value:
    raise InputError('--model and --out are both needed; see --help.')
  check_save_hf(_OUT.value)
  check_apart(_MODEL.value, _OUT.value)
  start = time.monotonic()
  model = load(_MODEL.value, dtype=_DTYPE.value)
  untied = to_untied(model)
  out = save_hf(untied, _OUT.value)
  c = model.config
  counts, written = count_params(c), count_params(untied.config)
  size = sum(f.stat().st_size for f in out.iterdir())
  console.table(
    [
      ['model', c.family, c.depth, _shape(c), counts.unique],
      ['export', c.family, c.depth, str(c.depth), written.unique],
    ],
    ['', 'family', 'depth', 'layers', 'parameters'],
  )
  print(f'written to {out}')
  console.finish(
    {
      'out': str(out),
      'family': c.family,
      'layers': untied.config.depth,
      'params_unique': counts.unique,
      'params_exported': written.unique,
      'bytes': size,
      'seconds': time.monotonic() - start,
      'peak_memory_bytes': console.peak_memory_bytes(),
    }
  )


def _shape(config) -> str:
  if config.depth == config.block_layers:
    return str(config.depth)
  return f'{config.prelude_layers} + {config.block_layers} x {config.loops} + {config.coda_layers}'
