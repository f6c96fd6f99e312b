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
from rrt.data import compressed, conversations, store
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


class Wanted:
  """What is read of a source's rows: a text field or a conversation.

  Counts the rows that hold none, and says so once.

  Attributes:
    field: of the text; 'a.b' is the field b of the object a. Of conversations, the field
      of the messages; None for those of `rrt.data.conversations`.
    chat: whether rows are conversations; they are read as JSON.
    count: rows that hold none.
    names: the fields of the first of them.
  """

  def __init__(self, path: str, field: str = 'text', chat: bool = False):
    self._path = path
    self.chat = chat
    self.field = None if chat and field == 'text' else field
    self.count = 0
    self.names: list[str] = []

  def of(self, row: dict[str, Any], where: str) -> str | None:
    """The row's text, or its conversation as JSON; None without one.

    Raises:
      InputError: the field is of another type.
    """
    if self.chat:
      return conversations.parse(row, where, self.field)
    return _text(row, self.field or 'text', where)

  def columns(self, names: Sequence[str]) -> list[str]:
    """Those of the columns that have to be read; none if the rows cannot hold a text."""
    if self.chat:
      heads = (self.field,) if self.field else conversations.NAMES
      if not any(n in names for n in heads):
        return []
      return [n for n in names if n in (*heads, *conversations.BESIDE)]
    field = self.field or 'text'
    column = field if field in names else field.split('.')[0]
    return [column] if column in names else []

  def skip(self, names: Iterable[str], count: int = 1) -> None:
    """Counts rows with these fields that hold none."""
    if not self.count:
      self.names = [str(n) for n in names]
    self.count += count

  @property
  def _what(self) -> str:
    what = 'conversation with an answer' if self.chat else 'text'
    return f'{what} in the field {self.field!r}' if self.field else what

  def report(self) -> None:
    """Prints a note if there are such rows."""
    if self.count:
      rows = 'row' if self.count == 1 else 'rows'
      console.note(f'{self._path}: {self.count:,} {rows} without a {self._what} left out')

  def error(self) -> InputError:
    """The error of a source in which nothing is left."""
    if not self.count:
      return InputError(f'{self._path}: holds no text')
    names = ', '.join(self.names[:8]) or 'none'
    hint = 'name the one that holds the text'
    if self.chat:
      hint = "name the one that holds the messages in 'field', or see rrt.data.conversations"
    elif any(n in conversations.NAMES for n in self.names):
      hint += ", or set format to 'chat'"
    return InputError(
      f'{self._path}: no row has a {self._what} (the fields of the first: {names}); {hint}'
    )


def json_lines(file: str, wanted: Wanted) -> Iterator[tuple[int, str]]:
  """Yields (offset of the line in the decompressed bytes, its text)."""
  offset = 0
  with compressed.open_binary(file) as raw:
    for number, line in enumerate(raw, 1):
      if line.strip():
        item = _json_object(line, f'{file}, line {number}')
        text = wanted.of(item, f'{file}, line {number}')
        if text is None:
          wanted.skip(item)
        else:
          yield offset, text
      offset += len(line)


def _json_object(line: bytes, where: str) -> dict[str, Any]:
  try:
    item = json.loads(line.decode('utf-8-sig'))
  except UnicodeDecodeError as e:
    raise InputError(f'{where}: not UTF-8') from e
  except (ValueError, RecursionError) as e:
    raise InputError(f'{where}: not a JSON object ({e})') from e
  if not isinstance(item, dict):
    raise InputError(
      f'{where}: a JSON {type(item).__name__}; each line must be one object like {{"text": "..."}}'
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


def parquet_rows(file: str, wanted: Wanted) -> Iterator[str]:
  """Yields the texts of a column, of `a.b` in a column of structs, or conversations."""
  parquet = compressed.require('pyarrow.parquet', 'parquet files', 'train')
  with parquet.ParquetFile(file) as table:
    names = table.schema_arrow.names
    columns = wanted.columns(names)
    if not columns:
      wanted.skip(names, table.metadata.num_rows)
      return
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=columns):
      for row in batch.to_pylist():
        number += 1
        text = wanted.of(row, f'{file}, row {number}')
        if text is None:
          wanted.skip(names)
        else:
          yield text


def open_json_lines(file: str, wanted: Wanted) -> Sequence[str]:
  """Maps the file into memory, and reads it once to validate and index its lines."""
  with compressed.reading(file):
    offsets, sizes = [], []
    for offset, text in json_lines(file, wanted):
      if text.strip():
        offsets.append(offset)
        sizes.append(len(text))
    parse = lambda line: wanted.of(_json_object(line, file), file) or ''
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


def open_records(file: str, wanted: Wanted) -> Sequence[str]:
  """Opens an ArrayRecord file of texts or of JSON objects.

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
      return wanted.of(item, where)
    try:
      return record.decode('utf-8')
    except UnicodeDecodeError as e:
      raise InputError(f'{where}: not UTF-8 text nor a JSON object') from e

  found = []
  for index in range(count):
    record = source[index]
    one = text(record, index)
    if one is None:
      wanted.skip(parse(record) or ())
    elif one.strip():
      found.append(index)
  return _Rows(source, found, text)


def open_hub(name: str, wanted: Wanted) -> Sequence[str]:
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
  return open_dataset(rows, name, wanted)


def open_dataset(rows: Any, name: str, wanted: Wanted) -> Sequence[str]:
  """Opens a `datasets.Dataset`, called `name` in errors."""
  columns = wanted.columns(rows.column_names)
  text = lambda row, i: wanted.of(row, f'{name}, row {i}')
  if not columns:
    wanted.skip(rows.column_names, len(rows))
    return _Rows(rows, (), text)
  only = rows.select_columns(columns).with_format(None)
  if wanted.chat:
    found = [i for i, row in enumerate(only) if text(row, i) is not None]
    if len(found) < len(rows):
      wanted.skip(rows.column_names, len(rows) - len(found))
    return _Rows(only, found, text)
  keep = []
  for batch in only.with_format('arrow').iter(batch_size=1024):
    has_text, is_null = _arrow_texts(batch.column(0), columns[0], wanted.field or 'text', name)
    keep.append(has_text)
    if is_null.any():
      wanted.skip(rows.column_names, int(is_null.sum()))
  return _Rows(only, np.flatnonzero(np.concatenate(keep)) if keep else (), text)


def open_rows(rows: Iterable[Any], name: str, wanted: Wanted) -> Sequence[str]:
  """Opens texts, or rows as dicts, from Python; a `datasets.Dataset` is read in place.

  Others are copied into memory.

  Raises:
    InputError: something that is neither, or one text instead of many.
  """
  if isinstance(rows, (str, bytes, dict)):
    raise InputError(f'{name}: give a list of texts or of rows, not one {type(rows).__name__}')
  if hasattr(rows, 'column_names') and hasattr(rows, 'select_columns') and hasattr(rows, '__len__'):
    return open_dataset(rows, name, wanted)
  found = []
  for i, row in enumerate(rows):
    where = f'{name}, row {i}'
    if isinstance(row, list):  # The messages of a conversation.
      row = {'messages': row}
    if isinstance(row, str) and not wanted.chat:
      row = {wanted.field: row}
    if not isinstance(row, dict):
      kinds = 'a dict of fields or a list of messages' if wanted.chat else 'a text or a dict'
      raise InputError(f'{where}: is {type(row).__name__}; it must be {kinds}')
    text = wanted.of(row, where)
    if text is None:
      wanted.skip(row)
    elif text.strip():
      found.append(text)
  return store.flat(found)


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
