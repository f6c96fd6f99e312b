"""Who may call: host names, origins, and how many at once."""

from __future__ import annotations

import dataclasses

from rrt.errors import InputError
from rrt.server.fields import Refused

try:
  from starlette.middleware.cors import CORSMiddleware
  from starlette.responses import JSONResponse
except ImportError as e:
  raise InputError(
    'Serving needs starlette and uvicorn: pip install "relaxed-recursive-transformers[serve]".'
  ) from e

_ALWAYS = ('/health', '/ping', '/metrics')  # Answered under any load.


@dataclasses.dataclass(frozen=True)
class Rules:
  """Who may call.

  Attributes:
    concurrent: requests that are answered at once; more get status 503.
    origins: of pages that may call (CORS); '*' for all.
    hosts: names in the Host header; '*' for all. A page of another site can have its own
      name lead to this machine (DNS rebinding), and would be seen as a page of ours.
    retry_after: `Retry-After` of the 503, in seconds.
  """

  concurrent: int = 1 << 30
  origins: tuple[str, ...] = ()
  hosts: tuple[str, ...] = ('*',)
  retry_after: int = 1


class Gatekeeper:
  """ASGI middleware that applies the rules."""

  def __init__(self, app, rules: Rules):
    self._rules = rules
    self._app = app
    if rules.origins:
      self._app = CORSMiddleware(
        app, allow_origins=rules.origins, allow_methods=['*'], allow_headers=['*']
      )
    self._running = 0

  async def __call__(self, scope, receive, send) -> None:
    """Answers, or refuses in the API's form."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    headers = dict(scope['headers'])
    if not self._knows(headers.get(b'host', b'').decode('latin-1')):
      refused = Refused('This host name is not allowed; see --allowed_hosts.', 403)
      await JSONResponse(refused.body(), 403)(scope, receive, send)
      return
    if self._running >= self._rules.concurrent and scope['path'] not in _ALWAYS:
      refused = Refused('Too many requests at once.', 503)
      wait = {'Retry-After': str(self._rules.retry_after)}
      await JSONResponse(refused.body(), 503, wait)(scope, receive, send)
      return
    self._running += 1
    try:
      await self._app(scope, receive, send)
    finally:
      self._running -= 1

  def _knows(self, host: str) -> bool:
    """Whether a Host header names an allowed host, with or without a port."""
    if '*' in self._rules.hosts:
      return True
    name = host[1:].partition(']')[0] if host.startswith('[') else host.partition(':')[0]
    return name.lower() in map(str.lower, self._rules.hosts)
