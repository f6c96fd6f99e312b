"""Maps tokens to bytes; a token may hold a part of a UTF-8 character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer

# How vocabularies over bytes write each: by itself where it prints, else by
# the letters from U+0100 on (GPT-2's table).
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (b for b in range(256) if b not in _PLAIN)
_BYTES = {chr(b): b for b in _PLAIN}
_BYTES |= {chr(256 + i): b for i, b in enumerate(_OTHERS)}


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes | None:
  """A token's bytes; None for an id outside the vocabulary.

  Byte-level vocabularies write each byte as one character; SentencePiece ones
  write a lone byte as `<0x0A>`. Added tokens stand for the bytes of their names.
  """
  written = tokenizer.token(token_id)
  if written is None:
    return None
  if tokenizer.byte_level:
    if token_id in tokenizer.added_ids or any(c not in _BYTES for c in written):
      return written.encode()
    return bytes(_BYTES[c] for c in written)
  if re.fullmatch('<0x[0-9A-F]{2}>', written):
    return bytes([int(written[3:5], 16)])
  return written.replace('\u2581', ' ').encode()


def is_continuation(tokenizer: Tokenizer, token_id: int) -> bool:
  """Whether a token begins inside a character: with a UTF-8 continuation byte."""
  first = (token_bytes(tokenizer, token_id) or b'')[:1]
  return bool(first) and first[0] & 0xC0 == 0x80


def character_start(tokenizer: Tokenizer, ids: Sequence[int], index: int) -> int:
  """The largest start <= index at which a token begins with a character's first byte.

  Decoding from inside a character turns it into U+FFFD, and with byte fallback
  (SentencePiece) the whole run of byte tokens that it belongs to.
  """
  while index > 0 and is_continuation(tokenizer, ids[index]):
    index -= 1
  return index


def incomplete_tail(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, str]:
  """Splits off an incomplete character at the end of a sequence.

  Returns:
    (start, text): the tokens from `start` on end inside a character, and hold the
    complete characters `text` before it; (len(ids), '') if the last is complete.
  """
  if not ids:
    return 0, ''
  start = character_start(tokenizer, ids, len(ids) - 1)
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  tail = b''.join(token_bytes(tokenizer, i) or b'' for i in ids[start:])
  text = decoder.decode(tail)
  return (start, text) if decoder.getstate()[0] else (len(ids), '')
