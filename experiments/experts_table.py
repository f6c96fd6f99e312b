r"""Who chooses the low-rank term: the loop, the token, or both; at equal parameters.

Every row is a child of one arrangement with as many parameters as the one of per-loop LoRA of
rank `--rank`, converted on the same text and trained by the recipe of
`experiments.equal_parameters`.

COMMAND
  python -m experiments.experts_table --calibration=wiki.jsonl.xz --train=news.jsonl.xz \
      --text=other_news.jsonl.xz --seeds=0,1 --out=runs/experts
  --rows='LoRA by loop,experts by both' --steps=400 is the longer run of two rows, --seeds= the
  table before training, --speed_only the tokens a second alone. A run that is started again goes
  on where it was.

HARDWARE
  Two CPU cores, 10 GiB; 4 to 8 s a training step of 1,024 tokens.

RESULT
  docs/experts.md
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any

from absl import flags
import jax
import numpy as np

from experiments import equal_parameters as table_lib
from experiments.measured import decode_speed, train_speed
from rrt import command, console
from rrt.checkpoints.load import load
from rrt.config import ModelConfig
from rrt.convert.calibration_data import calibration_text
from rrt.convert.plan import ConvertConfig, plan
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models.count import count_params
from rrt.models.init import init_params
from rrt.relax.bank import Bank, Pool
from rrt.relax.experts import Experts, uniform
from rrt.relax.hosts import LINEAR_AXES
from rrt.relax.lora import Lora
from rrt.relax.trees import own_leaves, relaxed_hosts, subtree
from rrt.train.loop import uptrain

FLAGS = flags.FLAGS
_ARRANGEMENT = flags.DEFINE_list('arrangement', ['8', '2', '8'], 'Prelude, loops and coda.')
_RANK = flags.DEFINE_integer('rank', 64, 'Of the per-loop LoRA that sets the size.')
_SPEED_ONLY = flags.DEFINE_bool('speed_only', False, 'Neither convert nor train.')
_EACH = flags.DEFINE_integer('experts_a_loop', 2, 'Experts that each loop begins with.')
ONE = 'LoRA of one expert'
UNIFORM = 'experts merged uniformly'  # Made of the trained experts by loop.


def children(parent: LanguageModel) -> dict[str, ConvertConfig]:
  """The rows: name -> how the child is made."""
  prelude, loops, coda = map(int, _ARRANGEMENT.value)
  base = ConvertConfig(prelude=prelude, loops=loops, coda=coda)
  even = lambda rank: dict.fromkeys(LINEAR_AXES, rank)
  size = lambda c: count_params(plan(parent.config, c)).unique
  most = size(base.replace(rank=_RANK.value))
  E, r = _EACH.value * loops, _RANK.value // _EACH.value
  N = plan(parent.config, base).block_layers

  def filled(make: Callable[[int], ConvertConfig], low: int, high: int) -> ConvertConfig:
    """The largest of a family that is no larger than the first row."""
    if size(make(low)) > most:
      raise InputError(f'--rank={_RANK.value}: pays for no expert bank; give a larger one.')
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (middle, high) if size(make(middle)) <= most else (low, middle)
    return make(low)

  # The routers come out of the ranks of one linear.
  routed = lambda **fields: filled(
    lambda down: base.replace(relax=(Experts(E, **fields, **even(r) | {'down': down}),)), 1, r + 1
  )
  # MLPs of the bank need no low-rank terms.
  positions = tuple(range(N // 4, N, 4))
  table = lambda rank: tuple(
    tuple(rank * (n not in positions) for n in range(N)) for _ in range(loops)
  )
  bank = lambda rank: base.replace(
    relax=(
      Lora(**dict.fromkeys('qkvo', rank), **dict.fromkeys(('gate', 'up', 'down'), table(rank))),
      Bank(positions=positions),
    )
  )
  pool = lambda experts: base.replace(
    relax=(
      Lora(**dict.fromkeys('qkvo', r)),
      Pool(positions=tuple(range(N)), experts=experts, balance_by='switch'),
    )
  )
  return {
    'LoRA by loop': base.replace(rank=_RANK.value),
    # What a token computes of the clusters' experts, not of the same size.
    ONE: base.replace(rank=r),
    'experts by loop': base.replace(relax=(Experts(E, by='loop', **even(r)),)),
    'experts by token': routed(by='token', topk=_EACH.value),
    'experts by both': routed(),
    'experts of clusters': routed(topk=1, clusters=True, balance_by='none', z_loss=0.0),
    'expert bank': filled(bank, 1, _RANK.value),
    'pool': filled(pool, 8, 8 * loops),
  }


def merged(model: LanguageModel) -> LanguageModel:
  """The model with its experts merged uniformly."""
  params = jax.tree.map(np.asarray, model.params)
  for relaxation, host, _ in relaxed_hosts(model.config):
    if isinstance(relaxation, Experts):
      tree = subtree(params['block'], host)
      tree.update(uniform(relaxation, own_leaves(tree, relaxation.kind), host))
  return dataclasses.replace(model, params=params)


def routing(history: list[dict[str, Any]]) -> dict[str, float]:
  """Of the last step: largest load over the mean, information of the loop in nats."""
  last = next((row for row in reversed(history) if 'train/loss' in row), {})
  found = {}
  for name in ('largest_load', 'entropy', 'loop_information'):
    for key, value in last.items():
      if key.startswith('train/relax/') and key.endswith(f'/{name}'):
        found[name] = float(value)
  return found


def speeds(config: ModelConfig) -> dict[str, float]:
  """Tokens a second, trained and decoded with 32 sequences, of random weights of this shape."""
  model = LanguageModel(config, init_params(config, jax.random.key(0)))
  return {'train_speed': train_speed(model), 'decode_32': decode_speed(model, 32)}


def main(_) -> None:
  """Makes, trains and measures the rows that table.json does not have yet."""
  for name in ('calibration', 'train', 'text', 'out'):
    if not FLAGS[name].value:
      raise InputError(f'--{name} is needed; see --help.')
  out = Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  parent = load(FLAGS.parent)
  made = children(parent)
  names = FLAGS.rows or list(made)
  for name in names:
    if name not in made:
      raise InputError(f'--rows names {name!r}; the rows are {", ".join(made)}.')
  path = out / 'table.json'
  table: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

  def keep(name: str, figures: dict[str, Any]) -> None:
    table.setdefault(name, {}).update(figures)
    path.write_text(json.dumps(table, indent=1) + '\n')
    print(f'{name}: {figures}', flush=True)

  for name in names if FLAGS.speed else ():
    if 'decode_32' not in table.setdefault(name, {}):
      keep(name, speeds(plan(parent.config, made[name])))
  for name in names if not _SPEED_ONLY.value else ():
    row = table.setdefault(name, {})
    trained = [f'{FLAGS.steps}_steps_seed_{seed}' for seed in FLAGS.seeds]
    if 'nats_start' in row and all(f'nats_{key}' in row for key in trained):
      continue
    text = calibration_text(FLAGS.calibration, made[name].calibration_tokens)
    child, report = to_recursive(parent, made[name], calibration=text)
    if 'nats_start' not in row:
      keep(name, {'parameters': report.params.unique, 'nats_start': table_lib.nats(child)})
    for seed, key in zip(map(int, FLAGS.seeds), trained, strict=True):
      if f'nats_{key}' in row:
        continue
      workdir = out / table_lib.folder(name) / key
      run = uptrain(parent, child, table_lib.recipe(child, seed), workdir)
      if run.stopped:
        raise SystemExit(128 + run.stopped)
      keep(name, {f'nats_{key}': table_lib.nats(run.model)})
      keep(name, {f'routing_{key}': routing(run.history)})
      if name == 'experts by loop':
        keep(UNIFORM, {'parameters': row['parameters']})
        keep(UNIFORM, {f'nats_{key}': table_lib.nats(merged(run.model))})
      shutil.rmtree(workdir)  # Of gigabytes; the figures are what is kept.
  _show(table)
  console.finish(table)


def _show(table: dict[str, dict[str, Any]]) -> None:
  ends = sorted({k for row in table.values() for k in row if k.startswith('nats_')})
  columns = ['parameters', *ends, 'train_speed', 'decode_32']
  console.table([[n, *(row.get(c) for c in columns)] for n, row in table.items()], ['', *columns])


if __name__ == '__main__':
  command.run(main)
