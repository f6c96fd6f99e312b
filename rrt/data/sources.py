"""Reads documents from text, JSON lines, parquet, ArrayRecord and the hub.

`stream(path)` yields the documents once, in order, with little memory, for
evaluation and calibration. `open_documents(source)` validates the whole source
and gives random access, for the grain pipeline.

A path is a file, a directory (searched in depth, hidden files left out), a
glob, `hf://owner/name[/config]:split`, or one of `builtin`, `builtin:train`
and `builtin:heldout` (see `rrt.data.corpus`). Text and JSON lines may be
compressed with gzip, xz or zstandard, detected by the first bytes. A document
is, by format:

* text: a file of up to `2 * CUT` characters is one document; a longer one is
  cut at the first blank line (else line end, else space) that follows `CUT`
  characters, so that it can be shuffled. `whole_files=True` never cuts.
* JSON lines: one object a line, its text in `field`.
* parquet and the hub: one row, its text in the column `field`.
* ArrayRecord: a record is UTF-8 text, or a JSON object with `field`.

`field='a.b'` is the field b of the object a. Rows without the field, or with null
in it, are skipped, and a note says how many. So are documents of white space alone.
With `format='chat'` rows are conversations (see `rrt.data.conversations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import glob
import itertools
import pathlib
import re
from typing import Any

import numpy as np

from rrt.data import compressed, formats, store
from rrt.errors import InputError

BUILTIN = ('builtin', 'builtin:train', 'builtin:heldout')
TEXT = ('.txt', '.text', '.md', '.rst')
JSON = ('.jsonl', '.ndjson', '.json')
PARQUET = ('.parquet', '.pq')
FORMATS = ('text', 'chat')
RECORDS = ('.array_record', '.arrayrecord')


@dataclasses.dataclass(frozen=True)
class Source:
  """A source of documents and how to read it.

  Attributes:
    path: a file, directory, glob, `hf://` name or `builtin`; of `rows` their name.
    weight: this source's share of the text in a mix; None (in all sources
      of a mix) takes every source in proportion to its size.
    field: the field or column that holds the text; 'a.b' of nested objects.
    whole_files: a text file is one document however long it is.
    format: 'text', or 'chat' for conversations.
    rows: texts or rows from Python, or a `datasets.Dataset`; None reads `path`.
  """

  path: str
  weight: float | None = None
  field: str = 'text'
  whole_files: bool = False
  format: str = 'text'
  rows: Any = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    if self.format not in FORMATS:
      raise InputError(f'data: format={self.format!r}: must be one of {FORMATS}')

  def wanted(self) -> formats.Wanted:
    """What is read of its rows."""
    return formats.Wanted(str(self.path), self.field, self.format == 'chat')


def is_path(text: str) -> bool:
  """Whether a string names a source rather than being text itself.

  True if such a file exists, or for one line that has no white space, begins
  with '/', './', '../' or '~', or ends in a known suffix.
  """
  if '\n' in text or len(text) > 1024 or not text.strip():
    return False
  named = text.startswith(('hf://', '/', './', '../', '~')) or text in BUILTIN
  if named or not any(c.isspace() for c in text) or kind(text) is not None:
    return True
  return pathlib.Path(text).exists()


def kind(path: str | pathlib.Path) -> str | None:
  """'text', 'json', 'parquet' or 'records' by a file's ending, else None."""
  name = re.sub(r'-\d+-of-\d+$', '', str(path).lower())
  suffixes = pathlib.Path(name).suffixes
  if suffixes and suffixes[-1] in compressed.COMPRESSED:
    suffixes.pop()
  ending = suffixes[-1] if suffixes else ''
  kinds = {'text': TEXT, 'json': JSON, 'parquet': PARQUET, 'records': RECORDS}
  return next((k for k, endings in kinds.items() if ending in endings), None)


def resolve(path: str | pathlib.Path) -> list[str]:
  """The files that a path matches, sorted; `hf://` and builtin unchanged.

  Raises:
    InputError: no such path, or a directory without a readable file.
  """
  path = str(path)
  if path.startswith('hf://') or path in BUILTIN:
    return [path]
  place = pathlib.Path(path).expanduser()
  if place.is_dir():
    found = sorted(p for p in place.rglob('*') if kind(p) and p.is_file())
    found = [p for p in found if not _hidden(p.relative_to(place))]
    if not found:
      endings = ' '.join(TEXT + JSON + PARQUET + RECORDS)
      raise InputError(
        f'{path}: the directory holds no file that ends in {endings} (the '
        'first two kinds also with .gz, .xz or .zst)'
      )
    return [str(p) for p in found]
  if place.exists():
    return [str(place)]
  if any(c in path for c in '*?['):
    names = sorted(glob.glob(str(place), recursive=True))
    if files := [n for n in names if pathlib.Path(n).is_file()]:
      return files
    raise InputError(f'{path}: no file matches this pattern')
  raise InputError(f'{path}: there is no such file or directory')


