"""Calibrated conversion: shared weights and relaxations fitted to activations.

The paper averages the tied layers and takes a plain SVD of what is left,
which treats every direction of a layer's input alike. Here the parent reads a
few thousand tokens, and each linear of the child is fitted by least squares:

1. Errors count by what they do to the inputs a linear really gets, so means
   and SVDs are weighted with covariances (`rrt.ops.least_squares`).
2. The shared weight is chosen together with the low-rank terms of all loops,
   not before them (`Relaxation.tie`).
3. Layer after layer, the child's own inputs are used, with the errors that
   earlier layers left in them, and the fit is towards the parent's outputs.
   What writes to the residual stream (o and down) also takes up the error
   that the stream has gathered so far.
4. Layers of their own behind the block or behind a deleted layer are nobody's
   shared weights: they are refitted whole.
5. Where a loop starts closed (`Gain.start = 0`), what it writes to the residual
   stream is kept only if it brings tokens that were left out of the fit nearer to
   the parent's: no such position is worse there than a deleted layer.

6. Where weights are quantized, each is rounded before what follows it is fitted:
   relaxations to the rounded shared weight (`rrt.convert.rounding`), later layers to
   inputs with all errors of rounding.

7. A further sweep (`sweeps`) chooses shared weights once more, now for what the loops
   after the first got and were asked for in the sweep before, instead of for the parent's
   inputs and weights; everything else is fitted anew to them. The parent's streams then
   stay in memory until the last sweep.

Nothing is trained by gradients. One layer's covariances are in memory at a
time, besides the parent's residual stream for the calibration tokens: after
attention and after the MLP, at every depth from the prelude on. That is
2 (L - P) x tokens x D float32 in the host's memory, freed depth by depth as
the child is fitted; of the child's own stream, one depth is there at a time.

B rows, L length, D model, I inputs of a linear, O outputs, R loops, N layers.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert import experts
from rrt.convert.activations import (
  CHECKED,
  SITES,
  LayerActivations,
  Stream,
  bias_of,
  gather,
  gather_out,
  kernel_of,
  set_kernel,
  sites,
  with_norms,
)
from rrt.convert.rounding import round_shared
from rrt.convert.weights import TINY, ChildWeights
from rrt.ops import least_squares


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
  """The steps of the calibration; all are taken, but for experiments.

  Attributes:
    child_inputs: each layer is fitted on the child's inputs, with the errors
      of the layers before it; otherwise on the parent's.
    parent_outputs: and towards the parent's outputs and residual stream;
      otherwise towards the parent's weights.
    tie_jointly: shared weights are chosen together with the relaxations that
      can (`Relaxation.tie`); otherwise they are weighted means.
    permute_units: hidden units are aligned before weights are shared.
    refit_coda: layers of their own (of the coda, and behind deleted ones) are
      refitted too.
    ridge: how strongly the covariances that weight means and SVDs are
      shrunk towards their diagonals.
  """

  child_inputs: bool = True
  parent_outputs: bool = True
  tie_jointly: bool = True
  permute_units: bool = True
  refit_coda: bool = True
  ridge: float = 1e-2


ALL_STEPS = CalibrationConfig()


@dataclasses.dataclass
class Sweep:
  """One sweep over the child's layers, and what it leaves to the next.

  Attributes:
    before: the sweep before it.
    records: whether another may follow. What it then keeps in the host's memory is as large as
      the layers of the loops after the first, and their inputs' covariances.
    covariances: (depth, site) -> E[x^T x] of the child's own inputs, [I, I], of positions
      in loops after the first.
    targets: (depth, linear) -> the weight that was asked for there, [I, O].
    gap: `||child - parent||^2 / ||parent||^2` of the last residual stream, of the tokens
      that fits are checked on.
  """

  before: 'Sweep | None' = None
  records: bool = False
  covariances: dict[tuple[int, str], np.ndarray] = dataclasses.field(default_factory=dict)
  targets: dict[tuple[int, str], np.ndarray] = dataclasses.field(default_factory=dict)
  gap: float = 0.0


def calibrate(
  activations: LayerActivations,
  weights: ChildWeights,
  streams: dict[int, Stream],
  start: int,
  h_BxLxD: np.ndarray,
  *,
  steps: CalibrationConfig = ALL_STEPS,
  sweep: Sweep | None = None,
  progress: Callable[[int], None] = lambda n: None,
) -> None:
  """Fits a child's linears to its parent, layer after layer.

  Args:
    activations: the parent's layers that the child stands for, and the tokens.
    weights: the child's, filled here: shared weights, relaxations, own layers.
    streams: the parent's by the child's depth, from `start` on; emptied meanwhile.
    start: the first depth that is fitted; those before it stay as they are.
    h_BxLxD: the residual stream before it.
    steps: which steps to take.
    sweep: which sweep this is, filled here; the only one by default.
    progress: called with the number of layers done since the last call.
  """
  child, sweep = weights.config, sweep or Sweep()
  R, N = child.loops, child.block_layers
  at = {child.depth_of(r, n): (r, n) for r in range(R) for n in range(N)}
  for depth in range(start):
    if depth in at:  # Of a vanilla child.
      weights.keep(at[depth], activations.layer(depth))
  for depth in range(start, child.depth):
    layer, end_BxLxD = fit_layer(
      activations, weights, depth, at.get(depth), streams, h_BxLxD, steps, sweep
    )
    if depth not in at:
      weights.own[depth] = jax.tree.map(np.asarray, layer)
      for name, codes in weights.own_codes.pop(depth, {}).items():
        set_kernel(weights.own[depth], name, codes)
    weights.drift.append(_gap(end_BxLxD, streams[depth].end))
    if depth == child.depth - 1:
      rows = np.concatenate([np.r_[rows] for rows in _checked(activations)])
      sweep.gap = _gap(end_BxLxD[rows], streams[depth].end[rows])
    del streams[depth]  # A layer looks ahead to later loops, never back.
    h_BxLxD = end_BxLxD
    progress(1)


def fit_layer(
  activations: LayerActivations,
  weights: ChildWeights,
  depth: int,
  position: tuple[int, int] | None,
  streams: dict[int, Stream],
  h_BxLxD: np.ndarray,
  steps: CalibrationConfig,
  sweep: Sweep,
):
  """Fits one depth, site after site; returns its merged layer and output."""
  c, child, norms = activations.config, weights.config, weights.norms_at
  R = child.loops
  stream = Stream(h_BxLxD, np.empty_like(h_BxLxD), np.empty_like(h_BxLxD))
  later = {}
  if position is not None and position[0] == 0:
    depths = [child.depth_of(r, position[1]) for r in range(1, R)]
    if steps.permute_units:
      activations.align(depth, depths, streams)
    weights.take_vectors(position[1], [activations.layer(d) for d in (depth, *depths)])
    later = {d: with_norms(c, activations.layer(d), norms(d)) for d in depths}
  parent = activations.layer(depth)
  layer = with_norms(c, parent, norms(depth))
  # What is seen of the inputs: the child's, or (for experiments) the parent's.
  seen, source = (stream, layer)
  if not steps.child_inputs:
    seen, source = streams[depth], with_norms(c, parent, norms(depth))
  refits = steps.child_inputs and steps.parent_outputs
  if position is None:
    refits = refits and steps.refit_coda

  def of_later(site: str, d: int):
    if sweep.before is not None:
      return sweep.before.covariances[d, site]
    c_IxI = activations.covariance(site, later[d], d, streams[d])
    return least_squares.damp(c_IxI, steps.ridge)

  def wanted_later(name: str, d: int):
    return sweep.before.targets[d, name] if sweep.before else kernel_of(later[d], name)

  for site, names in sites(c).items():
    xs = [activations.inputs(site, source, depth, rows, seen) for rows in activations.chunks]
    found = _targets(activations, site, parent, layer, depth, streams[depth], stream, xs)
    c_IxI = least_squares.damp(found[0][0] + found[1][0], steps.ridge)
    cs_RxIxI = jnp.stack([c_IxI, *(of_later(site, d) for d in later)])
    records = sweep.records and position is not None and position[0] > 0
    if records:
      sweep.covariances[depth, site] = np.asarray(c_IxI)
    for name in names:
      target_IxO = kernel_of(layer, name)
      if refits:
        (c1, k1), (c2, k2) = [(c, crosses[name]) for c, crosses in found]
        target_IxO = least_squares.refit(c1 + c2, k1 + k2, c2, k2, target_IxO)
      if position is not None:
        if records:
          sweep.targets[depth, name] = np.asarray(target_IxO)
        ws_RxIxO = jnp.stack([target_IxO, *(wanted_later(name, d) for d in later)])
        args = weights, name, position, cs_RxIxI, ws_RxIxO, steps
        target_IxO = _fit_position(*args, _inputs(weights, name, xs))
      else:
        target_IxO = weights.round_own(depth, name, target_IxO)
      set_kernel(layer, name, target_IxO)
    if site.endswith('out'):
      old, new = stream[:2] if site == 'attn_out' else stream[1:]
      for rows, x_BxLxI in zip(activations.chunks, xs, strict=True):
        new[rows] = activations.write(site, layer, x_BxLxI, old[rows])
      if position is not None and weights.is_closed(names[0], position):
        goal = streams[depth].middle if site == 'attn_out' else streams[depth].end
        if not _helps(activations, old, new, goal):
          set_kernel(layer, names[0], weights.leave_out(names[0], position, c_IxI))
          new[:] = old
  if c.num_experts:
    if position is not None:
      tied = {depth: (source, seen)} | {d: (other, streams[d]) for d, other in later.items()}
      looks = [activations.experts(*at, d) for d, at in tied.items()]
      _fit_experts(c, weights, layer, looks, position, steps)
    write_experts = lambda: activations.write_mlp(layer, depth, stream)
    write_experts()
    if position is not None and weights.is_closed('down', position):
      if not _helps(activations, stream.middle, stream.end, streams[depth].end):
        _leave_out_experts(c, weights, layer, position)
        write_experts()
  return layer, stream.end


def _fit_experts(c: ModelConfig, weights: ChildWeights, layer, looks, position, steps) -> None:
  """Fits the experts of a layer at a position; see `rrt.convert.experts`."""
  r, n = position
  at = lambda e: (r, n * c.copies('up') + e)
  fit_one = lambda name, e, cs, ws: _fit_position(weights, name, at(e), cs, ws, steps)
  experts.fit(c, layer, looks, steps.ridge, fit_one)


def _leave_out_experts(c: ModelConfig, weights: ChildWeights, layer, position) -> None:
  """Makes closed experts write nothing."""
  (r, n), E = position, c.copies('down')
  down = layer['mlp']['down']
  zeros = [weights.leave_out('down', (r, n * E + e), None) for e in range(E)]
  layer['mlp']['down'] = {**down, 'kernels': jnp.stack(zeros)}


def _targets(activations, site, parent, layer, depth, wanted: Stream, own, xs):
  """E[x^T x], and by linear E[x^T (y - x W)] of the child's inputs x.

  y is the parent's output on its own inputs; for what writes to the residual
  stream, the parent's stream less the child's.

  Returns:
    A pair of these, of the tokens to fit on and of those to check on; their
    sum is over all tokens.
  """
  size, last = xs[0].shape[-1], len(xs) - 1
  zeros = lambda columns: jnp.zeros((size, columns))
  columns = size if site.endswith('in') else activations.config.d_model
  sums = [[zeros(size), zeros(columns)] for _ in range(2)]
  part, name = site.split('_')[0], SITES[site][0]
  post = layer.get(f'{part}_post_norm', {}).get('scale')
  for i, (rows, x_BxLxI) in enumerate(zip(activations.chunks, xs, strict=True)):
    some = sums[_is_checked(i, last)]
    if site.endswith('in'):
      target_BxLxI = activations.inputs(site, parent, depth, rows, wanted)
      some[:] = gather(*some, x_BxLxI, target_BxLxI)
      continue
    if site == 'attn_out':
      gap_BxLxD = wanted.middle[rows] - own.start[rows]
    else:
      gap_BxLxD = wanted.end[rows] - own.middle[rows]
    y_BxLxD = None
    if post is not None:
      y_BxLxD = activations.inputs(site, parent, depth, rows, wanted)
      y_BxLxD = y_BxLxD @ kernel_of(parent, name) + bias_of(parent, name)
    kernel_IxD, bias_1x1xD = kernel_of(layer, name), bias_of(layer, name)
    some[:] = gather_out(
      activations.config, *some, x_BxLxI, kernel_IxD, bias_1x1xD, post, gap_BxLxD, y_BxLxD
    )
  found = []
  for c_IxI, k in sums:
    c_IxI, k = c_IxI / activations.tokens, k / activations.tokens
    if site.endswith('out'):
      found.append((c_IxI, {name: k}))
      continue
    crosses = {}
    for n in sites(activations.config)[site]:
      w_IxO = kernel_of(parent, n)
      crosses[n] = k @ w_IxO + c_IxI @ (w_IxO - kernel_of(layer, n))
    found.append((c_IxI, crosses))
  return found


def _gap(h_BxLxD, goal_BxLxD) -> float:
  """The squared distance of two streams, relative to the second's size."""
  gap = np.sum((h_BxLxD - goal_BxLxD) ** 2, dtype=np.float64)
  return float(gap / max(np.sum(goal_BxLxD**2, dtype=np.float64), TINY))


