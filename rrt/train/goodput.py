"""Where a run's time goes.

Goodput is the share of the time that training steps have; the rest is
compilation, waiting for data, evaluation, checkpoints, and steps that were lost
with a process and done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import time
from typing import Any

NAMES = ('compile', 'data', 'eval', 'save', 'lost')


class Goodput:
  """Seconds of a run by what they were spent on, earlier parts of the run included.

  Attributes:
    seconds: by `NAMES`; what is left of the time is the steps'.
  """

  def __init__(self, row: Mapping[str, Any], lost: float = 0.0):
    """Continues from the last row of metrics.

    Args:
      row: {} for a new run.
      lost: seconds of steps behind the checkpoint that the run goes on from.
    """
    self.seconds = {name: float(row.get(f'goodput/{name}_seconds', 0.0)) for name in NAMES}
    self.seconds['lost'] += lost

  @contextlib.contextmanager
  def spent(self, name: str):
    """Counts the time inside as that of one of `NAMES`."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self.seconds[name] += time.monotonic() - begin

  def compiling(self, call: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function whose first call, which compiles, counts as compilation."""
    called = False

    def counted(*args):
      nonlocal called
      if called:
        return call(*args)
      called = True
      with self.spent('compile'):
        return call(*args)

    return counted

  def row(self, wall_time: float) -> dict[str, float]:
    """Values for the metrics.

    Args:
      wall_time: seconds of the run without lost ones.
    """
    others = sum(self.seconds.values())
    total = wall_time + self.seconds['lost']
    steps = max(total - others, 0.0)
    found = {f'goodput/{name}_seconds': value for name, value in self.seconds.items()}
    return found | {
      'goodput/step_seconds': steps,
      'goodput/share': steps / total if total > 0 else 0.0,
    }
