"""The engine's ladder: the same requests, from static batches to lossless.

    python -m benchmarks.serving --model=runs/smollm2_10x3 --depth=0.7

An offline drain: all requests wait at the start, each ends after its own
number of tokens (log-normal prompts and answers, end tokens ignored). Rungs:

  transformers      Hugging Face's `generate` on the untied export, batches of
                    `slots` rows, each as long as its longest answer
  dynamic, compiled the same with a cache that grows; on a GPU, compiled
  continuous        Hugging Face's continuous batching, its `generate_batch`
  llama.cpp         its server on the same export (needs xllamacpp)
  untied            our engine on the untied export: continuous batching
  tied              the recursive model at full depth, all tokens in step
  static            the same, new requests only when all before have ended
  depth-wise        the engine's default schedule: out of step, where sampling
                    waits for some tokens only and loops share a launch; in step
                    where prelude, coda and head cost more than the block
  without LoRA      the same without its low-rank terms: what they cost
  in step           tokens leave early and wait for the others of their step
  depth-wise exits  tokens leave early and the next ones take their lanes
  copied exits      the same, skipped loops keep copies of keys and values
  live gate         depth-wise, with the gate that is stored with the model
  lossless          drafts after every loop but the last, verified at full depth
  without lookup    the same, without prompt-lookup drafts

Exits are replayed at random depths whose mean is `depth` of the loops, so that
speed is measured apart from a gate; the live gate has the threshold calibrated to
its target loss (`promised`, nats a token), and `rrt evaluate --exits` measures its
loss on other text. The bound on "times
tied" is by parameters: what a token costs at full depth over what it costs at
its mean depth, embedding apart and head included, without LoRA; of the lossless
mode, by launches: those of tied over its own. "roof" is the bound on the
tokens a second themselves (`roofline.py`), and under load on the two waits.
Compilation is left out: each contender runs once before it is timed. "times
tied" is the median of the rounds' own ratios.

With `--rates` the same requests also arrive one by one (`arrivals.py`), at
these fractions of the requests a second that `tied` drained.
"""

from pathlib import Path

from absl import flags
import numpy as np

from benchmarks import arrivals, common, hugging_face, pictures, rungs
from benchmarks.roofline import Costs, Roof
from rrt import command, console, runtime
from rrt.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_list('only', [], 'Rungs to run; all by default.')
flags.DEFINE_list('rates', [], 'Loads of the open loop, as fractions of what tied drained.')
flags.DEFINE_float('ttft', 2.0, 'Seconds: limit of goodput.')
flags.DEFINE_float('tpot', 0.3, 'Seconds: limit of goodput.')
flags.DEFINE_string('out', 'benchmarks/results/serving.json', 'JSON file.')


def bound(config, depth: float) -> float:
  """What a token costs at full depth over its cost at a mean depth."""
  costs = Costs.of(config)
  return costs.passed(config.loops) / costs.passed(depth)


def bounds(name: str, device: dict, figures: dict, config) -> dict:
  """Mean loops of a rung of ours and the bound on its "times tied"."""
  if name == 'untied':
    return {}
  tokens_R = np.asarray(device['depths_R'])
  mean = float(tokens_R @ np.arange(1, config.loops + 1) / tokens_R.sum())
  found = {'mean_loops': mean, 'bound': bound(config, mean)}
  if name in ('lossless', 'without lookup') and 'tied' in figures:
    found['bound'] = figures['tied']['steps'] / device['steps']
  return found


def open_loop(contenders: dict, work, tied: list[float], least: dict) -> list[dict]:
  """Runs the contenders under load; a row for each and each rate.

  Args:
    contenders: by name.
    work: the requests.
    tied: seconds in which `tied` drained them.
    least: of each contender, least seconds to a first and to a further token.
  """
  batches = lambda run: arrivals.static_batches(run.generate, FLAGS.slots)
  makers = {
    'transformers': batches,
    'dynamic': batches,
    'compiled': batches,
    'continuous': lambda run: arrivals.continuous(run.manager),
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
        | least[name]
      )
  fields = list(found[0])
  console.table([tuple(row[f] for f in fields) for row in found], fields)
  return found


