"""Rows of calibration tokens from any text, a part of them held out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rrt.config_checks import is_whole
from rrt.errors import InputError

LEAST = 128  # Tokens that calibration needs at the very least.
HELD_OUT = 8  # One row in so many is kept for measuring, ...
HELD_OUT_TOKENS = 4096  # ... up to so many tokens.


class TooLittleText(InputError):
  """A text with too few tokens to fit anything to."""


def check_tokens(tokens: int) -> None:
  """Raises InputError unless so many tokens are enough to fit on."""
  if not is_whole(tokens, LEAST):
    raise InputError(
      f'calibration_tokens={tokens!r}: must be {LEAST} or more; a few thousand serve well.'
    )


def calibration_text(path: str | None, tokens: int, field: str = 'text') -> str:
  """Enough text for so many tokens, from a path or the installation.

  Raises:
    InputError: the path is empty or cannot be read.
  """
  if path is not None and not path.strip():
    raise InputError(f'calibration={path!r}: give the path of a text, or leave it out.')
  if path is None:
    from rrt.data import corpus  # Only here is text needed.

    return corpus.builtin_text()
  from rrt.data import sources

  documents, size = [], 0
  for document in sources.stream(path, field, whole_files=True):
    documents.append(document)
    size += len(document)
    if size > 64 * max(tokens, 1):
      break
  return '\n\n'.join(documents)


def split_rows(
  calibration: str | Sequence[int], tokenizer: Any, *, tokens: int, length: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows to fit on and rows to measure on.

  Rows of a text longer than needed are taken at even distances all over it:
  a few thousand tokens of one article say less than of many. Models that
  were trained with a begin token get it at the start of each row.

  Args:
    calibration: a text, or token ids.
    tokenizer: the parent's, or None if token ids are given.
    tokens: how many to fit on; fewer if the text has fewer.
    length: of a row; shorter if that leaves fewer than four rows.
    vocab_size: ids must lie below it.

  Returns:
    (fit_BxL, held_out_BxL), int32, both with one row at least.

  Raises:
    TooLittleText: it has fewer than `LEAST` tokens.
    InputError: unknown ids, or no tokenizer for a text.
  """
  check_tokens(tokens)
  goal = tokens + max(tokens // (HELD_OUT - 1), 1)
  if isinstance(calibration, str):
    rows_BxL = _rows_of_text(calibration, tokenizer, goal, length)
  else:
    rows_BxL = _cut(np.asarray(calibration, np.int64).reshape(-1), goal, length)
  if not 0 <= rows_BxL.min() <= rows_BxL.max() < vocab_size:
    raise InputError(
      f'The calibration tokens reach from {rows_BxL.min()} to '
      f'{rows_BxL.max()}, outside the vocabulary of {vocab_size}; use the '
      'tokenizer of the parent.'
    )
  rows_BxL = rows_BxL.astype(np.int32)
  count, row = rows_BxL.shape
  every = min(HELD_OUT, count)
  held = np.arange(every - 1, count, every)[: max(HELD_OUT_TOKENS // row, 1)]
  return np.delete(rows_BxL, held, axis=0), rows_BxL[held]


def _cut(ids: np.ndarray, goal: int, length: int) -> np.ndarray:
  """Consecutive rows of the first `goal` ids."""
  ids = ids[:goal]
  if ids.size < LEAST:
    raise TooLittleText(
      f'The calibration text has {ids.size} tokens; give {LEAST} or more, a '
      'few thousand serve well.'
    )
  length = min(length, ids.size // 4)
  return ids[: ids.size // length * length].reshape(-1, length)


def _rows_of_text(text: str, tokenizer, goal: int, length: int) -> np.ndarray:
  if tokenizer is None:
    raise InputError(
      'The parent has no tokenizer to read text with; give token ids, or '
      'leave the text out and take --init=average.'
    )
  bos = tokenizer.bos_id if getattr(tokenizer, 'add_bos', False) else None
  own = length - (bos is not None)
  count = max(goal // length, 4)
  # Two bytes a token is less than any text needs; eight is plenty for most.
  if len(text) <= 8 * goal:
    ids = np.asarray(tokenizer.encode(text, bos=False), np.int64)
    rows_BxL = _cut(ids, goal, own)
  else:
    rows = []
    for start in np.linspace(0, len(text), count, endpoint=False).astype(int):
      line = text.find('\n', start, start + len(text) // count // 4)
      start = line + 1 if start and line >= 0 else start
      ids = tokenizer.encode(text[start : start + 12 * length], bos=False)
      if len(ids) >= own:
        rows.append(ids[:own])
    if len(rows) < 2:
      return _cut(np.asarray(tokenizer.encode(text, bos=False)), goal, own)
    rows_BxL = np.asarray(rows, np.int64)
  if bos is None:
    return rows_BxL
  return np.insert(rows_BxL, 0, bos, axis=1)
