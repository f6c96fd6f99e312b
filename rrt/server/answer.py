"""Builds OpenAI responses, whole or streamed, from the engine's output."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
import secrets
import time
from typing import Any

from rrt.data.token_bytes import token_bytes
from rrt.infer.engine.request import Request
from rrt.server.protocol import Job

FINISH = {'end': 'stop', 'stop': 'stop', 'length': 'length'}


class Answer:
  """Builds the response objects of one job."""

  def __init__(self, job: Job, model: str, tokenizer):
    self._job, self._model, self._tokenizer = job, model, tokenizer
    kind = 'chatcmpl' if job.chat else 'cmpl'
    self._id = f'{kind}-{secrets.token_hex(12)}'
    self._created = int(time.time())
    self._names: dict[int, tuple[str, bytes]] = {}

  def _shell(self, choices: list, chunk: bool) -> dict[str, Any]:
    kind = 'text_completion'
    if self._job.chat:
      kind = 'chat.completion.chunk' if chunk else 'chat.completion'
    return {
      'id': self._id,
      'object': kind,
      'created': self._created,
      'model': self._model,
      'choices': choices,
    }

  def chunk(self, index: int, event, begin: bool) -> dict[str, Any]:
    """One chunk of a streamed response."""
    text = ''.join(t for t, _ in event.pieces)
    logprobs = self._logprobs(self._job.requests[index], event.first, event.tokens)
    choice: dict[str, Any] = {'index': index, 'logprobs': logprobs}
    if self._job.chat:
      role = {'role': 'assistant'} if begin else {}
      choice['delta'] = role | ({'content': text} if text or begin else {})
    else:
      choice['text'] = text
    if self._job.pieces:
      choice['loops'] = [list(p) for p in event.pieces]
      # A piece may be the text of several tokens; this has one entry a token.
      loops = self._job.requests[index].loops[event.first :]
      choice['token_loops'] = loops[: event.tokens]
    choice['finish_reason'] = FINISH.get(event.finish)
    return self._shell([choice], chunk=True)

  def usage_chunk(self) -> dict[str, Any]:
    """The last chunk of a stream with `include_usage`."""
    return self._shell([], chunk=True) | {'usage': self._usage()}

  def whole(self, texts: Sequence[str]) -> dict[str, Any]:
    """The whole response, of requests that have finished."""
    choices = []
    for i, (request, text) in enumerate(zip(self._job.requests, texts, strict=True)):
      choice: dict[str, Any] = {'index': i}
      if self._job.chat:
        choice['message'] = {'role': 'assistant', 'content': text}
      else:
        choice['text'] = text
      choice['logprobs'] = self._logprobs(request, 0, len(request.tokens))
      choice['finish_reason'] = FINISH.get(request.finish)
      choices.append(choice)
    return self._shell(choices, chunk=False) | {'usage': self._usage()}

  def _usage(self) -> dict[str, int]:
    requests = self._job.requests
    # The choices of a prompt share it.
    prompt = sum(len(r.prompt) for r in requests[:: self._job.choices])
    completion = sum(len(r.detokenizer.tokens) for r in requests if r.detokenizer)
    return {
      'prompt_tokens': prompt,
      'completion_tokens': completion,
      'total_tokens': prompt + completion,
    }

  def _token(self, token: int) -> tuple[str, bytes]:
    r"""A token's name and its bytes.

    The name is the token's text, which joined gives the completion. A part of a
    character has OpenAI's form `bytes:\xe4\xb8`.
    """
    if token not in self._names:
      raw = token_bytes(self._tokenizer, token) or b''
      try:
        name = raw.decode()
      except UnicodeDecodeError:
        name = 'bytes:' + ''.join(f'\\x{b:02x}' for b in raw)
      self._names[token] = name, raw
    return self._names[token]

  def _logprobs(self, request: Request, first: int, count: int) -> dict[str, Any] | None:
    """The `logprobs` object of some of a request's tokens."""
    if request.params.logprobs is None or request.detokenizer is None:
      return None
    kept = request.detokenizer.tokens[first : first + count]
    rows = list(zip(kept, request.logprobs[first:], strict=False))
    # A decoder may strip the space in front of a text's first token.
    stripped = first == 0 and request.detokenizer.strips_space
    entries = [
      (self._stripped(t) if stripped and i == 0 else self._token(t), p, top)
      for i, (t, (p, top)) in enumerate(rows)
    ]
    if self._job.chat:
      one = lambda n, p: {'token': n[0], 'logprob': p, 'bytes': list(n[1])}
      return {
        'content': [
          one(n, p) | {'top_logprobs': [one(self._token(t), q) for t, q in top]}
          for n, p, top in entries
        ]
      }
    return {
      'tokens': [n[0] for n, _, _ in entries],
      'token_logprobs': [p for _, p, _ in entries],
      'top_logprobs': [self._by_name(top) for _, _, top in entries],
      'text_offset': self._offsets(request, first, len(rows)),
    }

  def _stripped(self, token: int) -> tuple[str, bytes]:
    name, raw = self._token(token)
    return name.removeprefix(' '), raw.removeprefix(b' ')

  def _by_name(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Log-probabilities by name; a name that is taken becomes `token_id:N`."""
    found: dict[str, float] = {}
    for token, logprob in top:
      name = self._token(token)[0]
      found[f'token_id:{token}' if name in found else name] = logprob
    return found

  def _offsets(self, request: Request, first: int, count: int) -> list[int]:
    """Character offset in the text of the character that each token begins in."""
    assert request.detokenizer is not None
    special = self._tokenizer.special_ids
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    offset, offsets = -int(request.detokenizer.strips_space), []
    for token in request.detokenizer.tokens[: first + count]:
      offsets.append(max(offset, 0))
      if token not in special:  # Those are not part of the text.
        offset += len(decoder.decode(self._token(token)[1]))
    return offsets[first:]
