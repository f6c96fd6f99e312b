"""Logs a run to Weights & Biases."""

from __future__ import annotations

from pathlib import Path
import secrets
from typing import Any

from rrt.errors import InputError


def require():
  """The module wandb.

  Raises:
    InputError: it is not installed.
  """
  try:
    import wandb
  except ImportError as e:
    raise InputError(
      'wandb needs its package: pip install "relaxed-recursive-transformers[wandb]", or set '
      "config.wandb=''."
    ) from e
  return wandb


class Run:
  """A run of a project; the same work directory goes on with the same run.

  wandb's own variables apply: WANDB_MODE=offline keeps the files in the work
  directory, for `wandb sync`.
  """

  def __init__(self, project: str, workdir: Path, config: dict[str, Any]):
    """Starts the run, or goes on with it.

    Raises:
      InputError: wandb is not installed, or refuses (no login, no network).
    """
    wandb = require()
    note = workdir / 'wandb_id'
    name = note.read_text().strip() if note.is_file() else secrets.token_hex(4)
    try:
      self._run = wandb.init(
        project=project, dir=str(workdir), id=name, resume='allow', config=config, name=workdir.name
      )
    except Exception as e:  # Its errors have no common class.
      reason = str(e).strip().split('\n')[0]
      raise InputError(f'config.wandb={project!r}: {reason}; WANDB_MODE=offline needs none.') from e
    note.write_text(name + '\n')

  def write(self, scalars: dict[str, float], step: int) -> None:
    """Logs the scalars of a step; a step that the run has already is dropped by wandb."""
    self._run.log(scalars, step=step)

  def close(self) -> None:
    """Ends the run and waits for what is not sent yet."""
    self._run.finish()
