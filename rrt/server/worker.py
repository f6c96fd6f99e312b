"""Runs the engine in a thread, with queues to the asynchronous handlers.

Only this thread uses the engine. Handlers submit tickets and read each ticket's
events; nothing else is shared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import dataclasses
import queue
import threading
import time
from typing import Any

from rrt.errors import InputError
from rrt.infer.detokenize import Detokenizer
from rrt.infer.engine.engine import Engine
from rrt.infer.engine.request import Request
from rrt.server.metrics import Metrics


class Busy(Exception):
  """The queue is full."""


class Failed(Exception):
  """The engine has stopped."""


@dataclasses.dataclass
class Event:
  """New output of a request.

  Attributes:
    pieces: new text by token, with the loops that the token ran; a token that
      completes no character yields no piece yet.
    first: index of the first new token in the completion.
    tokens: number of new tokens.
    finish: the finish reason; '' while the request runs.
  """

  pieces: list[tuple[str, int]]
  first: int
  tokens: int
  finish: str = ''


class Ticket:
  """A submitted request and its queue of events for the handler."""

  def __init__(self, request: Request, tokenizer, ends):
    self.request = request
    self.arrived = self.admitted = time.monotonic()
    self.first = 0.0
    self.last = 0.0
    self._pieces: list[tuple[str, int]] = []
    self._given = 0
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
    self.text = Detokenizer.of(request.params, tokenizer, request.prompt, ends, 0, self._show)
    request.detokenizer = self.text

  def _show(self, index: int, text: str) -> None:
    del index
    loops = self.request.loops
    at = min(len(self.text.tokens), len(loops)) - 1
    self._pieces.append((text, loops[at] if at >= 0 else 0))

  def news(self) -> Event:
    """The output since the last call; called by the engine's thread."""
    if self.request.finish:
      self.text.finish(len(self.request.prompt), self.request.finish)
    tokens = len(self.text.tokens)
    given = self._given
    event = Event(self._pieces, given, tokens - given, self.request.finish)
    self._pieces, self._given = [], tokens
    return event

  def put(self, event: Event | Exception) -> None:
    """Queues an event for the handler; thread-safe."""
    try:
      self._loop.call_soon_threadsafe(self._events.put_nowait, event)
    except RuntimeError:
      pass  # The handlers' loop is closed: nobody reads any more.

  async def get(self) -> Event:
    """The next event; raises Failed when the engine has stopped."""
    event = await self._events.get()
    if isinstance(event, Exception):
      raise event
    return event


class Worker:
  """Runs an engine in a thread.

  Attributes:
    engine: used by the thread alone, except for constant attributes.
    metrics: of all requests.
    failed: the error that ended the thread, or None.
  """

  def __init__(self, engine: Engine, tokenizer, max_waiting: int, name: str = ''):
    """Prepares the thread.

    Args:
      engine: for this thread alone.
      tokenizer: of its model.
      max_waiting: requests that may wait for a slot; `submit` refuses more.
      name: of the model, for the metrics.
    """
    self.engine = engine
    self.metrics = Metrics(engine.shape, name)
    self.failed: BaseException | None = None
    self._tokenizer = tokenizer
    self._most = engine.shape.slots + max_waiting
    self._tickets: dict[Request, Ticket] = {}
    self._open = 0
    self._closed = ''  # Why nothing is taken any more.
    self._lock = threading.Lock()
    self._commands: queue.Queue[tuple[str, Any]] = queue.Queue()
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def stop(self) -> None:
    """Stops the thread; running requests fail."""
    self._commands.put(('stop', None))
    if self._thread.is_alive():
      self._thread.join(timeout=30)

  def check_room(self) -> None:
    """Raises Busy or Failed where `submit` would for any request."""
    with self._lock:
      self._check_room(1)

  def check(self, requests: list[Request]) -> None:
    """Raises InputError for requests that the engine cannot run; thread-safe."""
    for request in requests:
      self.engine.check(request)

  def _check_room(self, count: int) -> None:
    if self._closed:
      raise Failed(self._closed)
    if self._open + count > self._most:
      self.metrics.refuse(count)
      raise Busy

  def submit(self, requests: list[Request]) -> list[Ticket]:
    """Queues requests, all or none.

    Raises:
      Busy: the queue is full.
      Failed: the engine has stopped.
      InputError: a request exceeds the engine's limits, or there are more than
        the queue's capacity.
    """
    if len(requests) > self._most:
      raise InputError(
        f'{len(requests)} choices are more than the {self._most} requests that this server holds.'
      )
    self.check(requests)
    tickets = [Ticket(r, self._tokenizer, tuple(self.engine.ends_of(r.params))) for r in requests]
    with self._lock:
      self._check_room(len(requests))
      self._open += len(requests)
      for ticket in tickets:
        self._commands.put(('submit', ticket))
    return tickets

  def cancel(self, ticket: Ticket) -> None:
    """Cancels a request, whose handler no longer waits."""
    self._commands.put(('cancel', ticket))

  async def stream(self, ticket: Ticket) -> AsyncIterator[Event]:
    """Yields events until the request ends; closing the iterator cancels it."""
    finished = False
    try:
      while not finished:
        event = await ticket.get()
        finished = bool(event.finish)
        yield event
    finally:
      if not finished:
        self.cancel(ticket)

  def _run(self) -> None:
    try:
      while self._obey(wait=not self.engine.busy):
        if self.engine.busy:
          waiting, began = list(self.engine.waiting), time.monotonic()
          changed = self.engine.step()
          # First, so that who has an answer finds it counted.
          for request in waiting:
            if request not in self.engine.waiting:
              self._tickets[request].admitted = began
          self.metrics.look(self.engine)
          for request in changed:
            self._tell(request)
      closed = 'the server is stopping'
    except BaseException as e:
      self.failed, closed = e, str(e) or type(e).__name__
    left = list(self._tickets.values())
    with self._lock:
      self._closed = closed
      while not self._commands.empty():
        what, ticket = self._commands.get()
        if what == 'submit':
          left.append(ticket)
    for ticket in left:
      ticket.put(Failed(closed))
    self._tickets.clear()

  def _obey(self, wait: bool) -> bool:
    """Executes queued commands; False for stop."""
    while True:
      try:
        what, ticket = self._commands.get(block=wait)
      except queue.Empty:
        return True
      wait = False
      if what == 'stop':
        return False
      if what == 'submit':
        self._tickets[ticket.request] = ticket
        self.engine.submit(ticket.request)
      elif ticket.request in self._tickets:
        self.engine.cancel(ticket.request)
        self._tell(ticket.request)

  def _tell(self, request: Request) -> None:
    ticket = self._tickets[request]
    now = time.monotonic()
    event = ticket.news()
    self.metrics.note(ticket, event, now)
    if event.finish:
      del self._tickets[request]
      with self._lock:
        self._open -= 1
    ticket.put(event)
