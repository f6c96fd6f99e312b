"""Finds the files of one GGUF model and their order.

A model is one file, a *split* (`m-00001-of-00003.gguf`, where each part is a
GGUF file) or consecutive raw *pieces* of a file (`m.gguf.part1`,
`m.gguf-part1-of-12`, `m.gguf.00`, ...). Parts are ordered by number, not as
text: part10 comes after part2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import re
from typing import NamedTuple

from rrt.errors import InputError

_SPLIT = re.compile(r'(?P<stem>.+-)(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf')
_PIECE = re.compile(
  r'(?P<stem>.+\.gguf[._-]?(part|split)?[._-]?)(?P<number>\d+)'
  r'(-?of-?(?P<total>\d+))?'
)
MAX_LISTED = 4  # How many names an error lists.


class Part(NamedTuple):
  """The fields of a part's file name.

  Attributes:
    stem: the name up to the number; equal for all parts of a model.
    number: of the part.
    total: number of parts, None if the name does not have it.
    is_split: whether the part is a GGUF file (a split) or a raw piece.
  """

  stem: str
  number: int
  total: int | None
  is_split: bool


def part_of(name: str) -> Part | None:
  """Parses a file name; None for a model in one file."""
  found = _SPLIT.fullmatch(name) or _PIECE.fullmatch(name)
  if not found:
    return None
  total = int(found['total']) if found['total'] else None
  is_split = found.re is _SPLIT
  return Part(found['stem'], int(found['number']), total, is_split)


def beside(path: Path) -> list[Path]:
  """All files of the model that one file belongs to, in order.

  Raises:
    InputError: some of them are missing.
  """
  part = part_of(path.name)
  if part is None or not path.is_file():
    return [path]
  return _numbered([p for p in path.parent.iterdir() if _same(p, part)], part)


def inside(directory: Path) -> list[Path]:
  """All files of the model in a directory, in order; [] if there is none.

  Raises:
    InputError: there are several models, or parts are missing.
  """
  files = [p for p in sorted(directory.iterdir()) if p.is_file()]
  # A whole file beside the pieces that it was joined from is enough.
  whole = [p for p in files if p.suffix == '.gguf']
  found = whole or [p for p in files if part_of(p.name)]
  models: dict[Part | Path, Path] = {}
  for path in found:
    part = part_of(path.name)
    models.setdefault(part._replace(number=0) if part else path, path)
  if len(models) > 1:
    names = ', '.join(p.name for p in list(models.values())[:MAX_LISTED])
    raise InputError(
      f'{directory} holds {len(models)} GGUF models; give the path of a file '
      f'of one of them ({names}).'
    )
  return beside(found[0]) if found else []


def in_order(paths: Sequence[Path]) -> list[Path]:
  """The files of one model in the order of their numbers.

  Args:
    paths: all of them, or any one; names without numbers are taken as they
      come.

  Raises:
    InputError: they are not the parts of one model, or some are missing.
  """
  if not paths:
    raise InputError('source=[]: give the files of a GGUF model.')
  if len(paths) == 1:
    return beside(paths[0])
  first = next(filter(None, (part_of(path.name) for path in paths)), None)
  return list(paths) if first is None else _numbered(paths, first)


def _numbered(paths: Sequence[Path], first: Part) -> list[Path]:
  """Files in order, all of which must belong with `first`."""
  numbered: dict[int, Path] = {}
  for path in paths:
    part = part_of(path.name)
    if not part or not _same(path, first) or part.number in numbered:
      other = numbered.get(part.number) if part else None
      raise InputError(
        f'{path.name} and {(other or paths[0]).name} are not parts of one GGUF '
        'model; give the files of one model, each of them once.'
      )
    numbered[part.number] = path
  start = 0 if min(numbered) == 0 and not first.is_split else 1
  stop = max(max(numbered) + 1, start + (first.total or 0))
  missing = [str(n) for n in range(start, stop) if n not in numbered]
  if missing:
    raise InputError(
      f'{paths[0].parent} has {len(numbered)} of the {stop - start} files of '
      f'the GGUF model {first.stem}*; those numbered '
      f'{", ".join(missing[:MAX_LISTED])} are missing: copy them too.'
    )
  if first.total and len(numbered) > first.total:
    raise InputError(
      f'{paths[0].parent} has {len(numbered)} files {first.stem}*, which say '
      f'that they are {first.total}; give the files of one model.'
    )
  return [numbered[n] for n in sorted(numbered)]


def _same(path: Path, part: Part) -> bool:
  """Whether a file is a part of the same model."""
  other = part_of(path.name)
  return other is not None and other._replace(number=part.number) == part
