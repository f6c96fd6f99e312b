"""What the engine takes, predicted from its passes and then measured.

    python -m benchmarks.predict --model=runs/smollm2_10x3

Each kind of pass is timed by itself (block, coda and head, prelude, keys and
values of skipped loops, a prompt's way into its slot, an empty call),
`rrt.infer.engine.simulate` counts the passes of a drain under five policies, and the
engine runs the same requests. The counts must be the engine's own exactly. The
seconds are compared repeat by repeat, the passes timed right before and right
after the run that they foretell, because the speed of a shared machine drifts;
the error is the median of the repeats.
"""

import functools
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, rungs
from rrt import command, console, runtime
from rrt.checkpoints.load import load
from rrt.errors import InputError
from rrt.infer.engine import engine as engines
from rrt.infer.engine import sampler, simulate
from rrt.infer.engine.engine import Engine
from rrt.infer.engine.request import Request
from rrt.infer.engine.state import IN_BLOCK, WAIT_PRELUDE, WAIT_SAMPLE
from rrt.infer.engine.step import run_block, run_prelude

FLAGS = flags.FLAGS
flags.DEFINE_string('predictions', 'benchmarks/results/predict.json', 'JSON file.')
_ROUNDS = 16
# Seconds of a pass over one page of the cache, and of a call.
_ONE_PAGE = {
  'block': lambda t: t.block(1),
  'sampler': lambda t: t.sampler(1),
  'fill': lambda t: t.fill,
  'prelude': lambda t: t.prelude(1),
  'call': lambda t: t.call,
}


