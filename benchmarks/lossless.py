"""The lossless mode against full depth, prompt by prompt.

    python -m benchmarks.lossless --model=gated --text=news.jsonl.xz

Continues each prompt greedily and, with seeds of its own, sampled, at full
depth and lossless, and counts the texts that differ. A run that finds one ends
with status 1. How fast the mode is, `benchmarks.serving` tells.
"""

import sys

from absl import flags

from benchmarks import common
from rrt import command, console
from rrt.checkpoints.load import load
from rrt.errors import InputError
from rrt.evals import perplexity
from rrt.infer.engine.engine import Engine, Request

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'A recursive model, as rrt.load takes it.')
flags.DEFINE_string('text', None, 'Text that is cut into the prompts.')
flags.DEFINE_integer('prompts', 200, 'How many.')
flags.DEFINE_integer('prompt_tokens', 24, 'Of each.')
flags.DEFINE_integer('new_tokens', 16, 'Of each.')
flags.DEFINE_integer('slots', 16, 'Sequences at once.')
flags.DEFINE_string('dtype', 'float32', 'Precision of both.')
flags.DEFINE_integer('max_batch_tokens', None, 'Of the lossless engine; all by default.')
flags.DEFINE_string('out', 'benchmarks/results/lossless.json', 'JSON file.')


def main(_):
  if not FLAGS.model or not FLAGS.text:
    raise InputError('--model and --text are needed.')
  model = load(FLAGS.model)
  length, count = FLAGS.prompt_tokens, FLAGS.prompts
  text = perplexity.read_text(FLAGS.text, count * length)
  rows = perplexity.make_rows(model, text, length, count * length)
  prompts = [row for row in rows if len(row) == length]
  if len(prompts) < count:
    raise InputError(f'--text={FLAGS.text}: gives {len(prompts)} prompts, not {count}.')
  context = length + FLAGS.new_tokens
  both = dict(slots=FLAGS.slots, context=context, dtype=FLAGS.dtype)
  full = Engine(model, **both)
  lossless = Engine(model, lossless=True, max_batch_tokens=FLAGS.max_batch_tokens, **both)
  figures: dict = {
    'machine': common.machine(1),
    'model': FLAGS.model,
    'prompts': count,
    'prompt_tokens': length,
    'new_tokens': FLAGS.new_tokens,
    'dtype': FLAGS.dtype,
    'slots': FLAGS.slots,
    'max_batch_tokens': lossless.shape.max_batch_tokens,
  }
  table = []
  for name, temperature in (('greedy', 0.0), ('sampled', 0.8)):
    before = lossless.figures()
    texts = [
      [
        r.tokens
        for r in engine.run(
          [
            Request.of(p, FLAGS.new_tokens, temperature, seed=i, ignore_eos=True)
            for i, p in enumerate(prompts)
          ]
        )
      ]
      for engine in (full, lossless)
    ]
    after = lossless.figures()
    same = sum(a == b for a, b in zip(*texts, strict=True))
    draft_tokens, num_accepted = (after[k] - before[k] for k in ('draft_tokens', 'num_accepted'))
    figures[name] = {'same': same, 'draft_tokens': draft_tokens, 'num_accepted': num_accepted}
    share = f'{100 * num_accepted / max(draft_tokens, 1):.0f} %'
    table.append((name, f'{same} of {count}', draft_tokens, share))
  console.table(table, ('drawn', 'texts as full depth', 'draft tokens', 'accepted'))
  differ = any(figures[n]['same'] < count for n in ('greedy', 'sampled'))
  common.save(FLAGS.out, figures)
  console.finish(figures | {'exit_status': int(differ)})
  if differ:
    sys.exit(1)


if __name__ == '__main__':
  command.run(main)
