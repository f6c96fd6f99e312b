"""Packed training batches from text, through grain, with an exact data state.

grain mixes, shuffles and repeats documents into one endless random-access
stream. Each row of the *global* batch is a lane: lane k of G reads elements
k, k + G, k + 2 G, ... and concatenates their tokens; tokens beyond the row's
length continue in the lane's next row. A process reads the lanes of its rows.

The data state is one pair (element, token) a lane. It does not depend on a
packing buffer or on the number of processes, and no token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import os
import pathlib
from typing import Any

import numpy as np

from rrt.data import sources as sources_lib
from rrt.data.sources import Source
from rrt.data.stream import DataSpec, Element, Stream
from rrt.errors import InputError

Batch = dict[str, np.ndarray]
_Places = dict[int, tuple[int, int]]  # lane: (element, token)
_Made = tuple[Batch, _Places]
_STATE_FORMAT = 1
_THREADS = 16


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
  vocab_size: int | None = None,
) -> Batches:
  """Iterates over batches of packed documents.

  Args:
    spec: the sources and their mixture; a path is a spec of one source.
    tokenizer: with `encode(text)`, `vocab_size` and `eos_ids`.
    batch: rows that this process yields; the global batch is `process_count`
      times as many.
    length: L, tokens a row.
    seed: of the order of documents.
    process_index, process_count: select the rows of the global batch that this
      process yields.
    prefetch: batches prepared ahead by a thread; 0 prepares them on demand.
    vocab_size: of the model; larger token ids are an error.

  Returns:
    An iterator of dicts of arrays [batch, L]:
      tokens: int32.
      targets: int32, the document's next token, 0 where there is none.
      segment_ids: int32, 1.. for the row's documents, 0 for padding.
      positions: int32, from 0 in each segment.
      weights: float32, 1 where `targets` counts. An element's last token has
        no target; the last token of a row does if its element goes on. Of
        conversations the answers alone count.

  Raises:
    InputError: unreadable or empty sources, or sizes out of range.
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
    raise InputError(f'data: process_index is {process_index} of {process_count}')
  lanes = batch * process_count
  stream = Stream(spec, tokenizer, seed, lanes, length, vocab_size)
  first = batch * process_index
  return Batches(stream, range(first, first + batch), length, prefetch)


class Batches(Iterator[Batch]):
  """The iterator that `batches` returns."""

  def __init__(self, stream: Stream, lanes: range, length: int, prefetch: int):
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

  def empty(self) -> Batch:
    """A batch of padding."""
    rows = [_empty_row(self._length) for _ in self._lane_ids]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def get_state(self) -> dict[str, Any]:
    """The data state behind the last batch returned: strings, ints and lists.

    It covers this process's lanes. To resume with another number of processes,
    save the states of all of them.
    """
    lanes = {str(lane): list(at) for lane, at in self._places.items()}
    return {
      'format': _STATE_FORMAT,
      **self._stream.identity,
      'length': self._length,
      'lanes': lanes,
    }

  def set_state(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
    """Resumes from a state, or from the states of all processes of a run.

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
        raise InputError('data state: not one that this version of rrt has saved')
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
    """Stops the threads; `get_state` still works."""
    self._start(self._places)

  def _start(self, places: _Places) -> None:
    for pool in self._pools:
      # Waits: a batch in the making must not touch the lanes made below.
      pool.shutdown(cancel_futures=True)
    self._pools = []
    self._map: Callable[..., Iterable] = map
    self._places = places
    self._ahead: list[concurrent.futures.Future] = []
    self._lanes = [_Lane(self._stream, *at) for at in places.values()]

  def _make_ahead(self) -> _Made | None:
    """Like `_make`, from the prefetching thread."""
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
    """One batch and the data state behind it; None when all lanes are exhausted."""
    rows = list(self._map(lambda lane: lane.row(self._length), self._lanes))
    if not any(row['segment_ids'].any() for row in rows):
      return None
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    places = (lane.place for lane in self._lanes)
    return batch, dict(zip(self._lane_ids, places, strict=True))


def _empty_row(length: int) -> dict[str, np.ndarray]:
  ints = ('tokens', 'targets', 'segment_ids', 'positions')
  row: dict[str, np.ndarray] = {n: np.zeros(length, np.int32) for n in ints}
  row['weights'] = np.zeros(length, np.float32)
  return row


class _Lane:
  """Reads the successive rows of one lane."""

  def __init__(self, stream: Stream, element: int, token: int):
    self._stream = stream
    self.place = (element, token)
    self._element: Element | None = None

  def row(self, length: int) -> dict[str, np.ndarray]:
    """The next row, padded behind the last element."""
    row = _empty_row(length)
    element, token = self.place
    filled = segment = barren = 0
    if token and length > 1 and self._stream.start_id is not None:
      # An element goes on, and begins with this token as the others do. What
      # follows it was the last target of the row before.
      row['tokens'][0], filled = self._stream.start_id, 1
    while filled < length and element < len(self._stream):
      if self._element is None:
        self._element = self._stream[element]
      tokens, counted = self._element
      size = min(len(tokens) - token, length - filled)
      if size > 0:
        segment, barren = segment + 1, 0
        begin = 0 if segment == 1 else filled
        targets = tokens[token + 1 : token + size + 1]
        row['tokens'][filled : filled + size] = tokens[token : token + size]
        row['targets'][filled : filled + len(targets)] = targets
        row['weights'][filled : filled + len(targets)] = counted[token + 1 : token + size + 1]
        filled, token = filled + size, token + size
        row['segment_ids'][begin:filled] = segment
        row['positions'][begin:filled] = np.arange(filled - begin)
      else:
        barren += 1
        if barren > self._stream.patience:
          raise InputError('data: the tokenizer makes no token of this text')
      if token >= len(tokens):
        element, token = element + self._stream.lanes, 0
        self._element = None
    self.place = (element, token)
    return row


# ------------------------------------------------------------------ evaluation


def read_tokens(
  path_or_text: str | pathlib.Path,
  tokenizer: Any,
  max_tokens: int | None = None,
  field: str = 'text',
) -> np.ndarray:
  """The first tokens of a text, with documents joined by blank lines.

  Args:
    path_or_text: a path (see `rrt.data.sources`) or the text itself; a string
      is a path if it looks like one (`sources.is_path`).
    tokenizer: with `encode(text)`.
    max_tokens: at most so many; None for all. Files are read only as far as
      needed.
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
  """The prefix of a text that ends at the first space behind `size` characters."""
  space = text.find(' ', size)
  return text if space < 0 else text[:space]


def rows(tokens: np.ndarray, length: int, bos: int | None = None) -> np.ndarray:
  """Cuts tokens into rows [B, length]; the remainder is dropped.

  Fewer tokens than `length` make one shorter row. With `bos` each row starts
  with that token and holds `length - 1` tokens of the text.

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
