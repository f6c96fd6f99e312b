"""Writes a model for other software: transformers, PEFT or llama.cpp.

rrt export --model=child --out=child-hf
rrt export --model=child --format=hf-tied --out=child-tied
rrt export --model=child --format=gguf --quantize=q8_0 --out=child.gguf
"""

import time

from rrt import command, console
from rrt.checkpoints import card
from rrt.checkpoints.hub import check_push, push_to_hub
from rrt.checkpoints.load import check_apart, load, load_config
from rrt.checkpoints.save_gguf import TYPES, arch_of, check_save_gguf, save_gguf
from rrt.checkpoints.save_hf import check_save_hf, save_hf
from rrt.checkpoints.save_hf_tied import check_tied, save_hf_tied
from rrt.checkpoints.save_peft import check_peft, save_peft
from rrt.checkpoints.sizes import sizes
from rrt.errors import InputError
from rrt.exits import gate as gate_lib
from rrt.models.adapter import adapter_of, bare_config, merge_adapter
from rrt.models.count import count_params
from rrt.models.quantized import dequantized
from rrt.models.untie import check_mergeable

FLAGS = command.Flags(
  'Writes a model for other software: transformers, PEFT or llama.cpp.',
  'rrt export --model=child --format=hf-tied --out=child-tied\n'
  'rrt export --model=child --format=gguf --quantize=q8_0 --out=child.gguf',
)
_MODEL = FLAGS.needed.string(
  'model',
  None,
  'What to export: an rrt directory, a training run, a Hugging Face '
  'directory, a GGUF file, smollm2-135m, gemma3-270m, or a hub id.',
)
_ADAPTER = FLAGS.usual.string(
  'adapter', None, "Directory of the model's task adapter (rrt.save_adapter)."
)
_OUT = FLAGS.needed.string(
  'out', None, 'The directory, or with --format=gguf the file, to write; new or an earlier export.'
)
_FORMAT = FLAGS.usual.enum(
  'format',
  'hf',
  ['hf', 'hf-tied', 'peft', 'gguf'],
  'hf: untied, for transformers. hf-tied: shared weights once, for transformers, with a modeling '
  'file. peft: a stock model with each shared layer once, and a LoRA adapter. gguf: untied, a '
  'file for llama.cpp.',
)
_QUANTIZE = FLAGS.usual.enum(
  'quantize', 'f32', list(TYPES), 'With --format=gguf: type of the matrices.'
)
_DTYPE = FLAGS.usual.enum(
  'dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Dtype of the written weights.'
)
_EXIT_THRESHOLD = FLAGS.usual.float(
  'exit_threshold',
  None,
  "With --format=hf-tied: the score at which a decoded token leaves the block, by the model's "
  'learned gate if it has one, otherwise by the cosine of its state before and after a loop.',
)
_PUSH = FLAGS.usual.string(
  'push_to_hub', None, 'Uploads what was written to this hub id (owner/name), with its card.'
)
_PRIVATE = FLAGS.rare.bool('private', False, 'With --push_to_hub: a new repository is private.')
_CHECKS = {
  'hf': lambda config: None if config.end_norm else check_mergeable(config),
  'hf-tied': check_tied,
  'peft': check_peft,
  'gguf': arch_of,
}


def main(_) -> None:
  """Checks, loads, writes, and reports."""
  if not _MODEL.value or not _OUT.value:
    raise InputError('--model and --out are both needed; see --help.')
  form = _FORMAT.value
  is_gguf = form == 'gguf'
  command.check_effect(_QUANTIZE, is_gguf, '--format=gguf')
  command.check_effect(_DTYPE, not is_gguf, 'another format than gguf')
  command.check_effect(_PRIVATE, _PUSH.value is not None, '--push_to_hub')
  if _PUSH.value is not None:
    check_push(_PUSH.value)
  command.check_effect(_EXIT_THRESHOLD, form == 'hf-tied', '--format=hf-tied')
  (check_save_gguf if is_gguf else check_save_hf)(_OUT.value)
  _CHECKS[form](bare_config(load_config(_MODEL.value)))
  check_apart(_MODEL.value, _OUT.value)
  start = time.monotonic()
  # Untied tensors are written one by one: no more than a layer is in memory.
  lazy = form == 'hf' and not _ADAPTER.value
  model = load(_MODEL.value, adapter=_ADAPTER.value, dtype=_DTYPE.value, lazy=lazy)
  if adapter_of(model.config):
    model = merge_adapter(dequantized(model))
  if is_gguf:
    out = save_gguf(model, _OUT.value, _QUANTIZE.value)
  elif form == 'hf':
    out = save_hf(model, _OUT.value)
  elif form == 'peft':
    out = save_peft(model, _OUT.value)
  else:
    out = save_hf_tied(model, _OUT.value, _EXIT_THRESHOLD.value, _gate(model))
  c = model.config
  size = sum(f.stat().st_size for f in ([out] if is_gguf else out.rglob('*')) if f.is_file())
  counts = count_params(c)
  print(f'{c.family}, {card.shape(c)}, {counts.unique:,} unique parameters\n')
  table = sizes(c, _DTYPE.value, _QUANTIZE.value if is_gguf else 'q8_0')
  console.table(
    [
      [
        s.format,
        f'{s.disk / 1e6:,.1f}',
        f'{s.memory / 1e6:,.1f}',
        '*' * (s.format.split()[0] == form),
      ]
      for s in table
    ],
    ['weights as', 'MB on disk', 'MB in memory', 'this one'],
  )
  print(f'written to {out}, {size / 1e6:,.1f} MB with all files')
  address = push_to_hub(out, _PUSH.value, _PRIVATE.value) if _PUSH.value else None
  if address:
    print(f'uploaded: {address}')
  console.finish(
    {
      'out': str(out),
      'uploaded': address,
      'format': form,
      'family': c.family,
      'layers': c.depth,
      'params_unique': counts.unique,
      'bytes': size,
      'formats': {s.format: {'disk': s.disk, 'memory': s.memory} for s in table},
      'seconds': time.monotonic() - start,
      'peak_memory_bytes': console.peak_memory_bytes(),
    }
  )


def _gate(model):
  """Arrays of the learned gate stored with a model, as an export can hold them."""
  if _EXIT_THRESHOLD.value is None:
    return None
  gate = gate_lib.stored(model)
  if gate is None or gate.kind != 'learned':
    return None
  if gate_lib.stored_lens(model):
    console.note("The gate's lens is left out: the coda reads the state of the exit itself.")
  return gate.arrays
