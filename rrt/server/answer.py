"""Builds OpenAI responses, whole or streamed, from the engine's output."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
import secrets
import time
from typing import Any

from rrt.data.token_bytes import token_bytes
from rrt.infer.engine.request import Request
from rrt.server import tools
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
    self._held: dict[int, str] = {}  # Texts of streams with tools.

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
    request, tokens = self._job.requests[index], event.tokens
    if not self._job.max_tokens:
      text, tokens = '', 0
    logprobs = self._logprobs(request, event.first, tokens)
    finish = FINISH.get(event.finish)
    choice: dict[str, Any] = {'index': index}
    if self._job.chat:
      delta: dict[str, Any] = {'role': 'assistant'} if begin else {}
      if self._job.tools.form:
        # Whether it is a call is known at its end.
        self._held[index] = self._held.get(index, '') + text
        if event.finish:
          content, calls = self._calls(request, self._held[index])
          delta |= {'content': content} if content else {}
          if calls:
            delta['tool_calls'] = [{'index': i, **call} for i, call in enumerate(calls)]
            finish = 'tool_calls'
      elif text or begin:
        delta['content'] = text
      choice['delta'] = delta
    else:
      echoed = begin and self._job.echo
      choice['text'] = (self._job.prompts[index].text if echoed else '') + text
      if echoed:
        logprobs = self._with_prompt(index, logprobs)
    choice['logprobs'] = logprobs
    if self._job.pieces:
      choice['loops'] = [list(p) for p in event.pieces]
      # A piece may be the text of several tokens; this has one entry a token.
      choice['token_loops'] = request.loops[event.first :][:tokens]
    choice['finish_reason'] = finish
    return self._shell([choice], chunk=True)

  def usage_chunk(self) -> dict[str, Any]:
    """The last chunk of a stream with `include_usage`."""
    return self._shell([], chunk=True) | {'usage': self._usage()}

  def whole(self, texts: Sequence[str]) -> dict[str, Any]:
    """The whole response, of requests that have finished."""
    choices = []
    for i, (request, text) in enumerate(zip(self._job.requests, texts, strict=True)):
      choice: dict[str, Any] = {'index': i}
      finish = FINISH.get(request.finish)
      tokens = len(request.tokens) if self._job.max_tokens else 0
      logprobs = self._logprobs(request, 0, tokens)
      if self._job.chat:
        content, calls = self._calls(request, text)
        choice['message'] = {'role': 'assistant', 'content': content}
        if calls:
          choice['message']['tool_calls'] = calls
          finish = 'tool_calls'
      else:
        text = text if self._job.max_tokens else ''
        choice['text'] = (self._job.prompts[i].text if self._job.echo else '') + text
        if self._job.echo:
          logprobs = self._with_prompt(i, logprobs)
      choice['logprobs'] = logprobs
      choice['finish_reason'] = finish
      choices.append(choice)
    return self._shell(choices, chunk=False) | {'usage': self._usage()}

  def _calls(self, request: Request, text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """(content, calls) of a chat's answer."""
    if not self._job.tools.form:
      return text, []
    # The marks of calls may be special tokens, which the text lacks.
    tokens = request.detokenizer.tokens if request.detokenizer else []
    ends = frozenset(self._tokenizer.eos_ids)
    kept = [t for t in tokens if t not in ends]
    content, calls = tools.parse(self._job.tools, self._tokenizer.decode(kept, skip_special=False))
    return (content, calls) if calls else (text, [])

  def _with_prompt(self, index: int, logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Log-probabilities of a completion behind those of its prompt."""
    request = self._job.requests[index]
    if logprobs is None or request.prompt_scores is None:
      return logprobs
    names = [self._token(t) for t in request.prompt]
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    offset, offsets = 0, []
    for _, raw in names:
      offsets.append(offset)
      offset += len(decoder.decode(raw))
    end = len(self._job.prompts[index].text)
    own = [None, *(p for p, _ in request.prompt_scores)]
    top = [None, *(self._by_name(t) for _, t in request.prompt_scores)]
    return {
      'tokens': [name for name, _ in names] + logprobs['tokens'],
      'token_logprobs': own + logprobs['token_logprobs'],
      'top_logprobs': top + logprobs['top_logprobs'],
      'text_offset': offsets + [end + o for o in logprobs['text_offset']],
    }

  def _usage(self) -> dict[str, int]:
    requests = self._job.requests
    # The choices of a prompt share it.
    prompt = sum(len(r.prompt) for r in requests[:: self._job.choices])
    completion = sum(len(r.detokenizer.tokens) for r in requests if r.detokenizer)
    completion *= bool(self._job.max_tokens)
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
