"""The rungs of the serving ladder: the requests, our policies, the peers.

The flags here say what is asked and how; `benchmarks.serving` runs the ladder
and `benchmarks.predict` foretells it.
"""

import dataclasses
from pathlib import Path

from absl import flags
import numpy as np

from benchmarks import llama_cpp
from rrt.errors import InputError
from rrt.relax import registry

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'A recursive model, as rrt.load takes it.')
flags.DEFINE_integer('slots', 32, 'Sequences at once.')
flags.DEFINE_integer('requests', 64, 'How many.')
flags.DEFINE_string(
  'text',
  None,
  'Text whose pieces are the prompts; random tokens by default, which is the '
  'same where what is written does not matter.',
)
flags.DEFINE_integer('prompt_tokens', 48, 'Median of the prompts.')
flags.DEFINE_integer('new_tokens', 64, 'Median of the answers.')
flags.DEFINE_float('sigma', 0.5, 'Of their logarithms.')
flags.DEFINE_float('depth', 0.7, 'Mean loops over all loops, for the exits.')
flags.DEFINE_string('dtype', 'float32', 'Precision, of ours and theirs.')
flags.DEFINE_string('kv_dtype', None, 'Of our cache.')
flags.DEFINE_bool(
  'round_weights',
  False,
  'Ours computes in float32 on weights and a cache that are rounded to '
  'bfloat16, whatever --dtype says.',
)
flags.DEFINE_integer('steps', 8, 'Block steps a call of ours.')
flags.DEFINE_integer('repeats', 3, 'Timed runs of each.')
flags.DEFINE_integer('threads', 2, 'Of torch.')


def workload(model) -> list[tuple[list[int], int]]:
  """Prompts and how many tokens each is answered with."""
  rng = np.random.default_rng(0)
  sizes = lambda median: np.clip(
    np.rint(median * np.exp(FLAGS.sigma * rng.normal(size=FLAGS.requests))), 4, 6 * median
  ).astype(int)
  prompts, answers = sizes(FLAGS.prompt_tokens), sizes(FLAGS.new_tokens)
  ids = rng.integers(5, model.config.vocab_size, prompts.sum()).tolist()
  if FLAGS.text:
    from rrt.evals import perplexity

    text = perplexity.read_text(FLAGS.text, len(ids))
    ids = perplexity.encode(model.tokenizer, text, len(ids))
    if len(ids) < prompts.sum():
      raise InputError(f'--text={FLAGS.text}: is too short.')
  ends = np.cumsum(prompts)
  return [
    (list(ids[end - n : end]), int(m)) for n, m, end in zip(prompts, answers, ends, strict=True)
  ]


def replay(loops: int, depth: float) -> tuple[dict, float]:
  """Random exit depths by slot and token, and their mean."""
  rng = np.random.default_rng(1)
  # After each loop but the last a token leaves with one probability.
  low, high = 0.0, 1.0
  for _ in range(50):
    p = (low + high) / 2
    mean = sum((1 - p) ** r for r in range(loops))
    low, high = (p, high) if mean > depth * loops else (low, p)
  drawn = rng.geometric(max(p, 1e-9), (FLAGS.slots, 4096))
  table = np.minimum(drawn, loops).astype(np.int32)
  return {'loops': table}, float(table.mean())


def new_engine(model, work, **options):
  """An engine for these requests."""
  from rrt.infer.engine.engine import Engine

  rounded = {}
  if FLAGS.round_weights:
    rounded = dict(dtype='float32', weight_dtype='bfloat16', kv_dtype='bfloat16')
  return Engine(
    model,
    slots=FLAGS.slots,
    context=max(len(p) + n for p, n in work),
    **dict(dtype=FLAGS.dtype, kv_dtype=FLAGS.kv_dtype, steps=FLAGS.steps) | rounded | options,
  )


def ours(model, work, batch: int | None = None, **options):
  """A run of the engine over the requests; it remembers its figures.

  Args:
    model: what runs.
    work: prompts and how many tokens each is answered with.
    batch: how many requests are asked at once; None for all.
    **options: of the engine.
  """
  from rrt.infer.engine.engine import Request

  engine = new_engine(model, work, **options)

  def run():
    before = engine.figures()
    run.tokens = []
    for first in range(0, len(work), batch or len(work)):
      part = work[first : first + (batch or len(work))]
      done = engine.run(Request.of(p, n, ignore_eos=True) for p, n in part)
      run.tokens += [r.tokens for r in done]
    after = engine.figures()
    run.figures = {k: np.subtract(after[k], before[k]).tolist() for k in after}

  run.engine = engine
  return run


def without_relaxations(model):
  """The model with its relaxations left out; it writes something else."""
  strip = lambda tree: {
    k: strip(v) if isinstance(v, dict) else v
    for k, v in tree.items()
    if not registry.kind_of_path(k)
  }
  return dataclasses.replace(
    model, params=strip(model.params), config=dataclasses.replace(model.config, relax=())
  )


def policies(config, arrays, depth: float) -> dict[str, dict]:
  """Options of our rungs on a recursive model.

  Args:
    config: of the model.
    arrays: of the replayed gate.
    depth: mean loops of its exits.
  """
  exits = dict(gate='replay', threshold=1.0, kv='propagate', arrays=arrays)
  slots = FLAGS.slots
  # Lanes for guesses only where there are few sequences.
  guessing = dict(lossless=True, max_batch_tokens=min(max(slots, 8), slots * config.loops))
  return {
    'tied': dict(max_sampled_tokens=slots, min_sampled_tokens=slots),
    'static': dict(batch=slots, max_sampled_tokens=slots, min_sampled_tokens=slots),
    'depth-wise': {},
    'in step': dict(max_sampled_tokens=slots, min_sampled_tokens=slots, **exits),
    'depth-wise exits': dict(mean_loops=depth, **exits),
    'copied exits': dict(mean_loops=depth, **exits | {'kv': 'write_ahead'}),
    'lossless': guessing,
    'without lookup': dict(lookup=0, **guessing),
  }


def llama(directory: Path, work):
  """A run of llama.cpp's server; it remembers its tokens."""
  from rrt.checkpoints.load import load
  from rrt.checkpoints.save_gguf import save_gguf

  path = directory / f'{FLAGS.dtype}.gguf'
  types = {'float32': 'f32', 'bfloat16': 'bf16'}
  save_gguf(load(directory / 'hf'), path, types[FLAGS.dtype])
  context = max(len(p) + n for p, n in work) + 1
  server = llama_cpp.Server(path, FLAGS.slots, context, FLAGS.threads, FLAGS.dtype)

  def run():
    run.tokens = server.run(work)

  run.server = server
  return run
