"""The engine's ladder: the same requests, from static batches to lossless.

    python -m benchmarks.serving --model=runs/smollm2_10x3 --depth=0.7

An offline drain: all requests wait at the start, each ends after its own
number of tokens (log-normal prompts and answers, end tokens ignored). Rungs:

  transformers      Hugging Face's `generate` on the untied export, batches of
                    `slots` rows, each as long as its longest answer
  llama.cpp         its server on the same export (needs xllamacpp)
  untied            our engine on the untied export: continuous batching
  tied              the recursive model at full depth, all tokens in step
  without LoRA      the same without its low-rank terms: what they cost
  depth-wise        the same, a token begins as soon as one has ended
  in step           tokens leave early and wait for the others of their step
  depth-wise exits  tokens leave early and the next ones take their lanes
  live gate         the same with the gate that is kept with the model
  lossless          guesses after the first loop, at full depth

Exits are replayed at random depths whose mean is `depth` of the loops, so that
speed is measured apart from a gate; the live gate leaves when it will, and
what that costs in quality is what `rrt.evaluate --exits` tells. The bound is
by parameters: what a token costs at full depth over what it costs at its mean
depth, embedding apart and head included, without LoRA. Compilation is left
out: each contender runs once before it is timed.

With `--rates` the same requests also arrive one by one (`arrivals.py`), at
these fractions of the requests a second that `tied` drained.
"""

import dataclasses
from pathlib import Path

from absl import flags
import numpy as np

from benchmarks import arrivals, common, llama_cpp, pictures
from rrt import cli
from rrt.errors import InputError

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
flags.DEFINE_list('only', [], 'Rungs to run; all by default.')
flags.DEFINE_list(
  'rates', [], 'Loads of the open loop, as fractions of what tied drained.'
)
flags.DEFINE_float('ttft', 2.0, 'Seconds: limit of goodput.')
flags.DEFINE_float('tpot', 0.3, 'Seconds: limit of goodput.')
flags.DEFINE_string('out', 'benchmarks/results/serving.json', 'JSON file.')


def workload(model) -> list[tuple[list[int], int]]:
  """Prompts and how many tokens each is answered with."""
  rng = np.random.default_rng(0)
  sizes = lambda median: np.clip(
    np.rint(median * np.exp(FLAGS.sigma * rng.normal(size=FLAGS.requests))),
    4, 6 * median,
  ).astype(int)  # fmt: skip
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
    (list(ids[end - n : end]), int(m))
    for n, m, end in zip(prompts, answers, ends, strict=True)
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
  from rrt.infer.engine import Engine

  rounded = {}
  if FLAGS.round_weights:
    rounded = dict(
      dtype='float32', weight_dtype='bfloat16', kv_dtype='bfloat16'
    )
  return Engine(
    model, slots=FLAGS.slots, context=max(len(p) + n for p, n in work),
    **dict(dtype=FLAGS.dtype, kv_dtype=FLAGS.kv_dtype, steps=FLAGS.steps)
    | rounded | options,
  )  # fmt: skip


def ours(model, work, **options):
  """A run of the engine over all requests; it remembers its figures."""
  from rrt.infer.engine import Request

  engine = new_engine(model, work, **options)

  def run():
    before = engine.figures()
    requests = engine.run(Request(p, n, ignore_end=True) for p, n in work)
    run.tokens = [r.tokens for r in requests]
    after = engine.figures()
    run.figures = {k: np.subtract(after[k], before[k]).tolist() for k in after}

  run.engine = engine
  return run


def without_lora(model):
  """The model with its low-rank terms left out; it writes something else."""
  strip = lambda tree: {
    k: strip(v) if isinstance(v, dict) else v
    for k, v in tree.items()
    if not k.startswith('lora_')
  }
  return dataclasses.replace(
    model, params=strip(model.params),
    config=dataclasses.replace(model.config, lora=None),
  )  # fmt: skip


