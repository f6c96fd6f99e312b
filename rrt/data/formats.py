"""Readers of one file by format: text, JSON lines, parquet, ArrayRecord, hub.

Functions named `open_*` give random access, the others yield the documents
once. `rrt.data.sources` chooses the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import io
import json
from typing import Any

import numpy as np

from rrt import console
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


class Skipped:
  """Counts the rows of a source that hold no text, and says so once.

  Attributes:
    count: rows whose field is absent or null.
    names: the fields of the first of them.
  """

  def __init__(self, path: str, field: str):
    self._path, self._field = path, field
    self.count = 0
    self.names: list[str] = []

  def add(self, names: Iterable[str], count: int = 1) -> None:
    """Counts rows with these fields."""
    if not self.count:
      self.names = [str(n) for n in names]
    self.count += count

  def report(self) -> None:
    """Prints a note if there are any."""
    if self.count:
      rows = 'row' if self.count == 1 else 'rows'
      console.note(
        f'{self._path}: {self.count:,} {rows} without a text in the field {self._field!r} left out'
      )

  def error(self) -> InputError:
    """The error of a source in which no text is left."""
    if not self.count:
      return InputError(f'{self._path}: holds no text')
    names = ', '.join(self.names[:8]) or 'none'
    return InputError(
      f'{self._path}: holds no text: no row has one in the field {self._field!r} (the fields '
      f'of the first: {names}); name the one that holds the text'
    )


def json_lines(file: str, field: str, skipped: Skipped) -> Iterator[tuple[int, str]]:
  """Yields (offset of the line in the decompressed bytes, its text)."""
  offset = 0
  with compressed.open_binary(file) as raw:
    for number, line in enumerate(raw, 1):
      if line.strip():
        item = _json_object(line, field, f'{file}, line {number}')
        text = _text(item, field, f'{file}, line {number}')
        if text is None:
          skipped.add(item)
        else:
          yield offset, text
      offset += len(line)


def _json_object(line: bytes, field: str, where: str) -> dict[str, Any]:
  try:
    item = json.loads(line.decode('utf-8-sig'))
  except UnicodeDecodeError as e:
    raise InputError(f'{where}: not UTF-8') from e
  except (ValueError, RecursionError) as e:
    raise InputError(f'{where}: not a JSON object ({e})') from e
  if not isinstance(item, dict):
    raise InputError(
      f'{where}: a JSON {type(item).__name__}; each line must be one object'
      f' like {{"{field}": "..."}}'
    )
  return item


def _text(item: dict[str, Any], field: str, where: str) -> str | None:
  """The text of a row in `field`, or in `a.b` of nested objects; None without one."""
  value: Any = item
  for name in (field,) if field in item else field.split('.'):
    value = value.get(name) if isinstance(value, dict) else None
  if value is None:
    return None
  if not isinstance(value, str):
    raise InputError(f'{where}: the field {field!r} is {type(value).__name__}, not text')
  # JSON can carry halves of surrogate pairs, which no tokenizer takes.
  return value.encode('utf-8', 'replace').decode('utf-8')


def parquet_rows(file: str, field: str, skipped: Skipped) -> Iterator[str]:
  """Yields the texts of a column, or of `a.b` in a column of structs."""
  parquet = compressed.require('pyarrow.parquet', 'parquet files', 'train')
  with parquet.ParquetFile(file) as table:
    names = table.schema_arrow.names
    column = field if field in names else field.split('.')[0]
    if column not in names:
      skipped.add(names, table.metadata.num_rows)
      return
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=[column]):
      for value in batch.column(0).to_pylist():
        row += 1
        text = _text({column: value}, field, f'{file}, row {row}')
        if text is None:
          skipped.add(names)
        else:
          yield text


def open_json_lines(file: str, field: str, skipped: Skipped) -> Sequence[str]:
  """Maps the file into memory, and reads it once to validate and index its lines."""
  with compressed.reading(file):
    offsets, sizes = [], []
    for offset, text in json_lines(file, field, skipped):
      if text.strip():
        offsets.append(offset)
        sizes.append(len(text))
    parse = lambda line: _text(_json_object(line, field, file), field, file) or ''
    return store.Lines(file, offsets, sizes, parse)


class _Rows(Sequence[str]):
  """A random-access sequence of texts, converted from some rows on access."""

  def __init__(self, rows: Any, indices: Iterable[int], text: Callable[[Any, int], str | None]):
    self._rows, self._text = rows, text
    self._indices = np.fromiter(indices, np.int64)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index):
    row = int(self._indices[index])
    return self._text(self._rows[row], row) or ''


def open_records(file: str, field: str, skipped: Skipped) -> Sequence[str]:
  """Opens an ArrayRecord file of texts, or of JSON objects with `field`.

  Reads it once to validate and index its records.
  """
  with compressed.reading(file):
    grain = compressed.require('grain', 'ArrayRecord files', 'train')
    compressed.require('array_record.python', 'ArrayRecord files', 'train')
    try:
      source = grain.sources.ArrayRecordDataSource([file])
      count = len(source)
    except Exception as e:  # array_record raises many types
      raise InputError(f'{file}: not a readable ArrayRecord file') from e

  def parse(record: bytes) -> dict[str, Any] | None:
    if record[:1] == b'{':
      with contextlib.suppress(ValueError, RecursionError):
        return json.loads(record)
    return None

  def text(record: bytes, index: int) -> str | None:
    where = f'{file}, record {index}'
    item = parse(record)
    if item is not None:
      return _text(item, field, where)
    try:
      return record.decode('utf-8')
    except UnicodeDecodeError as e:
      raise InputError(f'{where}: not UTF-8 text nor a JSON object') from e

  found = []
  for index in range(count):
    record = source[index]
    one = text(record, index)
    if one is None:
      skipped.add(parse(record) or ())
    elif one.strip():
      found.append(index)
  return _Rows(source, found, text)


def open_hub(name: str, field: str, skipped: Skipped) -> Sequence[str]:
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
  column = field if field in rows.column_names else field.split('.')[0]
  if column not in rows.column_names:
    skipped.add(rows.column_names, len(rows))
    return _Rows(rows, (), lambda r, i: None)
  only = rows.select_columns([column])
  keep = []
  for batch in only.with_format('arrow').iter(batch_size=1024):
    has_text, is_null = _arrow_texts(batch.column(0), column, field, name)
    keep.append(has_text)
    if is_null.any():
      skipped.add(rows.column_names, int(is_null.sum()))
  found = np.flatnonzero(np.concatenate(keep)) if keep else np.zeros(0, int)
  text = lambda row, i: _text({column: row[column]}, field, f'{name}, row {i}')
  return _Rows(only, found, text)


def _arrow_texts(values: Any, column: str, field: str, where: str) -> tuple[Any, Any]:
  """Which rows of an Arrow column hold a text, and which are null, bool arrays."""
  pc = compressed.require('pyarrow.compute', 'hf:// sources', 'train')
  types = compressed.require('pyarrow.types', 'hf:// sources', 'train')
  for part in () if column == field else field.split('.')[1:]:
    values = pc.struct_field(values, part)
  if types.is_null(values.type):
    return np.zeros(len(values), bool), np.ones(len(values), bool)
  if not (types.is_string(values.type) or types.is_large_string(values.type)):
    raise InputError(f'{where}: the field {field!r} is {values.type}, not text')
  filled = pc.utf8_length(pc.utf8_trim_whitespace(values))
  has_text = pc.greater(pc.fill_null(filled, 0), 0)
  return np.asarray(has_text, bool), np.asarray(pc.is_null(values), bool)
