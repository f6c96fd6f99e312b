"""uvicorn with limits on idle and unfinished connections."""

from __future__ import annotations

import asyncio
import logging
import math

from rrt.errors import InputError

try:
  import uvicorn
  from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as e:
  raise InputError(
    'Serving needs starlette and uvicorn: pip install "relaxed-recursive-transformers[serve]".'
  ) from e

# Places beside those that the application answers with 503: for /health, /metrics and
# connections kept for a next request.
_SPARE = 1024


class Connection(H11Protocol):
  """A connection that is closed if its client sends no complete request.

  uvicorn alone waits endlessly for a first request, for the rest of one, and for
  the rest of a body after the response, while each connection takes one of
  `limit_concurrency` places.

  Attributes:
    idle_seconds: time for a complete request head, from the connection or from
      the first byte after a response; also for the rest of a refused body.
  """

  idle_seconds = 30.0

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._end: asyncio.TimerHandle | None = None

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    self._look()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._look()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    self._stop()

  def _look(self) -> None:
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop()  # A request is being answered.
    elif self._end is None:
      end = self.transport.close
      self._end = self.loop.call_later(self.idle_seconds, end)

  def _stop(self) -> None:
    if self._end is not None:
      self._end.cancel()
      self._end = None


class HttpServer(uvicorn.Server):
  """Ends quietly at a second Ctrl-C, which cuts the running requests."""

  def handle_exit(self, sig, frame) -> None:
    super().handle_exit(sig, frame)
    if self.force_exit:  # It would log a traceback for each of them.
      logging.getLogger('uvicorn.error').setLevel(logging.CRITICAL + 1)


def http_server(app, requests: int, seconds: float, log_requests: bool) -> uvicorn.Server:
  """The HTTP server of an application.

  Args:
    app: the ASGI application.
    requests: concurrent requests.
    seconds: time for one response; SIGTERM waits as long for running ones.
    log_requests: whether to print a line a request.
  """
  config = uvicorn.Config(
    app,
    http=Connection,
    ws='none',
    access_log=log_requests,
    limit_concurrency=requests + _SPARE,
    log_level='info' if log_requests else 'warning',
    timeout_graceful_shutdown=math.ceil(seconds),
    h11_max_incomplete_event_size=1 << 16,
  )
  return HttpServer(config)
