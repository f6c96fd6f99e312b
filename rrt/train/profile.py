"""A window of steps under jax's profiler, for TensorBoard and Perfetto."""

from __future__ import annotations

from pathlib import Path
import re

import jax

from rrt.errors import InputError


def parse(window: str) -> tuple[int, int]:
  """(first, last) step of '10:15'; (0, 0) of ''.

  Raises:
    InputError: it is no such window.
  """
  if not window:
    return 0, 0
  match = re.fullmatch(r'(\d+):(\d+)', window)
  if match is None or not 1 <= int(match[1]) <= int(match[2]):
    raise InputError(f'profile={window!r}: give the first and the last step, as in 10:15.')
  return int(match[1]), int(match[2])


class Profile:
  """Traces the steps of a window into `directory`/profile."""

  def __init__(self, window: str, directory: Path | None):
    self._first, self._last = parse(window)
    self._directory, self._on = directory, False

  def before(self, step: int) -> None:
    """Call it before a step is begun; the step before it may still be running."""
    if self._on and step > self._last + 1:
      self._stop()
    elif not self._on and self._directory and self._first <= step <= self._last:
      jax.profiler.start_trace(self._directory / 'profile')
      self._on = True

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._on = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._on:
      self._stop()
