"""Binds the server's socket."""

import socket

from rrt.errors import InputError


def bind(host: str, port: int, seconds: float) -> socket.socket:
  """Binds a socket to an address, without listening yet.

  Args:
    host: name or IP address.
    port: 0 takes a free one.
    seconds: TCP user timeout: a connection whose client acknowledges no data
      for so long is closed (Linux).

  Raises:
    InputError: the address is in use or not of this machine.
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
