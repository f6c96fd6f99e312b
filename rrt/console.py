"""Terminal output of commands: tables, progress bars, the final line of JSON."""

from collections.abc import Sequence
import contextlib
import json
import math
import os
import resource
import sys
import time
from typing import Any


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
  """Prints rows under headers, numbers to the right."""
  cells = [[_cell(v) for v in row] for row in rows]
  widths = [max([len(h), *(len(row[i]) for row in cells)]) for i, h in enumerate(headers)]
  right = [
    bool(rows) and all(isinstance(r[i], (int, float)) for r in rows) for i in range(len(headers))
  ]

  def line(values):
    padded = [
      v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)
    ]
    return '  '.join(padded).rstrip()

  print(line(headers))
  print('  '.join('-' * w for w in widths))
  for row in cells:
    print(line(row))
  print(flush=True)


def _cell(value: Any) -> str:
  if isinstance(value, bool) or value is None:
    return '-' if value is None else str(value)
  if isinstance(value, int):
    return f'{value:,}'
  if isinstance(value, float):
    return f'{value:,.4f}' if abs(value) < 100 else f'{value:,.1f}'
  return str(value)


class SafeStream:
  """A standard stream that drops what cannot be written, and never raises.

  The reader of a pipe may be gone, a disk full, a terminal closed.

  Attributes:
    error: of the first failed write, or None.
  """

  def __init__(self, stream: Any):
    self._stream = stream
    self.error: OSError | ValueError | None = None

  def write(self, text: str) -> int:
    """Writes a text, or drops it."""
    self._do(lambda: self._stream.write(text))
    return len(text)

  def flush(self) -> None:
    """Flushes, or drops what is buffered."""
    self._do(self._stream.flush)

  def _do(self, act) -> None:
    if self.error is not None:
      return
    try:
      act()
    except (OSError, ValueError) as e:
      self.error = e
      # What is buffered, and what C code prints, must not fail later.
      with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def guard_streams() -> None:
  """Makes stdout and stderr of a program safe, also if they are closed."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:  # Or the next file that is opened would take its place.
      os.dup2(os.open(os.devnull, os.O_RDWR), number)
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, 'w'))
    elif not isinstance(stream, SafeStream):
      setattr(sys, name, SafeStream(stream))


def say(text: str, end: str = '\n') -> None:
  """Prints to stderr; a failure is ignored, as printing must not end work."""
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.stderr, flush=True, end=end)


_noted: set[str] = set()


def note(text: str) -> None:
  """Prints a note to stderr, the same one once."""
  if text not in _noted:
    _noted.add(text)
    say(f'note: {text}')


def finish(figures: dict[str, Any]) -> None:
  """Prints the figures as the program's last line, one JSON object."""
  print(json.dumps(_plain(figures), allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
  """Converts to JSON types; numbers that are not finite become null."""
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if value is None or isinstance(value, (bool, int, str)):
    return value
  return float(value) if math.isfinite(value) else None


def peak_memory_bytes() -> int:
  """The process's largest resident set so far, on the host, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


class Progress:
  """A progress bar on a terminal, plain lines elsewhere.

  with Progress(total=steps, label='uptrain', unit='steps') as progress:
    progress.update(1, note='loss 3.2')
  """

  def __init__(self, total: int, label: str, unit: str = 'steps'):
    self.total, self.label, self.unit = total, label, unit
    self.done, self.start, self.shown = 0, time.monotonic(), 0.0
    self.reported = -1
    # The first units may compile, and those of an earlier run took no time of
    # this one: neither counts for the rate.
    self.base: tuple[int, float] | None = None
    self.bar = sys.stderr is not None and sys.stderr.isatty()

  def __enter__(self):
    return self

  def __exit__(self, failed, *_):
    self.close(complete=failed is None)

  def close(self, complete: bool = True) -> None:
    """Shows the end; the total of complete work may have been an upper bound."""
    if complete:
      self.total = self.done
    if self.bar or self.reported != self.done:
      self._show(last=True)

  def skip(self, n: int) -> None:
    """Counts n units that were finished before."""
    self.done += n

  def update(self, n: int = 1, note: str = '') -> None:
    """Adds n finished units."""
    self.done += n
    now = time.monotonic()
    self.base = self.base or (self.done, now)
    if now - self.shown >= (0.2 if self.bar else 10.0):
      self.shown = now
      self._show(note=note)

  def to(self, done: int, total: int | None = None, note: str = '') -> None:
    """Sets the finished units and the total."""
    self.total = self.total if total is None else total
    self.update(done - self.done, note)

  def _show(self, note: str = '', last: bool = False) -> None:
    self.reported = self.done
    seconds = time.monotonic() - self.start
    done, since = self.base or (self.done, self.start)
    rate = (self.done - done) / max(time.monotonic() - since, 1e-9)
    left = _clock(max(self.total - self.done, 0) / rate) if rate else '?'
    text = f'{self.label} {self.done:,}/{self.total:,} {self.unit}, {_clock(seconds)} gone'
    if not last:
      text += f', {left} left'
    text = f'{text} {note}'.rstrip()
    if self.bar:
      full = int(24 * min(self.done / max(self.total, 1), 1.0))
      text = f'\r[{"#" * full}{"." * (24 - full)}] {text}\033[K'
    say(text, end='' if self.bar and not last else '\n')


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'
