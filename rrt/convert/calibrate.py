"""Calibrated conversion: shared weights and LoRA fitted to real activations.

The paper averages the tied layers and takes a plain SVD of what is left,
which treats every direction of a layer's input alike. Here the parent reads a
few thousand tokens, and each linear of the child is fitted by least squares:

1. Errors count by what they do to the inputs a linear really gets, so means
   and SVDs are weighted with covariances (`rrt.convert.fit`).
2. The shared weight is chosen together with the low-rank terms of all loops,
   not before them (`fit.tie`).
3. Layer after layer, the child's own inputs are used, with the errors that
   earlier layers left in them, and the fit is towards the parent's outputs.
   What writes to the residual stream (o and down) also takes up the error
   that the stream has gathered so far.
4. The coda's layers are nobody's shared weights: they are refitted whole.

Nothing is trained by gradients. One layer's covariances are in memory at a
time, besides the parent's residual stream for the calibration tokens.

B rows, L length, D model, I inputs of a linear, O outputs, R loops, N layers.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert import fit
from rrt.models.attention import Attention, Context, Place
from rrt.models.layers import Mlp, rms_norm
from rrt.models.transformer import make_context

# Where linears read: inputs in the order in which a layer makes them.
SITES = {
  'attn_in': ('q', 'k', 'v'),
  'attn_out': ('o',),
  'mlp_in': ('gate', 'up'),
  'mlp_out': ('down',),
}
RIDGE = 1e-2
PULL = 1e-2
CODA_PULL = 1e9
CHUNK_TOKENS = 4096  # Tokens whose activations are in memory at a time.


def part_of(component: str) -> str:
  """The subtree that holds a component: 'attn' or 'mlp'."""
  return 'mlp' if component in ('gate', 'up', 'down') else 'attn'


class Stream(NamedTuple):
  """The residual stream at one depth, for all calibration tokens.

  Attributes:
    start: what the layer reads, [B, L, D] on the host.
    middle: after attention.
    end: after the MLP.
  """

  start: np.ndarray
  middle: np.ndarray
  end: np.ndarray


@dataclasses.dataclass
class Fitted:
  """What calibration found.

  Attributes:
    shared: component -> weights of the block's layers, [N, I, O].
    low_a: component -> [N, R, I, r].
    low_b: component -> [N, R, r, O].
    coda: layer trees in order.
    kept: component -> share of the residual's energy that the low-rank
      terms keep, [R, N].
    drift: by depth from the block on, `||child - parent||^2 / ||parent||^2`
      of the residual stream after it.
  """

  shared: dict[str, np.ndarray]
  low_a: dict[str, np.ndarray]
  low_b: dict[str, np.ndarray]
  coda: list[Any]
  kept: dict[str, np.ndarray]
  drift: list[float]


# ------------------------------------------------- one layer, taken to pieces


@functools.partial(jax.jit, static_argnums=0)
def _norm(config: ModelConfig, gain_D, x_BxLxD):
  return rms_norm(
    x_BxLxD, gain_D[None, None], config.norm_eps, config.unit_offset_norm
  )


@functools.partial(jax.jit, static_argnums=0)
def _mixed(config: ModelConfig, attn, x_BxLxD, place: Place, context: Context):
  """What the output projection reads."""
  module = Attention(config)
  params = {'params': attn}
  return module.apply(params, x_BxLxD, None, place, 0, context, method='mixed')[
    0
  ]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, mlp, x_BxLxD):
  """What the down projection reads."""
  return Mlp(config).apply({'params': mlp}, x_BxLxD, method='hidden')


@functools.partial(jax.jit, static_argnums=0)
def _add(config: ModelConfig, post_D, kernel_IxD, x_BxLxI, h_BxLxD):
  """The residual stream after a linear (and its post-norm) wrote to it."""
  y_BxLxD = x_BxLxI @ kernel_IxD
  if post_D is not None:
    y_BxLxD = _norm(config, post_D, y_BxLxD)
  return h_BxLxD + y_BxLxD


@jax.jit
def _gather(c_IxI, k_IxI, own_BxLxI, wanted_BxLxI):
  """Adds x^T x and x^T (wanted - x) of a chunk."""
  x_TxI = own_BxLxI.reshape(-1, own_BxLxI.shape[-1])
  e_TxI = (wanted_BxLxI - own_BxLxI).reshape(x_TxI.shape)
  return c_IxI + x_TxI.T @ x_TxI, k_IxI + x_TxI.T @ e_TxI


@functools.partial(jax.jit, static_argnums=0)
def _gather_out(
  config: ModelConfig,
  c_IxI,
  k_IxD,
  x_BxLxI,
  kernel_IxD,
  post_D,
  gap_BxLxD,
  y_BxLxD,
):
  """Adds x^T x and x^T (target - x W) of a chunk, for o and down.

  Without post-norms the target is the gap to the parent's stream. A
  post-norm divides by the size of its input and multiplies by a gain, so
  tokens are weighted by 1 / size and targets divided by the gain, at the
  size of the parent's y; where a gain is next to nothing, y is the target.
  """
  x_TxI = x_BxLxI.reshape(-1, x_BxLxI.shape[-1])
  gap_TxD = gap_BxLxD.reshape(-1, gap_BxLxD.shape[-1])
  if post_D is not None:
    y_TxD = y_BxLxD.reshape(gap_TxD.shape)
    size_Tx1 = jnp.sqrt(jnp.mean(y_TxD**2, -1, keepdims=True) + config.norm_eps)
    gain_D = post_D + 1.0 if config.unit_offset_norm else post_D
    weak_D = jnp.abs(gain_D) < 1e-2 * jnp.sqrt(jnp.mean(gain_D**2))
    gain_D = jnp.where(weak_D, 1.0, gain_D)
    gap_TxD = jnp.where(
      weak_D[None, :], y_TxD / size_Tx1, gap_TxD / gain_D[None, :]
    )
    x_TxI = x_TxI / size_Tx1
  e_TxD = gap_TxD - x_TxI @ kernel_IxD
  return c_IxI + x_TxI.T @ x_TxI, k_IxD + x_TxI.T @ e_TxD


class Walk:
  """The calibration tokens' way through a parent and its child.

  Attributes:
    config: the parent's, untied.
    layers: depth -> the parent's layer tree.
    chunks: slices of rows that are in memory together.
  """

  def __init__(
    self, config: ModelConfig, layers: Callable[[int], Any], tokens_BxL
  ):
    self.config, self.layers = config, layers
    rows, length = tokens_BxL.shape
    step = max(1, CHUNK_TOKENS // length)
    self.chunks = [slice(i, i + step) for i in range(0, rows, step)]
    self.tokens = rows * length
    self._tokens_BxL = tokens_BxL

  def context(self, rows: slice) -> Context:
    return make_context(self.config, jnp.asarray(self._tokens_BxL[rows]))

  def place(self, depth: int) -> Place:
    """Window and rotary table of a depth."""
    pick = lambda values: jnp.asarray(values[depth]) if values else None
    return Place(pick(self.config.windows), pick(self.config.rope_index))

  def inputs(self, site: str, layer, depth: int, rows: slice, stream: Stream):
    """What a site's linears read for a chunk of rows, [B, L, I]."""
    c = self.config
    if site.startswith('attn'):
      x_BxLxD = _norm(c, layer['attn_norm']['scale'], stream.start[rows])
      if site == 'attn_in':
        return x_BxLxD
      context, place = self.context(rows), self.place(depth)
      return _mixed(c, layer['attn'], x_BxLxD, place, context)
    x_BxLxD = _norm(c, layer['mlp_norm']['scale'], stream.middle[rows])
    return x_BxLxD if site == 'mlp_in' else _hidden(c, layer['mlp'], x_BxLxD)

  def write(self, site: str, layer, x_BxLxI, h_BxLxD):
    """The residual stream after attention or the MLP wrote to it."""
    part, component = ('attn', 'o') if site == 'attn_out' else ('mlp', 'down')
    post = layer.get(f'{part}_post_norm', {}).get('scale')
    kernel_IxD = layer[part][component]['kernel']
    return _add(self.config, post, kernel_IxD, x_BxLxI, h_BxLxD)

  def step(self, depth: int, layer, start_BxLxD: np.ndarray) -> Stream:
    """One layer on all tokens."""
    stream = Stream(
      start_BxLxD, np.empty_like(start_BxLxD), np.empty_like(start_BxLxD)
    )
    for rows in self.chunks:
      for site, old, new in (
        ('attn_out', stream.start, stream.middle),
        ('mlp_out', stream.middle, stream.end),
      ):
        x_BxLxI = self.inputs(site, layer, depth, rows, stream)
        new[rows] = self.write(site, layer, x_BxLxI, old[rows])
    return stream

  def run(
    self,
    embedded_BxLxD: np.ndarray,
    first: int,
    progress: Callable[[int], None] = lambda n: None,
  ) -> dict[int, Stream]:
    """The parent's streams by depth, from `first` on."""
    streams = {}
    h_BxLxD = embedded_BxLxD
    for depth in range(self.config.depth):
      stream = self.step(depth, self.layers(depth), h_BxLxD)
      if depth >= first:
        streams[depth] = stream
      h_BxLxD = stream.end
      progress(1)
    return streams

  def covariance(self, site: str, layer, depth: int, stream: Stream):
    """E[x^T x] of a site's inputs."""
    c_IxI = 0.0
    for rows in self.chunks:
      x_BxLxI = self.inputs(site, layer, depth, rows, stream)
      c_IxI = _gather_own(c_IxI, x_BxLxI)
    return c_IxI / self.tokens


