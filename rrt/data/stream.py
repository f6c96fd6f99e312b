"""The mixed, shuffled and repeated stream of tokenized documents, by index.

An element is a document. A document of more than 8,192 characters and more than
`16 * length` (some four rows) is split, at line ends or spaces, into equal
pieces that are shuffled separately: else one novel would fill a row of the
batch for hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any, NamedTuple
import zlib

import numpy as np

from rrt import console
from rrt.data import compressed, conversations, formats, sources
from rrt.data.sources import Source
from rrt.errors import InputError

_SAMPLE = 64  # documents read to tell a source from another
_TURN_ENDS = ('<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<end_of_turn>')


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The training data: sources, mixture and epochs.

  Attributes:
    sources: of the documents. With weights, each source supplies that share of
      the text (by size), repeated as often as needed; without weights, sources
      are concatenated and an epoch reads each document once.
    epochs: passes over the documents; None repeats them endlessly. The last
      batch is padded. With weights an epoch ends with the first source that is
      exhausted.
    shuffle: whether to shuffle the documents, differently in every epoch.
    separator: token appended to every document: None for the tokenizer's first
      end-of-document token (not end of turn), -1 for none.
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


class Element(NamedTuple):
  """A tokenized element.

  Attributes:
    tokens: int32 [T].
    counted: bool [T], the tokens that the loss counts: all of a text, the answers of a
      conversation.
  """

  tokens: np.ndarray
  counted: np.ndarray


class Stream:
  """The stream of tokenized elements, by index."""

  def __init__(
    self,
    spec: DataSpec,
    tokenizer: Any,
    seed: int,
    lanes: int,
    length: int,
    vocab_size: int | None = None,
  ):
    grain = compressed.require('grain', 'training data', 'train')
    self.lanes = lanes
    self._tokenizer = tokenizer
    self._vocab_size = vocab_size or float('inf')
    self.start_id = getattr(tokenizer, 'start_id', None)
    self._separator = _separator(spec, tokenizer)
    name = getattr(tokenizer, 'token', lambda _: None)
    self._ends = {*_TURN_ENDS, *filter(None, map(name, tokenizer.eos_ids or ()))}
    opened = [sources.open_documents(s) for s in spec.sources]
    size = max(16 * length, formats.CUT)
    pieces = [
      _Pieces(documents, size, source.format == 'chat')
      for source, documents in zip(spec.sources, opened, strict=True)
    ]
    if any(s.format == 'chat' for s in spec.sources):
      _check_template(tokenizer)
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
        (s.weight or 0) / each.mean_size() for s, each in zip(spec.sources, pieces, strict=True)
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

  def __getitem__(self, index: int) -> Element:
    text, ends_document, chat = self._elements[index]
    if chat:
      text, spans, complete = conversations.render(text, self._tokenizer.apply_chat, self._ends)
      if not complete:
        console.note(
          'data: the chat template rewrites earlier turns; the last answer of such a conversation '
          'counts alone'
        )
      tokens, counted = self._tokenizer.encode_marked(text, spans)
    else:
      tokens = list(self._tokenizer.encode(text)) if text else []
      if tokens and ends_document and self._separator >= 0:
        tokens.append(self._separator)
      counted = [True] * len(tokens)
    if tokens and max(tokens) >= self._vocab_size:
      raise InputError(
        f'data: a text has the token {max(tokens)}, outside the vocabulary of '
        f'{self._vocab_size}; take the special tokens out of it.'
      )
    return Element(np.asarray(tokens, np.int32), np.asarray(counted, bool))


def _check_template(tokenizer: Any) -> None:
  if getattr(tokenizer, 'chat_template', None) is None:
    raise InputError(
      "data: format='chat' needs a tokenizer with a chat template; this one has none."
    )


class _Pieces(Sequence[tuple[str, bool, bool]]):
  """Pieces of documents: (text, whether it ends its document, whether it is a chat).

  Conversations are not cut.
  """

  def __init__(self, documents: Sequence[str], size: int, chat: bool = False):
    self._documents, self._chat = documents, chat
    sizes = getattr(documents, 'sizes', None)
    if sizes is None:  # not known without reading all of it
      sizes = np.array([min(size, len(text)) for text in _sample(documents)])
      self._counts = np.ones(len(documents), np.int64)
      self._size = float(sizes.mean()) * len(documents)
    else:
      self._counts = np.maximum(1, -(-np.asarray(sizes, np.int64) // size))
      if chat:
        self._counts = np.ones(len(documents), np.int64)
      self._size = float(np.sum(sizes))
    self._ends = np.cumsum(self._counts)

  def divide(self, times: int) -> None:
    """Splits each document into `times` pieces."""
    if self._chat:
      raise InputError(
        f'data: {len(self._documents)} conversations are fewer than the rows of a batch; give '
        'more, or a smaller batch'
      )
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
    return text[start:end], part + 1 == count, self._chat


def _edge(text: str, part: int, count: int) -> int:
  """Start of a piece: the even split, moved forward to the next word boundary."""
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
  """The separator token, -1 for none."""
  if spec.separator is None:
    ids = tuple(tokenizer.eos_ids or ())
    # A chat model's first such token may end a turn, not a document.
    name = getattr(tokenizer, 'token', lambda _: None)
    ids = tuple(i for i in ids if name(i) not in _TURN_ENDS) or ids
    return int(ids[0]) if ids else -1
  if spec.separator >= tokenizer.vocab_size:
    raise InputError(
      f'data: separator is {spec.separator}, beyond the vocabulary of {tokenizer.vocab_size}'
    )
  return spec.separator


def _sample(documents: Sequence[str]) -> list[str]:
  """Evenly spaced documents of a source."""
  count = min(_SAMPLE, len(documents))
  return [documents[i * len(documents) // count] for i in range(count)]


def _digest(spec: DataSpec, opened: Sequence[Sequence[str]]) -> str:
  """A digest of the data's content, independent of its path."""
  digest = hashlib.sha256(f'{spec.epochs} {spec.shuffle}'.encode())
  for source, documents in zip(spec.sources, opened, strict=True):
    kind = '' if source.format == 'text' else f' {source.format}'
    digest.update(f'\n{source.weight} {len(documents)}{kind}'.encode())
    for text in _sample(documents):
      digest.update(hashlib.sha256(text.encode('utf-8', 'replace')).digest())
  return digest.hexdigest()[:16]


def _fingerprint(tokenizer: Any, separator: int) -> str:
  name = getattr(tokenizer, 'sha256', None) or str(tokenizer.vocab_size)
  return f'{name[:16]}:{separator}'