def _checked(activations: LayerActivations) -> list[slice]:
  """The rows that fits are checked on."""
  last = len(activations.chunks) - 1
  return [rows for i, rows in enumerate(activations.chunks) if _is_checked(i, last)]


def _is_checked(chunk: int, last: int) -> bool:
  """Whether a chunk's tokens are left out of a first fit, to check it on."""
  return chunk % CHECKED == CHECKED - 1 or (last < CHECKED - 1 and chunk == last)


def _helps(activations: LayerActivations, old_BxLxD, new_BxLxD, goal_BxLxD) -> bool:
  """Whether what was written brings the checked tokens nearer to the goal."""
  gain = 0.0
  for rows in _checked(activations):
    gap = lambda h_BxLxD, rows=rows: float(np.sum((h_BxLxD[rows] - goal_BxLxD[rows]) ** 2))
    gain += gap(old_BxLxD) - gap(new_BxLxD)
  return gain > 0


def _inputs(weights: ChildWeights, name: str, xs):
  """Inputs to fit on and to check on, [T, I] each, for relaxations that need them."""
  if not any(r.fits_inputs and r.leaves(weights.hosts[name]) for r in weights.config.relax):
    return None
  flat = lambda some: jnp.concatenate([jnp.asarray(x).reshape(-1, x.shape[-1]) for x in some])
  last = len(xs) - 1
  checked = [x for i, x in enumerate(xs) if _is_checked(i, last)]
  fitted = [x for i, x in enumerate(xs) if not _is_checked(i, last)]
  return (flat(fitted), flat(checked)) if fitted and checked else None


def _fit_position(weights: ChildWeights, name, position, cs_RxIxI, ws_RxIxO, steps, inputs=None):
  """Fits one linear at a position towards ws[0]; at its first loop W' as well."""
  r, n = position
  if r == 0:
    shared_IxO = ws_RxIxO[0] if len(ws_RxIxO) == 1 else None
    if steps.tie_jointly and shared_IxO is None:
      shared_IxO = weights.tie(name, n, cs_RxIxI, ws_RxIxO)
    if shared_IxO is None:
      shared_IxO = least_squares.weighted_mean(cs_RxIxI, ws_RxIxO)
    weights.shared[name][n] = shared_IxO
    if weights.config.weights != 'float':
      round_shared(weights, name, n, cs_RxIxI, ws_RxIxO)
  return jnp.asarray(weights.fit(name, position, ws_RxIxO[0], cs_RxIxI[0], inputs))
