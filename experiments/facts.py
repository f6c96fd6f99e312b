r"""What a relaxation can learn by heart: facts of a made-up world, recalled in other words.

A converted child is frozen; each row adds one relaxation, trains it alone on sentences that tell
the facts and asks for them in a wording that was not in the text. All rows have as many trained
parameters (--table=parameters) or add as many FLOPs a token (--table=flops).

COMMAND
  python -m experiments.facts --child=child --facts=1000,4000,16000 --seeds=0,1 \
      --text=news.jsonl.xz --task_data=eval/ --out=runs/facts
  `rrt convert` makes the child. --rows makes some of the rows; a run that is started again goes
  on where it was.

HARDWARE
  An accelerator for these sizes: a pass over 1,000 facts is 52 steps of 1,024 tokens. Two CPU
  cores (4 to 10 s a step) for hundreds of facts.

RESULT
  docs/results/memory.md
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import math
from pathlib import Path
import shutil
from typing import Any, ClassVar

from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp

from experiments import facts_world as world_lib
from experiments.measured import decode_speed
from rrt import command, console
from rrt.checkpoints.load import load, save
from rrt.cli import plots
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.evals import endings, perplexity
from rrt.model import LanguageModel
from rrt.models.adapter import with_relaxation
from rrt.ops.matmul import matmul
from rrt.relax.adapter import Adapter
from rrt.relax.base import NO_AUX, Leaf, Relaxation
from rrt.relax.experts import Experts
from rrt.relax.hosts import LINEAR_AXES
from rrt.relax.lookup import Lookup
from rrt.relax.memory import Memory
from rrt.relax.peer import Peer
from rrt.relax.registry import register
from rrt.train.loop import uptrain

FLAGS = flags.FLAGS
_CHILD = flags.DEFINE_string('child', None, 'A converted model.')
_FACTS = flags.DEFINE_list('facts', ['1000', '4000', '16000'], 'Numbers of facts.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1'], 'Of worlds, weights and the order of the text.')
_ROWS = flags.DEFINE_list('rows', None, 'Names of the rows to make; all by default.')
_TABLE = flags.DEFINE_enum('table', 'parameters', ['parameters', 'flops'], 'What all rows share.')
_TRAINED = flags.DEFINE_integer('trained', 10_000_000, 'Trained parameters of --table=parameters.')
_SLOTS = flags.DEFINE_integer('slots', 16384, 'Of the memory that --table=flops goes by.')
_EPOCHS = flags.DEFINE_integer('epochs', 12, 'Passes over the sentences.')
_BATCH = flags.DEFINE_integer('batch', 4, 'Rows of 128 tokens of a step.')
_RATE = flags.DEFINE_float('learning_rate', 5e-4, 'The peak; see RATES.')
_TEXT = flags.DEFINE_string('text', None, 'Other text: what is forgotten.')
_TASK_DATA = flags.DEFINE_string('task_data', None, 'Directory with LAMBADA; not run without.')
_LIMIT = flags.DEFINE_integer('limit', 200, 'Questions of LAMBADA.')
_TOP = flags.DEFINE_integer('top', 1000, 'Slots of the sparse rows.')
_SPEED = flags.DEFINE_bool('speed', False, 'Measure decoding; the machine must be idle.')
_OUT = flags.DEFINE_string('out', None, 'Directory of models, table.json and facts.svg.')
# Of the learning rate, by kind; tables have ten times as much again.
RATES = {'memory': 4.0, 'peer': 4.0, 'wider': 4.0}
# The rows that go on from a trained row, with a fourth as many facts of another world.
THEN = {
  'new facts in top slots': ('memory in all loops', 'memory'),
  'new facts in all slots': ('memory in all loops', ''),
  'new facts in LoRA': ('LoRA', ''),
}


@register
@dataclasses.dataclass(frozen=True)
class Wider(Relaxation):
  """More hidden units beside those of the block's MLPs, the same ones in all loops.

  Attributes:
    units: of each layer.
  """

  kind: ClassVar[str] = 'wider'
  site: ClassVar[str] = 'mlp'
  unmergeable: ClassVar[str] = 'it makes the MLPs of the block wider than the others'
  matrices: ClassVar[bool] = True

  units: int = 64

  def leaves(self, host):
    D, F = host.d_in, self.units
    normal, zeros = nn.initializers.normal(D**-0.5), nn.initializers.zeros
    return {
      'wider_gate': Leaf((D, F), ('embed', 'mlp'), normal),
      'wider_up': Leaf((D, F), ('embed', 'mlp'), normal),
      'wider_down': Leaf((F, D), ('mlp', 'embed'), zeros),
    }

  def apply(self, params, x, y, loop, host):
    gate, up, down = (params[f'wider_{n}'].astype(x.dtype) for n in ('gate', 'up', 'down'))
    return y + matmul(jax.nn.silu(matmul(x, gate)) * matmul(x, up), down), NO_AUX


def added_params(config: ModelConfig, added: Relaxation) -> int:
  """Parameters of a relaxation."""
  return sum(added.count(host) for host in added.hosts(config))


def added_flops(config: ModelConfig, added: Relaxation) -> int:
  """Multiplications and additions of a relaxation for one token, in all loops."""
  D, R = config.d_model, config.loops
  if isinstance(added, Lookup):
    host = added.hosts(config)[0]
    H, J, K = added.heads, added.heads * added.topk, added.size(host)
    once = 2 * D * H * 2 * K + 2 * 2 * H * added.half * K
    if isinstance(added, Memory):
      once += 2 * J * added.width(host) + 2 * 2 * D * added.width(host)
    else:
      once += 2 * 2 * J * D
    return once * len(added.positions) * len(added.loops or range(R))
  # Every matrix of the others meets every token in every loop.
  share = 1 if isinstance(added, Adapter) and added.by_loop else R
  return 2 * share * added_params(config, added)


def rows(config: ModelConfig) -> dict[str, Relaxation]:
  """What each row adds to a child, all of one size."""
  middle, loops = (config.block_layers // 2,), config.loops
  lookup = lambda cls, slots, **kw: cls(middle, slots, **{'heads': 4, 'topk': 32} | kw)
  square = lambda n: n * n
  if _TABLE.value == 'flops':
    reference = lookup(Memory, square(math.isqrt(_SLOTS.value)))
    size, most, least = added_flops, added_flops(config, reference), 1
    # What reads in one loop may read as much more there.
    memory = lambda n: lookup(Memory, reference.slots, heads=n, loops=(0,))
    shared = lambda n: lookup(Memory, reference.slots, heads=n)
    peer = lambda n: lookup(Peer, reference.slots, heads=n)
  else:
    size, most, least = added_params, _TRAINED.value, 6  # 32 slots and more.
    memory = lambda n: lookup(Memory, square(n), loops=(0,))
    shared = lambda n: lookup(Memory, square(n))
    peer = lambda n: lookup(Peer, square(n))
  families: dict[str, tuple[Callable[[int], Relaxation], int]] = {
    'wider MLP': (lambda n: Wider(n), 1),
    'LoRA': (lambda n: Adapter(rank=n, components=('all',), by_loop=loops > 1), 1),
    'LoRA experts': (lambda n: Experts(2 * loops, **dict.fromkeys(LINEAR_AXES, n)), 1),
    'PEER': (peer, least),
    'memory in one loop': (memory, least),
    'memory in all loops': (shared, least),
  }
  fits = lambda added: size(config, added) <= most
  return {name: _largest(*family, fits) for name, family in families.items()}


def _largest(make: Callable[[int], Relaxation], least: int, fits) -> Relaxation:
  """The largest of a family that fits."""
  if not fits(make(least)):
    raise InputError(f'{make(least)!r} is too large already; raise --trained or --slots.')
  low = least
  while fits(make(2 * low)):
    low *= 2
  for bit in reversed(range(low.bit_length())):
    if fits(make(low + 2**bit)):
      low += 2**bit
  return make(low)


def encoder(model: LanguageModel) -> Callable[[str], list[int]]:
  """The tokenizer's `encode`.

  Raises:
    InputError: the model has none.
  """
  if model.tokenizer is None:
    raise InputError('--child has no tokenizer; its facts are text.')
  return model.tokenizer.encode


def recall(model: LanguageModel, world: list[world_lib.Fact], wording: int = -1) -> float:
  """Share of the facts whose object is the greedy continuation of a wording."""
  encode = encoder(model)
  pairs = []
  for fact in world:
    before, answer = fact.question(wording)
    prompt = encode(before)
    pairs.append((tuple(prompt), tuple(encode(before + answer)[len(prompt) :])))
  params = jax.tree.map(jnp.asarray, model.params)
  scores = endings.score_endings(model.config, params, pairs, batch_tokens=2048)
  return sum(greedy for _, greedy in scores) / len(scores)


def train(child: LanguageModel, kind: str, world, seed: int, only: str = ''):
  """A child whose relaxation of this kind was trained on a world's sentences."""
  wordings = len(next(iter(world_lib.WORDINGS.values()))) - 1
  text = world_lib.sentences(world, wordings)
  encode = encoder(child)
  tokens = sum(len(encode(t)) + 1 for t in text)
  recipe: dict[str, Any] = {
    'steps': math.ceil(_EPOCHS.value * tokens / (128 * _BATCH.value)),
    'batch': _BATCH.value,
    'length': 128,
    'remat': 'none',
    'seed': seed,
    'log_every': 10,
    'loss': {'cross_entropy': 1.0, 'distillation': 0.0},
    'optimizer': {
      'learning_rate': _RATE.value * RATES.get(kind, 1.0),
      'warmup_steps': 4,
      'final_rate': 0.1,
    },
  }
  if only:
    recipe |= {'train_only': only, 'slots': {'top': _TOP.value}}
  else:
    recipe['optimizer']['train'] = rf'(^|/){kind}(_\w+)?$'
  return uptrain(None, child, recipe, data=text)


