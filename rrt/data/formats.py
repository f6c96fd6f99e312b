"""Readers of one file by format: text, JSON lines, parquet, ArrayRecord, hub.

Functions named `open_*` give random access, the others yield the documents
once. `rrt.data.sources` chooses the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import io
import json
from typing import Any

from rrt.data import compressed, store
from rrt.errors import InputError

CUT = 8192


def text_pieces(file: str, whole: bool) -> Iterator[str]:
  """Yields pieces of a text file; joined they are the file, with unified line ends."""
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


def json_lines(file: str, field: str) -> Iterator[tuple[int, str]]:
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
      f'{where}: has no field {field!r} (its fields: {names}); name the one that holds the text'
    )
  return _string(item[field], field, where)


def _string(value: Any, field: str, where: str) -> str:
  if not isinstance(value, str):
    raise InputError(f'{where}: the field {field!r} is {type(value).__name__}, not text')
  # JSON can carry halves of surrogate pairs, which no tokenizer takes.
  return value.encode('utf-8', 'replace').decode('utf-8')


def parquet_rows(file: str, field: str) -> Iterator[str]:
  """Yields the texts of a column; null rows are skipped."""
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


def open_json_lines(file: str, field: str) -> Sequence[str]:
  """Maps the file into memory, and reads it once to validate and index its lines."""
  with compressed.reading(file):
    offsets, sizes = [], []
    for offset, text in json_lines(file, field):
      if text.strip():
        offsets.append(offset)
        sizes.append(len(text))
    return store.Lines(file, offsets, sizes, lambda line: _json_text(line, field, file))


class _Rows(Sequence[str]):
  """A random-access sequence of texts, converted from rows on access."""

  def __init__(self, rows: Any, text: Callable[[Any, int], str]):
    self._rows, self._text = rows, text

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    return self._text(self._rows[index], index)


def open_records(file: str, field: str) -> Sequence[str]:
  """Opens an ArrayRecord file of texts, or of JSON objects with `field`."""
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


def open_hub(name: str, field: str) -> Sequence[str]:
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
