r"""What brings a converted child nearer to its parent in 40 steps: one change a line.

Every line trains each child by the recipe of `experiments.equal_parameters` with one
change, on the same text, and measures the same held-out text.

COMMAND
  python -m experiments.healing \
      --children=runs/equal_103/deleted_and_refitted/start,runs/equal_103/closed_loops_in_their_place/start \
      --train=news.jsonl.xz --text=other_news.jsonl.xz --out=runs/healing
  --lines='as it is' --lines=Muon makes some of the lines. A run that is started again goes
  on where it was.

HARDWARE
  Two CPU cores, 10 GiB; 4 to 8 s a training step of 1,024 tokens.

RESULT
  docs/results/equal_parameters.md
"""

from __future__ import annotations

import json
from pathlib import Path
import shutil
from typing import Any

from absl import flags

from experiments import equal_parameters as table_lib
from rrt import command, console
from rrt.checkpoints.load import load
from rrt.errors import InputError
from rrt.train.loop import uptrain
from rrt.train.recipe import Recipe

FLAGS = flags.FLAGS
_CHILDREN = flags.DEFINE_list('children', [], 'Converted models, as directories.')
_LINES = flags.DEFINE_multi_string('lines', None, 'Names of lines to make; all by default.')

# Line -> fields of the recipe that differ.
LINES: dict[str, dict[str, Any]] = {
  'as it is': {},
  'half the rate': {'optimizer.learning_rate': 1e-4},
  'twice the rate': {'optimizer.learning_rate': 4e-4},
  'Muon': {'optimizer.method': 'muon'},
  'Muon, twice the rate': {'optimizer.method': 'muon', 'optimizer.learning_rate': 4e-4},
  'hidden states beside the logits': {'loss.hidden': 1.0},
  'top 64 logits': {'loss.top_k': 64},
  'cross-entropy beside the logits': {'loss.cross_entropy': 0.5},
  'one row of 1,024': {'batch': 1, 'length': 1024},
  'four rows of 256': {'batch': 4, 'length': 256},
  'embedding frozen': {'optimizer.train': '^(?!embed)'},
  'norms, gains and LoRA alone': {'optimizer.train': 'relaxations'},
}


def _rules(lora: float, gain: dict[str, float]) -> dict[str, Any]:
  return {'optimizer.rules': ((r'lora_[ab]$', {'multiplier': lora}), (r'/gain$', gain))}


# The same for children whose loops start closed.
OPENING: dict[str, dict[str, Any]] = {
  'gains at the rate of the weights': _rules(1.0, {'multiplier': 1.0}),
  'gains at 200 times the rate': _rules(1.0, {'multiplier': 200.0}),
  'gains open late': _rules(1.0, {'multiplier': 50.0, 'warmup_steps': 20}),
  'LoRA at four times the rate': _rules(4.0, {'multiplier': 50.0}),
}


def changed(fields: dict[str, Any], recipe: Recipe) -> Recipe:
  """A recipe with other values at some paths."""
  values = recipe.to_dict()
  for path, value in fields.items():
    *before, name = path.split('.')
    part = values
    for key in before:
      part = part[key]
    part[name] = value
  rules = values['optimizer']['rules']
  values['optimizer']['rules'] = tuple((pattern, fields) for pattern, fields in rules)
  return Recipe.from_dict(values)


def main(_) -> None:
  """Trains and measures what table.json does not have yet."""
  for name in ('children', 'train', 'text', 'out'):
    if not FLAGS[name].value:
      raise InputError(f'--{name} is needed; see --help.')
  known = LINES | OPENING
  lines = _LINES.value or list(known)
  for name in lines:
    if name not in known:
      raise InputError(f'--lines names {name!r}; the lines are {"; ".join(known)}.')
  out = Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'table.json'
  table: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
  parent = load(FLAGS.parent)
  children = {where: load(where) for where in _CHILDREN.value}
  for name in lines:
    for where, child in children.items():
      key = f'{Path(where).parent.name}, seed {FLAGS.seeds[0]}'
      opens = any(r.kind == 'gain' for r in child.config.relax)
      if key in table.setdefault(name, {}) or (name in OPENING and not opens):
        continue
      recipe = changed(known[name], table_lib.recipe(child, int(FLAGS.seeds[0])))
      workdir = out / Path(where).parent.name / ''.join(c if c.isalnum() else '_' for c in name)
      run = uptrain(parent, child, recipe, workdir)
      if run.stopped:
        raise SystemExit(128 + run.stopped)
      table[name][key] = table_lib.nats(run.model)
      shutil.rmtree(workdir)  # Of gigabytes; the figure is what is kept.
      path.write_text(json.dumps(table, indent=1) + '\n')
      print(f'{name}: {key}: {table[name][key]}', flush=True)
  columns = sorted({key for row in table.values() for key in row})
  console.table([[n, *(row.get(c) for c in columns)] for n, row in table.items()], ['', *columns])
  console.finish(table)


if __name__ == '__main__':
  command.run(main)
