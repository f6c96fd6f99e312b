"""Prefill of ours beside Hugging Face's forward pass.

    python -m benchmarks.prefill --shapes=1x1024,8x256,32x64

Same weights, tokens and precision, all cores; both fill a key-value cache and
compute the logits of each row's last token only. They take turns of two runs,
the second of which is timed; compilation is reported apart.
"""

from absl import flags

from benchmarks import common
from rrt import command, console, runtime

FLAGS = flags.FLAGS
flags.DEFINE_string('model', 'smollm2-135m', 'What rrt.load takes.')
flags.DEFINE_list('shapes', ['1x1024', '8x256', '32x64'], 'Rows x tokens.')
flags.DEFINE_integer('repeats', 7, 'Timed runs of each.')
flags.DEFINE_integer('threads', 2, 'Of torch.')
flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'Precisions.')
flags.DEFINE_list('attentions', ['sdpa', 'eager'], "Hugging Face's.")
flags.DEFINE_string('out', 'benchmarks/results/prefill.json', 'JSON file.')


def ours(decoder, ids):
  """A prefill by our decoder, up to the first token of each row."""
  rows = [list(map(int, row)) for row in ids]
  return lambda: next(decoder.run(rows, [1] * len(rows)))


def theirs(loaded, ids):
  """A prefill by the peer."""
  import torch

  inputs = torch.tensor(ids, dtype=torch.long)

  def run():
    with torch.inference_mode():
      out = loaded(inputs, use_cache=True, logits_to_keep=1)
      return out.logits.argmax(-1)

  return run


def main(_):
  runtime.use_huge_pages()
  from rrt.infer.decode import Decoder

  model, peer = common.load(FLAGS.model, FLAGS.threads)
  figures = {'machine': common.machine(FLAGS.threads)}
  figures |= {'model': FLAGS.model, 'repeats': FLAGS.repeats}
  rows = []
  for dtype in FLAGS.dtypes:
    decoder = Decoder(model.config, model.params, dtype=dtype)
    loaded = {a: peer(dtype, a) for a in FLAGS.attentions}
    for shape in FLAGS.shapes:
      batch, length = map(int, shape.split('x'))
      ids = common.prompts(model.config.vocab_size, batch, length)
      before = decoder.clock.compile_seconds
      contenders = {'rrt': ours(decoder, ids)}
      for name, one in loaded.items():
        contenders[f'transformers, {name}'] = theirs(one, ids)
      seconds = common.take_turns(contenders, FLAGS.repeats, settle=True)
      found = {k: common.summary(v, batch * length) for k, v in seconds.items()}
      best = min((k for k in found if k != 'rrt'), key=lambda k: found[k]['seconds'])
      figures.setdefault(dtype, {})[shape] = found | {
        'peer': best,
        'speedup': found[best]['seconds'] / found['rrt']['seconds'],
        'compile_seconds': decoder.clock.compile_seconds - before,
      }
      for name, f in found.items():
        rows.append(
          (
            dtype,
            shape,
            name,
            f['seconds'],
            f['seconds_iqr'],
            f['tokens_per_second'],
            f['seconds'] / found['rrt']['seconds'],
          )
        )
  console.table(rows, ('dtype', 'shape', 'who', 'seconds', 'iqr', 'tokens/s', 'times ours'))
  common.save(FLAGS.out, figures)
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
