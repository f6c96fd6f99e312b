"""Documents from files: text, JSON lines, parquet, ArrayRecord, the hub.

Two ways in. `stream(path)` yields the documents once, in order, in little
memory: evaluation and calibration read it. `open_documents(source)` checks
everything first and gives random access, as the grain pipeline needs.

A path is a file, a directory (searched in depth, hidden files left out), a
glob, `hf://owner/name[/config]:split`, or one of `builtin`, `builtin:train`
and `builtin:heldout` (see `rrt.data.corpus`). Text and JSON lines may be
compressed with gzip, xz or zstandard, which is told by the first bytes. What
a document is:

* text: a file of up to `2 * CUT` characters is one document; a longer one is
  cut at the first blank line (else line end, else space) that follows `CUT`
  characters, so that it can be shuffled. `whole_files=True` never cuts.
* JSON lines: one object a line, its text in `field`.
* parquet and the hub: a row, its text in the column `field`.
* ArrayRecord: a record is UTF-8 text, or a JSON object with `field`.

Documents without any visible character are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import glob
import io
import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np

from rrt.data import compressed, store
from rrt.errors import InputError

CUT = 8192
BUILTIN = ('builtin', 'builtin:train', 'builtin:heldout')
TEXT = ('.txt', '.text', '.md', '.rst')
JSON = ('.jsonl', '.ndjson', '.json')
PARQUET = ('.parquet', '.pq')
RECORDS = ('.array_record', '.arrayrecord')


@dataclasses.dataclass(frozen=True)
class Source:
  """Where documents come from.

  Attributes:
    path: a file, directory, glob, `hf://` name or `builtin`.
    weight: this source's share of the text in a mix; None (in all sources
      of a mix) takes every source in proportion to its size.
    field: the field or column that holds the text.
    whole_files: a text file is one document however long it is.
  """

  path: str
  weight: float | None = None
  field: str = 'text'
  whole_files: bool = False


def is_path(text: str) -> bool:
  """Whether a string names a source rather than being text itself.

  It does if such a file exists, or if it looks like a name: one line, and
  either no white space, a leading '/', './', '../' or '~', or a known ending.
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
  """The files that a path stands for, sorted; `hf://` and builtin as given.

  Raises:
    InputError: nothing is there, or a directory without a readable file.
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
    InputError: a file that is missing, damaged, binary or not UTF-8, a line
      or column without `field`, or no document at all.
  """
  empty = True
  for file in resolve(path):
    for text in _stream_file(file, field, whole_files):
      empty = False
      yield text
  if empty:
    raise InputError(f'{path}: holds no text')


def _stream_file(file: str, field: str, whole_files: bool) -> Iterator[str]:
  if file in BUILTIN:
    from rrt.data import corpus  # corpus reads through this module too

    yield from corpus.documents(file)
    return
  if file.startswith('hf://'):
    dataset = _open_hub(file, field)
    yield from filter(str.strip, (dataset[i] for i in range(len(dataset))))
    return
  texts: Iterator[str]
  match kind(file):
    case 'json':
      texts = (text for _, text in _json_lines(file, field))
    case 'parquet':
      texts = _parquet(file, field)
    case 'records':
      records = _open_records(file, field)
      texts = (records[i] for i in range(len(records)))
    case _:
      texts = _text(file, whole_files)
  with compressed.reading(file):
    yield from filter(str.strip, texts)


def _text(file: str, whole: bool) -> Iterator[str]:
  """Pieces of a text file; joined they are the file, its line ends unified."""
  line = 1
  with compressed.open_binary(file) as raw:
    reader = io.TextIOWrapper(raw, encoding='utf-8-sig')
    rest = ''
    while True:
      try:
        block = reader.read(1 << 20)
      except UnicodeDecodeError as e:
        raise InputError(
          f'{file}: not UTF-8 text (byte 0x{e.object[e.start]:02x}, after '
          f'line {line}); convert it first, for example with iconv'
        ) from e
      if '\0' in block:
        raise InputError(f'{file}: holds zero bytes: it is binary, not text')
      line += block.count('\n')
      rest += block
      if not block:
        break
      if not whole:
        *pieces, rest = cut(rest)
        yield from pieces
    yield rest


def cut(text: str, size: int = CUT) -> list[str]:
  """Cuts a text into pieces of `size` to `2 * size` characters.

  A piece ends after the first blank line behind `size` characters, else after
  a line end, else after a space. The last piece may be shorter; the pieces
  joined are the text.
  """
  pieces, start = [], 0
  while len(text) - start > 2 * size:
    low, high = start + size, start + 2 * size
    for mark in ('\n\n', '\n', ' '):
      found = text.find(mark, low, high)
      if found >= 0:
        end = found + len(mark)
        break
    else:
      end = high
    pieces.append(text[start:end])
    start = end
  return [*pieces, text[start:]]


def _json_lines(file: str, field: str) -> Iterator[tuple[int, str]]:
  """Yields (offset of the line in the decompressed bytes, its text)."""
  offset = 0
  with compressed.open_binary(file) as raw:
    for number, line in enumerate(raw, 1):
      if line.strip():
        yield offset, _json_text(line, field, f'{file}, line {number}')
      offset += len(line)


def _json_text(line: bytes, field: str, where: str) -> str:
  """The text of one JSON object."""
  try:
    item = json.loads(line.decode('utf-8-sig'))
  except UnicodeDecodeError as e:
    raise InputError(f'{where}: not UTF-8') from e
  except (ValueError, RecursionError) as e:
    raise InputError(f'{where}: not a JSON object ({e})') from e
  return _field(item, field, where)


