"""Activations of a layer on the calibration tokens, one layer at a time.

`LayerActivations` computes the inputs of each linear: of q, k and v; of o; of
gate and up; of down. It works on chunks of rows, so that device memory does not
grow with the number of tokens. Host memory does: `LayerActivations.run` keeps
the residual stream after attention and after the MLP at each depth that it
returns, 2 x tokens x D float32 a depth.

B rows, L length, T tokens, D model, F hidden units, I inputs, O outputs.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert import experts, permute
from rrt.models.attention import Attention, AttnSpec, Context
from rrt.models.experts import ExpertMlp
from rrt.models.layers import HERE, Mlp, Norm
from rrt.models.transformer import make_context
from rrt.relax.hosts import part_of

# Where linears read: inputs in the order in which a layer makes them.
SITES = {
  'attn_in': ('q', 'k', 'v'),
  'attn_out': ('o',),
  'mlp_in': ('gate', 'up'),
  'mlp_out': ('down',),
}
CHUNK_TOKENS = 2048  # Tokens whose activations are in memory at a time.
CHECKED = 4  # One chunk in so many is what `least_squares.refit` checks on.
ALIGN_CHUNKS = 2  # How many serve to compare hidden units.


def sites(config: ModelConfig) -> dict[str, tuple[str, ...]]:
  """`SITES` of a model, whose MLP may have no gate, or experts (`rrt.convert.experts`)."""
  has = {name for name in config.shapes() if config.copies(name) == 1}
  found = {site: tuple(n for n in names if n in has) for site, names in SITES.items()}
  return {site: names for site, names in found.items() if names}


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


def with_norms(config: ModelConfig, layer, norms):
  """A layer tree with other gains and biases, its linears rescaled to match the gains.

  Where a pre-norm's gain changes, the rows of the linears that read it are
  divided by the change: the layer computes what it did. (Gains of post-norms
  and of q and k have no linear behind them to make up for a change.)
  """
  new = {**layer, **{k: v for k, v in norms.items() if k.endswith('_norm')}}
  for part in ('attn', 'mlp'):
    new[part] = dict(layer[part])
    for name, leaves in norms.get(part, {}).items():
      new[part][name] = {**layer[part][name], **leaves}
    if not config.pre_norms:
      continue
    old_D, new_D = (
      tree[f'{part}_norm']['scale'] + float(config.unit_offset_norm) for tree in (layer, norms)
    )
    weak_D = jnp.abs(new_D) <= 1e-3 * jnp.sqrt(jnp.mean(new_D**2))
    ratio_D = jnp.where(weak_D, 1.0, old_D / jnp.where(weak_D, 1.0, new_D))
    for name in SITES[f'{part}_in']:
      leaf = 'kernels' if config.copies(name) > 1 else 'kernel'
      if name in config.shapes():
        kernel = jnp.asarray(layer[part][name][leaf])
        rescaled = jnp.asarray(ratio_D).reshape(*(1,) * (kernel.ndim - 2), -1, 1) * kernel
        new[part][name] = {**new[part][name], leaf: rescaled}
  return new


def kernel_of(layer, name: str):
  """One of the seven linears of a layer tree, [I, O]."""
  return layer[part_of(name)][name]['kernel']


def set_kernel(layer, name: str, kernel_IxO) -> None:
  """Replaces one of the seven linears of a layer tree, in place."""
  part = layer[part_of(name)]
  part[name] = {**part[name], 'kernel': kernel_IxO}


def bias_of(layer, name: str):
  """The bias of one of the seven linears, [1, 1, O]; [1, 1, 1] of 0 without one."""
  return np.asarray(layer[part_of(name)][name].get('bias', 0.0), np.float32).reshape(1, 1, -1)


def embedded(config: ModelConfig, table_VxD, tokens_BxL) -> np.ndarray:
  """The input of the first layer, float32 [B, L, D] on the host."""
  x_BxLxD = np.asarray(table_VxD)[tokens_BxL].astype(np.float32)
  scale = config.d_model**0.5 if config.scale_embeddings else 1.0
  return x_BxLxD * np.float32(scale)


# ------------------------------------------------- one layer, taken to pieces


@functools.partial(jax.jit, static_argnums=0)
def _norm(config: ModelConfig, norm, x_BxLxD):
  return Norm(config, config.d_model).apply({'params': norm}, x_BxLxD)


@functools.partial(jax.jit, static_argnums=0)
def _mixed(config: ModelConfig, attn, x_BxLxD, attn_spec: AttnSpec, context: Context):
  """What the output projection reads."""
  module = Attention(config)
  params = {'params': attn}
  return module.apply(params, x_BxLxD, None, attn_spec, HERE, context, method='mixed')[0]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, mlp, x_BxLxD):
  """What the down projection reads; of experts their weighted sum, [B, L, D]."""
  if config.num_experts:
    return ExpertMlp(config).apply({'params': mlp}, x_BxLxD)
  return Mlp(config).apply({'params': mlp}, x_BxLxD, method='hidden')


@functools.partial(jax.jit, static_argnums=0)
def _add(config: ModelConfig, post, kernel_IxD, bias_1x1xD, x_BxLxI, h_BxLxD):
  """The residual stream after a linear (and its post-norm) wrote to it; None for the identity."""
  y_BxLxD = x_BxLxI if kernel_IxD is None else x_BxLxI @ kernel_IxD + bias_1x1xD
  if post is not None:
    y_BxLxD = _norm(config, post, y_BxLxD)
  return h_BxLxD + y_BxLxD


@jax.jit
def gather(c_IxI, k_IxI, own_BxLxI, wanted_BxLxI):
  """Adds x^T x and x^T (wanted - x) of a chunk."""
  x_TxI = own_BxLxI.reshape(-1, own_BxLxI.shape[-1])
  e_TxI = (wanted_BxLxI - own_BxLxI).reshape(x_TxI.shape)
  return c_IxI + x_TxI.T @ x_TxI, k_IxI + x_TxI.T @ e_TxI


def _size(config: ModelConfig, y):
  """What a norm divides by."""
  return jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + config.norm_eps)


@functools.partial(jax.jit, static_argnums=0)
def gather_out(
  config: ModelConfig, c_IxI, k_IxD, x_BxLxI, kernel_IxD, bias_1x1xD, post_D, gap_BxLxD, y_BxLxD
):
  """Adds x^T x and x^T (target - x W - b) of a chunk, for o and down.

  Without post-norms the target is the gap to the parent's stream. A
  post-norm divides by the size of its input and multiplies by a gain, so
  tokens are weighted by 1 / size and targets divided by the gain, at the
  size of the parent's y; where a gain is next to nothing, y is the target.
  """
  x_TxI = x_BxLxI.reshape(-1, x_BxLxI.shape[-1])
  gap_TxD = gap_BxLxD.reshape(-1, gap_BxLxD.shape[-1])
  bias_TxD = bias_1x1xD[0]
  if post_D is not None:
    y_TxD = y_BxLxD.reshape(gap_TxD.shape)
    size_Tx1 = _size(config, y_TxD)
    gain_D = post_D + 1.0 if config.unit_offset_norm else post_D
    weak_D = jnp.abs(gain_D) <= 1e-2 * jnp.sqrt(jnp.mean(gain_D**2))
    gain_D = jnp.where(weak_D, 1.0, gain_D)
    gap_TxD = jnp.where(weak_D[None, :], y_TxD / size_Tx1, gap_TxD / gain_D[None, :])
    x_TxI, bias_TxD = x_TxI / size_Tx1, bias_TxD / size_Tx1
  e_TxD = gap_TxD - x_TxI @ kernel_IxD - bias_TxD
  return c_IxI + x_TxI.T @ x_TxI, k_IxD + x_TxI.T @ e_TxD


class LayerActivations:
  """The calibration tokens' way through a parent and its child.

  Attributes:
    config: the parent's, untied.
    chunks: slices of rows that are in memory together.
    orders: depth -> (order, signs) of the hidden units of its MLP, where
      they were lined up with another layer's; with experts their order before these.
  """

  def __init__(self, config: ModelConfig, layers: Callable[[int], Any], tokens_BxL):
    self.config, self._layers = config, layers
    self.orders: dict[int, tuple[np.ndarray, ...]] = {}
    rows, length = tokens_BxL.shape
    step = max(1, min(CHUNK_TOKENS // length, rows // CHECKED))
    self.chunks = [slice(i, i + step) for i in range(0, rows, step)]
    self.tokens = rows * length
    self._tokens_BxL = tokens_BxL

  def layer(self, depth: int) -> Any:
    """The parent's layer tree at a depth, its hidden units lined up."""
    layer = self._layers(depth)
    if depth in self.orders:
      reorder = experts.reorder if self.config.num_experts else permute.reorder
      layer = {**layer, 'mlp': reorder(layer['mlp'], *self.orders[depth])}
    return layer

  def context(self, rows: slice) -> Context:
    return make_context(self.config, jnp.asarray(self._tokens_BxL[rows]))

  def attn_spec(self, depth: int) -> AttnSpec:
    """Window and rotary table of a depth."""
    pick = lambda values: jnp.asarray(values[depth]) if values else None
    return AttnSpec(pick(self.config.windows), pick(self.config.rope_index))

  def inputs(self, site: str, layer, depth: int, rows: slice, stream: Stream):
    """What a site's linears read for a chunk of rows, [B, L, I]."""
    c = self.config
    if site.startswith('attn'):
      x_BxLxD = jnp.asarray(stream.start[rows])
      if c.pre_norms:
        x_BxLxD = _norm(c, layer['attn_norm'], x_BxLxD)
      if site == 'attn_in':
        return x_BxLxD
      context, attn_spec = self.context(rows), self.attn_spec(depth)
      return _mixed(c, layer['attn'], x_BxLxD, attn_spec, context)
    x_BxLxD = jnp.asarray((stream.start if c.parallel else stream.middle)[rows])
    if c.pre_norms:
      x_BxLxD = _norm(c, layer['mlp_norm'], x_BxLxD)
    return x_BxLxD if site == 'mlp_in' else _hidden(c, layer['mlp'], x_BxLxD)

  def write(self, site: str, layer, x_BxLxI, h_BxLxD):
    """The residual stream after attention or the MLP wrote to it."""
    part, component = ('attn', 'o') if site == 'attn_out' else ('mlp', 'down')
    post = layer.get(f'{part}_post_norm')
    kernel_IxD = None
    if self.config.copies(component) == 1:
      kernel_IxD = layer[part][component]['kernel']
    return _add(self.config, post, kernel_IxD, bias_of(layer, component), x_BxLxI, h_BxLxD)

  def step(self, depth: int, layer, start_BxLxD: np.ndarray) -> Stream:
    """One layer on all tokens."""
    stream = Stream(start_BxLxD, np.empty_like(start_BxLxD), np.empty_like(start_BxLxD))
    for rows in self.chunks:
      for site, old, new in (
        ('attn_out', stream.start, stream.middle),
        ('mlp_out', stream.middle, stream.end),
      ):
        x_BxLxI = self.inputs(site, layer, depth, rows, stream)
        new[rows] = self.write(site, layer, x_BxLxI, old[rows])
    return stream

  def run(
    self, embedded_BxLxD: np.ndarray, first: int, progress: Callable[[int], None] = lambda n: None
  ) -> dict[int, Stream]:
    """The parent's streams by depth, from `first` on."""
    streams = {}
    h_BxLxD = embedded_BxLxD
    for depth in range(self.config.depth):
      stream = self.step(depth, self.layer(depth), h_BxLxD)
      if depth >= first:
        streams[depth] = stream
      h_BxLxD = stream.end
      progress(1)
    return streams

  def covariance(self, site: str, layer, depth: int, stream: Stream):
    """E[x^T x] of a site's inputs, weighted as `gather_out` weights them."""
    c_IxI = 0.0
    for rows in self.chunks:
      x_BxLxI = self.inputs(site, layer, depth, rows, stream)
      if site.endswith('out') and self.config.post_norms:
        name = SITES[site][0]
        y_BxLxD = x_BxLxI @ kernel_of(layer, name) + bias_of(layer, name)
        x_BxLxI = x_BxLxI / _size(self.config, y_BxLxD)
      c_IxI = _gather_own(c_IxI, x_BxLxI)
    return c_IxI / self.tokens

  def align(self, first: int, others: list[int], streams: dict[int, Stream]):
    """Lines the hidden units of tied depths up with the first one's, once."""
    others = [depth for depth in others if depth not in self.orders]
    if not others:
      return
    if self.config.num_experts:
      few = self.chunks[:ALIGN_CHUNKS]
      seen = lambda depth: self.experts(self.layer(depth), streams[depth], depth, few)
      one = seen(first)
      for depth in others:
        self.orders[depth] = experts.match(self.config, one, seen(depth))
      return

    def look(depth):
      layer, tokens = self.layer(depth), 0
      c_IxI = power_F = jnp.zeros(())
      for rows in self.chunks[:ALIGN_CHUNKS]:
        x_BxLxI = self.inputs('mlp_in', layer, depth, rows, streams[depth])
        hidden_BxLxF = _hidden(self.config, layer['mlp'], x_BxLxI)
        c_IxI = _gather_own(c_IxI, x_BxLxI)
        power_F = power_F + jnp.sum(hidden_BxLxF**2, (0, 1))
        tokens += x_BxLxI.shape[0] * x_BxLxI.shape[1]
      mlp = {name: kernel_of(layer, name) for name in layer['mlp']}
      return mlp, c_IxI / tokens, power_F / tokens

    mlp, c_IxI, power_F = look(first)
    for depth in others:
      other, c2_IxI, power2_F = look(depth)
      self.orders[depth] = permute.match_units(mlp, other, c_IxI + c2_IxI, power_F, power2_F)

  def experts(self, layer, stream: Stream, depth: int, chunks: list[slice] | None = None):
    """A layer's experts on its inputs, of all chunks of rows or of some."""
    xs = [self.inputs('mlp_in', layer, depth, r, stream) for r in chunks or self.chunks]
    x_TxD = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in xs])
    return experts.look(self.config, layer['mlp'], x_TxD)

  def write_mlp(self, layer, depth: int, stream: Stream) -> None:
    """Fills the stream behind the MLP."""
    for rows in self.chunks:
      x_BxLxI = self.inputs('mlp_out', layer, depth, rows, stream)
      stream.end[rows] = self.write('mlp_out', layer, x_BxLxI, stream.middle[rows])


@jax.jit
def _gather_own(c_IxI, x_BxLxI):
  x_TxI = x_BxLxI.reshape(-1, x_BxLxI.shape[-1])
  return c_IxI + x_TxI.T @ x_TxI