def measured(model: LanguageModel) -> dict[str, float]:
  """What is left of the rest: nats on other text, LAMBADA, and the speed."""
  text = perplexity.read_text(_TEXT.value, 8192)
  found = {'nats': perplexity.score(model, text, context=1024, max_tokens=8192).nll_nats}
  if _TASK_DATA.value:
    from rrt.evals import harness

    result = harness.run(model, 'lambada', data=_TASK_DATA.value, limit=_LIMIT.value)[0]
    found['lambada'] = 100 * result.score
  if _SPEED.value:
    found['decode_32'] = decode_speed(model, 32)
  return found


def main(_) -> None:
  """Makes the rows that table.json does not have yet, and the picture."""
  for name in ('child', 'text', 'out'):
    if not FLAGS[name].value:
      raise InputError(f'--{name} is needed; see --help.')
  child = load(_CHILD.value)
  made = rows(child.config)
  known = [*made, *(THEN if _TABLE.value == 'parameters' else ())]
  names = _ROWS.value or known
  for name in names:
    if name not in known:
      raise InputError(f'--rows names {name!r}; the rows are {"; ".join(known)}.')
  out = Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'table.json'
  table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

  def keep(name: str, key: str, figures: Callable[[], dict[str, Any]]) -> None:
    row = table.setdefault(name, {})
    if key not in row:
      row[key] = figures()
      path.write_text(json.dumps(table, indent=1) + '\n')
      print(f'{name}: {key}: {row[key]}', flush=True)

  keep('the child', 'size', lambda: {'added': 0, 'flops': 0} | measured(child))
  for count in map(int, _FACTS.value):
    for seed in map(int, _SEEDS.value):
      world, key = world_lib.facts(count, seed), f'{count} facts, seed {seed}'
      keep('the child', key, lambda world=world: _asked(child, world))
      models = out / key.replace(', ', '_').replace(' ', '_')
      for name in names:
        if name in made:
          added = made[name]
          size = added_params(child.config, added), added_flops(child.config, added)
          keep(name, 'size', lambda size=size: dict(zip(('added', 'flops'), size, strict=True)))
          keep(
            name, key, lambda n=name, w=world, s=seed, m=models: _row(child, made[n], w, s, m / n)
          )
      for name in names:
        if name in THEN:
          keep(name, key, lambda n=name, w=world, s=seed, m=models: _then(n, w, s, m, made))
      shutil.rmtree(models, ignore_errors=True)  # Of gigabytes; the figures are what is kept.
  _show(table)
  _draw(table, out / 'facts.svg')
  console.finish(table)


