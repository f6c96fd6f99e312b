"""Every format in, and one clear sentence for every bad file."""

import gzip
import json
import lzma
import pathlib

import pytest

from rrt import console
from rrt.data import formats, sources, store
from rrt.data.sources import Source
from rrt.errors import InputError

TEXTS = ['One day.', 'Zwei Tage, größer.', 'Three\n\nparagraphs 😀.']


def write_lines(path, texts, field='text'):
  data = ''.join(json.dumps({'id': i, field: t}) + '\n' for i, t in enumerate(texts)).encode()
  compress = {'.gz': gzip.compress, '.xz': lzma.compress, '.zst': _zstd}
  path.write_bytes(compress.get(path.suffix, bytes)(data))
  return str(path)


def _zstd(data):
  zstandard = pytest.importorskip('zstandard')
  return zstandard.ZstdCompressor().compress(data)


def both(path, **options):
  """The documents by both ways in, which must agree."""
  once = list(sources.stream(path, **options))
  opened = sources.open_documents(Source(str(path), **options))
  assert list(opened[i] for i in range(len(opened))) == once
  return once


@pytest.mark.parametrize('ending', ['', '.gz', '.xz', '.zst'])
def test_json_lines(tmp_path, ending):
  path = write_lines(tmp_path / f'a.jsonl{ending}', TEXTS)
  assert both(path) == TEXTS


@pytest.mark.parametrize('ending', ['', '.gz', '.xz', '.zst'])
def test_text(tmp_path, ending):
  text = 'Hello.\r\nA second line, ü.\r\n'.encode('utf-8-sig')
  compress = {'.gz': gzip.compress, '.xz': lzma.compress, '.zst': _zstd}
  path = tmp_path / f'a.txt{ending}'
  path.write_bytes(compress.get(ending, bytes)(text))
  assert both(path) == ['Hello.\nA second line, ü.\n']


def test_text_without_an_ending(tmp_path):
  (tmp_path / 'README').write_text('Hello.')
  assert both(tmp_path / 'README') == ['Hello.']


def test_several_zstd_frames_and_gzip_members(tmp_path):
  (tmp_path / 'a.txt.zst').write_bytes(_zstd(b'one ') + _zstd(b'two'))
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'one ') + gzip.compress(b'two'))
  assert both(tmp_path) == ['one two'] * 2


def test_parquet(tmp_path):
  pa = pytest.importorskip('pyarrow')
  import pyarrow.parquet as pq

  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'n': [1, 2, 3, 4], 'body': [*TEXTS, None]}), path)
  assert both(path, field='body') == TEXTS
  with pytest.raises(InputError, match=r"in the field 'text' \(the fields of the first: n, body\)"):
    both(path)


def write_records(module, path, records):
  writer = module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


def test_array_record(tmp_path):
  module = pytest.importorskip('array_record.python.array_record_module')
  path = tmp_path / 'a.array_record-00000-of-00001'
  records = [TEXTS[0].encode(), b'{"text": null}', json.dumps({'text': TEXTS[1]}).encode()]
  records += [b'{"body": "x"}', b' ', b'{no JSON}']
  write_records(module, path, records)
  assert both(path) == [*TEXTS[:2], '{no JSON}']
  write_records(module, tmp_path / 'c.array_record', [b'{"body": "x"}'])
  with pytest.raises(InputError, match='the fields of the first: body'):
    both(tmp_path / 'c.array_record')
  (tmp_path / 'b.array_record').write_bytes(b'no such thing')
  with pytest.raises(InputError, match='not a readable ArrayRecord file'):
    both(tmp_path / 'b.array_record')


ROWS = [{'text': 'a'}, {'text': None}, {'body': 'x'}, {'text': 'b'}, {'text': ''}]
NESTED = [{'data': {'text': 'a'}}, {'data': None}, {'data': {'n': 1}}, {'data': {'text': 'b'}}]


