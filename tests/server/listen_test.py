"""The server's connections: none is held for ever by who asks nothing."""

import asyncio
import errno
import socket
import time

import pytest

pytest.importorskip('uvicorn')

from rrt.server.connection import Connection
from rrt.server.listen import bind
from tests.serving import serving

IDLE = 0.5  # Seconds.


@pytest.mark.skipif(not hasattr(socket, 'TCP_USER_TIMEOUT'), reason='needs TCP_USER_TIMEOUT')
def test_the_connection_of_a_stalled_reader_ends():
  with bind('127.0.0.1', 0, 1) as sock:
    sock.listen()
    with socket.create_connection(sock.getsockname()):
      connection, _ = sock.accept()
      with connection, pytest.raises(TimeoutError) as ended:
        connection.settimeout(30)
        connection.sendall(bytes(1 << 26))  # More than all buffers hold.
  assert ended.value.errno == errno.ETIMEDOUT  # No limit of this test's.


@pytest.fixture
def address(monkeypatch):
  """Where answers take longer than a connection may idle."""
  monkeypatch.setattr(Connection, 'idle_seconds', IDLE)

  async def slow(scope, receive, send):
    del receive
    assert scope['type'] == 'http'  # There is no lifespan.
    await asyncio.sleep(2 * IDLE)
    headers = [(b'content-length', b'4')]
    await send({'type': 'http.response.start', 'status': 413, 'headers': headers})
    await send({'type': 'http.response.body', 'body': b'done'})

  with serving(slow) as address:
    yield address


def head(size: int) -> bytes:
  return f'POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}'.encode()


@pytest.mark.parametrize('sent', [b'', head(3)])
def test_a_connection_without_a_whole_request_ends(address, sent):
  with socket.create_connection(address, timeout=30) as client:
    client.sendall(sent)
    assert client.recv(1) == b''


@pytest.mark.slow
def test_a_connection_lasts_while_requests_are_answered(address):
  with socket.create_connection(address, timeout=30) as client:
    # Half a head comes in time, and the answer later than that.
    for size in (3, 1000):
      client.sendall(head(size))
      time.sleep(IDLE / 5)
      client.sendall(b'\r\n\r\n123')
      answer = b''
      while not answer.endswith(b'done'):
        part = client.recv(1000)
        assert part
        answer += part
    # The rest of a body whose request has been refused, in small parts.
    with pytest.raises(OSError):
      for _ in range(50):
        client.sendall(b'4')
        time.sleep(IDLE / 5)