def _hidden(path: pathlib.Path) -> bool:
  return any(part.startswith('.') for part in path.parts)


# ---------------------------------------------------------------- once through


def stream(
  path: str | pathlib.Path, field: str = 'text', whole_files: bool = False
) -> Iterator[str]:
  """Yields the documents of a path once, in order.

  Raises:
    InputError: a file that is missing, damaged, binary or not UTF-8, or no
      document at all.
  """
  wanted = formats.Wanted(str(path), field)
  empty = True
  try:
    for file in resolve(path):
      for text in _stream_file(file, wanted, whole_files):
        empty = False
        yield text
  finally:
    if not empty:
      wanted.report()
  if empty:
    raise wanted.error()


def _stream_file(file: str, wanted: formats.Wanted, whole_files: bool) -> Iterator[str]:
  if wanted.chat and (file in BUILTIN or kind(file) in (None, 'text')):
    raise InputError(f"{file}: is text; format='chat' reads rows: JSON lines, parquet, the hub")
  if file in BUILTIN:
    from rrt.data import corpus  # corpus reads through this module too

    yield from corpus.documents(file)
    return
  if file.startswith('hf://'):
    dataset = formats.open_hub(file, wanted)
    yield from filter(str.strip, (dataset[i] for i in range(len(dataset))))
    return
  texts: Iterator[str]
  match kind(file):
    case 'json':
      texts = (text for _, text in formats.json_lines(file, wanted))
    case 'parquet':
      texts = formats.parquet_rows(file, wanted)
    case 'records':
      records = formats.open_records(file, wanted)
      texts = (records[i] for i in range(len(records)))
    case _:
      texts = formats.text_pieces(file, whole_files)
  with compressed.reading(file):
    yield from filter(str.strip, texts)


# --------------------------------------------------------------- random access


def open_documents(source: Source) -> Sequence[str]:
  """Validates a whole source and opens it for random access.

  Plain JSON lines, ArrayRecord and hub datasets are read in place. Others are
  unpacked: up to `store.IN_MEMORY` bytes into memory, larger ones once into a
  file of the user's cache directory (see `rrt.data.store`).

  Returns:
    The texts; of a chat source, conversations as JSON.

  Raises:
    InputError: as `stream`.
  """
  wanted = source.wanted()
  if source.rows is not None:
    parts = [formats.open_rows(source.rows, source.path, wanted)]
  else:
    parts = _open_files(source, wanted)
  documents = parts[0] if len(parts) == 1 else _Joined(parts)
  if not len(documents):
    raise wanted.error()
  wanted.report()
  return documents


def _open_files(source: Source, wanted: formats.Wanted) -> list[Sequence[str]]:
  parts: list[Sequence[str]] = []
  files = resolve(source.path)
  by_store = itertools.groupby(files, lambda f: (_in_place(f), kind(f)))
  for (in_place, _), group in by_store:
    if in_place is None:
      names = list(group)
      texts = itertools.chain.from_iterable(
        _stream_file(f, wanted, source.whole_files) for f in names
      )
      options = f'{source.format} {source.field} {source.whole_files} {formats.CUT}'
      parts.append(store.unpack(texts, names, options))
    else:
      parts.extend(in_place(f, wanted) for f in group)
  return parts


def _in_place(file: str) -> Callable[[str, formats.Wanted], Sequence[str]] | None:
  """The reader that opens a file in place; None if it has to be unpacked."""
  if file in BUILTIN:
    return None
  if file.startswith('hf://'):
    return formats.open_hub
  if kind(file) == 'records':
    return formats.open_records
  if kind(file) == 'json' and not compressed.compression(file):
    return formats.open_json_lines
  return None


class _Joined(Sequence[str]):
  """The concatenation of several sequences of documents."""

  def __init__(self, parts: Sequence[Any]):
    self._parts = parts
    self._ends = list(itertools.accumulate(map(len, parts)))
    if all(hasattr(part, 'sizes') for part in parts):
      self.sizes = np.concatenate([part.sizes for part in parts])

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index):
    for part, end in zip(self._parts, self._ends, strict=True):
      if index < end:
        return part[index - end + len(part)]
    raise IndexError(index)
