"""The socket of the server."""

import socket

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
