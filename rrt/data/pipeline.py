"""Text to training batches through grain, resumable to the bit.

Documents are mixed, shuffled and repeated by grain into one endless stream
with random access. Each row of the *global* batch is a lane: lane k of G reads
the stream's elements k, k + G, k + 2 G, ... and lays their tokens end to end;
what does not fit goes on in the lane's next row. A process owns the lanes of
its own rows.

So the whole state of a run is one pair (element, token) a lane: small, plain
integers, independent of any packing buffer, and of how many processes share
the lanes. No token is left out.

An element is a document. One of more than 8,192 characters and more than
`16 * length` (some four rows) is shared out, at line ends or spaces, in equal
pieces that are shuffled on their own: else one novel would fill a lane for
hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from typing import Any
import zlib

import numpy as np

from rrt.data import sources as sources_lib
from rrt.data.sources import Source
from rrt.errors import InputError

Batch = dict[str, np.ndarray]
_Places = dict[int, tuple[int, int]]  # lane: (element, token)
_Made = tuple[Batch, _Places]
_STATE_FORMAT = 1
_THREADS = 16
_SAMPLE = 64  # documents read to tell a source from another


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """What to train on.

  Attributes:
    sources: where the documents come from. With weights, each source gives
      that share of the text (by its size), repeated as often as needed;
      without any, all are joined and an epoch reads each document once.
    epochs: passes over the documents; None repeats for ever. The last batch
      is padded. With weights an epoch ends when one source is used up.
    shuffle: whether the order of documents is random, anew every epoch.
    separator: the token put behind every document: None for the tokenizer's
      first end-of-sequence token, -1 for none.
  """

  sources: tuple[Source, ...]
  epochs: int | None = None
  shuffle: bool = True
  separator: int | None = None

  def __post_init__(self):
    if not self.sources:
      raise InputError('data: no source is given')
    weights = [s.weight for s in self.sources]
    if any(w is None for w in weights) and any(w is not None for w in weights):
      raise InputError(f'data: give a weight to all sources or none: {weights}')
    for source in self.sources:
      if source.weight is not None and not 0 < source.weight < float('inf'):
        raise InputError(
          f'data: the weight of {source.path} is {source.weight}; it must be'
          ' positive (leave the source out instead of 0)'
        )
    if self.epochs is not None and self.epochs < 1:
      raise InputError(f'data: epochs is {self.epochs}; it must be 1 or more')


def batches(
  spec: DataSpec | Source | str | pathlib.Path,
  tokenizer: Any,
  *,
  batch: int,
  length: int,
  seed: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
) -> Batches:
  """Batches of packed documents.

  Args:
    spec: what to read; a path stands for that one source.
    tokenizer: with `encode(text)`, `vocab_size` and `eos_ids`.
    batch: rows that this process yields; the global batch is `process_count`
      times as many.
    length: L, tokens a row.
    seed: decides the order of documents.
    process_index, process_count: which rows of the global batch are ours.
    prefetch: batches made ahead by a thread; 0 makes them when asked for.

  Returns:
    An iterator of dicts of arrays [batch, L]:
      tokens: int32.
      targets: int32, the document's next token, 0 where there is none.
      segment_ids: int32, 1.. for the row's documents, 0 for padding.
      positions: int32, from 0 in each segment.
      weights: float32, 1 where `targets` counts. An element's last token has
        no target; the last token of a row does if its element goes on.

  Raises:
    InputError: unreadable or empty sources, sizes that make no sense.
  """
  if not isinstance(spec, DataSpec):
    source = spec if isinstance(spec, Source) else Source(str(spec))
    spec = DataSpec((source,))
  for name, value in (('batch', batch), ('length', length)):
    if value < 1:
      raise InputError(f'data: {name} is {value}; it must be 1 or more')
  if not 0 <= seed < 2**32:
    raise InputError(f'data: seed is {seed}; it must be in [0, 2^32)')
  if not 0 <= process_index < process_count:
    raise InputError(
      f'data: process_index is {process_index} of {process_count}'
    )
  stream = _Stream(spec, tokenizer, seed, batch * process_count, length)
  first = batch * process_index
  return Batches(stream, range(first, first + batch), length, prefetch)


class Batches(Iterator[Batch]):
  """The iterator that `batches` returns; made there only."""

  def __init__(self, stream: _Stream, lanes: range, length: int, prefetch: int):
    self._stream, self._lane_ids, self._length = stream, lanes, length
    self._prefetch = prefetch
    self._pools: list[concurrent.futures.ThreadPoolExecutor] = []
    self._places: _Places = {}
    self._start({lane: (lane, 0) for lane in lanes})

  def __next__(self) -> Batch:
    try:
      made = self._make_ahead() if self._prefetch else self._make()
    except BaseException:
      self._start(self._places)  # lanes may have stopped half way
      raise
    if made is None:
      raise StopIteration
    batch, self._places = made
    return batch

  def get_state(self) -> dict[str, Any]:
    """Where the batches handed out so far end: strings, ints and lists.

    It holds this process's lanes. To go on with another number of processes
    keep the states of all of them.
    """
    lanes = {str(lane): list(at) for lane, at in self._places.items()}
    return {
      'format': _STATE_FORMAT,
      **self._stream.identity,
      'length': self._length,
      'lanes': lanes,
    }

  def set_state(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
    """Goes on from a state, or from the states of all processes of a run.

    The number of processes may differ as long as the global batch is the same.

    Raises:
      InputError: the state belongs to other data, another tokenizer, seed,
        length or global batch, or lacks this process's rows.
    """
    states = [state] if isinstance(state, dict) else list(state)
    here = {**self._stream.identity, 'length': self._length}
    places: _Places = {}
    for one in states:
      if not isinstance(one, dict) or one.get('format') != _STATE_FORMAT:
        raise InputError(
          'data state: not one that this version of rrt has saved'
        )
      for name, value in here.items():
        if one.get(name) != value:
          raise InputError(
            f'data state: saved with {name} {one.get(name)}, but now it is '
            f'{value}; to go on exactly, give what the run began with'
          )
      for lane, (document, token) in one['lanes'].items():
        places[int(lane)] = (int(document), int(token))
    missing = [lane for lane in self._lane_ids if lane not in places]
    if missing:
      raise InputError(
        f'data state: lacks row {missing[0]} of the global batch; with'
        ' another number of processes give the states of all of them'
      )
    self._start({lane: places[lane] for lane in self._lane_ids})

  def close(self) -> None:
    """Stops the threads; the state stays readable."""
    self._start(self._places)

  def _start(self, places: _Places) -> None:
    for pool in self._pools:
      # Waits: a batch in the making must not touch the lanes made below.
      pool.shutdown(cancel_futures=True)
    self._pools = []
    self._map: Callable[..., Iterable] = map
    self._places = places
    self._ahead: list[concurrent.futures.Future] = []
    self._lanes = [_Lane(self._stream, k, *at) for k, at in places.items()]

  def _make_ahead(self) -> _Made | None:
    """What `_make` returns, from a thread that is some batches ahead."""
    if not self._pools:
      # One thread makes the batches in order; more would race for the lanes.
      # The lanes of a batch know nothing of each other, and tokenizers let
      # other threads run.
      threads = min(_THREADS, os.cpu_count() or 1, len(self._lanes))
      self._pools = [
        concurrent.futures.ThreadPoolExecutor(1, 'rrt_batch'),
        concurrent.futures.ThreadPoolExecutor(threads, 'rrt_row'),
      ]
      self._map = self._pools[1].map
    while len(self._ahead) <= self._prefetch:
      self._ahead.append(self._pools[0].submit(self._make))
    return self._ahead.pop(0).result()

  def _make(self) -> _Made | None:
    """One batch and where it ends; None when all lanes are used up."""
    rows = list(self._map(lambda lane: lane.row(self._length), self._lanes))
    if not any(row['segment_ids'].any() for row in rows):
      return None
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    places = (lane.place for lane in self._lanes)
    return batch, dict(zip(self._lane_ids, places, strict=True))


class _Lane:
  """One row of the global batch through time."""

  def __init__(self, stream: _Stream, lane: int, element: int, token: int):
    self._stream, self._lane = stream, lane
    self.place = (element, token)
    self._tokens: np.ndarray | None = None

  def row(self, length: int) -> dict[str, np.ndarray]:
    """The next row; padding from where the elements end."""
    ints = ('tokens', 'targets', 'segment_ids', 'positions')
    row: dict[str, np.ndarray] = {n: np.zeros(length, np.int32) for n in ints}
    row['weights'] = np.zeros(length, np.float32)
    element, token = self.place
    filled = segment = barren = 0
    while filled < length and element < len(self._stream):
      if self._tokens is None:
        self._tokens = self._stream[element]
      tokens = self._tokens
      size = min(len(tokens) - token, length - filled)
      if size > 0:
        segment, barren = segment + 1, 0
        here = slice(filled, filled + size)
        targets = tokens[token + 1 : token + size + 1]
        row['tokens'][here] = tokens[token : token + size]
        row['targets'][filled : filled + len(targets)] = targets
        row['weights'][filled : filled + len(targets)] = 1
        row['segment_ids'][here] = segment
        row['positions'][here] = np.arange(size)
        filled, token = filled + size, token + size
      else:
        barren += 1
        if barren > self._stream.patience:
          raise InputError('data: the tokenizer makes no token of this text')
      if token >= len(tokens):
        element, token = element + self._stream.lanes, 0
        self._tokens = None
    self.place = (element, token)
    return row


class _Stream:
  """The stream of tokenized elements, by index."""

  def __init__(
    self, spec: DataSpec, tokenizer: Any, seed: int, lanes: int, length: int
  ):
    grain = sources_lib._import('grain', 'training data', 'train')
    self.lanes = lanes
    self._tokenizer = tokenizer
    self._separator = _separator(spec, tokenizer)
    opened = [sources_lib.open_documents(s) for s in spec.sources]
    size = max(16 * length, sources_lib.CUT)
    pieces = [_Pieces(documents, size) for documents in opened]
    # Fewer elements than lanes would put the same text in several lanes.
    times = -(-lanes // sum(map(len, pieces)))
    if times > 1:
      for each in pieces:
        each.divide(times)
    self.patience = sum(map(len, pieces)) + 100
    datasets = [grain.MapDataset.source(each) for each in pieces]
    weighted = len(pieces) > 1 and spec.sources[0].weight is not None
    if not weighted:
      datasets = [grain.MapDataset.concatenate(datasets)]
    for number, dataset in enumerate(datasets):
      if spec.shuffle:
        own = zlib.crc32(f'{seed} {number}'.encode())
        dataset = dataset.shuffle(seed=own)
      datasets[number] = dataset.repeat(spec.epochs)
    self._elements = datasets[0]
    if weighted:
      # Shares of the text: elements are the rarer the longer they are.
      shares = [
        (s.weight or 0) / each.mean_size()
        for s, each in zip(spec.sources, pieces, strict=True)
      ]
      shares = [share / sum(shares) for share in shares]
      self._elements = grain.MapDataset.mix(datasets, weights=shares)
    self.identity = {
      'data': _digest(spec, opened),
      'tokenizer': _fingerprint(tokenizer, self._separator),
      'seed': seed,
      'global_batch': lanes,
    }

  def __len__(self) -> int:
    return len(self._elements)

  def __getitem__(self, index: int) -> np.ndarray:
    text, ends_document = self._elements[index]
    tokens = list(self._tokenizer.encode(text)) if text else []
    if tokens and ends_document and self._separator >= 0:
      tokens.append(self._separator)
    return np.asarray(tokens, np.int32)


class _Pieces(Sequence[tuple[str, bool]]):
  """Documents with the long ones shared out: (text, whether it ends one)."""

  def __init__(self, documents: Sequence[str], size: int):
    self._documents = documents
    sizes = getattr(documents, 'sizes', None)
    if sizes is None:  # not known without reading all of it
      sizes = np.array([min(size, len(text)) for text in _sample(documents)])
      self._counts = np.ones(len(documents), np.int64)
      self._size = float(sizes.mean()) * len(documents)
    else:
      self._counts = np.maximum(1, -(-np.asarray(sizes, np.int64) // size))
      self._size = float(np.sum(sizes))
    self._ends = np.cumsum(self._counts)

  def divide(self, times: int) -> None:
    """Makes `times` pieces of each."""
    self._counts = self._counts * times
    self._ends = np.cumsum(self._counts)

  def mean_size(self) -> float:
    return self._size / len(self)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index):
    document = int(np.searchsorted(self._ends, index, side='right'))
    text, count = self._documents[document], int(self._counts[document])
    part = index - int(self._ends[document]) + count
    start, end = _edge(text, part, count), _edge(text, part + 1, count)
    return text[start:end], part + 1 == count


def _edge(text: str, part: int, count: int) -> int:
  """Where a part starts: at its even share, or a bit behind, between words."""
  even = len(text) * part // count
  if part in (0, count):
    return even
  # Less than a share ahead, so that edges keep their order.
  limit = even + len(text) // (2 * count)
  line = text.find('\n', even, limit)
  if line >= 0:
    return line + 1
  space = text.find(' ', even, limit)
  return even if space < 0 else space


def _separator(spec: DataSpec, tokenizer: Any) -> int:
  """The token put behind a document, -1 for none."""
  if spec.separator is None:
    ids = tuple(tokenizer.eos_ids or ())
    return int(ids[0]) if ids else -1
  if spec.separator >= tokenizer.vocab_size:
    raise InputError(
      f'data: separator is {spec.separator}, beyond the vocabulary of '
      f'{tokenizer.vocab_size}'
    )
  return spec.separator


def _sample(documents: Sequence[str]) -> list[str]:
  """Documents spread evenly over a source."""
  count = min(_SAMPLE, len(documents))
  return [documents[i * len(documents) // count] for i in range(count)]


def _digest(spec: DataSpec, opened: Sequence[Sequence[str]]) -> str:
  """Names the data by content, so that it may move to another place."""
  digest = hashlib.sha256(f'{spec.epochs} {spec.shuffle}'.encode())
  for source, documents in zip(spec.sources, opened, strict=True):
    digest.update(f'\n{source.weight} {len(documents)}'.encode())
    for text in _sample(documents):
      digest.update(hashlib.sha256(text.encode('utf-8', 'replace')).digest())
  return digest.hexdigest()[:16]


def _fingerprint(tokenizer: Any, separator: int) -> str:
  name = getattr(tokenizer, 'sha256', None) or str(tokenizer.vocab_size)
  return f'{name[:16]}:{separator}'


# ------------------------------------------------------------------ evaluation


def read_tokens(
  path_or_text: str | pathlib.Path,
  tokenizer: Any,
  max_tokens: int | None = None,
  field: str = 'text',
) -> np.ndarray:
  """The first tokens of a text, its documents joined by blank lines.

  Args:
    path_or_text: a path (see `rrt.data.sources`) or the text itself; a string
      is a path if it looks like one (`sources.is_path`).
    tokenizer: with `encode(text)`.
    max_tokens: how many at most; None for all. No more files or lines are
      read than that takes.
    field: the field that holds the text.

  Returns:
    int32 [tokens], with the special tokens that the tokenizer adds by default.

  Raises:
    InputError: as `sources.stream`, or text without any token.
  """
  is_path = isinstance(path_or_text, pathlib.Path)
  if not is_path and not sources_lib.is_path(str(path_or_text)):
    texts = iter([str(path_or_text)])
  else:
    # Text files are cut for shuffling only: here they are read whole.
    texts = sources_lib.stream(path_or_text, field, whole_files=True)
  if max_tokens is not None and max_tokens < 1:
    raise InputError(f'max_tokens is {max_tokens}; it must be 1 or more')
  documents, size, goal = [], 0, 8 * (max_tokens or 0)
  for document in texts:
    documents.append(document)
    size += len(document) + 2
    while max_tokens is not None and size >= goal:
      # The tokens of a beginning are the beginning of the tokens, but for the
      # last word: hence one token more than needed.
      tokens = tokenizer.encode(_first('\n\n'.join(documents), goal))
      if len(tokens) > max_tokens:
        return np.asarray(tokens, np.int32)[:max_tokens]
      goal *= 2
  tokens = tokenizer.encode('\n\n'.join(documents))
  if not len(tokens):
    raise InputError(f'{path_or_text}: no token in this text')
  return np.asarray(tokens, np.int32)[:max_tokens]


def _first(text: str, size: int) -> str:
  """The beginning of a text up to a space behind `size` characters."""
  space = text.find(' ', size)
  return text if space < 0 else text[:space]


def rows(tokens: np.ndarray, length: int, bos: int | None = None) -> np.ndarray:
  """Cuts tokens into rows [B, length]; what is left over is dropped.

  Fewer tokens than a row make one shorter row. With `bos` each row starts
  with that token, as models do that were trained so; a row then takes
  `length - 1` tokens of the text.

  Raises:
    InputError: a length below 2, or no token.
  """
  if length < 2:
    raise InputError(f'length is {length}; a row needs 2 tokens or more')
  tokens = np.asarray(tokens, np.int32).reshape(-1)
  if bos is not None:
    length -= 1
    tokens = tokens[1:] if tokens.size and tokens[0] == bos else tokens
  if not tokens.size:
    raise InputError('no token to make a row of')
  length = min(length, len(tokens))
  count = len(tokens) // length
  tokens_BxL = tokens[: count * length].reshape(count, length)
  if bos is None:
    return tokens_BxL
  start_Bx1 = np.full((count, 1), bos, np.int32)
  return np.concatenate([start_Bx1, tokens_BxL], axis=1)
