"""Builds OpenAI responses, whole or streamed, from the engine's output."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
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
    self._names: dict[int, str] = {}

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

  def _name(self, token: int) -> str:
    """A token's text."""
    if token not in self._names:
      self._names[token] = self._tokenizer.decode([token], skip_special=False)
    return self._names[token]

  def _bytes(self, token: int) -> list[int]:
    """A token's bytes, which may be part of a character."""
    if '\ufffd' not in self._name(token):
      return list(self._name(token).encode())
    return list(token_bytes(self._tokenizer, token) or b'')

  def _logprobs(self, request: Request, first: int, count: int) -> dict[str, Any] | None:
    """The `logprobs` object of some of a request's tokens."""
    if request.params.logprobs is None or request.detokenizer is None:
      return None
    name = self._name
    kept = request.detokenizer.tokens[first : first + count]
    rows = list(zip(kept, request.logprobs[first:], strict=False))
    if self._job.chat:
      one = lambda t, p: {'token': name(t), 'logprob': p, 'bytes': self._bytes(t)}
      return {
        'content': [one(t, p) | {'top_logprobs': [one(*a) for a in top]} for t, (p, top) in rows]
      }
    return {
      'tokens': [name(t) for t, _ in rows],
      'token_logprobs': [p for _, (p, _) in rows],
      'top_logprobs': [{name(t): p for t, p in top} for _, (_, top) in rows],
      'text_offset': self._offsets(request, first, len(rows)),
    }

  def _offsets(self, request: Request, first: int, count: int) -> list[int]:
    """Character offset of each token in the text."""
    tokens = request.detokenizer.tokens[: first + count] if request.detokenizer else []
    sizes = (len(self._name(t)) for t in tokens)
    return list(itertools.accumulate(sizes, initial=0))[first : first + count]
