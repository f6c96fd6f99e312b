"""Finds the weights of one child, by the paper's rules or fitted to text."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert import drop, rank_budget, select
from rrt.convert import spectra as spectra_lib
from rrt.convert.activations import LayerActivations, embedded
from rrt.convert.calibrate import CalibrationConfig
from rrt.convert.plan import ConvertConfig, is_exact, plan, with_relaxations
from rrt.convert.rounding import round_shared
from rrt.convert.sweeps import calibrate_in_sweeps
from rrt.convert.weights import ChildWeights
from rrt.model import LanguageModel
from rrt.ops.quantize import dense, quantize


def fits_text(config: ModelConfig, convert: ConvertConfig) -> bool:
  """Whether anything is fitted to text."""
  if convert.init != 'calibrated' or is_exact(config, convert):
    return False
  if convert.add_loops:
    return convert.weights != 'float' or (bool(convert.drop) and convert.refit != 'none')
  return config.loops > 1 or config.weights != 'float' or convert.refit != 'none'


@dataclasses.dataclass
class Job:
  """Finds the weights of one child, either way.

  Attributes:
    dropped: the parent's layers that are deleted.
    kept: the parent without them.
  """

  parent: LanguageModel
  config: ModelConfig  # The child's; a budget adds its low-rank terms.
  convert: ConvertConfig
  seed: int
  steps: CalibrationConfig
  progress: Callable[[int, int], None] | None
  tokens_BxL: np.ndarray  # To fit on; empty where nothing is fitted.

  def __post_init__(self):
    found = drop.parse(self.convert.drop, self.parent.config.depth)
    if isinstance(found, int):
      runs = self.parent.config.depth - found + 1
      count = layer_counter(runs, self.progress)
      start = drop.Costs(self.parent, self.tokens_BxL).starts(found, count)[0]
      found = tuple(range(start, start + found))
      self.convert = self.convert.replace(drop=found)
      self.config = plan(self.parent.config, self.convert)
    self.dropped = found
    # What the child is arranged from; targets stay those of the whole parent.
    self.kept = drop.without(self.parent, found)

  def _weights(self) -> ChildWeights:
    fits = self.convert.relax_init == 'fit'
    return ChildWeights(self.config, self._layers(), self.convert.init, self.seed, fits)

  def _layers(self) -> Any:
    return self.kept.params['block']['layers']

  def _spend(self, spectra: dict[str, np.ndarray]) -> None:
    """Turns the budget into ranks."""
    ranks = rank_budget.spend(self.config, spectra, self.convert.budget or 0)
    self.config = with_relaxations(self.config, self.convert, ranks)

  def selected(self) -> ChildWeights:
    """Shared weights by the paper's rules, relaxations fitted to weights."""
    c, layers = self.config, self._layers()
    budget = self.convert.budget is not None
    positions = c.loops * c.block_layers
    linears = len(c.shapes())
    total = c.block_layers + positions * (2 if budget else 1)
    count = layer_counter(total, self.progress, parts=linears)
    shared = select.select_shared(c, layers, self.convert.init, self.seed, count)
    if budget:
      self._spend(select.spectra(c, layers, shared, count))
    weights = self._weights()
    weights.shared = shared
    if c.weights != 'float':
      for name, host in weights.hosts.items():
        for n in range(c.block_layers):
          at = lambda r, n=n, host=host: select.kernel_at(layers, host, c.depth_of(r, n))
          round_shared(weights, name, n, None, np.stack([at(r) for r in range(c.loops)]))
    select.fit_relaxations(weights, layers, count)
    return weights

  def calibrated(self) -> ChildWeights:
    """Shared weights, relaxations and refitted layers, fitted to text."""
    c, depth = self.config, self.parent.config.depth
    kept = drop.kept_of(self.parent.config, self.dropped)
    start = drop.first_refitted(kept, self.convert.refit, depth)
    if c.loops > 1:
      start = min(start, c.prelude_layers)
    if c.weights != 'float':  # All layers are rounded.
      start = 0
    count = layer_counter(depth + (c.depth - start) * self.convert.sweeps, self.progress)
    whole = self._activations(self.parent)
    table_VxD = self.parent.params['embed']['table']
    x_BxLxD = embedded(self.parent.config, table_VxD, self.tokens_BxL)
    streams = whole.run(x_BxLxD, start, count)
    h_BxLxD = streams[start].start  # No gap lies before it, but for a rounded table.
    if c.weights != 'float':
      rounded_VxD = np.asarray(dense(quantize(table_VxD, 'int8', axis=-1)))
      h_BxLxD = embedded(self.parent.config, rounded_VxD, self.tokens_BxL)
    streams = drop.targets(streams, kept, self.convert.refit, depth)
    activations = self._activations(self.kept) if self.dropped else whole
    if self.convert.budget is not None:
      norms = self._weights().norms_at
      self._spend(spectra_lib.whitened(activations, c, streams, norms, self.steps))
      if is_exact(self.config, self.convert):  # Any shared weight will do.
        self.convert = self.convert.replace(budget=None)
        return self.selected()
    steps = self.steps
    if self.convert.refit == 'none':
      steps = dataclasses.replace(steps, refit_coda=False)
    return calibrate_in_sweeps(
      activations,
      self._weights,
      streams,
      start,
      h_BxLxD,
      sweeps=self.convert.sweeps,
      steps=steps,
      progress=count,
    )

  def _activations(self, model: LanguageModel) -> LayerActivations:
    layers = model.params['block']['layers']
    at_depth = lambda depth: jax.tree.map(lambda t: jnp.asarray(t[depth]), layers)
    return LayerActivations(model.config, at_depth, self.tokens_BxL)


def layer_counter(
  total: int, progress: Callable[[int, int], None] | None, parts: int = 1
) -> Callable[[int], None]:
  """Counts work in parts of a layer, and reports it in layers."""
  done = 0

  def count(n: int = 1) -> None:
    nonlocal done
    done += n
    if progress:
      progress(done // parts, total)

  return count