@jax.jit
def _gather_own(c_IxI, x_BxLxI):
  x_TxI = x_BxLxI.reshape(-1, x_BxLxI.shape[-1])
  return c_IxI + x_TxI.T @ x_TxI


def calibrate(
  walk: Walk,
  child: ModelConfig,
  streams: dict[int, Stream],
  norms: Callable[[int], dict[str, Any]],
  *,
  ridge: float = RIDGE,
  progress: Callable[[int], None] = lambda n: None,
) -> Fitted:
  """Fits a child's linears to its parent, layer after layer.

  Args:
    walk: the parent and the calibration tokens.
    child: the child's config; its LoRA ranks say what is fitted.
    streams: from `walk.run(.., child.prelude_layers)`; emptied on the way.
    norms: depth -> the child's gains, as the norm leaves of a layer tree.
    ridge: how strongly covariances are shrunk towards their diagonals.
    progress: called with the number of layers done since the last call.
  """
  P, R, N = child.prelude_layers, child.loops, child.block_layers
  at = {child.depth_of(r, n): (r, n) for r in range(R) for n in range(N)}
  fitted = _empty(child)
  h_BxLxD = streams[P].start
  for depth in range(P, walk.config.depth):
    layer, end_BxLxD = _fit_layer(
      walk, child, fitted, depth, at.get(depth), streams, h_BxLxD, norms, ridge
    )
    if depth not in at:
      fitted.coda.append(jax.tree.map(np.asarray, layer))
    gap = np.sum((end_BxLxD - streams[depth].end) ** 2, dtype=np.float64)
    size = np.sum(streams[depth].end ** 2, dtype=np.float64)
    fitted.drift.append(float(gap / size))
    del streams[depth]  # A layer looks ahead to later loops, never back.
    h_BxLxD = end_BxLxD
    progress(1)
  return fitted


