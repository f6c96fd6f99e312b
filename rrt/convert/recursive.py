"""A vanilla model becomes a recursive one: which layers, which weights.

`to_recursive` arranges the parent's L layers as prelude, block x loops and
coda, finds weights for the shared block (paper, section 2: stepwise, average,
lower, upper, random; or ours, calibrated) and low-rank relaxations that take
the block back towards the parent at each position (eq. 4).

The work itself is `rrt.convert.select`.
"""

from collections.abc import Callable, Sequence
import time

import numpy as np

from rrt import console
from rrt.config import ModelConfig
from rrt.convert import calibrate as calibrate_lib
from rrt.convert import calibration_data, rank_budget
from rrt.convert.plan import LoopRanks, arrange, with_ranks
from rrt.convert.report import Report, count_arrays, cross_entropy, identity_error, start_report
from rrt.convert.select import Conversion, is_exact, one_blas_thread
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models.untie import to_untied
from rrt.tree import flatten

INITS = ('calibrated', 'stepwise', 'average', 'lower', 'upper', 'random')
ROW = 1024  # Tokens of a calibration row.
CALIBRATION_TOKENS = 8192


def plan(
  parent: ModelConfig,
  *,
  prelude: int = 0,
  block: int | None = None,
  loops: int = 2,
  coda: int = 0,
  order: str = 'cycle',
  init: str = 'calibrated',
  rank: LoopRanks | dict[str, LoopRanks] | None = 0,
  budget: int | None = None,
  alpha: float | None = None,
  lora_init: str = 'svd',
  loop_norms: bool = True,
  calibration_tokens: int = CALIBRATION_TOKENS,
  seed: int = 0,
) -> ModelConfig:
  """The shape of the child that `to_recursive` makes of a parent.

  All that can be told without the weights is checked. A budget's ranks are
  only known when it is spent; here the child is without LoRA then.

  Args:
    parent: a vanilla model's config; the others as in `to_recursive`.

  Raises:
    InputError: an argument that cannot work, in one sentence.
  """
  if init not in INITS:
    raise InputError(f'init={init!r}: must be one of {", ".join(INITS)}.')
  if lora_init not in ('svd', 'zero'):
    raise InputError(f"lora_init={lora_init!r}: must be 'svd' or 'zero'.")
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise InputError(f'seed={seed!r}: must be from 0 to 2**32 - 1.')
  config = arrange(
    parent, prelude=prelude, block=block, loops=loops, coda=coda, order=order, loop_norms=loop_norms
  )
  rank_budget.check(budget, rank)
  calibration_data.check_tokens(calibration_tokens)
  return with_ranks(config, rank, alpha)


@one_blas_thread()
def to_recursive(
  parent: LanguageModel,
  *,
  prelude: int = 0,
  block: int | None = None,
  loops: int = 2,
  coda: int = 0,
  order: str = 'cycle',
  init: str = 'calibrated',
  rank: LoopRanks | dict[str, LoopRanks] | None = 0,
  budget: int | None = None,
  alpha: float | None = None,
  lora_init: str = 'svd',
  loop_norms: bool = True,
  calibration: str | Sequence[int] | None = None,
  calibration_tokens: int = CALIBRATION_TOKENS,
  seed: int = 0,
  steps: calibrate_lib.Steps = calibrate_lib.ALL_STEPS,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[LanguageModel, Report]:
  """Converts a vanilla model into a relaxed recursive one.

  With full-rank LoRA and per-loop norms, or with one loop, the child computes
  what the parent does, at any alpha.

  Args:
    parent: a vanilla model.
    prelude: layers kept as they are before the block.
    block: layers of the block; worked out from the rest when None.
    loops: times the block runs.
    coda: layers of their own after the block.
    order: 'cycle' or 'sequence'.
    init: the block's shared weights, one of `INITS`.
    rank: of the LoRA of every linear, or by component: `{'q': 32, ...}`;
      where the loops differ a tuple, one a loop. Capped at the smaller side
      of the matrix. 0 for none.
    budget: LoRA parameters to spend over positions and matrices where they
      regain most, instead of `rank`.
    alpha: LoRA's scale is alpha / rank; None for a scale of 1. The factors
      make up for it.
    lora_init: 'svd' of what the shared weights lack, or 'zero'.
    loop_norms: every loop keeps its own norm gains.
    calibration: text, or token ids, to fit on and to measure on; None takes
      English text that is found in the installation. Where nothing is
      fitted, text that is too short is not measured on.
    calibration_tokens: how many to fit on.
    seed: of random weights.
    steps: of the calibration; all of them, but for experiments.
    progress: called with (layers done, layers in all) as work proceeds.

  Returns:
    (the child, the report).

  Raises:
    InputError: an argument that cannot work, in one sentence, before any
      work starts; or weights with NaN or infinity.
  """
  start = time.monotonic()
  config = plan(
    parent.config,
    prelude=prelude,
    block=block,
    loops=loops,
    coda=coda,
    order=order,
    init=init,
    rank=rank,
    budget=budget,
    alpha=alpha,
    lora_init=lora_init,
    loop_norms=loop_norms,
    calibration_tokens=calibration_tokens,
    seed=seed,
  )
  check_finite(parent, 'parent', 'load it again or take another checkpoint')
  fits = init == 'calibrated' and not is_exact(config, init, lora_init)
  fit_BxL = held_out_BxL = np.zeros((0, 0), np.int32)
  if fits or calibration is not None:
    if calibration is None:
      calibration = calibration_data.calibration_text(None, calibration_tokens)
    try:
      fit_BxL, held_out_BxL = calibration_data.split_rows(
        calibration,
        parent.tokenizer,
        tokens=calibration_tokens,
        length=min(ROW, config.max_context),
        vocab_size=config.vocab_size,
      )
    except calibration_data.TooLittleText:
      if fits:
        raise
  untied = to_untied(parent)
  job = Conversion(untied, config, init, lora_init, seed)
  if fits:
    job.calibrate(fit_BxL, budget, alpha, steps, progress)
  else:
    job.select(budget, alpha, progress)
  config, params = job.config, job.params()
  report = start_report(untied.config, config, init)
  report.kept = {k: v.tolist() for k, v in job.kept.items()}
  report.drift = job.drift
  report.calibration_tokens = fit_BxL.size if job.fitted else 0
  report.params_counted = count_arrays(config, params)
  meta = dict(parent.meta)
  child = LanguageModel(config, params, parent.tokenizer, meta)
  check_finite(child, 'child', 'try dtype=float32, or another init')
  if held_out_BxL.size:
    report.nll_parent_nats = cross_entropy(untied, held_out_BxL)
    report.nll_child_nats = cross_entropy(child, held_out_BxL)
    report.held_out_tokens = held_out_BxL.size - len(held_out_BxL)
  if is_exact(config, init, lora_init):
    tokens_BxL = held_out_BxL
    if not tokens_BxL.size:
      ids = np.random.default_rng(seed).integers(0, config.vocab_size, 64)
      tokens_BxL = ids.astype(np.int32)[None]
    report.identity_error = identity_error(untied, child, tokens_BxL[:1, :256])
  report.seconds = time.monotonic() - start
  report.peak_memory_bytes = console.peak_memory_bytes()
  meta['conversion'] = report.to_json()
  return child, report


def check_finite(model: LanguageModel, who: str, mend: str) -> None:
  """Raises InputError naming the first weights with NaN or infinity."""
  for path, leaf in flatten(model.params).items():
    if not np.isfinite(np.asarray(leaf)).all():
      raise InputError(f'The {who} has NaN or infinity in {path}; {mend}.')
