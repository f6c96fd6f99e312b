"""The ASGI application: routes, limits, API key, streaming."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
import contextlib
import dataclasses
import functools
import hmac
import importlib.resources
from typing import Any

import rrt
from rrt.errors import InputError
from rrt.server import metrics as metrics_lib
from rrt.server import prompts, protocol
from rrt.server.answer import Answer
from rrt.server.events import Events, disconnected, late, sse
from rrt.server.fields import Fields, Refused, read_body
from rrt.server.gatekeeper import Gatekeeper, Rules
from rrt.server.worker import Busy, Event, Failed, Ticket, Worker

try:
  from starlette.applications import Starlette
  from starlette.middleware import Middleware
  from starlette.requests import ClientDisconnect, Request
  from starlette.responses import JSONResponse, PlainTextResponse, Response
  from starlette.routing import Route
except ImportError as e:
  raise InputError(
    'Serving needs starlette and uvicorn: pip install "relaxed-recursive-transformers[serve]".'
  ) from e


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of requests.

  Attributes:
    body_bytes: size of a request's body.
    body_seconds: time for receiving the body.
    max_tokens: new tokens of one completion.
    seconds: time for a response, from the request's arrival.
    retry_after: `Retry-After` of a 429, in seconds.
  """

  body_bytes: int = 1 << 20
  body_seconds: float = 30.0
  max_tokens: int = 4096
  seconds: float = 600.0
  retry_after: int = 1


