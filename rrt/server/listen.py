"""The server's socket, and the connections that it takes."""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from rrt.errors import InputError


def bind(host: str, port: int, seconds: float) -> socket.socket:
  """A socket at an address, which does not listen yet.

  Args:
    host: its name or number.
    port: 0 takes a free one.
    seconds: until a connection ends whose client reads nothing of what waits
      for it, where the system can do that.

  Raises:
    InputError: the address cannot be had.
  """
  sock = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
  sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  if hasattr(socket, 'TCP_USER_TIMEOUT'):
    option = socket.TCP_USER_TIMEOUT
    sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))
  try:
    sock.bind((host, port))
  except (OSError, UnicodeError) as e:
    sock.close()
    raise InputError(f'--host={host} --port={port}: not free ({e}).') from e
  return sock


class Connection(H11Protocol):
  """One that ends where no request comes in time.

  uvicorn waits for ever for the first request of a connection, for the rest of
  half a request and for what is left of one that it has refused, and each
  connection takes one of `limit_concurrency` places.

  Attributes:
    idle_seconds: from the connection, or from the first byte while no request
      is being answered, to the end of a request's headers.
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
