"""Incremental detokenization: whole characters, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from rrt.data.token_bytes import character_start, incomplete_tail, token_bytes

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer
  from rrt.infer.sampling import SamplingParams

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

  Special tokens are not part of the text, but stop strings may be or contain
  them: stop strings are searched in the text with special tokens written out.

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
    include_stop: bool = False,
    min_tokens: int = 0,
  ):
    """Begins a text.

    Args:
      tokenizer: None for no text.
      prompt: the tokens before.
      end: tokens that end the text.
      stops: strings that end it.
      index: of the text, for `show`.
      show: called with (index, new text).
      include_stop: whether the text keeps the stop string.
      min_tokens: stop strings count behind so many tokens.
    """
    self._include_stop, self._min_tokens = include_stop, min_tokens
    self._checked = 0  # Stop strings before count no more.
    self._end, self._stops = frozenset(end), stops
    self._index, self._show = index, show
    self._tokenizer = tokenizer
    self._stream = StreamDecoder(tokenizer, before=prompt) if tokenizer else None
    self.tokens: list[int] = []
    self._text = ''  # With special tokens.
    self._special: list[tuple[int, int]] = []  # Where they begin and end in it.
    self._shown = 0  # How far the text was streamed.
    self.stopped = False
    self._ended = False

  @classmethod
  def of(
    cls,
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    prompt: Sequence[int],
    end: Sequence[int],
    index: int,
    show: Callable[[int, str], Any],
  ) -> Detokenizer:
    """A text with the stop strings of these parameters."""
    rest = params.include_stop, params.min_tokens
    return cls(tokenizer, prompt, end, params.stop, index, show, *rest)

  def extend(self, tokens: Sequence[int]) -> None:
    """Appends new tokens; those behind a stop string are dropped."""
    for token in tokens:
      if self.stopped or self._ended:
        break
      self.tokens.append(token)
      self._ended = token in self._end
      if self._tokenizer is None or self._stream is None:
        continue
      if not self._ended:
        self._grow(self._stream.push(token))
      else:
        self._grow(self._stream.flush())
      if token in self._tokenizer.special_ids and not self.stopped:
        self._grow(self._tokenizer.token(token) or '', special=True)
      if len(self.tokens) <= self._min_tokens:
        self._checked = len(self._text)
    self._hand_out(self._held())

  @property
  def strips_space(self) -> bool:
    """Whether the decoder has stripped a space in front of the first token."""
    if self._tokenizer is None or not self.tokens:
      return False
    first = token_bytes(self._tokenizer, self.tokens[0]) or b''
    return first.startswith(b' ') and bool(self._text) and not self._text.startswith(' ')

  def finish(self, prompt_tokens: int, reason: str) -> Completion:
    """The completion; `reason` applies unless an end token or stop string was met."""
    if self._stream is not None and not (self.stopped or self._ended):
      self._grow(self._stream.flush())
    self._hand_out(len(self._text))
    if self.stopped:
      reason = 'stop'
    elif self._ended:
      reason = 'end'
    return Completion(self._visible(0, len(self._text)), self.tokens, prompt_tokens, reason)

  def _grow(self, new: str, special: bool = False) -> None:
    if not new:
      return
    longest = max(map(len, self._stops), default=0)
    begin = max(len(self._text) - longest + 1, 0)
    if special:
      self._special.append((len(self._text), len(self._text) + len(new)))
    self._text += new
    if len(self.tokens) <= self._min_tokens:
      return
    begin = max(begin, self._checked)
    found = [(at, s) for s in self._stops if (at := self._find(s, begin)) >= 0]
    # An end token ends the row by itself; a stop string that it completes may
    # begin earlier.
    at, stop = min(found, default=(-1, ''))
    if found and not (self._ended and special and at >= len(self._text) - len(new)):
      at += len(stop) if self._include_stop else 0
      self._text, self.stopped = self._text[:at], True
      self._special = [s for s in self._special if s[1] <= len(self._text)]

  def _find(self, stop: str, begin: int) -> int:
    """Where a stop string begins, -1 if nowhere; it contains no part of a special token."""
    at = self._text.find(stop, begin)
    while at >= 0 and any((a < at < b) or (a < at + len(stop) < b) for a, b in self._special):
      at = self._text.find(stop, at + 1)
    return at

  def _visible(self, begin: int, end: int) -> str:
    """The text from `begin` to `end` without special tokens."""
    parts = []
    for a, b in self._special:
      if b > begin and a < end:
        parts.append(self._text[begin:a])
        begin = b
    return ''.join(parts) + self._text[begin:end]

  def _held(self) -> int:
    """Where the longest suffix that may begin a stop string begins."""
    end = len(self._text)
    if self.stopped or self._ended:
      return end
    for size in range(min(max(map(len, self._stops), default=1) - 1, end), 0, -1):
      if any(s.startswith(self._text[-size:]) for s in self._stops):
        return end - size
    return end

  def _hand_out(self, end: int) -> None:
    if end > self._shown:
      text = self._visible(self._shown, end)
      self._shown = end
      if text:
        self._show(self._index, text)


class StreamDecoder:
  """Decodes text incrementally, one token at a time.

  A character may be spread over tokens and a decoder may strip a leading space,
  so the tokens since the last complete text are decoded together. The window
  begins at a character's first byte.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, before: Sequence[int] = ()):
    """`before`: the preceding tokens, which are not returned as text."""
    self._tokenizer = tokenizer
    self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
    before = [int(i) for i in before]
    start = max(len(before) - _CONTEXT, 0)
    if start:
      start = character_start(tokenizer, before, start)
    self._ids = before[start:]
    # A character that the prompt leaves incomplete belongs to the completion.
    complete, text = incomplete_tail(tokenizer, self._ids)
    self._known = len(self._decode(self._ids[:complete])) + len(text)
    self._returned = len(self._ids)  # Tokens whose text was returned.

  def push(self, token_id: int) -> str:
    """The text that this token completes, often ''."""
    self._ids.append(int(token_id))
    return self._take(final=False)

  def flush(self) -> str:
    """The remaining text, with an incomplete character as U+FFFD."""
    return self._take(final=True)

  def _take(self, final: bool) -> str:
    if self._returned == len(self._ids):
      return ''
    text = self._decode(self._ids)
    new = text[self._known :]
    if not new or (new.endswith('\ufffd') and not final):
      return ''
    # The tokens of this call are the context of the next one.
    del self._ids[: character_start(self._tokenizer, self._ids, self._returned)]
    self._returned = len(self._ids)
    self._known = len(self._decode(self._ids))
    return new