class Server:
  """HTTP handlers in front of a worker."""

  def __init__(
    self,
    worker: Worker,
    tokenizer,
    name: str,
    limits: Limits,
    key: str | None = None,
    rules: Rules | None = None,
  ):
    """Handlers of one model.

    Args:
      worker: runs its engine.
      tokenizer: its tokenizer.
      name: for clients.
      limits: of requests.
      key: that clients must send; None for none.
      rules: who may call; None lets all.
    """
    self.worker, self.name, self.limits = worker, name, limits
    self._tokenizer = tokenizer
    self._key = None if key is None else key.encode()
    self._rules = rules or Rules()

  def app(self) -> Starlette:
    """The ASGI application; its lifespan starts and stops the worker."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
      del app
      self.worker.start()
      try:
        yield
      finally:
        self.worker.stop()

    routes = [
      Route('/', _page('page.html', 'text/html')),
      Route('/page.css', _page('page.css', 'text/css')),
      Route('/page.js', _page('page.js', 'text/javascript')),
      Route('/health', self._health),
      Route('/ping', self._health, methods=['GET', 'POST']),
      Route('/version', self._version),
      Route('/metrics', self._metrics),
      Route('/v1/models', self._guarded(self._models)),
      Route('/v1/models/{name:path}', self._guarded(self._models)),
      Route('/v1/completions', self._guarded(self._complete(False)), methods=['POST']),
      Route('/v1/chat/completions', self._guarded(self._complete(True)), methods=['POST']),
      Route('/tokenize', self._guarded(self._tokenize), methods=['POST']),
      Route('/detokenize', self._guarded(self._detokenize), methods=['POST']),
    ]
    keeper = Middleware(Gatekeeper, rules=self._rules)
    handlers: dict[Any, Any] = {404: _no_such_path, 405: _no_such_method}
    return Starlette(
      routes=routes, lifespan=lifespan, middleware=[keeper], exception_handlers=handlers
    )

  def _guarded(self, handler):
    """Wraps a handler: checks the API key, returns errors in OpenAI's format."""

    async def guarded(request: Request):
      try:
        self._check_key(request)
        return await handler(request)
      except Refused as e:
        headers = {'WWW-Authenticate': 'Bearer'} if e.status == 401 else None
        return JSONResponse(e.body(), e.status, headers)
      except InputError as e:
        return JSONResponse(Refused(str(e)).body(), 400)
      except Busy:
        wait = str(self.limits.retry_after)
        body = Refused('All slots and places in the queue are taken.', 429)
        return JSONResponse(body.body(), 429, {'Retry-After': wait})
      except Failed as e:
        body = Refused(f'The engine has stopped: {e}', 503)
        return JSONResponse(body.body(), 503)
      except ClientDisconnect:
        return PlainTextResponse('', 499)

    return guarded

  def _check_key(self, request: Request) -> None:
    if self._key is None:
      return
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    same = hmac.compare_digest(given.strip().encode('latin-1', 'replace'), self._key)
    if scheme.lower() != 'bearer' or not same:
      raise Refused('Give the API key as "Authorization: Bearer KEY".', 401)

  async def _health(self, request: Request):
    del request
    failed = self.worker.failed
    if failed is not None:
      return JSONResponse({'status': 'failed'}, 503)
    return JSONResponse({'status': 'ok'})

  async def _metrics(self, request: Request):
    del request
    text = self.worker.metrics.text()
    return PlainTextResponse(text, media_type=metrics_lib.CONTENT_TYPE)

  async def _version(self, request: Request):
    del request
    return JSONResponse({'version': rrt.__version__})

  async def _tokenize(self, request: Request):
    """vLLM's /tokenize: of a prompt, or of the messages of a chat."""
    f = Fields(await self._body(request))
    tokenizer = self._tokenizer
    if f.get('messages') is not None:
      ids = (await asyncio.to_thread(prompts.of_chat, f, tokenizer, None)).ids
    else:
      text = f.get('prompt')
      if not isinstance(text, str):
        raise Refused('prompt must be a text.', param='prompt')
      special = f.flag('add_special_tokens', True)
      ids = await asyncio.to_thread(tokenizer.encode, text, None if special else False)
    return JSONResponse(
      {'count': len(ids), 'max_model_len': self.worker.engine.context, 'tokens': ids}
    )

  async def _detokenize(self, request: Request):
    """vLLM's /detokenize."""
    f = Fields(await self._body(request))
    vocab = self.worker.engine.shape.config.vocab_size
    ids = f.ids('tokens', vocab, 1 << 20)
    if ids is None:
      raise Refused('tokens must be a list of token ids.', param='tokens')
    return JSONResponse({'prompt': self._tokenizer.decode(ids, skip_special=False)})

  async def _models(self, request: Request):
    shape = self.worker.engine.shape
    model = {
      'id': self.name,
      'object': 'model',
      'created': 0,
      'owned_by': 'rrt',
      'max_model_len': self.worker.engine.context,
      'loops': shape.config.loops,
      'chat': self._tokenizer.chat_template is not None,
      'gate': shape.gate,
      'lossless': shape.lossless,
      'threshold': self.worker.engine.config.threshold,
    }
    name = request.path_params.get('name')
    if name is None:
      return JSONResponse({'object': 'list', 'data': [model]})
    if name != self.name:
      raise Refused(f'This server has one model, {self.name!r}.', 404, 'model')
    return JSONResponse(model)

  def _complete(self, chat: bool):
    async def complete(request: Request):
      raw = await self._raw(request)
      self.worker.check_room()  # Before a long prompt is tokenized.
      engine = self.worker.engine
      # Tokenizing a long prompt would hold up the other handlers.
      job = await asyncio.to_thread(
        protocol.parse,
        read_body(raw),
        chat,
        name=self.name,
        tokenizer=self._tokenizer,
        context=engine.context,
        vocab=engine.shape.config.vocab_size,
        max_tokens=min(self.limits.max_tokens, engine.context),
        logprobs=engine.shape.logprobs,
      )
      self.worker.metrics.ignore(job.unknown)
      # Grammars are compiled here, not in the engine's thread.
      await asyncio.to_thread(self.worker.check, job.requests)
      tickets = self.worker.submit(job.requests)
      answer = Answer(job, self.name, self._tokenizer)
      if job.stream:
        events = self._stream(job, tickets, answer)
        leave = functools.partial(self._leave, tickets)
        return Events(events, self.limits.seconds, leave)
      return await self._wait(request, tickets, answer)

    return complete

  async def _body(self, request: Request) -> dict[str, Any]:
    return read_body(await self._raw(request))

  async def _raw(self, request: Request) -> bytes:
    """The body, of the right type."""
    # Pages of other sites cannot send this type without being asked first.
    kind = request.headers.get('content-type', '').split(';')[0].strip()
    if kind.lower() != 'application/json':
      raise Refused('Send the body as application/json.', 415)
    return await self._read_in_time(request)

  async def _read_in_time(self, request: Request) -> bytes:
    """Reads the body within `body_seconds`."""
    try:
      return await asyncio.wait_for(self._read(request), self.limits.body_seconds)
    except TimeoutError:
      raise Refused(f'The body took longer than {self.limits.body_seconds:.0f} s.', 408) from None

  async def _read(self, request: Request) -> bytes:
    """Reads the body up to `body_bytes`."""
    most = self.limits.body_bytes
    length = request.headers.get('content-length', '0')
    parts, size = [], 0
    if not length.isdigit() or int(length) > most:
      raise Refused(f'The body is longer than {most} bytes.', 413)
    async for part in request.stream():
      size += len(part)
      if size > most:
        raise Refused(f'The body is longer than {most} bytes.', 413)
      parts.append(part)
    return b''.join(parts)

  async def _wait(self, request: Request, tickets: list[Ticket], answer):
    """The whole response; a disconnected client cancels its requests."""

    async def read(ticket: Ticket) -> str:
      pieces: list[str] = []
      async for event in self.worker.stream(ticket):
        pieces += (t for t, _ in event.pieces)
      return ''.join(pieces)

    readers = [asyncio.ensure_future(read(t)) for t in tickets]
    everything = asyncio.gather(*readers)
    gone = asyncio.ensure_future(disconnected(request))
    try:
      either: set[asyncio.Future[Any]] = {everything, gone}
      done, _ = await asyncio.wait(
        either, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED
      )
      if everything in done:
        texts = everything.result()
        return JSONResponse(await asyncio.to_thread(answer.whole, texts))
      if gone in done:
        return PlainTextResponse('', 499)
      raise late(self.limits.seconds)
    finally:
      gone.cancel()
      for reader in readers:
        reader.cancel()
      await asyncio.gather(*readers, everything, gone, return_exceptions=True)

  async def _stream(
    self, job: protocol.Job, tickets: list[Ticket], answer
  ) -> AsyncGenerator[bytes, None]:
    """Streams server-sent events of all choices."""
    merged: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def read(index: int, ticket: Ticket) -> None:
      try:
        async for event in self.worker.stream(ticket):
          await merged.put((index, event))
      except Failed as e:
        await merged.put((index, e))

    readers = [asyncio.ensure_future(read(i, t)) for i, t in enumerate(tickets)]
    begun, open_ = set(), len(tickets)
    try:
      while open_:
        index, event = await merged.get()
        if isinstance(event, Exception):
          yield sse(Refused(f'The engine has stopped: {event}', 503).body())
          return
        begin = index not in begun
        begun.add(index)
        open_ -= bool(event.finish)
        yield sse(answer.chunk(index, event, begin))
      if job.usage:
        yield sse(answer.usage_chunk())
      yield b'data: [DONE]\n\n'
    finally:
      for reader in readers:
        reader.cancel()
      await asyncio.gather(*readers, return_exceptions=True)

  def _leave(self, tickets: list[Ticket]) -> None:
    for ticket in tickets:
      self.worker.cancel(ticket)


def _page(name: str, kind: str):
  """A handler for a file of the page."""

  async def page(request: Request):
    del request
    text = importlib.resources.files('rrt.server').joinpath(name).read_text(encoding='utf-8')
    return Response(text, media_type=kind, headers={'Cache-Control': 'no-cache'})

  return page


def _no_such_path(request: Request, e: Exception):
  del e
  text = f'There is no {request.url.path}; see /v1/models, /v1/completions, /v1/chat/completions.'
  return JSONResponse(Refused(text, 404).body(), 404)


def _no_such_method(request: Request, e: Exception):
  text = f'{request.url.path} does not take {request.method}.'
  headers = getattr(e, 'headers', None)
  return JSONResponse(Refused(text, 405).body(), 405, headers)