def spectra(
  walk: Walk,
  child: ModelConfig,
  streams: dict[int, Stream],
  norms: Callable[[int], dict[str, Any]],
  ridge: float = RIDGE,
) -> dict[str, np.ndarray]:
  """What a weighted mean would lack, for `budgets.spend`.

  Returns:
    component -> whitened singular values relative to the norm of the
    position's own output, [R, N, K].
  """
  R, N = child.loops, child.block_layers
  found = {
    name: np.zeros((R, N, min(shape))) for name, shape in child.shapes().items()
  }
  for n in range(N):
    depths = [child.depth_of(r, n) for r in range(R)]
    layers = [with_norms(walk.config, walk.layers(d), norms(d)) for d in depths]
    for site, names in SITES.items():
      cs_RxIxI = jnp.stack(
        [
          fit.damp(walk.covariance(site, layer, d, streams[d]), ridge)
          for d, layer in zip(depths, layers, strict=True)
        ]
      )
      for name in names:
        ws_RxIxO = jnp.stack([_kernel(layer, name) for layer in layers])
        mean_IxO = fit.weighted_mean(cs_RxIxI, ws_RxIxO)
        for r in range(R):
          sigma_K = fit.spectrum(cs_RxIxI[r], ws_RxIxO[r] - mean_IxO)[0]
          power = jnp.sum((cs_RxIxI[r] @ ws_RxIxO[r]) * ws_RxIxO[r])
          found[name][r, n] = np.asarray(sigma_K / jnp.sqrt(power))
  return found


