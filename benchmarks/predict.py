"""What the engine takes, predicted from its passes and then measured.

    python -m benchmarks.predict --model=runs/smollm2_10x3

Times each kind of pass by itself (block, coda and head, prelude, a prompt's way
into its slot, an empty call), lets `rrt.infer.simulate` count the passes of a drain under four
policies, and runs the engine on the same requests. The counts must be the
engine's own exactly; the seconds are compared, the least of some runs on both
sides, since what else the machine does only adds to them.
"""

import functools
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, rungs
from rrt import cli, pretrained
from rrt.errors import InputError
from rrt.infer import decode, draws, flights, lanes, simulate
from rrt.infer import engine as engines
from rrt.infer.engine import Engine

FLAGS = flags.FLAGS
flags.DEFINE_string(
  'predictions', 'benchmarks/results/predict.json', 'JSON file.'
)
_ROUNDS = 16


def measure(engine: Engine, prompts: set[int]) -> simulate.Times:
  """Seconds of each pass of an engine, with all its slots taken.

  Args:
    engine: fresh; it is used up.
    prompts: lengths that are prefilled.
  """
  plan, params, gate = engine.plan, engine._params, engine._gate
  S, page = plan.slots, plan.page
  rng = np.random.default_rng(0)
  draw_ids = lambda n: rng.integers(5, plan.config.vocab_size, n).tolist()

  call = _seconds(lambda: _call_empty(engine), 5)
  bucket = lambda n: decode.bucket(n, engine.context)
  prefill = {
    size: _seconds(functools.partial(_admit, engine, draw_ids(size)), 5)
    for size in sorted(set(map(bucket, prompts)))
  }
  state = engine._state
  table = engine._table
  table = table._replace(room_S=np.full(S, 10**6, np.int32))

  def passes(stage, body, position):
    """Runs a pass again and again on all slots."""

    def once(i, state):
      f = state.flights
      # What is the same in all rounds would be computed once.
      f = f._replace(
        x_SxKxD=f.x_SxKxD + jnp.asarray(1e-3 * i, f.x_SxKxD.dtype),
        token_SxK=jnp.full_like(f.token_SxK, i),
        stage_SxK=jnp.full_like(state.flights.stage_SxK, stage),
        position_SxK=jnp.full_like(f.position_SxK, position),
        loop_SxK=jnp.zeros_like(state.flights.loop_SxK),
      )
      state = state._replace(
        flights=f, live_S=jnp.ones(S, bool),
        base_S=jnp.full_like(state.base_S, position),
        count_S=jnp.zeros_like(state.count_S),
      )  # fmt: skip
      return body(state)

    return lambda params, table, state: jax.lax.fori_loop(
      0, _ROUNDS, once, state
    )

  kinds = {
    'block': (flights.RUN, lambda p, t: lambda s: lanes.run_block(
      plan, p, gate, t, s)),
    'draw': (flights.DUE, lambda p, t: lambda s: draws.draw(
      plan, p, gate, t, jnp.asarray([-1]), s)[0]),
    'enter': (flights.ENTER, lambda p, t: lambda s: lanes.enter(plan, p, s)),
  }  # fmt: skip
  found = {}
  most = -(-engine.context // page)
  for kind, (stage, body) in kinds.items():
    at = {}
    for pages in sorted({1, most}):
      position = min(pages * page, engine.context) - 1
      run = jax.jit(
        lambda p, t, s, stage=stage, body=body, position=position: passes(
          stage, body(p, t), position
        )(p, t, s),
        donate_argnums=2,
      )
      state = jax.block_until_ready(run(params, table, state))
      took = []
      for _ in range(5):
        began = time.perf_counter()
        state = jax.block_until_ready(run(params, table, state))
        took.append((time.perf_counter() - began) / _ROUNDS)
      at[pages] = min(took)
    found[kind] = at
  by_pages = lambda at: (
    lambda n: float(np.interp(n, list(at), list(at.values())))
  )
  return simulate.Times(
    by_pages(found['block']), by_pages(found['draw']),
    by_pages(found['enter']),
    lambda n: prefill[bucket(n)], call,
  )  # fmt: skip


def _admit(engine: Engine, ids: list[int]):
  """Puts a prompt into the first slot."""
  engine._state = engines._admit(
    engine.plan, engine._state, jnp.int32(0), jnp.int32(ids[-1]),
    jnp.int32(len(ids) - 1), engine._prefill(ids), None,
  )  # fmt: skip
  return engine._state


def _call_empty(engine: Engine):
  """A call with no sequence in it, and its way to the host."""
  engine._state, *out = engines._call(
    engine.plan, engine._params, engine._gate, engine._table, engine._end_E,
    engine._state,
  )  # fmt: skip
  return jax.device_get(out)


def _seconds(run, repeats: int) -> float:
  jax.block_until_ready(run())
  took = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(run())
    took.append(time.perf_counter() - began)
  return min(took)


def main(_):
  if not FLAGS.model:
    raise InputError('--model is missing: a model of two loops or more.')
  common.use_huge_pages()
  model = pretrained.load(FLAGS.model)
  work = rungs.workload(model)
  arrays, depth = rungs.replay(model.config.loops, FLAGS.depth)
  figures: dict = {'machine': common.machine(FLAGS.threads)} | {
    name: getattr(FLAGS, name)
    for name in (
      'model', 'slots', 'requests', 'prompt_tokens', 'new_tokens', 'sigma',
      'dtype', 'steps', 'repeats',
    )
  }  # fmt: skip
  figures['mean_loops'] = depth
  rows = []
  for name, options in rungs.policies(model.config, arrays, depth).items():
    if 'lossless' in options:
      continue
    run = rungs.ours(model, work, **options)
    run()
    took = []
    for _ in range(FLAGS.repeats):
      began = time.perf_counter()
      run()
      took.append(time.perf_counter() - began)
    measured = min(took)
    times = measure(
      rungs.new_engine(model, work, **options), {len(p) - 1 for p, _ in work}
    )
    depths = arrays['loops'] if 'gate' in options else None
    found = simulate.schedule(
      simulate.Policy.of(run.engine.plan), [(len(p), n) for p, n in work],
      depths,
    )  # fmt: skip
    predicted = simulate.seconds(found, times)
    counted = {
      'steps': found.steps, 'draw_steps': len(found.draw_pages),
      'lanes': found.lanes, 'stalls': found.stalls,
    }  # fmt: skip
    same = all(run.figures[k] == v for k, v in counted.items())
    figures[name] = {
      'predicted': predicted, 'measured': measured,
      'error': predicted / measured - 1, 'counts_equal': same,
    } | counted  # fmt: skip
    rows.append((
      name, found.steps, predicted, measured,
      f'{100 * (predicted / measured - 1):+.1f} %', 'yes' if same else 'no',
    ))  # fmt: skip
  cli.table(
    rows,
    ('policy', 'block steps', 'predicted s', 'measured s', 'error', 'counts'),
  )
  common.save(FLAGS.predictions, figures)
  cli.finish(figures)


if __name__ == '__main__':
  cli.run(main)
