"""Greedy decoding of ours beside Hugging Face's `generate`.

    python -m benchmarks.decode --batch=32 --prompt_tokens=32 --new_tokens=128

Same weights, tokens and precision, all cores. Hugging Face's is timed with
SDPA over its growing cache and over its static one, and the better is the
peer. A timed run holds prefill, decoding and the host loop of each, not
tokenization; compilation is reported apart. The share of tokens that agree
is printed: in float32 nearly all, but a batch of random prompts has ties that
rounding decides.
"""

from absl import flags
import numpy as np

from benchmarks import common
from rrt import command, console, runtime

FLAGS = flags.FLAGS
flags.DEFINE_string('model', 'smollm2-135m', 'What rrt.load takes.')
flags.DEFINE_integer('batch', 32, 'Rows.')
flags.DEFINE_integer('prompt_tokens', 32, 'Of each row.')
flags.DEFINE_integer('new_tokens', 128, 'Of each row.')
flags.DEFINE_integer('repeats', 5, 'Timed runs of each.')
flags.DEFINE_integer('threads', 2, 'Of torch.')
flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'Precisions.')
flags.DEFINE_list('caches', ['dynamic', 'static'], "Hugging Face's caches.")
flags.DEFINE_string('out', 'benchmarks/results/decode.json', 'JSON file.')


def ours(model, dtype, ids):
  """A run of our decoder; it remembers its tokens."""
  from rrt.infer.decode import Decoder

  decoder = Decoder(model.config, model.params, dtype=dtype)
  rows = [list(map(int, row)) for row in ids]

  def run():
    tokens = [[] for _ in rows]
    for drawn in decoder.run(rows, [FLAGS.new_tokens] * len(rows)):
      for row, new in zip(tokens, drawn, strict=True):
        row.extend(new)
    run.tokens = np.array(tokens)

  run.clock = decoder.clock
  return run


def theirs(loaded, cache, ids):
  """A run of `generate`; it remembers its tokens."""
  import torch

  inputs = torch.tensor(ids, dtype=torch.long)
  mask = torch.ones_like(inputs)
  settings = {
    'do_sample': False,
    'max_new_tokens': FLAGS.new_tokens,
    'min_new_tokens': FLAGS.new_tokens,
  }
  if cache == 'static':
    settings |= {'cache_implementation': 'static', 'disable_compile': True}

  def run():
    with torch.inference_mode():
      out = loaded.generate(inputs, attention_mask=mask, **settings)
    run.tokens = out[:, ids.shape[1] :].numpy()

  return run


def main(_):
  runtime.use_huge_pages()
  model, peer = common.load(FLAGS.model, FLAGS.threads)
  ids = common.prompts(model.config.vocab_size, FLAGS.batch, FLAGS.prompt_tokens)
  figures = {'machine': common.machine(FLAGS.threads)}
  figures |= {
    name: getattr(FLAGS, name)
    for name in ('model', 'batch', 'prompt_tokens', 'new_tokens', 'repeats')
  }
  rows = []
  for dtype in FLAGS.dtypes:
    loaded = peer(dtype)
    contenders = {'rrt': ours(model, dtype, ids)}
    for cache in FLAGS.caches:
      contenders[f'transformers, {cache} cache'] = theirs(loaded, cache, ids)
    seconds = common.take_turns(contenders, FLAGS.repeats)
    tokens = FLAGS.batch * FLAGS.new_tokens
    found = {k: common.summary(v, tokens) for k, v in seconds.items()}
    best = min((k for k in found if k != 'rrt'), key=lambda k: found[k]['seconds'])
    same = np.mean(contenders['rrt'].tokens == contenders[best].tokens)
    ratio = found[best]['seconds'] / found['rrt']['seconds']
    figures[dtype] = found | {
      'peer': best,
      'speedup': ratio,
      'tokens_equal': float(same),
      'compile_seconds': contenders['rrt'].clock.compile_seconds,
    }
    for name, f in found.items():
      rows.append(
        (
          dtype,
          name,
          f['seconds'],
          f['seconds_iqr'],
          f['tokens_per_second'],
          found[name]['seconds'] / found['rrt']['seconds'],
        )
      )
  console.table(rows, ('dtype', 'who', 'seconds', 'iqr', 'tokens/s', 'times ours'))
  common.save(FLAGS.out, figures)
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
