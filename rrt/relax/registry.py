"""The kinds of relaxation, by name: reading and writing configurations.

A new kind is a file beside this one and a line in `KINDS`; a package of its
own calls `register`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from rrt.errors import InputError

if TYPE_CHECKING:
  from rrt.relax.base import Relaxation

# kind -> module:class; loaded when first asked for.
KINDS: dict[str, str | type[Relaxation]] = {
  'lora': 'rrt.relax.lora:Lora',
  'gain': 'rrt.relax.gain:Gain',
  'adapter': 'rrt.relax.adapter:Adapter',
  'memory': 'rrt.relax.memory:Memory',
  'peer': 'rrt.relax.peer:Peer',
  'experts': 'rrt.relax.experts:Experts',
  'bank': 'rrt.relax.bank:Bank',
  'pool': 'rrt.relax.bank:Pool',
}
# Names in a block layer that leaves must not take.
_TAKEN = set('kernel scale bias table attn mlp layers q k v o gate up down'.split())


def register(cls: type[Relaxation]) -> type[Relaxation]:
  """Makes a kind known to configurations; usable as a decorator.

  Raises:
    InputError: its name is taken.
  """
  kind = cls.kind
  clash = [k for k in KINDS if k.startswith(f'{kind}_') or kind.startswith(f'{k}_')]
  if kind in _TAKEN or clash or KINDS.get(kind, cls) is not cls:
    raise InputError(f'relaxation kind {kind!r}: the name is taken; choose another.')
  KINDS[kind] = cls
  return cls


def class_of(kind: str) -> type[Relaxation]:
  """The class of a kind.

  Raises:
    InputError: there is no such kind.
  """
  found = KINDS.get(kind)
  if found is None:
    near = difflib.get_close_matches(str(kind), KINDS, 1)
    hint = f'did you mean {near[0]!r}?' if near else f'known are {", ".join(KINDS)}.'
    raise InputError(f'relax: there is no relaxation {kind!r}; {hint}')
  if isinstance(found, str):
    module, name = found.split(':')
    loaded = getattr(importlib.import_module(module), name)
    KINDS[kind] = loaded
    return loaded
  return found


def kind_of_path(path: str) -> str | None:
  """The kind that a parameter belongs to, by its path; None for a model's own."""
  leaf = path.rsplit('/', 1)[-1]
  return next((k for k in KINDS if leaf == k or leaf.startswith(f'{k}_')), None)


def tables() -> list[str]:
  """Names of the tables that pooled relaxations look up."""
  classes = [class_of(kind) for kind in list(KINDS)]
  return [name for cls in classes if cls.pooled for name in cls.rates]


def states() -> set[str]:
  """Names of leaves that no gradient trains."""
  return {name for kind in list(KINDS) for name in class_of(kind).states}


def to_json(relaxation: Relaxation) -> dict[str, Any]:
  """Plain values, `from_json` reverses it."""
  return {'kind': relaxation.kind} | dataclasses.asdict(relaxation)


def from_json(fields: dict[str, Any]) -> Relaxation:
  """A relaxation from its kind and fields.

  Raises:
    InputError: the kind or a field is unknown.
  """
  fields = dict(fields)
  cls = class_of(fields.pop('kind', ''))
  _check_known(cls, fields)
  return cls(**{k: as_tuple(v) for k, v in fields.items()})


def parse(text: str) -> Relaxation:
  """A relaxation from words: 'gain', or 'gain:components=o+down'.

  Fields follow a colon, separated by commas; '+' separates the entries of a
  tuple.

  Raises:
    InputError: a kind, a field or a value that cannot work.
  """
  kind, _, rest = text.strip().partition(':')
  cls = class_of(kind)
  pairs = [p.partition('=') for p in rest.split(',') if p]
  words = {name.strip(): value.strip() for name, _, value in pairs}
  _check_known(cls, words)
  hints = get_type_hints(cls)
  return cls(**{k: _value(hints[k], v, f'relax={text!r}: {k}') for k, v in words.items()})


def _check_known(cls: type[Relaxation], fields: dict[str, Any]) -> None:
  known = [f.name for f in dataclasses.fields(cls)]
  for name in fields:
    if name not in known:
      raise InputError(
        f'relax: {cls.kind} has no field {name!r}; its fields are {", ".join(known)}.'
      )


def _value(hint: Any, word: str, where: str) -> Any:
  """A word as a value of a field's type."""
  options = get_args(hint) or (hint,)
  if word in ('none', 'None') and type(None) in options:
    return None
  if word in ('true', 'false') and bool in options:
    return word == 'true'
  if '+' in word or str(hint).startswith('tuple'):
    inner = str if 'str' in str(hint) else None
    return tuple(w if inner else _number(w, where) for w in word.split('+'))
  if str in options:
    return word
  return _number(word, where)


def _number(word: str, where: str) -> int | float:
  for read in (int, float):
    try:
      return read(word)
    except ValueError:
      continue
  raise InputError(f'{where}={word!r}: must be a number.')


def as_tuple(value: Any) -> Any:
  """Lists of JSON, nested ones too, as tuples."""
  if isinstance(value, (list, tuple)):
    return tuple(as_tuple(v) for v in value)
  return value