class Clock:
  """Times each pass of an engine, with all its slots taken."""

  def __init__(self, engine: Engine, prompts: set[int]):
    """Compiles.

    Args:
      engine: fresh; it is used up.
      prompts: lengths that are prefilled.
    """
    self._engine = engine
    self._table = engine._table._replace(
      max_new_tokens_S=np.full(engine.shape.slots, 10**6, np.int32)
    )
    rng = np.random.default_rng(0)
    vocab = engine.shape.config.vocab_size
    self._bucket = lambda n: min(engine._prefiller.shape_of(max(n - 1, 1)).size, engine.context)
    self._prompts = {
      n: rng.integers(5, vocab, n).tolist() for n in sorted(set(map(self._bucket, prompts)))
    }
    page = engine.shape.page
    self._pages = sorted({1, -(-engine.context // page)})
    self._passes = {
      (kind, n): self._compile(kind, min(n * page, engine.context) - 1)
      for kind in ('block', 'sampler', 'prelude')
      for n in self._pages
    }
    if engine.shape.fills:
      self._passes['fill', 1] = self._compile('fill', 0)
    self.read()

  def read(self) -> simulate.Times:
    """Means over a few rounds, now."""
    engine = self._engine
    call = _seconds(lambda: _call_empty(engine), 5)
    prefill = {
      n: _seconds(functools.partial(_admit, engine, ids), 3) for n, ids in self._prompts.items()
    }
    found = {
      key: _seconds(functools.partial(self._run, run), 2) / _ROUNDS
      for key, run in self._passes.items()
    }

    def by_pages(kind):
      at = [found[kind, n] for n in self._pages]
      return lambda n: float(np.interp(n, self._pages, at))

    return simulate.Times(
      by_pages('block'),
      by_pages('sampler'),
      by_pages('prelude'),
      lambda n: prefill[self._bucket(n)],
      max(found.get(('fill', 1), 0.0) - found['sampler', 1], 0.0),
      call,
    )

  def _run(self, run):
    engine = self._engine
    engine._state = run(engine._params, self._table, engine._state)
    return engine._state

  def _compile(self, kind: str, position: int):
    """A run of one pass again and again, on all slots at a position."""
    shape, gate = self._engine.shape, self._engine._gate
    draw = lambda p, t, s: sampler.sample_tokens(shape, p, gate, t, s)[0]
    stage, loops, body = {
      'block': (IN_BLOCK, 0, lambda p, t, s: run_block(shape, p, gate, t, s)),
      'sampler': (WAIT_SAMPLE, shape.config.loops, draw),
      'fill': (WAIT_SAMPLE, 1, draw),
      'prelude': (WAIT_PRELUDE, 0, lambda p, t, s: run_prelude(shape, p, s)),
    }[kind]

    def once(params, table, i, state):
      f = state.in_flight
      # What is the same in all rounds would be computed once.
      f = f._replace(
        x_SxKxD=f.x_SxKxD + jnp.asarray(1e-3 * i, f.x_SxKxD.dtype),
        token_SxK=jnp.full_like(f.token_SxK, i),
        stage_SxK=jnp.full_like(f.stage_SxK, stage),
        position_SxK=jnp.full_like(f.position_SxK, position),
        loop_SxK=jnp.full_like(f.loop_SxK, loops),
      )
      state = state._replace(
        in_flight=f,
        live_S=jnp.ones(shape.slots, bool),
        base_S=jnp.full_like(state.base_S, position),
        count_S=jnp.zeros_like(state.count_S),
      )
      return body(params, table, state)

    def rounds(params, table, state):
      each = functools.partial(once, params, table)
      return jax.lax.fori_loop(0, _ROUNDS, each, state)

    return jax.jit(rounds, donate_argnums=2)


def _admit(engine: Engine, ids: list[int]):
  """Puts a prompt into the first slot."""
  group = engine._prefiller.take([Request.of(ids, 1)], [0])
  while not group.complete:
    engine._prefiller.launch(group)
  engine._insert(0, group.requests[0], engine._prefiller.row(group, 0), group.shape.size)
  return engine._state


def _call_empty(engine: Engine):
  """A call with no sequence in it, and its way to the host."""
  engine._state, *out = engines._call(
    engine.shape, engine._params, engine._gate, engine._table, engine._state
  )
  return jax.device_get(out)


def _seconds(run, repeats: int) -> float:
  """Of one run; the first compiles where nothing has, and does not count."""
  jax.block_until_ready(run())
  began = time.perf_counter()
  for _ in range(repeats):
    jax.block_until_ready(run())
  return (time.perf_counter() - began) / repeats


def main(_):
  if not FLAGS.model:
    raise InputError('--model is missing: a model of two loops or more.')
  runtime.use_huge_pages()
  model = load(FLAGS.model)
  work = rungs.workload(model)
  arrays, depth = rungs.replay(model.config.loops, FLAGS.depth)
  figures: dict = {'machine': common.machine(FLAGS.threads)} | {
    name: getattr(FLAGS, name)
    for name in (
      'model',
      'slots',
      'requests',
      'prompt_tokens',
      'new_tokens',
      'sigma',
      'dtype',
      'steps',
      'repeats',
    )
  }
  figures['mean_loops'] = depth
  contenders = {
    name: Contender(model, work, options, arrays['loops'])
    for name, options in rungs.policies(model.config, arrays, depth).items()
    if not {'lossless', 'batch'} & set(options)
  }
  for _ in range(FLAGS.repeats):
    for contender in contenders.values():
      contender.compare()
  figures |= {name: c.figures() for name, c in contenders.items()}
  console.table(
    [
      (
        name,
        f['steps'],
        f['predicted'],
        f['measured'],
        f'{100 * f["error"]:+.1f} %',
        'yes' if f['counts_equal'] else 'no',
      )
      for name, f in figures.items()
      if name in contenders
    ],
    ('policy', 'block steps', 'predicted s', 'measured s', 'error', 'counts'),
  )
  common.save(FLAGS.predictions, figures)
  console.finish(figures)


class Contender:
  """A policy: its engine, its clock and its schedule."""

  def __init__(self, model, work, options: dict, loops_SxT):
    """Compiles and counts."""
    self._run = rungs.ours(model, work, **options)
    self._run()
    self._clock = Clock(rungs.new_engine(model, work, **options), {len(p) - 1 for p, _ in work})
    self._passes = simulate.schedule(
      simulate.Policy.of(self._run.engine.shape),
      [(len(p), n) for p, n in work],
      loops_SxT if 'gate' in options else None,
    )
    self._found: list[tuple[float, float]] = []
    self._times: list[simulate.Times] = []

  def compare(self) -> None:
    """Foretells a run and times it."""
    before = self._foretell()
    began = time.perf_counter()
    self._run()
    measured = time.perf_counter() - began
    self._found.append(((before + self._foretell()) / 2, measured))

  def _foretell(self) -> float:
    self._times.append(self._clock.read())
    return simulate.seconds(self._passes, self._times[-1])

  def figures(self) -> dict:
    """Medians, and whether the counts are the engine's."""
    predicted, measured = np.asarray(self._found).T
    counted = {
      'steps': self._passes.steps,
      'sampler_steps': len(self._passes.sampler_pages),
      'fill_passes': self._passes.fill_passes,
      'batch_tokens': self._passes.batch_tokens,
      'stalls': self._passes.stalls,
    }
    return counted | {
      'predicted': np.median(predicted),
      'measured': np.median(measured),
      'error': np.median(predicted / measured) - 1,
      'errors': (predicted / measured - 1).tolist(),
      'passes': {
        name: float(np.median([time(t) for t in self._times])) for name, time in _ONE_PAGE.items()
      },
      'counts_equal': all(self._run.figures[k] == n for k, n in counted.items()),
    }


if __name__ == '__main__':
  command.run(main)