def _field(item: Any, field: str, where: str) -> str:
  if not isinstance(item, dict):
    raise InputError(
      f'{where}: a JSON {type(item).__name__}; each line must be one object'
      f' like {{"{field}": "..."}}'
    )
  if field not in item:
    names = ', '.join(map(str, list(item)[:8])) or 'none'
    raise InputError(
      f'{where}: has no field {field!r} (its fields: {names}); name the one'
      ' that holds the text'
    )
  return _string(item[field], field, where)


def _string(value: Any, field: str, where: str) -> str:
  if not isinstance(value, str):
    raise InputError(
      f'{where}: the field {field!r} is {type(value).__name__}, not text'
    )
  # JSON can carry halves of surrogate pairs, which no tokenizer takes.
  return value.encode('utf-8', 'replace').decode('utf-8')


def _parquet(file: str, field: str) -> Iterator[str]:
  parquet = compressed.require('pyarrow.parquet', 'parquet files', 'train')
  with parquet.ParquetFile(file) as table:
    names = table.schema_arrow.names
    if field not in names:
      raise InputError(
        f'{file}: has no column {field!r} (its columns: '
        f'{", ".join(names[:8])}); name the one that holds the text'
      )
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
      for value in batch.column(0).to_pylist():
        row += 1
        if value is not None:
          yield _string(value, field, f'{file}, row {row}')


# --------------------------------------------------------------- random access


def open_documents(source: Source) -> Sequence[str]:
  """Checks a source from end to end and opens it for random access.

  Plain JSON lines, ArrayRecord and hub datasets are read where they lie. The
  others are unpacked: up to `store.IN_MEMORY` bytes into memory, more into a
  file of the user's cache directory, once (see `rrt.data.store`).

  Raises:
    InputError: as `stream`.
  """
  parts: list[Sequence[str]] = []
  files = resolve(source.path)
  by_store = itertools.groupby(files, lambda f: (_in_place(f), kind(f)))
  for (in_place, _), group in by_store:
    if in_place is None:
      names = list(group)
      texts = itertools.chain.from_iterable(
        _stream_file(f, source.field, source.whole_files) for f in names
      )
      options = f'{source.field} {source.whole_files} {CUT}'
      parts.append(store.unpack(texts, names, options))
    else:
      parts.extend(in_place(f, source.field) for f in group)
  documents = parts[0] if len(parts) == 1 else _Joined(parts)
  if not len(documents):
    raise InputError(f'{source.path}: holds no text')
  return documents


def _in_place(file: str) -> Callable[[str, str], Sequence[str]] | None:
  """How to open a file without unpacking it; None where that cannot be."""
  if file in BUILTIN:
    return None
  if file.startswith('hf://'):
    return _open_hub
  if kind(file) == 'records':
    return _open_records
  if kind(file) == 'json' and not compressed.compression(file):
    return _open_json_lines
  return None


class _Joined(Sequence[str]):
  """Several sequences of documents as one."""

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


def _open_json_lines(file: str, field: str) -> Sequence[str]:
  """Maps the file; reads all of it once to check and to index its lines."""
  with compressed.reading(file):
    offsets, sizes = [], []
    for offset, text in _json_lines(file, field):
      if text.strip():
        offsets.append(offset)
        sizes.append(len(text))
    return store.Lines(
      file, offsets, sizes, lambda line: _json_text(line, field, file)
    )


class _Rows(Sequence[str]):
  """Rows of something with random access, made into texts when asked for."""

  def __init__(self, rows: Any, text: Callable[[Any, int], str]):
    self._rows, self._text = rows, text

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    return self._text(self._rows[index], index)


def _open_records(file: str, field: str) -> Sequence[str]:
  with compressed.reading(file):
    grain = compressed.require('grain', 'ArrayRecord files', 'train')
    compressed.require('array_record.python', 'ArrayRecord files', 'train')
    try:
      source = grain.sources.ArrayRecordDataSource([file])
      count = len(source)
    except Exception as e:  # array_record raises many types
      raise InputError(f'{file}: not a readable ArrayRecord file') from e
  if not count:
    raise InputError(f'{file}: holds no text')

  def text(record: bytes, index: int) -> str:
    where = f'{file}, record {index}'
    if record[:1] == b'{':
      with contextlib.suppress(ValueError):
        return _field(json.loads(record), field, where)
    try:
      return record.decode('utf-8')
    except UnicodeDecodeError as e:
      raise InputError(f'{where}: not UTF-8 text nor a JSON object') from e

  rows = _Rows(source, text)
  _ = rows[0]
  return rows


def _open_hub(name: str, field: str) -> Sequence[str]:
  """Opens `hf://owner/name[/config]:split`, or `hf://name:split`."""
  place, colon, split = name.removeprefix('hf://').partition(':')
  parts = place.split('/')
  if not colon or not split or not all(parts) or len(parts) > 3:
    raise InputError(
      f'{name}: write it as hf://owner/name[/config]:split, for example'
      ' hf://roneneldan/TinyStories:train'
    )
  datasets = compressed.require('datasets', 'hf:// sources', 'eval')
  try:
    rows = datasets.load_dataset('/'.join(parts[:2]), *parts[2:], split=split)
  except Exception as e:  # the hub raises many types
    reason = str(e).strip().split('\n')[0]
    raise InputError(f'{name}: the hub did not give it ({reason})') from e
  if field not in rows.column_names:
    raise InputError(
      f'{name}: has no column {field!r} (its columns: '
      f'{", ".join(rows.column_names[:8])}); name the one with the text'
    )
  return _Rows(rows, lambda r, i: _string(r[field], field, f'{name}, row {i}'))