def _asked(model: LanguageModel, world) -> dict[str, float]:
  chance = world_lib.chance(world)
  return {'recall': recall(model, world), 'seen': recall(model, world, 0), 'chance': chance}


def _row(child: LanguageModel, added: Relaxation, world, seed: int, where: Path):
  """The figures of a trained row, whose model is kept for the rows that go on from it."""
  run = train(with_relaxation(child, added, seed), added.kind, world, seed)
  _stop_if_asked(run)
  save(run.model, where)
  key = 'throughput/tokens_per_second'
  speed = [r[key] for r in run.history[1:] if key in r]
  trained = {'steps': run.step, 'train_speed': sorted(speed)[len(speed) // 2] if speed else None}
  return _asked(run.model, world) | trained | measured(run.model)


def _then(name: str, old, seed: int, models: Path, made: dict[str, Relaxation]):
  """The figures of a row that learns new facts: `kept` is the recall of the old ones."""
  first, only = THEN[name]
  if not (models / first).is_dir():
    raise InputError(f'{name!r} goes on from {first!r}: name both in --rows, in a new --out.')
  model = load(str(models / first))
  new = world_lib.facts(max(len(old) // 4, 6), seed + 50)
  run = train(model, made[first].kind, new, seed, only)
  _stop_if_asked(run)
  return _asked(run.model, new) | {'kept': recall(run.model, old)} | measured(run.model)


def _stop_if_asked(run) -> None:
  if run.stopped:
    raise SystemExit(128 + run.stopped)


def _mean(row: dict[str, Any], start: str, figure: str) -> float | None:
  """Of all seeds of a number of facts."""
  values = [r[figure] for key, r in row.items() if key.startswith(start) and figure in r]
  return sum(values) / len(values) if values else None


def _show(table: dict[str, Any]) -> None:
  figures = ('recall', 'seen', 'kept', 'nats', 'lambada', 'train_speed', 'decode_32')
  counts = list(dict.fromkeys(key.split(',')[0] for row in table.values() for key in row))
  lines = []
  for count in [c for c in counts if c != 'size']:
    for name, row in table.items():
      size = row.get('size', {})
      base = [size.get(f) for f in figures] if name == 'the child' else [None] * len(figures)
      means = [_mean(row, f'{count},', f) for f in figures]
      both = [m if m is not None else b for m, b in zip(means, base, strict=True)]
      lines.append([count, name, size.get('added'), size.get('flops'), *both])
  console.table(lines, ['', '', 'trained', 'FLOPs a token', *figures])


def _draw(table: dict[str, Any], out: Path) -> None:
  """Recall, and nats on other text, by the number of facts."""
  pyplot = plots.open_pyplot()
  figure, all_axes = pyplot.subplots(1, 2, figsize=(10, 4))
  titles = {'recall': 'recall in a wording not trained on', 'nats': 'nats on other text'}
  every: set[int] = set()
  for axes, (key, title) in zip(all_axes, titles.items(), strict=True):
    for i, (name, row) in enumerate(table.items()):
      counts = sorted({int(k.split()[0]) for k in row if k != 'size'})
      every |= set(counts)
      values = [_mean(row, f'{n} facts,', key) for n in counts]
      points = [(n, v) for n, v in zip(counts, values, strict=True) if v is not None]
      if points:
        axes.plot(*zip(*points, strict=True), 'o-', label=name, color=f'C{i}')
    axes.set(xscale='log', xlabel='facts', title=title)
    axes.set_xticks(sorted(every), [str(n) for n in sorted(every)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  all_axes[1].axhline(table['the child']['size']['nats'], ls='--', color='k', label='before')
  all_axes[0].set_ylim(0, 1)
  all_axes[0].legend(fontsize=7)
  out.write_text(plots.svg(figure))


if __name__ == '__main__':
  command.run(main)
