"""Converts a vanilla model into a relaxed recursive one.

`to_recursive` arranges the parent's L layers as prelude, block x loops and
coda (`plan.py`), finds the block's shared weights and relaxations (`job.py`), either
by the paper's rules (`select.py`) or fitted to text (`calibrate.py`), and
reports what was kept (`report.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import time
from typing import Any, Literal

import numpy as np

from rrt import console
from rrt.config import ModelConfig
from rrt.convert import banks, calibration_data, drop, search, size
from rrt.convert.calibrate import ALL_STEPS, CalibrationConfig
from rrt.convert.job import Job, fits_text
from rrt.convert.plan import ConvertConfig, is_exact, plan, with_added_loops
from rrt.convert.report import (
  Report,
  count_arrays,
  cross_entropy,
  identity_error,
  remade,
  start_report,
)
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models.added_loops import add_loops
from rrt.models.untie import to_untied
from rrt.ops.matmul import float32_is_float32
from rrt.tree import flatten

ROW = 512  # Tokens of a calibration row: more texts for as many tokens.


@contextlib.contextmanager
def one_blas_thread():
  """LAPACK on one thread, and products of float32 numbers in float32.

  OpenBLAS and XLA each have a thread pool; together they slow an
  eigendecomposition down by a factor of 6 to 20.
  """
  limit: Any = contextlib.nullcontext()
  try:
    import scipy.linalg  # noqa: F401  (jax's LAPACK, which must be loaded)
    import threadpoolctl
  except ImportError:
    pass  # Without the extra `convert` it is only slower.
  else:
    limit = threadpoolctl.threadpool_limits(1, 'blas')
  with limit, float32_is_float32('float32'):
    yield


@one_blas_thread()
def to_recursive(
  parent: LanguageModel,
  convert: ConvertConfig | None = None,
  *,
  calibration: str | Sequence[int] | None = None,
  seed: int = 0,
  steps: CalibrationConfig = ALL_STEPS,
  progress: Callable[[int, int], None] | Literal['bar'] | None = 'bar',
  **changes: Any,
) -> tuple[LanguageModel, Report]:
  """Converts a vanilla model into a relaxed recursive one.

  With full-rank low-rank terms and per-loop norms, or with one loop, the child
  computes what the parent does, at any alpha.

  Args:
    parent: a vanilla model.
    convert: what to make of it; keyword arguments change single fields.
    calibration: text, or token ids, to fit on and to measure on; None reads
      `convert.calibration`. Where nothing is fitted, text that is too short
      is not measured on.
    seed: of random weights.
    steps: of the calibration; all of them, but for experiments.
    progress: called with (layers done, layers in all); 'bar' shows them on
      stderr, None shows nothing.
    **changes: fields of `ConvertConfig`.

  Returns:
    (the child, the report).

  Raises:
    InputError: an argument that cannot work, in one sentence, before any
      work starts; or weights with NaN or infinity.

  Example:
    >>> child, report = rrt.to_recursive(parent, prelude=8, loops=2, coda=8, rank=64)
    >>> report.show()
  """
  start = time.monotonic()
  if 'calibration' in changes:
    raise InputError('calibration: give the text, or its path in a ConvertConfig.')
  convert = (convert or ConvertConfig()).replace(**changes)
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise InputError(f'seed={seed!r}: must be from 0 to 2**32 - 1.')
  config = plan(parent.config, convert)
  check_finite(parent, 'parent', 'load it again or take another checkpoint')
  fits = fits_text(config, convert)
  automatic = isinstance(drop.parse(convert.drop, parent.config.depth), int)
  needed = fits or automatic or convert.params is not None
  fit_BxL, held_out_BxL = _calibration_rows(parent, config, convert, calibration, needed)
  untied = to_untied(parent)
  considered: list[search.Candidate] = []
  with console.Progress(0, 'convert', 'layers') as bar:
    report_to = bar.to if progress == 'bar' else progress
    if convert.params is not None:
      convert, considered = _search(untied, convert, fit_BxL, held_out_BxL, seed, steps, report_to)
    child, report = _make(untied, convert, fit_BxL, held_out_BxL, seed, steps, report_to)
  if held_out_BxL.size:
    report.nll_parent_nats = cross_entropy(untied, held_out_BxL)
  if report.exact:
    tokens_BxL = held_out_BxL
    if not tokens_BxL.size:
      ids = np.random.default_rng(seed).integers(0, child.config.vocab_size, 64)
      tokens_BxL = ids.astype(np.int32)[None]
    report.identity_error = identity_error(untied, child, tokens_BxL[:1, :256])
  report.considered = search.rows(considered)
  report.seconds = time.monotonic() - start
  report.peak_memory_bytes = console.peak_memory_bytes()
  child.meta.update(parent.meta, conversion=report.to_json())
  return child, report


def _make(
  untied: LanguageModel,
  convert: ConvertConfig,
  fit_BxL: np.ndarray,
  held_out_BxL: np.ndarray,
  seed: int,
  steps: CalibrationConfig,
  progress: Callable[[int, int], None] | None,
) -> tuple[LanguageModel, Report]:
  """One child of an untied parent, and its report."""
  if convert.add_loops:
    vanilla, report = _make(
      untied, convert.without_loops(), fit_BxL, held_out_BxL, seed, steps, progress
    )
    child = add_loops(vanilla, with_added_loops(vanilla.config, convert), seed)
    return child, remade(report, untied.config, child, convert.init, kept={})
  config, few = plan(untied.config, convert), banks.wanted(convert.relaxations())
  if few:  # All are made, and the likest merged.
    whole, report = _make(
      untied,
      convert.replace(relax=banks.whole(convert.relaxations())),
      fit_BxL,
      held_out_BxL,
      seed,
      steps,
      progress,
    )
    child = banks.reduced(whole, few, fit_BxL if fit_BxL.size else None)
    nats = cross_entropy(child, held_out_BxL) if held_out_BxL.size else None
    changes = dict(exact=False, nll_child_nats=nats)
    return child, remade(report, untied.config, child, convert.init, **changes)
  job = Job(untied, config, convert, seed, steps, progress, fit_BxL)
  weights = job.calibrated() if fits_text(job.config, job.convert) else job.selected()
  config, params = weights.config, weights.to_params(untied.params)
  report = start_report(untied.config, config, convert.init)
  report.dropped = list(job.dropped)
  report.kept = {k: v.tolist() for k, v in weights.kept.items()}
  report.drift = weights.drift
  report.calibration_tokens = fit_BxL.size if weights.drift else 0
  report.params_counted = count_arrays(config, params)
  report.exact = is_exact(config, job.convert)
  child = LanguageModel(config, params, untied.tokenizer)
  check_finite(child, 'child', 'try dtype=float32, or another init')
  if held_out_BxL.size:
    report.nll_child_nats = cross_entropy(child, held_out_BxL)
    report.held_out_tokens = held_out_BxL.size - len(held_out_BxL)
  return child, report


def _search(
  untied: LanguageModel,
  convert: ConvertConfig,
  fit_BxL: np.ndarray,
  held_out_BxL: np.ndarray,
  seed: int,
  steps: CalibrationConfig,
  progress: Callable[[int, int], None] | None,
) -> tuple[ConvertConfig, list[search.Candidate]]:
  """The best child of `convert.params` parameters, and all that were considered."""
  config, costs = untied.config, drop.Costs(untied, fit_BxL)
  # Candidates are fitted on one half of the rows and scored on the other.
  half = max(min(search.MOST_TOKENS // fit_BxL.shape[1], len(fit_BxL) // 2), 1)
  few_BxL, scored_BxL = fit_BxL[:half], np.concatenate([fit_BxL[half:], held_out_BxL])
  params = size.target(convert.params, config)
  of = lambda most: search.candidates(config, most, costs.starts, convert, convert.layers_run)
  found = of(params)
  # Points of the picture lie inside the best run: no further runs are compared.
  count = size.deletions(params, config)
  inside = lambda n: [costs.starts(count)[0] + (count - n) // 2]
  others = [
    c
    for most in search.between(params, config)
    for c in search.deleted(search.candidates(config, most, inside, convert))
  ]

  def score(candidate: ConvertConfig) -> float:
    _, report = _make(untied, candidate, few_BxL, scored_BxL, seed, steps, None)
    return report.nll_child_nats or float('inf')

  scored = search.score_all(found + others, score, progress)
  return search.nearest(scored[: len(found)]).convert, scored


def _calibration_rows(
  parent: LanguageModel,
  config: ModelConfig,
  convert: ConvertConfig,
  calibration: str | Sequence[int] | None,
  fits: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Rows to fit on and rows to measure on; empty where there is no text."""
  nothing = np.zeros((0, 0), np.int32)
  if calibration is None and convert.calibration is None and not fits:
    return nothing, nothing
  if calibration is None:
    calibration = calibration_data.calibration_text(convert.calibration, convert.calibration_tokens)
  try:
    return calibration_data.split_rows(
      calibration,
      parent.tokenizer,
      tokens=convert.calibration_tokens,
      length=min(ROW, config.max_context),
      vocab_size=config.vocab_size,
    )
  except calibration_data.TooLittleText:
    if fits:
      raise
    return nothing, nothing


def check_finite(model: LanguageModel, who: str, remedy: str) -> None:
  """Raises InputError naming the first weights with NaN or infinity."""
  for path, leaf in flatten(model.params).items():
    if not np.isfinite(np.asarray(leaf)).all():
      raise InputError(f'The {who} has NaN or infinity in {path}; {remedy}.')
