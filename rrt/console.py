"""Terminal output of commands: tables, progress bars, the final line of JSON."""

from collections.abc import Sequence
import contextlib
import datetime
import io
import json
import math
import os
import resource
import sys
import time
from typing import Any


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
  """Prints rows under headers on stdout, numbers to the right."""
  from rich import box
  from rich.table import Table

  drawn = Table(*headers, box=box.SIMPLE_HEAD if any(headers) else None)
  for i, column in enumerate(drawn.columns):
    numbers = bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
    column.justify = 'right' if numbers else 'left'
    column.overflow = 'fold'
  for row in rows:
    drawn.add_row(*map(_cell, row))
  _terminal(sys.stdout).print(drawn)


def _terminal(stream: Any):
  """Rich's view of a stream; what is no terminal takes lines of any width."""
  from rich.console import Console

  # Rich takes a command's environment (COLUMNS, NO_COLOR, FORCE_COLOR) into account.
  width = None if stream is not None and stream.isatty() else 10_000
  return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


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
  """Progress on stderr: a bar on a terminal, one line in a notebook, lines elsewhere.

  with Progress(total=steps, label='uptrain', unit='steps') as progress:
    progress.update(1, note='loss 3.2')

  The time left is that of the units of this run; the first of them may compile and is
  not counted.
  """

  def __init__(self, total: int, label: str, unit: str = 'steps'):
    """A total of 0 is not known yet: nothing is shown before the first unit."""
    from rich import progress as bars

    self.label, self.unit = label, unit
    self._shown, self._reported = 0.0, -1
    self._bar = sys.stderr is not None and sys.stderr.isatty()
    # A notebook's output writes over a line that begins with a carriage return.
    self._notebook = type(sys.stderr).__module__.startswith('ipykernel')
    text = lambda form: bars.TextColumn(form, markup=False)
    self._bars = bars.Progress(
      text('{task.description}'),
      bars.BarColumn(),
      text('{task.fields[count]}'),
      bars.TimeElapsedColumn(),
      bars.TimeRemainingColumn(),
      text('{task.fields[note]}'),
      console=_terminal(SafeStream(sys.stderr or io.StringIO())),
      disable=not self._bar,
      get_time=lambda: time.monotonic(),
      speed_estimate_period=3600.0,
    )
    self._bars.add_task(label, total=total or None, count='', note='')
    self._task = self._bars.tasks[0]

  @property
  def done(self) -> int:
    """Units that are finished."""
    return int(self._task.completed)

  @property
  def total(self) -> int:
    """Units in all."""
    return int(self._task.total or 0)

  @total.setter
  def total(self, total: int) -> None:
    self._task.total = total or None

  def __enter__(self):
    if self.total:
      self._task.fields['count'] = self._count()
      self._bars.start()
    return self

  def __exit__(self, failed, *_):
    self.close(complete=failed is None)

  def close(self, complete: bool = True) -> None:
    """Shows the end; the total of complete work may have been an upper bound."""
    if complete:
      self.total = self.done
      self._task.fields['count'] = self._count()
    self._bars.stop()
    if not self._bar and self.done and self._reported != self.done:
      self._say(last=True)

  def skip(self, n: int) -> None:
    """Counts n units that were finished before."""
    self._task.completed += n

  def update(self, n: int = 1, note: str = '') -> None:
    """Adds n finished units."""
    self._bars.start()
    self._bars.update(self._task.id, advance=n, note=note)
    self._task.fields['count'] = self._count()
    now = time.monotonic()
    if not self._bar and now - self._shown >= (1.0 if self._notebook else 10.0):
      self._shown = now
      self._say(note)

  def to(self, done: int, total: int | None = None, note: str = '') -> None:
    """Sets the finished units and the total."""
    self.total = self.total if total is None else total
    self.update(done - self.done, note)

  def _count(self) -> str:
    return f'{self.done:,}/{self.total:,} {self.unit}'

  def _say(self, note: str = '', last: bool = False) -> None:
    self._reported = self.done
    clock = lambda seconds: str(datetime.timedelta(seconds=int(seconds)))
    left = self._task.time_remaining
    text = f'{self.label} {self._count()}, {clock(self._task.elapsed or 0)} gone'
    if not last:
      text += f', {"?" if left is None else clock(left)} left'
    text = f'{text} {note}'.rstrip()
    if self._notebook:
      say(f'\r{text:<79}', end='\n' if last else '')
    else:
      say(text)