def _empty(child: ModelConfig) -> Fitted:
  """Arrays for what is to be found."""
  R, N = child.loops, child.block_layers
  fitted = Fitted({}, {}, {}, [], {}, [])
  for name, (d_in, d_out) in child.shapes().items():
    fitted.shared[name] = np.zeros((N, d_in, d_out), np.float32)
    fitted.kept[name] = np.ones((R, N))
    width = child.lora.width(name) if child.lora else 0
    if width:
      fitted.low_a[name] = np.zeros((N, R, d_in, width), np.float32)
      fitted.low_b[name] = np.zeros((N, R, width, d_out), np.float32)
  return fitted


def with_norms(config: ModelConfig, layer, norms):
  """A layer tree with other gains, its linears rescaled to match.

  Where a pre-norm's gain changes, the rows of the linears that read it are
  divided by the change: the layer computes what it did. (Gains of post-norms
  and of q and k have no linear behind them to make up for a change.)
  """
  new = {**layer, **{k: v for k, v in norms.items() if k.endswith('_norm')}}
  for part in ('attn', 'mlp'):
    new[part] = {**layer[part], **norms.get(part, {})}
    old_D, new_D = (
      tree[f'{part}_norm']['scale'] + float(config.unit_offset_norm)
      for tree in (layer, norms)
    )
    weak_D = jnp.abs(new_D) < 1e-3 * jnp.sqrt(jnp.mean(new_D**2))
    ratio_D = jnp.where(weak_D, 1.0, old_D / jnp.where(weak_D, 1.0, new_D))
    for name in SITES[f'{part}_in']:
      _set(new, name, jnp.asarray(ratio_D)[:, None] * layer[part][name]['kernel'])
  return new


def _kernel(layer, name: str):
  return layer[part_of(name)][name]['kernel']


def _set(layer, name: str, kernel_IxO) -> None:
  layer[part_of(name)][name] = {'kernel': kernel_IxO}


