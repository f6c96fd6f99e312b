"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases, throughput and MFU.

`metrics.jsonl` holds one object a logged step. A resumed run drops the lines
after the checkpoint it starts from, so that the file is that of one
uninterrupted run. Names, the same everywhere:

* `train/loss`, `train/cross_entropy`, `train/distillation` (nats a token),
  `train/learning_rate`, `train/grad_norm` and others of the step;
* `eval/cross_entropy`: nats a token of the held-out text;
* `goodput/share`: of the time so far, how much the steps had; `goodput/compile_seconds`,
  `data`, `eval`, `save`, `lost` and `step` (`rrt.train.goodput`);
* `throughput/tokens_per_second`, `throughput/mfu`, `throughput/total_tokens` (so far,
  padding included), `throughput/wall_time` (seconds, earlier parts of the run included);
* `memory/peak_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import math
import os
from pathlib import Path
import re
import shutil
import subprocess
import time
from typing import Any

import jax
import numpy as np

from rrt import console
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.models.count import linears
from rrt.relax.trees import count_all
from rrt.relax.trees import norms as norms_of
from rrt.train import optim, wandb
from rrt.train.goodput import Goodput
from rrt.train.recipe import Recipe
from rrt.train.tensorboard import Board

# Dense bf16 FLOP/s of one device, from the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'TPU7x': 2307e12,
  'NVIDIA V100': 125e12,
  'NVIDIA L4': 121e12,
  'NVIDIA L40': 181e12,
  'NVIDIA L40S': 362e12,
  'NVIDIA A10': 125e12,
  'NVIDIA A10G': 70e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H100 NVL': 835e12,
  'NVIDIA H200': 989e12,
  'NVIDIA GH200': 989e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA GB200': 2500e12,
}


def forward_flops(config: ModelConfig, length: int) -> float:
  """Floating-point operations a token of a forward pass, head included.

  Multiply and add count as two. Attention counts the keys that are visible
  (causal, windowed), averaged over a sequence of `length` tokens; norms,
  activations and softmaxes are left out.
  """
  c = config
  matmuls = c.depth * linears(c) + count_all(c) + c.d_model * c.vocab_size
  keys = 0.0
  for depth in range(c.depth):
    window = (c.windows[depth] if c.windows else 0) or length
    w = min(window, length)
    keys += (w * (w + 1) / 2 + (length - w) * w) / length
  return 2.0 * matmuls + 4.0 * c.num_heads * c.head_dim * keys


def step_flops(config: ModelConfig, teacher: ModelConfig | None, tokens: int, length: int) -> float:
  """Model FLOPs of a train step: 3 forward passes, and one of the teacher.

  Recomputation by rematerialisation is not counted; savings of frozen parameters
  are not subtracted.
  """
  flops = 3.0 * forward_flops(config, length)
  if teacher is not None:
    flops += forward_flops(teacher, length)
  return flops * tokens


def peak_flops() -> float | None:
  """Peak FLOP/s of all devices; None for unknown kinds (CPUs)."""
  one = peak_of(jax.devices()[0].device_kind)
  return None if one is None else one * jax.device_count()


def peak_of(kind: str) -> float | None:
  """Peak FLOP/s of one device, by whole words of its name (L40S is not L4)."""
  names = [n for n in PEAK_FLOPS if re.search(rf'\b{n}\b', kind, re.I)]
  return PEAK_FLOPS[max(names, key=len)] if names else None


def memory_bytes() -> int:
  """Peak memory so far of the first device, or of the host."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use') or console.peak_memory_bytes()


# Frobenius norms of what each kind of relaxation adds, by loop.
relaxation_norms = jax.jit(norms_of, static_argnums=0)


def revision(directory: Path) -> str:
  """The git revision of a directory, with '+' if it has changes, or ''."""
  ask = lambda *args: subprocess.run(
    ['git', '-C', str(directory), *args], capture_output=True, text=True, timeout=10, check=True
  ).stdout.strip()
  try:
    edited = ask('status', '--porcelain', '--untracked-files=no')
    return ask('rev-parse', 'HEAD') + ('+' if edited else '')
  except (OSError, subprocess.SubprocessError):
    return ''


class Writer:
  """Appends rows to `metrics.jsonl` and, if wanted, to TensorBoard and wandb.

  Attributes:
    path: of the file.
    rows: those of the run so far.
    lost: seconds of the steps whose rows were dropped.
  """

  def __init__(self, directory: Path, step: int, recipe: Recipe):
    """Keeps the rows up to `step` and drops later ones.

    Only process 0 writes. A file with damaged lines is copied first.
    """
    self.path = Path(directory) / 'metrics.jsonl'
    rows, damaged = _parse(self.path)
    self.rows = [r for r in rows if r['step'] <= step and step]
    self.lost = _seconds(rows) - _seconds(self.rows)
    self._file: Any = None
    self._board: Any = None
    self._wandb: Any = None
    if jax.process_index():
      return
    if damaged:
      copy = self.path.with_name(self.path.name + '.damaged')
      shutil.copyfile(self.path, copy)
      console.say(
        f'{self.path}: lines {damaged} are damaged and left out from now on; '
        f'{copy.name} is the file as it was'
      )
    rest = self.path.with_suffix('.tmp')
    rest.write_text(''.join(json.dumps(r) + '\n' for r in self.rows))
    os.replace(rest, self.path)
    # The buffer keeps rows while the disk is full.
    self._file = self.path.open('a', buffering=1 << 20)
    if recipe.tensorboard:
      self._attempt(lambda: self._open_board(step + 1))
    if recipe.wandb:
      self._wandb = wandb.Run(recipe.wandb, self.path.parent, recipe.to_dict())

  def _open_board(self, step: int) -> None:
    self._board = Board(self.path.parent / 'tensorboard', step)

  def write(self, row: dict[str, Any]) -> None:
    """Appends a row, which has the key 'step'; None values are dropped."""
    row = {k: v for k, v in row.items() if v is not None}
    self.rows.append(row)
    if self._file:
      self._file.write(json.dumps(_plain(row)) + '\n')
      self._attempt(self._file.flush)
    numbers = {k: v for k, v in row.items() if k != 'step' and isinstance(v, (int, float))}
    if self._wandb:
      self._wandb.write(numbers, row['step'])
    if self._board:
      if not self._attempt(lambda: self._board.write(numbers, row['step'])):
        self._board = None  # Its file may end in half an event.

  def close(self) -> None:
    """Flushes and closes the files."""
    for f in (self._file, self._board, self._wandb):
      if f:
        self._attempt(f.close)

  def _attempt(self, write: Callable[[], Any]) -> bool:
    """Writes; a failure is noted and does not end the run."""
    try:
      write()
    except OSError as e:
      where = self.path.parent
      console.note(f'{where}: metrics cannot be written ({e.strerror or e}); the run goes on')
      return False
    return True


def read(path: Path) -> list[dict[str, Any]]:
  """The rows of a metrics file, without damaged lines."""
  return _parse(path)[0]


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
  """(the rows, the numbers of damaged lines) of a file that may not exist.

  A truncated last line is ignored: the run was killed while writing it.
  """
  rows, damaged = [], []
  text = path.read_text(errors='replace') if path.exists() else ''
  lines = text.split('\n')
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      row['step'] + 0  # A number, or the line is not one that this wrote.
      rows.append(row)
    except (ValueError, KeyError, TypeError):
      if number < len(lines):
        damaged.append(number)
  return rows, damaged


def _plain(row: dict[str, Any]) -> dict[str, Any]:
  """JSON has no NaN: such a value is written as its name."""
  return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _seconds(rows: list[dict[str, Any]]) -> float:
  """How long a run with these rows had taken."""
  return next((r['throughput/wall_time'] for r in rows[::-1] if 'throughput/wall_time' in r), 0.0)


class Log:
  """Turns a step's metrics into a row, one step late; watches for NaNs.

  Attributes:
    rows: of the run so far.
    time: where its time went.
  """

  def __init__(self, recipe: Recipe, spec, workdir, start: int, on_row):
    self._recipe, self._spec, self._on_row = recipe, spec, on_row
    self._schedule = optim.schedule(recipe.optimizer, recipe.steps)
    self._flops = step_flops(
      spec.config, spec.teacher_config, recipe.batch * recipe.length, recipe.length
    )
    self._pending: tuple[int, Any, Any] | None = None
    self._clock: tuple[int, float] | None = None
    self._last_heldout: float | None = None
    self._writer = None
    self.rows: list[dict[str, Any]] = []
    if workdir is not None:
      self._writer = Writer(workdir, start, recipe)
      self.rows = self._writer.rows
    self._begin = time.monotonic() - _seconds(self.rows)
    lost = self._writer.lost if self._writer else 0.0
    self.time = Goodput(self.rows[-1] if self.rows else {}, lost)
    self._progress = console.Progress(recipe.steps, 'uptrain', 'steps')
    self._progress.skip(start)

  def __enter__(self):
    self._progress.__enter__()
    return self

  def __exit__(self, *_):
    # A run that was stopped has not reached its total.
    self._progress.close(complete=self._progress.done >= self._progress.total)
    if self._writer:
      self._writer.close()

  def expect(self, steps: int) -> None:
    """Sets how many steps the run will have."""
    self._progress.total = steps

  def say(self, text: str) -> None:
    """A line for the user, from one process."""
    if jax.process_index() == 0:
      console.say(text)

  def heldout(self, step: int, nats: float) -> None:
    """Files a measurement; the row of its step carries it."""
    self.flush()
    self._last_heldout = nats
    row = {'step': step, 'eval/cross_entropy': nats, **self._so_far(step)}
    self._write(row)
    self._clock = None  # Its seconds are not the step's.

  def step(self, step: int, metrics, params) -> None:
    """Takes the metrics of a step that may still be running."""
    norms = None
    if step % self._recipe.log_every == 0 and self._spec.config.relax:
      norms = relaxation_norms(self._spec.config, params)
    self.flush()
    self._pending = (step, metrics, norms)

  def flush(self) -> None:
    """Waits for the pending step and writes its row.

    Raises:
      InputError: too many steps in a row were not finite.
    """
    if self._pending is None:
      return
    (step, metrics, norms), self._pending = self._pending, None
    values = {k: v.item() for k, v in jax.device_get(metrics).items()}
    now = time.monotonic()
    measured = self._last_heldout
    shown = f'text {values["cross_entropy"]:.3f}'
    self._progress.update(1, shown if measured is None else f'held-out {measured:.3f} nats')
    if values['skipped_in_a_row'] >= self._recipe.max_skipped:
      first = step - values['skipped_in_a_row'] + 1
      raise InputError(
        f'The loss or its gradient was not finite in steps {first} to '
        f'{step}; they changed nothing and the run stops here. Start anew in '
        'another work directory with a lower optimizer.learning_rate, or look '
        'for broken text in data.path.'
      )
    if step % self._recipe.log_every:
      return
    row = {'step': step, **{f'train/{k}': v for k, v in values.items()}}
    row['train/learning_rate'] = float(self._schedule(step - 1 - values['skipped']))
    if norms is not None:
      for kind, norm_R in norms.items():
        for r, norm in enumerate(np.asarray(norm_R)):
          row[f'train/{kind}_norm/{r + 1}'] = float(norm)
    # The first interval holds the compilation: it is not timed.
    if self._clock:
      rate = (step - self._clock[0]) / (now - self._clock[1])
      row['throughput/tokens_per_second'] = rate * self._recipe.batch * self._recipe.length
      peak = peak_flops()
      row['throughput/mfu'] = rate * self._flops / peak if peak else None
    self._clock = (step, now)
    row |= self._so_far(step)
    row['memory/peak_bytes'] = memory_bytes()
    self._write(row)

  def _so_far(self, step: int) -> dict[str, float]:
    wall_time = time.monotonic() - self._begin
    return {
      'throughput/total_tokens': step * self._recipe.batch * self._recipe.length,
      'throughput/wall_time': wall_time,
      **self.time.row(wall_time),
    }

  def _write(self, row) -> None:
    if self._writer:
      self._writer.write(row)
    else:
      self.rows.append(row)
    if self._on_row:
      self._on_row(row)
