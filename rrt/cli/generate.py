r"""Continues prompts, with any model that `rrt.load` takes.

rrt generate --model=smollm2-135m --prompt='The sea is' \
    --max_new_tokens=60 --temperature=0.8 --top_p=0.95

The first completion is streamed, the others are printed at the end, followed by
a table of speeds and one line of JSON.
"""

import dataclasses

from rrt import command, console
from rrt.errors import InputError

FLAGS = command.Flags(
  'Continues prompts, with any model that `rrt.load` takes.',
  "rrt generate --model=smollm2-135m --prompt='The sea is' \\\n"
  '    --max_new_tokens=60 --temperature=0.8 --top_p=0.95',
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
_PROMPT = FLAGS.needed.multi_string('prompt', None, 'Text to continue; may be repeated.')
_MAX_NEW_TOKENS = FLAGS.usual.integer(
  'max_new_tokens', 128, 'Maximum tokens to generate for each prompt.'
)
_TEMPERATURE = FLAGS.usual.float('temperature', 0.0, 'Sampling temperature; 0 is greedy.')
_TOP_K = FLAGS.usual.integer('top_k', 0, 'Sample from the k most likely tokens; 0 is all.')
_TOP_P = FLAGS.usual.float(
  'top_p', 1.0, 'Sample from the fewest tokens with this total probability.'
)
_MIN_P = FLAGS.rare.float(
  'min_p', 0.0, 'Sample from tokens of at least this share of the highest probability.'
)
_SEED = FLAGS.usual.integer('seed', 0, 'Seed of the first prompt; prompt i has seed + i.')
_STOP = FLAGS.usual.multi_string(
  'stop', [], 'Stop string, which ends a completion; may be repeated.'
)
_LOOPS = FLAGS.rare.integer('loops', None, 'How many loops of the block to run; all by default.')
_CHAT = FLAGS.usual.bool('chat', False, 'Prompts are user messages: apply the chat template.')
_DTYPE = FLAGS.rare.enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Dtype of weights and computation.'
)
_STREAM = FLAGS.rare.bool('stream', True, 'Print the first completion while it is generated.')


class _Screen:
  """Prints the completions one below the other, the first one live.

  The prompts are decoded as one batch; the text of the later ones is printed
  when all are complete.
  """

  def __init__(self, prompts, live: bool):
    self._prompts, self._live = prompts, live
    self._waiting = [''] * len(prompts)
    self._current = -1

  def show(self, index: int, text: str) -> None:
    """Receives new text of one prompt."""
    if self._current < 0:
      self._next()
    if self._live and index == self._current:
      print(text, end='', flush=True)
    else:
      self._waiting[index] += text

  def finish(self) -> None:
    """Prints the completions that were not streamed."""
    while self._current < len(self._prompts):
      self._next()

  def _next(self) -> None:
    if self._current >= 0:
      print(self._waiting[self._current] if not self._live else '', end='')
      print('\n')
    self._current += 1
    if self._current == len(self._prompts):
      return
    if len(self._prompts) > 1:
      print(f'[{self._current + 1}/{len(self._prompts)}] ', end='')
    print(self._prompts[self._current], end='', flush=True)
    if self._live:
      print(self._waiting[self._current], end='', flush=True)


def main(argv) -> None:
  """Generates, then prints the speed."""
  del argv
  if not _MODEL.value:
    raise InputError('--model is missing; try --model=smollm2-135m.')
  if not _PROMPT.value:
    raise InputError("--prompt is missing; try --prompt='The sea is'.")
  from rrt.checkpoints.load import load
  from rrt.infer import generate
  from rrt.infer.sampling import SamplingParams

  prompts = _PROMPT.value
  params = SamplingParams(
    _MAX_NEW_TOKENS.value,
    _TEMPERATURE.value,
    _TOP_K.value,
    _TOP_P.value,
    _MIN_P.value,
    _SEED.value,
    tuple(_STOP.value),
  )
  params.check()
  for flag in (_TOP_K, _TOP_P, _MIN_P, _SEED):
    command.check_effect(flag, _TEMPERATURE.value > 0, 'a --temperature above 0')
  generate.check_texts(prompts)
  model = load(_MODEL.value, adapter=_ADAPTER.value)
  generator = generate.Generator(model, loops=_LOOPS.value, dtype=_DTYPE.value)
  heads = [p + '\n' for p in prompts] if _CHAT.value else prompts
  screen = _Screen(heads, live=_STREAM.value)
  done = generator.complete(prompts, params, screen.show, _CHAT.value)
  screen.finish()

  clock = generator.clock
  prefill = clock.prefill_tokens / max(clock.prefill_seconds, 1e-9)
  decoded = clock.decode_tokens / max(clock.decode_seconds, 1e-9)
  console.table(
    [
      ('prefill', clock.prefill_tokens, clock.prefill_seconds, prefill),
      ('decode', clock.decode_tokens, clock.decode_seconds, decoded),
    ],
    ('phase', 'tokens', 'seconds', 'tokens/s'),
  )
  print(f'compilation took {clock.compile_seconds:.1f} s more')
  console.finish(
    {
      'model': _MODEL.value,
      'loops': generator.loops,
      'dtype': _DTYPE.value,
      'completions': [
        {'prompt': p} | dataclasses.asdict(c) for p, c in zip(prompts, done, strict=True)
      ],
      'prefill_tokens_per_second': prefill,
      'decode_tokens_per_second': decoded,
      **dataclasses.asdict(clock),
      'peak_memory_bytes': console.peak_memory_bytes(),
    }
  )