def _fit_layer(
  walk: Walk,
  child: ModelConfig,
  fitted: Fitted,
  depth: int,
  position: tuple[int, int] | None,
  streams: dict[int, Stream],
  h_BxLxD: np.ndarray,
  norms: Callable[[int], dict[str, Any]],
  ridge: float,
):
  """Fits one depth, site after site; returns its merged layer and output."""
  c, R = walk.config, child.loops
  stream = Stream(h_BxLxD, np.empty_like(h_BxLxD), np.empty_like(h_BxLxD))
  parent = walk.layers(depth)
  layer = with_norms(c, parent, norms(depth))
  later = {}
  if position is not None and position[0] == 0:
    for d in (child.depth_of(r, position[1]) for r in range(1, R)):
      later[d] = with_norms(c, walk.layers(d), norms(d))
  for site, names in SITES.items():
    xs = [walk.inputs(site, layer, depth, rows, stream) for rows in walk.chunks]
    c_IxI, crosses = _targets(
      walk, site, parent, layer, depth, streams[depth], stream, xs
    )
    raw_IxI, c_IxI = c_IxI, fit.damp(c_IxI, ridge)
    pulled_IxI = fit.damp(raw_IxI, PULL if position is not None else CODA_PULL)
    cs_RxIxI = jnp.stack(
      [
        c_IxI,
        *(
          fit.damp(walk.covariance(site, other, d, streams[d]), ridge)
          for d, other in later.items()
        ),
      ]
    )
    for name in names:
      target_IxO = fit.refit(pulled_IxI, crosses[name], _kernel(layer, name))
      if position is not None:
        ws_RxIxO = jnp.stack(
          [target_IxO, *(_kernel(other, name) for other in later.values())]
        )
        target_IxO = _relax(child, fitted, name, position, cs_RxIxI, ws_RxIxO)
      _set(layer, name, target_IxO)
    if site.endswith('out'):
      old, new = stream[:2] if site == 'attn_out' else stream[1:]
      for rows, x_BxLxI in zip(walk.chunks, xs, strict=True):
        new[rows] = walk.write(site, layer, x_BxLxI, old[rows])
  return layer, stream.end


def _targets(walk, site, parent, layer, depth, wanted: Stream, own, xs):
  """E[x^T x], and by linear E[x^T (y - x W)] of the child's inputs x.

  y is the parent's output on its own inputs; for what writes to the residual
  stream, the parent's stream less the child's.
  """
  c_IxI = k_IxO = 0.0
  for rows, x_BxLxI in zip(walk.chunks, xs, strict=True):
    if site.endswith('in'):
      target = walk.inputs(site, parent, depth, rows, wanted)
      c_IxI, k_IxO = _gather(c_IxI, k_IxO, x_BxLxI, target)
      continue
    part = site[: -len('_out')]
    name = SITES[site][0]
    if site == 'attn_out':
      gap_BxLxD = wanted.middle[rows] - own.start[rows]
    else:
      gap_BxLxD = wanted.end[rows] - own.middle[rows]
    post = layer.get(f'{part}_post_norm', {}).get('scale')
    y_BxLxD = None
    if post is not None:
      y_BxLxD = walk.inputs(site, parent, depth, rows, wanted)
      y_BxLxD = y_BxLxD @ _kernel(parent, name)
    c_IxI, k_IxO = _gather_out(
      walk.config, c_IxI, k_IxO, x_BxLxI, _kernel(layer, name), post,
      gap_BxLxD, y_BxLxD,
    )  # fmt: skip
  c_IxI, k_IxO = c_IxI / walk.tokens, k_IxO / walk.tokens
  if site.endswith('out'):
    return c_IxI, {SITES[site][0]: k_IxO}
  crosses = {}
  for name in SITES[site]:
    w_IxO = _kernel(parent, name)
    crosses[name] = k_IxO @ w_IxO + c_IxI @ (w_IxO - _kernel(layer, name))
  return c_IxI, crosses


def _relax(child, fitted: Fitted, name, position, cs_RxIxI, ws_RxIxO):
  """W' + A B of a position, towards ws[0]; at its first loop W' as well."""
  r, n = position
  ranks_R = np.zeros(child.loops, np.int32)
  if child.lora:
    ranks_R = child.lora.table(name, child.loops, child.block_layers)[:, n]
  if r == 0:
    fitted.shared[name][n] = fit.tie(cs_RxIxI, ws_RxIxO, jnp.asarray(ranks_R))
  shared_IxO = jnp.asarray(fitted.shared[name][n])
  rest_IxO = ws_RxIxO[0] - shared_IxO
  width = child.lora.width(name) if child.lora else 0
  a_Ixw, b_wxO, kept = fit.low_rank(
    cs_RxIxI[0], rest_IxO, int(ranks_R[r]), width
  )
  fitted.kept[name][r, n] = kept
  if not width:
    return shared_IxO
  fitted.low_a[name][n, r] = a_Ixw
  fitted.low_b[name][n, r] = b_wxO
  return shared_IxO + a_Ixw @ b_wxO