def main(_):
  if not FLAGS.model:
    raise InputError('--model is missing: a model of two loops or more.')
  runtime.use_huge_pages()
  from rrt.checkpoints.load import load
  from rrt.exits import gate as gate_lib

  model, peer = common.load(FLAGS.model, FLAGS.threads)
  R = model.config.loops
  if R < 2:
    raise InputError(f'--model={FLAGS.model}: has no loops.')
  work = rungs.workload(model)
  arrays, depth = rungs.replay(R, FLAGS.depth)
  directory = Path(peer.directory.name)
  untied = load(directory / 'hf')
  makers = {
    'transformers': lambda: hugging_face.static_batches(peer(FLAGS.dtype), work, FLAGS.slots),
    'dynamic': lambda: hugging_face.static_batches(peer(FLAGS.dtype), work, FLAGS.slots, 'dynamic'),
    'continuous': lambda: hugging_face.continuous(peer(FLAGS.dtype), work, FLAGS.slots),
    'llama.cpp': lambda: rungs.llama(directory, work),
    'untied': lambda: rungs.ours(untied, work),
  } | {
    name: lambda options=options: rungs.ours(model, work, **options)
    for name, options in rungs.policies(model.config, arrays, depth).items()
  }
  if model.config.relax:
    makers['without LoRA'] = lambda: rungs.ours(rungs.without_relaxations(model), work)
  if gate_lib.stored(model):
    makers['live gate'] = lambda: rungs.ours(model, work, gate='stored')
  if hugging_face.device() == 'cuda':
    makers['compiled'] = lambda: hugging_face.static_batches(
      peer(FLAGS.dtype), work, FLAGS.slots, 'compiled'
    )
  names = FLAGS.only or list(makers)
  if unknown := set(names) - set(makers):
    raise InputError(f'--only: {sorted(unknown)}: this model has {[*makers]}.')
  if FLAGS.rates and 'tied' not in names:
    raise InputError('--rates are fractions of what tied drained: run it too.')
  if FLAGS.repeats < 2:
    raise InputError(f'--repeats={FLAGS.repeats}: must be 2 or more.')
  contenders = {name: makers[name]() for name in names}
  seconds = common.take_turns(contenders, FLAGS.repeats)
  tokens = sum(n for _, n in work)
  figures = {'machine': common.machine(FLAGS.threads)} | {
    name: getattr(FLAGS, name)
    for name in (
      'model',
      'slots',
      'requests',
      'prompt_tokens',
      'new_tokens',
      'sigma',
      'text',
      'dtype',
      'kv_dtype',
      'round_weights',
      'steps',
      'repeats',
    )
  }
  figures |= {'tokens': tokens, 'mean_loops': depth, 'bound': bound(model.config, depth)}
  roof = Roof.measure(FLAGS.dtype)
  figures |= {'flops': roof.flops, 'bandwidth': roof.bandwidth}
  least: dict[str, dict] = {}
  prompt = int(np.median([len(p) for p, _ in work]))
  rows, base = [], seconds.get('tied')
  reference = contenders.get('transformers') or contenders.get('tied')
  for name, run in contenders.items():
    found = common.summary(seconds[name], tokens)
    if name == 'live gate':
      found['promised_loss'] = gate_lib.stored(model).calibration.get('loss')
    if base:
      # Round by round: the machine's speed may change from one to the next.
      found['over_tied'] = float(np.median(np.array(base) / np.array(seconds[name])))
    if reference:
      found['same'] = float(np.mean([a == b for a, b in zip(run.tokens, reference.tokens)]))
    device = getattr(run, 'figures', None)
    if device:
      ran = device['batch_tokens'] + device['stalls']
      found |= device
      found |= bounds(name, device, figures, model.config)
      found |= {
        'stall_share': device['stalls'] / max(ran, 1),
        'lane_share': device['batch_tokens']
        / (device['steps'] * run.engine.shape.max_batch_tokens),
      }
    costs = Costs.of(model.config, tied='mean_loops' in found)
    depth_run = found.get('mean_loops', R)
    found['roof'] = FLAGS.slots / roof.seconds(costs, depth_run, FLAGS.slots)
    least[name] = {
      'ttft_bound': roof.prompt_seconds(costs, prompt),
      'tpot_bound': roof.seconds(costs, depth_run, 1),
    }
    figures[name] = found
    rows.append(
      (
        name,
        found['tokens_per_second'],
        found['roof'],
        found['seconds_iqr'],
        found.get('over_tied'),
        found.get('bound'),
        found.get('stall_share'),
        found.get('lane_share'),
        found.get('same'),
        found.get('promised_loss'),
      )
    )
  console.table(
    rows,
    (
      'rung',
      'tokens/s',
      'roof',
      'iqr, s',
      'times tied',
      'bound',
      'stalls',
      'batch_tokens',
      'same',
      'promised',
    ),
  )
  print(
    f'exits at {depth:.2f} of {R} loops: no more than '
    f'{figures["bound"]:.3f} times full depth by parameters'
  )
  if FLAGS.rates:
    figures['arrivals'] = open_loop(contenders, work, seconds['tied'], least)
  common.save(FLAGS.out, figures)
  pictures.draw(figures, Path(FLAGS.out).with_suffix('.svg'))
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
