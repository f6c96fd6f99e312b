"""`rrt evaluate --exits`: a table and a plot of quality against depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrt import console
from rrt.cli import plots
from rrt.errors import InputError
from rrt.evals import depth, every_loop
from rrt.exits import gate as gate_lib
from rrt.files import check_file_writable
from rrt.infer.engine.config import KV_POLICIES


def check(text: str | None, kinds: str, kvs: Sequence[str], curve: str | None) -> None:
  """Raises InputError for invalid flags, before anything runs."""
  if not text:
    raise InputError('--exits needs --text.')
  depth.parse_gates(kinds)
  for kv in kvs:
    if kv not in KV_POLICIES[1:]:
      raise InputError(f'kv={kv!r}: must be one of {KV_POLICIES[1:]}.')
  if curve:
    plots.open_pyplot()
    _check_picture(Path(curve))


def check_model(model, kinds: str) -> None:
  """Raises InputError for a model without early exits, or without the gate."""
  every_loop.check(model.config)
  gate = gate_lib.stored(model)
  arrays = gate.arrays if gate else None
  for kind in depth.parse_gates(kinds) if kinds != 'all' else ():
    if kind in every_loop.NEEDS:
      gate_lib.check_arrays(kind, arrays, model.config)


def _check_picture(path: Path) -> None:
  """Raises InputError unless the picture can be written."""
  if path.is_file() and path.read_bytes()[:4] not in (b'', b'<svg'):
    raise InputError(f'curve={path}: exists and is not an SVG picture.')
  try:
    check_file_writable(path)
  except OSError as e:
    why = e.strerror or e
    raise InputError(f'curve={path}: cannot be written ({why}).') from e


def measure(
  model,
  rows,
  kinds: str,
  kvs: Sequence[str],
  curve: str | None = None,
  *,
  batch: int = 4,
  dtype: str = 'float32',
) -> list[depth.Point]:
  """Measures, prints and plots the curve.

  Args:
    model: of two loops or more.
    rows: tokens, from `perplexity.make_rows`.
    kinds: gates by name, separated by commas, or 'all': of the learned gate
      only if the model has one. A gate saved with the model is also measured at
      its calibrated threshold.
    kvs: cache policies for skipped loops; each is measured.
    curve: SVG file to write.
    batch: rows in one pass.
    dtype: of the computation.
  """
  names = depth.parse_gates(kinds)
  gate = gate_lib.stored(model)
  arrays = gate.arrays if gate else None
  if kinds == 'all':
    names = [n for n in names if every_loop.NEEDS.get(n) in (None, *(arrays or {}))]
  with console.Progress(sum(map(len, rows)), 'every loop', 'tokens') as progress:
    static = every_loop.read_static(
      model, rows, arrays, batch=batch, dtype=dtype, progress=progress.update
    )
  scored = int(static.scored_NxL.sum())
  points = []
  for kv in kvs:
    count = sum(len(depth.thresholds(static, n, depth.SHARES)) for n in names)
    with console.Progress((count + bool(gate)) * scored, kv, 'tokens') as progress:
      settings: dict = {'kv': kv, 'batch': batch, 'dtype': dtype, 'progress': progress.update}
      points += depth.curve(model, static, names, arrays, **settings)
      if gate:
        points.append(depth.measure(model, static, gate.kind, gate.threshold, arrays, **settings))
  console.table(depth.table(points), depth.HEADERS)
  if curve:
    Path(curve).write_text(plots.depth_curve(points, model.config.loops))
    print(f'wrote {curve}')
  return points


def ask_tasks(model, points: Sequence[depth.Point], **settings) -> list[dict]:
  """Evaluates the tasks at each point, and prints the scores.

  Args:
    model: as for `measure`.
    points: from `measure`; the oracle, which needs full depth, is skipped.
    **settings: of `harness.run`.

  Returns:
    A dict for each point: gate, kv, threshold, mean loops of the endings' tokens,
    the mean score and each task's.
  """
  from rrt.evals import harness

  gate = gate_lib.stored(model)
  arrays = gate.arrays if gate else None
  found: list[dict[str, Any]] = []
  for p in points:
    if p.gate == 'oracle':
      continue
    results = harness.run(model, gate=gate_lib.Gate(p.gate, p.threshold, arrays, p.kv), **settings)
    found.append(
      {
        'gate': p.gate,
        'kv': p.kv,
        'threshold': p.threshold,
        'mean_loops': results[0].mean_loops,
        'lost_nats': p.lost_nats,
        'mean_score': sum(r.score for r in results) / len(results),
        'tasks': {r.task: r.score for r in results},
      }
    )
  names = list(found[0]['tasks']) if found else []
  console.table(
    [
      (
        f['gate'],
        f['kv'],
        f['threshold'],
        f['mean_loops'],
        f'{100 * f["mean_score"]:.1f}',
        *(f'{100 * f["tasks"][n]:.1f}' for n in names),
      )
      for f in found
    ],
    ('gate', 'skipped loops', 'threshold', 'loops', 'mean %', *names),
  )
  return found