@pytest.mark.parametrize('ending', ['.jsonl', '.jsonl.gz', '.parquet', 'hub', '.array_record'])
@pytest.mark.parametrize('rows, field', [(ROWS, 'text'), (NESTED, 'data.text')])
def test_rows_without_a_text_are_left_out_and_counted(
  tmp_path, monkeypatch, capsys, ending, rows, field
):
  path = str(tmp_path / f'a{ending}')
  if ending.startswith('.jsonl'):
    data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    (tmp_path / f'a{ending}').write_bytes(gzip.compress(data) if ending.endswith('gz') else data)
  elif ending == '.array_record':
    module = pytest.importorskip('array_record.python.array_record_module')
    write_records(module, path, [json.dumps(row).encode() for row in rows])
  else:
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / 'a.parquet')
    if ending == 'hub':
      datasets = pytest.importorskip('datasets')
      path = 'hf://owner/name:train'
      load = lambda *names, split: datasets.Dataset(table)
      monkeypatch.setattr(datasets, 'load_dataset', load)
  monkeypatch.setattr(console, '_noted', set())
  assert both(path, field=field) == ['a', 'b']
  note = f'note: {path}: 2 rows without a text in the field {field!r} left out\n'
  assert capsys.readouterr().err == note
  with pytest.raises(InputError, match=r"no row has a text in the field 'no\.such'"):
    both(path, field='no.such')


def test_directory_and_glob_read_every_kind(tmp_path):
  write_lines(tmp_path / 'b.jsonl', ['b1', 'b2'])
  write_lines(tmp_path / 'c.jsonl.gz', ['c'])
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'd.md').write_text('d')
  (tmp_path / 'a.txt').write_text('a')
  (tmp_path / 'image.png').write_bytes(b'\x89PNG\0')
  (tmp_path / '.hidden').mkdir()
  (tmp_path / '.hidden' / 'e.txt').write_text('e')
  assert both(tmp_path) == ['a', 'b1', 'b2', 'c', 'd']
  assert both(f'{tmp_path}/*.jsonl*') == ['b1', 'b2', 'c']
  assert both(f'{tmp_path}/**/*.md') == ['d']


def test_long_text_is_cut_and_nothing_lost(tmp_path):
  paragraphs = [f'Paragraph {i}. ' + 'word ' * (i % 97) for i in range(3000)]
  text = '\n\n'.join(paragraphs)
  path = tmp_path / 'long.txt'
  path.write_text(text)
  pieces = both(path)
  assert ''.join(pieces) == text
  assert all(formats.CUT <= len(p) <= 2 * formats.CUT for p in pieces[:-1])
  assert all(p.endswith('\n\n') for p in pieces[:-1])
  assert both(path, whole_files=True) == [text]


@pytest.mark.parametrize('mark', ['', ' ', '\n'])
def test_cut_without_paragraphs(mark):
  text = (('x' * 7) + mark) * 5000
  pieces = formats.cut(text, 100)
  assert ''.join(pieces) == text
  assert all(100 <= len(p) <= 200 for p in pieces[:-1])
  assert all(p.endswith(mark) for p in pieces[:-1])


