"""Server-sent events: a stream with a time limit, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
import contextlib
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from rrt.server.fields import Refused

_LAST_WORD = 1.0  # Seconds to tell a client that its time is over.


class Events(StreamingResponse):
  """A stream of server-sent events with a time limit, read or not."""

  def __init__(
    self, events: AsyncGenerator[bytes, None], seconds: float, leave: Callable[[], None]
  ):
    """`leave` is called at the end, also if no event was sent."""
    super().__init__(events, media_type='text/event-stream', headers={'Cache-Control': 'no-cache'})
    self._events, self._seconds, self._leave = events, seconds, leave

  async def stream_response(self, send) -> None:
    """Sends the events; `send` itself blocks if the client stops reading."""
    try:
      async with asyncio.timeout(self._seconds):
        await super().stream_response(send)
    except TimeoutError:
      body = sse(late(self._seconds).body())
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORD):
          await send({'type': 'http.response.body', 'body': body})
    finally:
      self._leave()
      await self._events.aclose()


async def disconnected(request: Request) -> None:
  """Returns when the client has disconnected."""
  while (await request.receive())['type'] != 'http.disconnect':
    pass


def late(seconds: float) -> Refused:
  """The refusal of a request whose time is over."""
  return Refused(f'No answer within {seconds:g} s.', 504)


def sse(value: dict[str, Any]) -> bytes:
  """One server-sent event."""
  return b'data: ' + json.dumps(value).encode() + b'\n\n'
