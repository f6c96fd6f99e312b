"""Restrictions of the tokens that a request may sample: JSON, grammars, bad words.

A constraint is run on the host: it says which tokens may come next, as a bit mask, and is
told which one came. Grammars are llguidance's.

V vocabulary, W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rrt.errors import InputError

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer

# A weak model may write white space for ever where any is allowed.
_JSON: Any = {'whitespace_pattern': r'[ \n]{0,2}'}
KINDS = ('json', 'json_object', 'regex', 'choice', 'grammar')


class Constraint(Protocol):
  """What may come next."""

  def allowed(self) -> np.ndarray:
    """The tokens that may come next, as bits: uint32 [W]."""

  def accept(self, token: int) -> None:
    """Goes on with the token that came."""


def words(vocab: int) -> int:
  """W of a vocabulary."""
  return -(-vocab // 32)


class Grammar:
  """A grammar of llguidance over a model's tokens."""

  def __init__(self, tokens: Any, grammar: str, vocab: int):
    """`tokens`: of `token_table`.

    Raises:
      InputError: the grammar is not one.
    """
    import llguidance
    import llguidance.numpy

    self._fill = llguidance.numpy.fill_next_token_bitmask
    self._matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
    self._mask_1xW = np.zeros((1, words(vocab)), np.int32)
    if self._matcher.is_error():
      reason = self._matcher.get_error().strip().split('\n')[0]
      raise InputError(f'structured_outputs: {reason}')

  def allowed(self) -> np.ndarray:
    self._fill(self._matcher, self._mask_1xW, 0)
    return self._mask_1xW[0].view(np.uint32).copy()

  def accept(self, token: int) -> None:
    self._matcher.consume_token(token)


class BadWords:
  """Sequences of tokens that may not be completed."""

  def __init__(self, sequences: Sequence[Sequence[int]], vocab: int):
    self._sequences = [tuple(s) for s in sequences]
    self._vocab = vocab
    self._came: list[int] = []

  def allowed(self) -> np.ndarray:
    mask_W = np.full(words(self._vocab), 2**32 - 1, np.uint32)
    for *before, last in self._sequences:
      if not before or self._came[-len(before) :] == before:
        mask_W[last // 32] &= ~np.uint32(1 << (last % 32))
    return mask_W

  def accept(self, token: int) -> None:
    self._came.append(token)


class Both:
  """Two constraints at once."""

  def __init__(self, first: Constraint, second: Constraint):
    self._parts = first, second

  def allowed(self) -> np.ndarray:
    first, second = self._parts
    return first.allowed() & second.allowed()

  def accept(self, token: int) -> None:
    for part in self._parts:
      part.accept(token)


def token_table(tokenizer: Tokenizer, vocab: int) -> Any:
  """llguidance's view of a tokenizer; made once a model.

  Raises:
    InputError: llguidance is not installed, or cannot read the tokenizer.
  """
  try:
    import llguidance
  except ImportError as e:
    raise InputError(
      'Structured outputs need llguidance: pip install "relaxed-recursive-transformers[serve]".'
    ) from e
  try:
    return llguidance.LLTokenizer(
      tokenizer.to_json(), n_vocab=vocab, eos_token=list(tokenizer.eos_ids) or None
    )
  except Exception as e:  # It raises bare exceptions.
    reason = str(e).strip().split('\n')[0]
    raise InputError(f'Structured outputs: this tokenizer is not supported ({reason}).') from e


def grammar_of(structured: Mapping[str, Any]) -> str:
  """The grammar of one of `KINDS`, for llguidance.

  Args:
    structured: {'json': a schema or its text}, {'json_object': True}, {'regex': '...'},
      {'choice': ['a', 'b']} or {'grammar': Lark or EBNF}.

  Raises:
    InputError: none or several of these, or a value of a wrong type.
  """
  import llguidance

  make = llguidance.LLMatcher
  given = {k: v for k, v in structured.items() if v is not None and v is not False}
  if len(given) != 1 or next(iter(given)) not in KINDS:
    raise InputError(f'structured_outputs: give one of {", ".join(KINDS)}.')
  kind, value = next(iter(given.items()))
  if kind == 'json':
    if isinstance(value, str):
      try:
        value = json.loads(value)
      except ValueError as e:
        raise InputError(f'structured_outputs: json is not a JSON schema ({e}).') from e
    value = {} if value is True else value
    if not isinstance(value, dict):
      raise InputError('structured_outputs: json must be a JSON schema.')
    return make.grammar_from_json_schema(json.dumps(value), overrides=_JSON)
  if kind == 'json_object':
    return make.grammar_from_json_schema(json.dumps({'type': 'object'}), overrides=_JSON)
  if kind == 'choice':
    some = isinstance(value, (list, tuple)) and bool(value)
    if not some or not all(isinstance(v, str) and v for v in value):
      raise InputError('structured_outputs: choice must be a list of texts.')
    return make.grammar_from_regex('|'.join(map(re.escape, value)))
  if not isinstance(value, str) or not value:
    raise InputError(f'structured_outputs: {kind} must be a text.')
  return make.grammar_from_regex(value) if kind == 'regex' else make.grammar_from_lark(value)


def bad_sequences(tokenizer: Tokenizer, bad_words: Sequence[str]) -> list[list[int]]:
  """Token sequences of words, at the beginning of a text and behind a space (as vLLM's)."""
  found = []
  for word in bad_words:
    plain = tokenizer.encode(word.lstrip(), bos=False)
    spaced = tokenizer.encode(' ' + word.lstrip(), bos=False)
    found += [plain]
    if spaced and spaced != plain and len(spaced) == len(plain):
      found += [spaced]
  return [s for s in found if s]