def test_blank_lines_and_documents_are_left_out(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('\n{"text": " "}\n\n{"text": "a"}\n{"text": ""}\n')
  assert both(path) == ['a']


def test_half_a_surrogate_pair_becomes_a_mark(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a\\ud800b"}')
  assert both(path) == ['a?b']


def test_much_text_is_unpacked_into_the_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('RRT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(store, 'IN_MEMORY', 100)
  texts = [f'Document {i}, größer.' for i in range(50)]
  path = write_lines(tmp_path / 'a.jsonl.gz', texts)
  assert both(path) == texts
  kept = sorted(p.suffix for p in (tmp_path / 'cache').iterdir())
  assert kept == ['.npy', '.txt']

  def fail(*_):
    raise AssertionError('unpacked twice')

  monkeypatch.setattr(store, '_unpack_to', fail)
  opened = sources.open_documents(Source(path))
  assert [opened[i] for i in range(len(opened))] == texts
  monkeypatch.undo()
  monkeypatch.setenv('RRT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(store, 'IN_MEMORY', 100)
  write_lines(tmp_path / 'a.jsonl.gz', texts[:40])  # changed: anew
  assert both(path) == texts[:40]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('RRT_CACHE', str(tmp_path / 'file' / 'cache'))
  monkeypatch.setattr(store, 'IN_MEMORY', 10)
  path = write_lines(tmp_path / 'a.jsonl.gz', ['many words'] * 9)
  with pytest.raises(InputError, match='RRT_CACHE'):
    both(path)


BAD = {
  'missing.txt': (None, 'no such file'),
  'none*.txt': (None, 'no file matches'),
  'empty.txt': (b'', 'holds no text'),
  'blank.jsonl': (b'\n\n', 'holds no text'),
  'binary.txt': (b'abc\0\0def', 'binary'),
  'latin.txt': ('line\nna\xefve'.encode('latin-1'), 'not UTF-8.*0xef'),
  'latin.jsonl': (b'{"text": "\xef"}', 'line 1: not UTF-8'),
  'field.jsonl': (
    b'{"text": null}\n\n{"body": "b", "n": 1}\n',
    "no row has a text in the field 'text' .the fields of the first: text.",
  ),
  'number.jsonl': (b'{"text": 3}', "line 1: the field 'text' is int"),
  'list.jsonl': (b'["text"]', 'line 1: a JSON list'),
  'broken.jsonl': (b'{"text": "a"}\n{"text": ', 'line 2: not a JSON object'),
  'short.txt.gz': (gzip.compress(b'some words' * 99)[:-9], 'ends too early'),
  'short.txt.xz': (lzma.compress(b'some words' * 99)[:-9], 'ends too early'),
  'short.txt.zst': ('zst', 'ends too early'),
  'plain.txt.gz': (b'plain text', 'is named .gz but is not'),
  'hurt.txt.xz': ('hurt', 'damaged'),
  'text.parquet': (b'not parquet', 'not a readable parquet file'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_sentence(tmp_path, name):
  content, message = BAD[name]
  if content == 'zst':
    content = _zstd(b'some words' * 99)[:-3]
  elif content == 'hurt':
    content = bytearray(lzma.compress(bytes(range(256)) * 9))
    content[30] ^= 255
  if content is not None:
    (tmp_path / name).write_bytes(content)
  for read in (lambda p: list(sources.stream(p)), lambda p: sources.open_documents(Source(p))):
    with pytest.raises(InputError, match=message) as caught:
      read(str(tmp_path / name))
    assert '\n' not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_directory_without_text(tmp_path):
  with pytest.raises(InputError, match=r'holds no file that ends in \.txt'):
    sources.resolve(tmp_path)


@pytest.mark.parametrize('name', ['hf://', 'hf://a', 'hf://a/b/c/d:train'])
def test_hub_names(name):
  with pytest.raises(InputError, match='hf://owner/name'):
    sources.open_documents(Source(name))


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'zstandard', None)
  (tmp_path / 'a.txt.zst').write_bytes(b'\x28\xb5\x2f\xfd1234')
  with pytest.raises(InputError, match=r'pip install ".*\[train\]"'):
    list(sources.stream(tmp_path / 'a.txt.zst'))


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('notes.txt', True),
    ('my notes.jsonl.xz', True),
    ('/some where/file', True),
    ('hf://a/b:train', True),
    ('builtin:heldout', True),
    ('data/*.jsonl', True),
    ('The cat sat on the mat.', False),
    ('He said and/or wrote it.', False),
    ('two\nlines.txt', False),
    ('', False),
  ],
)
def test_is_path(text, expected):
  assert sources.is_path(text) is expected


def test_is_path_of_a_file_that_exists(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('some words').write_text('a')
  assert sources.is_path('some words')
