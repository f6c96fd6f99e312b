"""Incremental detokenization: whole characters, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer

# Tokens of a prompt that settle how its continuation is written: whole
# characters, and what a decoder does at the beginning of a text.
_CONTEXT = 8


@dataclasses.dataclass(frozen=True)
class Completion:
  """The completion of one prompt.

  Attributes:
    text: without prompt, end token and stop string.
    tokens: sampled ids, with the end token or stop string that ended them.
    prompt_tokens: number of tokens of the prompt.
    finish_reason: 'end' (an end token), 'stop' (a stop string), 'length'
      (max_new_tokens) or 'context' (the model's context is full).
  """

  text: str
  tokens: list[int]
  prompt_tokens: int
  finish_reason: str


class Detokenizer:
  """Detokenizes one row; finds stop strings, streams text that is final.

  Attributes:
    tokens: accepted so far, none behind an end token or a stop string.
    stopped: whether a stop string was met.
  """

  def __init__(
    self,
    tokenizer: Tokenizer | None,
    prompt: Sequence[int],
    end: Sequence[int],
    stops: Sequence[str],
    index: int,
    show: Callable[[int, str], Any],
  ):
    self._end, self._stops = frozenset(end), stops
    self._index, self._show = index, show
    self._stream = _decoder(tokenizer, prompt)
    self.tokens: list[int] = []
    self._text = ''
    self._shown = 0
    self.stopped = False
    self._ended = False

  def extend(self, tokens: Sequence[int]) -> None:
    """Appends new tokens; those behind a stop string are dropped."""
    for token in tokens:
      if self.stopped or self._ended:
        break
      self.tokens.append(token)
      if token in self._end:
        self._ended = True
        self._grow(self._stream.flush())
      else:
        self._grow(self._stream.push(token))
    self._hand_out(len(self._text) - self._held())

  def finish(self, prompt_tokens: int, reason: str) -> Completion:
    """The completion; `reason` applies unless an end token or stop string was met."""
    if not (self.stopped or self._ended):
      self._grow(self._stream.flush())
    self._hand_out(len(self._text))
    if self.stopped:
      reason = 'stop'
    elif self._ended:
      reason = 'end'
    return Completion(self._text, self.tokens, prompt_tokens, reason)

  def _grow(self, new: str) -> None:
    if not new:
      return
    longest = max(map(len, self._stops), default=0)
    begin = max(len(self._text) - longest + 1, 0)
    self._text += new
    found = [self._text.find(s, begin) for s in self._stops]
    found = [at for at in found if at >= 0]
    if found:
      self._text, self.stopped = self._text[: min(found)], True

  def _held(self) -> int:
    """Length of the text's longest suffix that may begin a stop string."""
    if self.stopped or self._ended:
      return 0
    for size in range(max(map(len, self._stops), default=1) - 1, 0, -1):
      if any(s.startswith(self._text[-size:]) for s in self._stops):
        return min(size, len(self._text))
    return 0

  def _hand_out(self, end: int) -> None:
    if end > self._shown:
      self._show(self._index, self._text[self._shown : end])
      self._shown = end


class StreamDecoder:
  """Decodes text incrementally, one token at a time.

  A character may be spread over tokens and a decoder may strip a leading
  space, so the tail since the last complete text is decoded together.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, before: Sequence[int] = ()):
    """`before`: the preceding tokens, which are not returned as text."""
    self._tokenizer = tokenizer
    self._skip = skip_special
    self._ids: list[int] = [int(i) for i in before[-_CONTEXT:]]
    self._begin = 0  # First id of the context that is decoded again.
    self._shown = len(self._ids)  # Ids whose text was handed out.

  def push(self, token_id: int) -> str:
    """The text that this token completes, often ''."""
    self._ids.append(int(token_id))
    return self._take(final=False)

  def flush(self) -> str:
    """The remaining text, with an incomplete character as U+FFFD."""
    return self._take(final=True)

  def _take(self, final: bool) -> str:
    decode = functools.partial(self._tokenizer.decode, skip_special=self._skip)
    before = decode(self._ids[self._begin : self._shown])
    after = decode(self._ids[self._begin :])
    if len(after) <= len(before) or (after.endswith('\ufffd') and not final):
      return ''
    self._begin, self._shown = self._shown, len(self._ids)
    return after[len(before) :]


class _Mute:
  """A stream decoder without a tokenizer: all text is ''."""

  def push(self, token: int) -> str:
    del token
    return ''

  def flush(self) -> str:
    return ''


def _decoder(tokenizer: Tokenizer | None, prompt: Sequence[int]):
  return StreamDecoder(tokenizer, before=prompt) if tokenizer else _Mute()
