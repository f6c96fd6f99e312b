"""Names, defaults and meanings of a recipe's fields, from its dataclasses.

A field's path is that of the nested dataclasses: 'optimizer.learning_rate'.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import Any, get_type_hints

# Names of fields elsewhere.
_ALIASES = {
  'lr': 'learning_rate',
  'peak_lr': 'learning_rate',
  'wd': 'weight_decay',
  'bs': 'batch',
  'batch_size': 'batch',
  'per_device_train_batch_size': 'batch',
  'seq_len': 'length',
  'seq_length': 'length',
  'max_length': 'length',
  'max_steps': 'steps',
  'num_steps': 'steps',
  'train_steps': 'steps',
  'warmup': 'warmup_steps',
  'min_lr': 'final_rate',
  'lr_schedule': 'schedule',
  'grad_clip': 'clip',
  'max_grad_norm': 'clip',
  'grad_accum': 'accumulate',
  'gradient_accumulation_steps': 'accumulate',
  'save_every': 'checkpoint_every',
  'save_steps': 'checkpoint_every',
  'eval_every': 'every',
  'teacher': 'parent',
  'model': 'child',
  'dataset': 'path',
  'kl': 'distillation',
}


def describe_fields(cls: Any, prefix: str = '') -> list[tuple[str, Any, str]]:
  """(path, default, meaning) of all fields, from the docstrings of the dataclasses."""
  meanings = _attributes(inspect.getdoc(cls) or '')
  found = []
  for field in dataclasses.fields(cls):
    kind = get_type_hints(cls)[field.name]
    path = f'{prefix}{field.name}'
    if dataclasses.is_dataclass(kind):
      found += describe_fields(kind, f'{path}.')
    else:
      factory = field.default_factory
      default = factory() if callable(factory) else field.default
      found.append((path, default, meanings.get(field.name, '')))
  return found


def _attributes(text: str) -> dict[str, str]:
  """The section Attributes of a docstring: meanings by name."""
  found: dict[str, str] = {}
  names: list[str] = []
  for line in text.partition('Attributes:')[2].splitlines():
    depth = len(line) - len(line.lstrip())
    head, colon, rest = line.strip().partition(': ')
    if depth == 2 and colon:
      names = [n.strip() for n in head.split(',')]
      found |= dict.fromkeys(names, rest)
    elif line.strip():
      found |= {n: f'{found[n]} {line.strip()}' for n in names}
  return found


def unknown_field(cls: Any, path: str) -> str:
  """What to say of a field that a recipe does not have."""
  *before, name = path.split('.')
  known = [known_path for known_path, _, _ in describe_fields(cls)]
  want = _ALIASES.get(name, name)
  same = [p for p in known if p.split('.')[-1] == want]
  inside = [p for p in known if p.split('.')[:-1] == before]
  near = [p for p in same if p in inside] or same
  for paths in (inside, known):
    last = [p.split('.')[-1] for p in paths]
    near = near or [paths[last.index(n)] for n in difflib.get_close_matches(name, last, 1)]
  if near:
    return f'there is no such field; did you mean {near[0]}?'
  return f'there is no such field; there are {", ".join(inside or known)}.'
