"""A training step of ours beside Hugging Face and torch, on the same weights.

    python -m benchmarks.train_step --batch=2 --length=512

Both train all parameters of the same model with AdamW and gradient clipping
on cross-entropy, on the same tokens, in the same precision, without
rematerialisation, with all cores and huge pages. The two take turns, so that
both see the same machine: in each round each takes a step that is not timed
(the pages that the other gave back must be found again) and then three that
are. torch runs with the settings of its own that are fastest on the machine at
hand: each of eager attention and SDPA is timed, the better one is the peer,
and its AdamW is the fused one.

What it prints: seconds a step (median and quartiles), the ratio of the
medians (above 1: ours is faster), the first loss of each (they agree), and
our compile time for models of growing depth.
"""

import gc
import statistics
import time

from absl import flags
import numpy as np

from benchmarks import common
from rrt import command, console, runtime
from rrt.models.init import init_params

FLAGS = flags.FLAGS
flags.DEFINE_string('model', 'smollm2-135m', 'What rrt.load takes.')
flags.DEFINE_integer('batch', 2, 'Rows.')
flags.DEFINE_integer('length', 512, 'Tokens a row.')
flags.DEFINE_integer('rounds', 4, 'Of three timed steps of each.')
flags.DEFINE_integer('chunk_tokens', 512, 'Tokens of logits at a time (ours).')
flags.DEFINE_integer('threads', 2, 'Of torch.')
flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Precision.')
flags.DEFINE_enum('remat', 'none', ['none', 'dots', 'full'], 'Ours.')
flags.DEFINE_bool('peer', True, 'Time torch as well.')
flags.DEFINE_list('depths', ['10', '20', '30'], 'Layers to compile.')
flags.DEFINE_string('out', 'benchmarks/results/train_step.json', 'JSON file.')

LEARNING_RATE = 3e-4


def batch_of(vocab: int):
  """Random tokens: a step's time does not depend on them."""
  shape = (FLAGS.batch, FLAGS.length)
  tokens = np.random.default_rng(0).integers(5, vocab, shape).astype(np.int32)
  weights = np.ones(shape, np.float32)
  weights[:, -1] = 0
  return {
    'tokens': tokens,
    'targets': np.roll(tokens, -1, 1),
    'weights': weights,
    'segment_ids': np.ones(shape, np.int32),
    'positions': np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
  }


def our_step(config, params=None):
  """(compile seconds, a function that takes a step and returns the loss).

  Without parameters only the compile time.
  """
  import jax
  import jax.numpy as jnp

  from rrt import sharding
  from rrt.train import optim, placement
  from rrt.train import step as step_lib
  from rrt.train.losses import Objective

  mesh = sharding.make_mesh()
  shapes = params or jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  settings = optim.Optimizer(learning_rate=LEARNING_RATE, schedule='constant', clip=1.0)
  trained = step_lib.trained_paths(optim.trainable(settings, shapes))
  spec = step_lib.Step(
    config,
    Objective(distillation=0.0, chunk_tokens=FLAGS.chunk_tokens),
    optim.make_optimizer(settings, step_lib.split(shapes, trained)[0], 100),
    trained,
    dtype=jnp.dtype(FLAGS.dtype),
    remat=FLAGS.remat,
  )
  abstract = step_lib.abstract_state(spec, mesh)
  step = step_lib.jit_step(spec, mesh, jax.tree.map(lambda x: x.sharding, abstract))
  batch = placement.to_mesh(batch_of(config.vocab_size), mesh)
  with jax.set_mesh(mesh):
    begin = time.perf_counter()
    compiled = step.lower(abstract, {}, batch).compile()
    seconds = time.perf_counter() - begin
  if params is None:
    return seconds, None
  held = [step_lib.init_state(spec, params, mesh)]

  def run():
    held[0], metrics = compiled(held[0], {}, batch)
    return float(metrics['loss'])

  return seconds, run


def their_step(directory: str, attention: str, vocab: int):
  """A function that takes a step of Hugging Face's model."""
  import torch
  import transformers

  torch.set_num_threads(FLAGS.threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation=attention
  )
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
  )
  tokens = torch.tensor(batch_of(vocab)['tokens'], dtype=torch.long)
  half = torch.autocast('cpu', torch.bfloat16, FLAGS.dtype == 'bfloat16')

  def run():
    with half:
      loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss)

  return run


def timed(run) -> tuple[float, float]:
  begin = time.perf_counter()
  loss = run()
  return time.perf_counter() - begin, loss


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
  low, middle, high = statistics.quantiles(seconds, n=4)
  return low, middle, high


def main(_):
  runtime.use_huge_pages()
  import dataclasses

  import rrt
  from rrt.train.metrics import step_flops

  model = rrt.load(FLAGS.model)
  config = model.config
  compile_seconds = {}
  for layers in map(int, FLAGS.depths):
    shape = dataclasses.replace(config, block_layers=layers, windows=(), rope_index=())
    compile_seconds[layers], _ = our_step(shape)
    print(f'compiled {layers} layers in {compile_seconds[layers]:.1f} s')
  seconds, ours = our_step(config, model.params)
  runs = {'ours': ours}
  chosen = None
  if FLAGS.peer:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
      rrt.save_hf(model, f'{scratch}/hf')
      tries = {}
      for attention in ('eager', 'sdpa'):
        run = their_step(f'{scratch}/hf', attention, config.vocab_size)
        run()
        tries[attention] = min(timed(run)[0] for _ in range(2))
        del run
        gc.collect()
      chosen = min(tries, key=tries.get)
      print('torch attention:', {k: round(v, 2) for k, v in tries.items()})
      runs['torch'] = their_step(f'{scratch}/hf', chosen, config.vocab_size)
  first = {name: run() for name, run in runs.items()}
  times = {name: [] for name in runs}
  for _ in range(FLAGS.rounds):
    for name, run in runs.items():
      run()
      times[name] += [timed(run)[0] for _ in range(3)]
  rows, figures = [], {}
  flops = step_flops(config, None, FLAGS.batch * FLAGS.length, FLAGS.length)
  for name, values in times.items():
    low, middle, high = quartiles(values)
    figures[f'{name}_seconds'] = middle
    figures[f'{name}_quartiles'] = [low, high]
    rows.append([name, middle, low, high, flops / middle / 1e9, first[name]])
  console.table(rows, ['', 'seconds a step', 'quartile 1', 'quartile 3', 'GFLOP/s', 'loss'])
  if FLAGS.peer:
    figures['ratio'] = figures['torch_seconds'] / figures['ours_seconds']
    figures['peer'] = {'attention': chosen}
  figures |= {
    'model': FLAGS.model,
    'batch': FLAGS.batch,
    'length': FLAGS.length,
    'dtype': FLAGS.dtype,
    'remat': FLAGS.remat,
    'first_loss': first,
    'compile_seconds': seconds,
    'compile_seconds_by_layers': compile_seconds,
    'machine': common.machine(FLAGS.threads),
  }
  common.save(FLAGS.out, figures)
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
