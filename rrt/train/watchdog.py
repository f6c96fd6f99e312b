"""Ends a run whose process hangs, and says where.

A collective that waits for a process that is gone, or a file system that does not
answer, would wait for ever. The launcher can start the run again: it resumes.
"""

from __future__ import annotations

from collections.abc import Callable
import faulthandler
import os
import sys
import threading
import time
from typing import Any

STATUS = 75  # Try again (EX_TEMPFAIL of sysexits.h).


class Watchdog:
  """Watches over the steps, evaluations and checkpoints of a run."""

  def __init__(self, seconds: float, end: Callable[[int], Any] = os._exit):
    """Watches from the first call of `at` on; 0 seconds watch nothing.

    Args:
      seconds: without a call of `at` that are too many.
      end: called with the exit status.
    """
    self._seconds, self._end = seconds, end
    self._what, self._since = '', 0.0
    self._over = threading.Event()
    self._thread: threading.Thread | None = None

  def at(self, what: str) -> None:
    """Says what the process does now, such as 'step 12'."""
    self._what, self._since = what, time.monotonic()
    if self._seconds and self._thread is None:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()

  def _watch(self) -> None:
    while not self._over.wait(min(self._seconds / 4, 5.0)):
      gone = time.monotonic() - self._since
      if gone > self._seconds:
        print(
          f'error: {self._what} has not ended after {gone:.0f} s (watchdog={self._seconds:g}); '
          'the process ends. Where each thread is:',
          file=sys.stderr,
          flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        self._end(STATUS)
        return

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._over.set()
    if self._thread:
      self._thread.join()