def policies(config, arrays, depth: float) -> dict[str, dict]:
  """Options of our rungs on a recursive model.

  Args:
    config: of the model.
    arrays: of the replayed gate.
    depth: mean loops of its exits.
  """
  exits = dict(gate='replay', threshold=1.0, kv='write_ahead', arrays=arrays)
  slots = FLAGS.slots
  share = slots / depth
  some = min(slots, int(np.ceil(share + 2 * (share * (1 - 1 / depth)) ** 0.5)))
  return {
    'tied': {},
    'depth-wise': dict(pool=1, draws=-(-slots // config.loops)),
    'in step': dict(pool=slots, **exits),
    'depth-wise exits': dict(draws=some, **exits),
    # Lanes for guesses only where there are few sequences.
    'lossless': dict(
      lossless=True, lanes=min(max(slots, 8), slots * config.loops)
    ),
  }


def generate(loaded, part, on_step=lambda: None) -> list[list[int]]:
  """Hugging Face's greedy tokens for a static batch."""
  import torch
  import transformers

  class Step(transformers.StoppingCriteria):
    """Told of each token; never stops."""

    def __call__(self, ids, scores, **_):
      on_step()
      return torch.zeros(len(ids), dtype=torch.bool)

  width = max(len(p) for p, _ in part)
  ids = torch.zeros((len(part), width), dtype=torch.long)
  mask = torch.zeros_like(ids)
  for row, (prompt, _) in enumerate(part):
    ids[row, width - len(prompt) :] = torch.tensor(prompt)
    mask[row, width - len(prompt) :] = 1
  longest = max(n for _, n in part)
  with torch.inference_mode():
    out = loaded.generate(
      ids, attention_mask=mask, do_sample=False, max_new_tokens=longest,
      min_new_tokens=longest, cache_implementation='static',
      disable_compile=True, stopping_criteria=[Step()],
    )  # fmt: skip
  return [
    row[width : width + n].tolist()
    for row, (_, n) in zip(out, part, strict=True)
  ]


def theirs(loaded, work):
  """A run of `generate` in static batches; it remembers its tokens."""

  def run():
    run.tokens = []
    for first in range(0, len(work), FLAGS.slots):
      run.tokens += generate(loaded, work[first : first + FLAGS.slots])

  run.loaded = loaded
  return run


def llama(directory: Path, work):
  """A run of llama.cpp's server; it remembers its tokens."""
  path = directory / f'{FLAGS.dtype}.gguf'
  llama_cpp.write_gguf(directory / 'hf', path, FLAGS.dtype)
  context = max(len(p) + n for p, n in work) + 1
  server = llama_cpp.Server(
    path, FLAGS.slots, context, FLAGS.threads, FLAGS.dtype
  )

  def run():
    run.tokens = server.run(work)

  run.server = server
  return run


def bound(config, depth: float) -> float:
  """What a token costs at full depth over its cost at a mean depth."""
  layer = sum(a * b for a, b in config.shapes().values())
  once = layer * (config.prelude_layers + config.coda_layers)
  once += config.vocab_size * config.d_model
  block = layer * config.block_layers
  return (once + config.loops * block) / (once + depth * block)


def open_loop(contenders: dict, work, tied: list[float]) -> list[dict]:
  """Runs the contenders under load; a row for each and each rate."""
  makers = {
    'transformers': lambda run: arrivals.transformers(
      run.loaded, FLAGS.slots, generate
    ),
    'llama.cpp': lambda run: arrivals.llama(run.server),
  }
  ours = lambda run: arrivals.engine(run.engine)
  found = []
  for fraction in map(float, FLAGS.rates):
    rate = fraction * len(work) / float(np.median(tied))
    at = arrivals.times_of(len(work), rate)
    for name, run in contenders.items():
      seen = makers.get(name, ours)(run)(work, at)
      found.append(
        {'rung': name, 'rate': rate}
        | arrivals.summary(seen, at, FLAGS.ttft, FLAGS.tpot)
      )
  fields = list(found[0])
  cli.table([tuple(row[f] for f in fields) for row in found], fields)
  return found


def main(_):
  if not FLAGS.model:
    raise InputError('--model is missing: a model of two loops or more.')
  common.use_huge_pages()
  from rrt import pretrained
  from rrt.infer import gates

  model, peer = common.load(FLAGS.model, FLAGS.threads)
  R = model.config.loops
  if R < 2:
    raise InputError(f'--model={FLAGS.model}: has no loops.')
  work = workload(model)
  arrays, depth = replay(R, FLAGS.depth)
  directory = Path(peer.directory.name)
  untied = pretrained.load(directory / 'hf')
  makers = {
    'transformers': lambda: theirs(peer(FLAGS.dtype), work),
    'llama.cpp': lambda: llama(directory, work),
    'untied': lambda: ours(untied, work),
  } | {
    name: lambda options=options: ours(model, work, **options)
    for name, options in policies(model.config, arrays, depth).items()
  }
  if model.config.lora:
    makers['without LoRA'] = lambda: ours(without_lora(model), work)
  if gates.stored(model):
    makers['live gate'] = lambda: ours(model, work, gate='stored')
  names = FLAGS.only or list(makers)
  contenders = {name: makers[name]() for name in names}
  seconds = common.take_turns(contenders, FLAGS.repeats)
  tokens = sum(n for _, n in work)
  figures = {'machine': common.machine(FLAGS.threads)} | {
    name: getattr(FLAGS, name)
    for name in (
      'model', 'slots', 'requests', 'prompt_tokens', 'new_tokens', 'sigma',
      'text', 'dtype', 'kv_dtype', 'round_weights', 'steps', 'repeats',
    )
  }  # fmt: skip
  figures |= {
    'tokens': tokens, 'mean_loops': depth, 'bound': bound(model.config, depth)
  }  # fmt: skip
  rows, base = [], seconds.get('tied')
  reference = contenders.get('transformers') or contenders.get('tied')
  for name, run in contenders.items():
    found = common.summary(seconds[name], tokens)
    if base:
      found['over_tied'] = np.median(base) / found['seconds']
    if reference:
      found['same'] = float(
        np.mean([a == b for a, b in zip(run.tokens, reference.tokens)])
      )
    device = getattr(run, 'figures', None)
    if device:
      ran = device['lanes'] + device['stalls']
      found |= device | {
        'stall_share': device['stalls'] / max(ran, 1),
        'lane_share': device['lanes']
        / (device['steps'] * run.engine.plan.lanes),
      }
    figures[name] = found
    rows.append((
      name, found['tokens_per_second'], found['seconds'],
      found['seconds_iqr'], found.get('over_tied'), found.get('stall_share'),
      found.get('lane_share'), found.get('same'),
    ))  # fmt: skip
  cli.table(
    rows,
    (
      'rung', 'tokens/s', 'seconds', 'iqr', 'times tied', 'stalls', 'lanes',
      'same',
    ),
  )  # fmt: skip
  print(
    f'exits at {depth:.2f} of {R} loops: no more than '
    f'{figures["bound"]:.3f} times tied'
  )
  if FLAGS.rates:
    figures['arrivals'] = open_loop(contenders, work, seconds['tied'])
  common.save(FLAGS.out, figures)
  pictures.draw(figures, Path(FLAGS.out).with_suffix('.svg'))
  cli.finish(figures)


if __name__ == '__main__':
  cli.run(main)
