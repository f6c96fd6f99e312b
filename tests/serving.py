"""Serves an application as `rrt serve` does, in a thread."""

import contextlib
import threading

from rrt.server.connection import http_server
from rrt.server.listen import bind


@contextlib.contextmanager
def serving(app):
  """The host and port of a server that ends with the block."""
  server = http_server(app, requests=8, seconds=5, log_requests=False)
  with bind('127.0.0.1', 0, 60) as sock:
    sock.listen()  # Clients wait from here on until it answers.
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
      yield sock.getsockname()
    finally:
      server.should_exit = True
      thread.join()
