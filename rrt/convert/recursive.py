"""A vanilla model becomes a recursive one: which layers, which weights.

`to_recursive` arranges the parent's L layers as prelude, block x loops and
coda, finds weights for the shared block (paper, section 2: stepwise, average,
lower, upper, random; or ours, calibrated) and low-rank relaxations that take
the block back towards the parent at each position (eq. 4).

P prelude, N block, C coda layers, R loops, I inputs, O outputs, r rank.
"""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt import cli
from rrt.config import ModelConfig
from rrt.convert import budgets, fit
from rrt.convert import calibrate as calibrate_lib
from rrt.convert.arrange import (
  arrange,
  is_full_rank,
  source_layers,
  with_ranks,
)
from rrt.convert.export import to_untied
from rrt.convert.family import flatten, set_path
from rrt.convert.report import (
  Report,
  count_arrays,
  cross_entropy,
  identity_error,
  start_report,
)
from rrt.convert.sample import split_rows
from rrt.convert.walk import Walk, part_of
from rrt.errors import InputError
from rrt.pretrained import LanguageModel

INITS = ('calibrated', 'stepwise', 'average', 'lower', 'upper', 'random')
ROW = 1024  # Tokens of a calibration row.
CALIBRATION_TOKENS = 8192


def to_recursive(
  parent: LanguageModel,
  *,
  prelude: int = 0,
  block: int | None = None,
  loops: int = 2,
  coda: int = 0,
  order: str = 'cycle',
  init: str = 'calibrated',
  rank: int | dict[str, int] | None = 0,
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
      capped at the smaller side of the matrix. 0 for none.
    budget: LoRA parameters to spend over positions and matrices where they
      regain most, instead of `rank`.
    alpha: LoRA's scale is alpha / rank; None for a scale of 1. The factors
      make up for it.
    lora_init: 'svd' of what the shared weights lack, or 'zero'.
    loop_norms: every loop keeps its own norm gains.
    calibration: text, or token ids, to fit on and to measure on; None takes
      English text that is found in the installation.
    calibration_tokens: how many to fit on.
    seed: of random weights.
    steps: of the calibration; all of them, but for experiments.
    progress: called with (layers done, layers in all) as work proceeds.

  Returns:
    (the child, the report).

  Raises:
    InputError: an argument that cannot work, in one sentence, before any
      work starts.
  """
  start = time.monotonic()
  if init not in INITS:
    raise InputError(f'init={init!r}: must be one of {", ".join(INITS)}.')
  if lora_init not in ('svd', 'zero'):
    raise InputError(f"lora_init={lora_init!r}: must be 'svd' or 'zero'.")
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise InputError(f'seed={seed!r}: must be from 0 to 2**32 - 1.')
  config = arrange(
      parent.config, prelude=prelude, block=block, loops=loops, coda=coda,
      order=order, loop_norms=loop_norms,
  )  # fmt: skip
  budgets.check(budget, rank)
  config = with_ranks(config, rank, alpha)
  check_finite(parent)
  exact = (loops == 1 and init != 'random') or (
    lora_init == 'svd' and loop_norms and is_full_rank(config)
  )
  fits = init == 'calibrated' and not exact
  fit_BxL = held_out_BxL = np.zeros((0, 0), np.int32)
  if fits or calibration is not None:
    fit_BxL, held_out_BxL = split_rows(
        builtin_text() if calibration is None else calibration,
        parent.tokenizer, tokens=calibration_tokens,
        length=min(ROW, config.max_context), vocab_size=config.vocab_size,
    )  # fmt: skip
  untied = to_untied(parent)
  job = _Conversion(untied, config, init, lora_init, seed)
  if fits:
    job.calibrate(fit_BxL, budget, alpha, steps, progress)
  else:
    job.select(budget, alpha)
  config, params = job.config, job.params()
  report = start_report(untied.config, config, init)
  report.kept = {k: v.tolist() for k, v in job.kept.items()}
  report.drift = job.drift
  report.calibration_tokens = fit_BxL.size if fits else 0
  report.params_counted = count_arrays(config, params)
  meta = dict(parent.meta)
  child = LanguageModel(config, params, parent.tokenizer, meta)
  if held_out_BxL.size:
    report.nll_parent_nats = cross_entropy(untied, held_out_BxL)
    report.nll_child_nats = cross_entropy(child, held_out_BxL)
    report.held_out_tokens = held_out_BxL.size - len(held_out_BxL)
  if exact:
    tokens_BxL = held_out_BxL
    if not tokens_BxL.size:
      ids = np.random.default_rng(seed).integers(0, config.vocab_size, 64)
      tokens_BxL = ids.astype(np.int32)[None]
    report.identity_error = identity_error(untied, child, tokens_BxL[:1, :256])
  report.seconds = time.monotonic() - start
  report.peak_memory_bytes = cli.peak_memory_bytes()
  meta['conversion'] = report.to_json()
  return child, report


def builtin_text() -> str:
  """English prose that the installation holds."""
  from rrt.data import corpus  # Only here is text needed.

  return corpus.builtin_text()


def check_finite(model: LanguageModel) -> None:
  """Raises InputError naming the first weights with NaN or infinity."""
  for path, leaf in flatten(model.params).items():
    if not np.isfinite(np.asarray(leaf)).all():
      raise InputError(
        f'The parent has NaN or infinity in {path}; load it again or take '
        'another checkpoint.'
      )


class _Conversion:
  """Finds the weights of one child.

  Attributes:
    config: the child's; a budget replaces its ranks.
    shared: component -> [N, I, O].
    low_a: component -> [N, R, I, r], at a scale of 1.
    low_b: component -> [N, R, r, O].
    coda: the coda's layer trees, where they were refitted.
    kept: component -> share of the residual kept, [R, N].
    drift: see `Report`.
  """

  def __init__(
    self,
    parent: LanguageModel,
    config: ModelConfig,
    init: str,
    lora_init: str,
    seed: int,
  ):
    self.parent, self.config = parent, config
    self.init, self.lora_init = init, lora_init
    self.random = np.random.default_rng(seed)
    self.layers = parent.params['block']['layers']
    self.shared: dict[str, np.ndarray] = {}
    self.low_a: dict[str, np.ndarray] = {}
    self.low_b: dict[str, np.ndarray] = {}
    self.kept: dict[str, np.ndarray] = {}
    self.coda: list[Any] = []
    self.drift: list[float] = []
    self.norms = self._norms()

  def kernel(self, name: str, depth: int) -> np.ndarray:
    """A linear of the parent, float32 [I, O]."""
    stacked = self.layers[part_of(name)][name]['kernel']
    return np.asarray(stacked[depth], np.float32)

  # ---------------------------------------------------------------- the norms

  def _norms(self) -> dict[str, np.ndarray]:
    """Gains of the block by path: [N, R, D] per loop, else [N, D].

    Tied gains come from the layer that the weights come from, or are means.
    """
    depths_NxR = self.config.block_depths().T
    gains = {}
    for path, leaf in flatten(self.layers).items():
      if not path.endswith('scale'):
        continue
      leaf = np.asarray(leaf, np.float32)
      if self.config.loop_norms:
        gains[path] = leaf[depths_NxR]
      elif self.init in ('stepwise', 'lower', 'upper'):
        gains[path] = leaf[source_layers(self.config, self.init)]
      else:
        gains[path] = leaf[depths_NxR].mean(1)
    return gains

  def _norms_at(self, depth: int) -> dict[str, Any]:
    """The child's gains at a depth, as a tree."""
    places = {int(d): p for p, d in np.ndenumerate(self.config.block_depths())}
    tree: dict[str, Any] = {}
    for path, leaf in flatten(self.layers).items():
      if not path.endswith('scale'):
        continue
      gain = np.asarray(leaf[depth], np.float32)
      if depth in places:
        r, n = places[depth]
        gain = self.norms[path][n]
        gain = gain[r] if self.config.loop_norms else gain
      set_path(tree, path, jnp.asarray(gain))
    return tree

  # -------------------------------------------- weights taken from the parent

  def select(self, budget: int | None, alpha: float | None) -> None:
    """Shared weights by the paper's rules, LoRA by a plain SVD."""
    c = self.config
    for name, (d_in, d_out) in c.shapes().items():
      shared_NxIxO = np.zeros((c.block_layers, d_in, d_out), np.float32)
      for n in range(c.block_layers):
        shared_NxIxO[n] = self._selected(name, n)
      self.shared[name] = shared_NxIxO
    if budget is not None:
      spectra = {name: self._spectra(name) for name in c.shapes()}
      self.config = budgets.spend(c, spectra, budget, alpha)
    for name in c.shapes():
      self._relax(name)

  def _selected(self, name: str, n: int) -> np.ndarray:
    """The shared weight of one linear of block layer n."""
    c = self.config
    if self.init == 'random':
      shape = c.shapes()[name]
      return self.random.normal(0, shape[0] ** -0.5, shape)
    if self.init in ('stepwise', 'lower', 'upper'):
      return self.kernel(name, int(source_layers(c, self.init)[n]))
    depths_R = c.block_depths()[:, n]
    return np.mean([self.kernel(name, int(d)) for d in depths_R], axis=0)

  def _residual(self, name: str, r: int, n: int) -> np.ndarray:
    depth = self.config.depth_of(r, n)
    return self.kernel(name, depth) - self.shared[name][n]

  def _spectra(self, name: str) -> np.ndarray:
    """Singular values of the residuals, relative to the weights' norms."""
    R, N = self.config.loops, self.config.block_layers
    values = np.zeros((R, N, min(self.config.shapes()[name])))
    for r, n in np.ndindex(R, N):
      sigma_K = jnp.linalg.svd(self._residual(name, r, n), compute_uv=False)
      weight_IxO = self.kernel(name, self.config.depth_of(r, n))
      values[r, n] = np.asarray(sigma_K) / np.linalg.norm(weight_IxO)
    return values

  def _relax(self, name: str) -> None:
    """LoRA of one component (paper, eq. 4), or its zero init."""
    c = self.config
    R, N = c.loops, c.block_layers
    if c.lora is None or not c.lora.width(name):
      return
    width = c.lora.width(name)
    d_in, d_out = c.shapes()[name]
    ranks_RxN = c.lora.table(name, R, N)
    a_NxRxIxr = np.zeros((N, R, d_in, width), np.float32)
    b_NxRxrxO = np.zeros((N, R, width, d_out), np.float32)
    self.kept[name] = np.zeros((R, N))
    for r, n in np.ndindex(R, N):
      rank = int(ranks_RxN[r, n])
      rest_IxO = self._residual(name, r, n)
      if self.lora_init == 'zero' or not rest_IxO.any():
        # Nothing to make up for: the usual start, the product zero.
        a_NxRxIxr[n, r, :, :rank] = self.random.normal(
          0, d_in**-0.5, (d_in, rank)
        )
        self.kept[name][r, n] = 0.0 if rest_IxO.any() else 1.0
        continue
      a_Ixr, b_rxO, self.kept[name][r, n] = fit.truncated_svd(rest_IxO, rank)
      a_NxRxIxr[n, r, :, :rank], b_NxRxrxO[n, r, :rank] = a_Ixr, b_rxO
    self.low_a[name], self.low_b[name] = a_NxRxIxr, b_NxRxrxO

  # ------------------------------------------------ weights fitted to the text

  def calibrate(
    self,
    tokens_BxL: np.ndarray,
    budget: int | None,
    alpha: float | None,
    steps: calibrate_lib.Steps,
    progress: Callable[[int, int], None] | None,
  ) -> None:
    """Shared weights, LoRA and coda by `rrt.convert.calibrate`."""
    c = self.config
    done, total = 0, 2 * c.depth - c.prelude_layers

    def count(n: int) -> None:
      nonlocal done
      done += n
      if progress:
        progress(done, total)

    walk = Walk(
      self.parent.config,
      lambda depth: jax.tree.map(lambda t: jnp.asarray(t[depth]), self.layers),
      tokens_BxL,
    )
    streams = walk.run(self._embed(tokens_BxL), c.prelude_layers, count)
    if budget is not None:
      spectra = calibrate_lib.spectra(walk, c, streams, self._norms_at, steps)
      self.config = budgets.spend(c, spectra, budget, alpha)
    zero = self.lora_init == 'zero'
    fitted = calibrate_lib.calibrate(
        walk, dataclasses.replace(c, lora=None) if zero else self.config,
        streams, self._norms_at, steps=steps, progress=count,
    )  # fmt: skip
    self.shared, self.coda = fitted.shared, fitted.coda
    self.kept, self.drift = fitted.kept, fitted.drift
    if zero:
      for name in c.shapes():
        self._relax(name)
    else:
      self.low_a, self.low_b = fitted.low_a, fitted.low_b

  def _embed(self, tokens_BxL: np.ndarray) -> np.ndarray:
    """What the first layer reads."""
    c = self.config
    x_BxLxD = np.asarray(self.parent.params['embed']['table'])[tokens_BxL]
    scale = c.d_model**0.5 if c.scale_embeddings else 1.0
    return x_BxLxD.astype(np.float32) * np.float32(scale)

  # ------------------------------------------------------------------ the tree

  def params(self) -> dict[str, Any]:
    """The child's parameter tree, in the parent's dtype."""
    c, source = self.config, self.parent.params
    tree: dict[str, Any] = {
      part: source[part]
      for part in ('embed', 'final_norm', 'head')
      if part in source
    }
    dtype = np.asarray(source['embed']['table']).dtype
    block: dict[str, Any] = {}
    for path, gains in self.norms.items():
      set_path(block, path, gains.astype(dtype))
    for name, kernels in self.shared.items():
      place = f'{part_of(name)}/{name}'
      set_path(block, f'{place}/kernel', kernels.astype(dtype))
      if c.lora is not None and name in self.low_a:
        # The forward pass multiplies the product by alpha / rank.
        half = np.float32(c.lora.scale(name) ** -0.5)
        set_path(
          block, f'{place}/lora_a', (half * self.low_a[name]).astype(dtype)
        )
        set_path(
          block, f'{place}/lora_b', (half * self.low_b[name]).astype(dtype)
        )
    tree['block'] = {'layers': block}
    first, last = c.prelude_layers, c.depth - c.coda_layers
    take = lambda some: jax.tree.map(lambda t: np.asarray(t[some]), self.layers)
    if c.prelude_layers:
      tree['prelude'] = {'layers': take(slice(0, first))}
    if self.coda:
      stack = lambda *leaves: np.stack(leaves).astype(dtype)
      tree['coda'] = {'layers': jax.tree.map(stack, *self.coda)}
    elif c.coda_layers:
      tree['coda'] = {'layers': take(slice(last, c.depth))}
    return tree
