"""What relaxations regain of a child's loss, against layers deleted and refitted.

python -m benchmarks.relaxations --calibration=wiki.jsonl.xz --text=news.jsonl.xz

Converts a model with several relaxations, calibrated and not trained, and scores
the children on other text. The peers are the untouched parent, and the same model
with as many middle layers deleted as make the parameters equal, the rest refitted
on the same text towards the parent's residual stream, as the coda of a child is.
Decoding speed stands beside each: eight sequences of 64 tokens, float32.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from benchmarks import common
from rrt import command, console
from rrt.checkpoints.load import load
from rrt.convert import calibration_data
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.evals import perplexity
from rrt.infer.generate import Generator
from rrt.infer.sampling import SamplingParams
from rrt.model import LanguageModel
from rrt.models.count import count_params

FLAGS = flags.FLAGS
flags.DEFINE_string('model', 'smollm2-135m', 'A vanilla model.')
flags.DEFINE_string('calibration', None, 'Text to fit on.')
flags.DEFINE_string('text', None, 'Text to score.')
flags.DEFINE_integer('prelude', 8, 'Layers before the block.')
flags.DEFINE_integer('loops', 2, 'Times the block runs.')
flags.DEFINE_integer('coda', 8, 'Layers after the block.')
flags.DEFINE_integer('tokens', 8192, 'To fit on, and as many to score.')
flags.DEFINE_string('out', None, 'JSON file for the figures.')

_ALL = 'gain:components=q+k+v+o+gate+up+down'
_CASES = (
  ('no relaxation', 0, ()),
  ('gain at o and down', 0, ('gain',)),
  ('gain at all linears', 0, (_ALL,)),
  ('LoRA, rank 64', 64, ()),
  ('LoRA, rank 64, then gain', 64, ('gain',)),
)


def measure(model: LanguageModel, text: str) -> dict[str, float]:
  """Parameters, nats a token and tokens a second."""
  nats = perplexity.score(model, text, context=1024, batch=2, max_tokens=FLAGS.tokens).nll_nats
  generator = Generator(model)
  params = SamplingParams(max_new_tokens=64, ignore_eos=True)
  prompts = [list(range(5 + i, 37 + i)) for i in range(8)]
  generator.complete(prompts, params)
  before = dataclasses.replace(generator.clock)
  generator.complete(prompts, params)
  tokens = generator.clock.decode_tokens - before.decode_tokens
  seconds = generator.clock.decode_seconds - before.decode_seconds
  return {
    'parameters': count_params(model.config).unique,
    'layers_run': model.config.depth,
    'nats': nats,
    'tokens_per_second': tokens / seconds,
  }


def main(_) -> None:
  """Converts, deletes, scores, prints."""
  if not FLAGS.calibration or not FLAGS.text:
    raise InputError('--calibration and --text are both needed.')
  parent = load(FLAGS.model)
  fitted_on = calibration_data.calibration_text(FLAGS.calibration, FLAGS.tokens)
  text = perplexity.read_text(FLAGS.text, FLAGS.tokens)
  found = {'parent': measure(parent, text)}
  say = lambda name: print(f'{name}: {found[name]}', flush=True)
  say('parent')
  whole = found['parent']['parameters']
  layer = (whole - count_params(dataclasses.replace(parent.config, block_layers=1)).unique) / (
    parent.config.depth - 1
  )
  peers: dict[int, str] = {}
  for name, rank, relax in _CASES:
    child, _ = to_recursive(
      parent,
      prelude=FLAGS.prelude,
      loops=FLAGS.loops,
      coda=FLAGS.coda,
      rank=rank,
      relax=relax,
      calibration=fitted_on,
      calibration_tokens=FLAGS.tokens,
    )
    found[name] = measure(child, text)
    say(name)
    # The fewest deleted layers with no more parameters than the child, and one less.
    most = -int((found[name]['parameters'] - whole) // layer)
    peers |= {n: f'{n} layers deleted, refitted' for n in (most, most - 1) if n > 0}
  for count, name in sorted(peers.items()):
    start = (parent.config.depth - count) // 2
    child, _ = to_recursive(
      parent,
      drop=tuple(range(start, start + count)),
      loops=1,
      calibration=fitted_on,
      calibration_tokens=FLAGS.tokens,
    )
    found[name] = measure(child, text)
    say(name)
  console.table(
    [[name, *f.values()] for name, f in found.items()],
    ['', 'parameters', 'layers run', 'nats', 'tokens/s'],
  )
  figures = {
    'model': FLAGS.model,
    'shape': f'{FLAGS.prelude} + block x {FLAGS.loops} + {FLAGS.coda}',
    'tokens': FLAGS.tokens,
    'seed': 0,
    **common.machine(2),
    'cases': found,
  }
  if FLAGS.out:
    Path(FLAGS.out).write_text(json.dumps(figures, indent=1) + '\n')
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
