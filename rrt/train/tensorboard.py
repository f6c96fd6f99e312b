"""Writes scalars for TensorBoard, through tensorboardX."""

from __future__ import annotations

from pathlib import Path
import time

from rrt.errors import InputError


def require():
  """The parts of tensorboardX that are used: (EventsWriter, summary, event_pb2).

  Raises:
    InputError: it is not installed.
  """
  try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
  except ImportError as e:
    raise InputError(
      'tensorboard=True needs tensorboardX: pip install '
      '"relaxed-recursive-transformers[train]", or set '
      'config.tensorboard=False.'
    ) from e
  return EventsWriter, summary, event_pb2


class Board:
  """An event file of scalars.

  tensorboardX's SummaryWriter writes in a thread and blocks for good if that fails,
  as on a full disk; this one raises OSError.
  """

  def __init__(self, directory: Path, step: int):
    """Opens a new event file; TensorBoard drops older events from `step` on.

    Raises:
      InputError: tensorboardX is not installed.
      OSError: the file cannot be written.
    """
    writer, summary, event_pb2 = require()
    self._event, self._scalar = event_pb2.Event, summary.scalar
    directory.mkdir(parents=True, exist_ok=True)
    self._file = writer(str(directory / 'events'))
    self._write(step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

  def write(self, scalars: dict[str, float], step: int) -> None:
    """Writes the scalars of a step to the disk."""
    for name, value in scalars.items():
      self._write(step, summary=self._scalar(name, value))
    self._file.flush()

  def _write(self, step: int, **fields) -> None:
    self._file.write_event(self._event(wall_time=time.time(), step=step, **fields))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()
