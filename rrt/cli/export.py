"""Writes a model untied, for Hugging Face transformers or for llama.cpp.

rrt export --model=child --out=child-hf
rrt export --model=child --format=gguf --quantize=q8_0 --out=child.gguf
"""

import time

from rrt import command, console
from rrt.checkpoints.load import check_apart, load, load_config
from rrt.checkpoints.save_gguf import TYPES, arch_of, check_save_gguf, save_gguf
from rrt.checkpoints.save_hf import check_save_hf, save_hf
from rrt.errors import InputError
from rrt.models.count import count_params
from rrt.models.untie import to_untied

FLAGS = command.Flags(
  'Writes a model untied, for Hugging Face transformers or for llama.cpp.',
  'rrt export --model=child --out=child-hf\n'
  'rrt export --model=child --format=gguf --quantize=q8_0 --out=child.gguf',
)
_MODEL = FLAGS.needed.string(
  'model',
  None,
  'What to export: an rrt directory, a training run, a Hugging Face '
  'directory, a GGUF file, smollm2-135m, gemma3-270m, or a hub id.',
)
_OUT = FLAGS.needed.string(
  'out', None, 'The directory, or with --format=gguf the file, to write; new or an earlier export.'
)
_FORMAT = FLAGS.usual.enum(
  'format', 'hf', ['hf', 'gguf'], 'hf: a directory for transformers. gguf: a file for llama.cpp.'
)
_QUANTIZE = FLAGS.usual.enum(
  'quantize', 'f32', list(TYPES), 'With --format=gguf: type of the matrices.'
)
_DTYPE = FLAGS.usual.enum(
  'dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Dtype of the written weights.'
)


def main(_) -> None:
  """Loads, unties, writes, and reports."""
  if not _MODEL.value or not _OUT.value:
    raise InputError('--model and --out are both needed; see --help.')
  is_gguf = _FORMAT.value == 'gguf'
  command.check_effect(_QUANTIZE, is_gguf, '--format=gguf')
  command.check_effect(_DTYPE, not is_gguf, '--format=hf')
  if is_gguf:
    check_save_gguf(_OUT.value)
    arch_of(load_config(_MODEL.value))
  else:
    check_save_hf(_OUT.value)
  check_apart(_MODEL.value, _OUT.value)
  start = time.monotonic()
  model = load(_MODEL.value, dtype=_DTYPE.value)
  untied = to_untied(model)
  if is_gguf:
    out = save_gguf(untied, _OUT.value, _QUANTIZE.value)
  else:
    out = save_hf(untied, _OUT.value)
  c = model.config
  counts, written = count_params(c), count_params(untied.config)
  size = sum(f.stat().st_size for f in ([out] if is_gguf else out.iterdir()))
  console.table(
    [
      ['model', c.family, c.depth, _shape(c), counts.unique],
      ['export', c.family, c.depth, str(c.depth), written.unique],
    ],
    ['', 'family', 'depth', 'layers', 'parameters'],
  )
  print(f'written to {out}, {size / 1e6:,.1f} MB')
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
