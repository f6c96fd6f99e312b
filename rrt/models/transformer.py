"""The model: embed, prelude, block x loops, coda, norm, head.

    tokens - embed - prelude -+-> block (N layers) -+- coda - norm - head
                              +------ R loops ------+

One class is the untied parent (`loops=1`), its recursive child and the
reduced-size baseline. The parameters keep one layout: a layer's leaves are
stacked on a leading axis, and what differs by loop has a loops axis behind it.
Whether scans or python loops run it is a choice at run time.

B batch, L query length, D model, V vocabulary, P prelude, N block, C coda
layers, R loops, T rotary tables.
"""

from typing import Any, NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.models.attention import AttnSpec, Context
from rrt.models.cache import Cache
from rrt.models.layers import Norm, partitioned, quantized_init, rope_tables
from rrt.models.relaxed import AUX, collect
from rrt.models.stack import REMAT, Stack, at_index, in_form_of, unstack
from rrt.ops.matmul import float32_is_float32
from rrt.ops.quantize import dense, rows
from rrt.relax.base import NO_AUX, Aux
from rrt.sharding import constrain, gather


class Output(NamedTuple):
  """Output of a forward pass; `logits` computes the logits from it.

  Attributes:
    hidden_BxLxD: after the final norm.
    loops_RxBxLxD: the block's output after each loop, if requested.
    cache: the written cache, if one was given.
    exits_RxBxLxD: after coda and final norm with all tokens leaving after each
      loop, if requested; the last is `hidden_BxLxD`.
    aux: losses and statistics of the relaxations, if requested.
  """

  hidden_BxLxD: jax.Array
  loops_RxBxLxD: jax.Array | None
  cache: Cache | None
  exits_RxBxLxD: jax.Array | None = None
  aux: Aux = NO_AUX


class Transformer(nn.Module):
  """A decoder-only language model of any recursion.

  Attributes:
    config: the model's shape.
    dtype: of activations and of weights inside matmuls.
    remat: what a training step recomputes: 'none', 'full' (all but a layer's
      input), 'dots' (all but the outputs of its matmuls).
    scan: run layers and loops by `nn.scan` over stacked parameters, or
      unrolled in python over `unstack(params)`.
  """

  config: ModelConfig
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan: bool = True

  @nn.compact
  def __call__(
    self,
    tokens_BxL,
    positions_BxL=None,
    segment_ids_BxL=None,
    cache: Cache | None = None,
    loops: int | None = None,
    return_loops: bool = False,
    return_exits: bool = False,
    key=None,
  ) -> Output:
    """Runs tokens through all layers; see `forward`."""
    c = self.config
    R = c.loops if loops is None else loops
    return_loops |= return_exits
    check_loops(c, R, return_loops)
    if return_exits and cache is not None:
      raise ValueError('return_exits takes no cache.')
    if self.remat not in REMAT:
      raise InputError(f'remat={self.remat!r}: must be one of {tuple(REMAT)}.')
    slots = cache.slots if cache else 0
    context = make_context(c, tokens_BxL, positions_BxL, segment_ids_BxL, slots)._replace(key=key)
    x_BxLxD = self.embed(tokens_BxL)
    prelude, block, coda = cache or Cache(None, None, None)
    shallow, looped, deep = attn_specs(c)

    def stack(count, name, **kwargs):
      return Stack(c, count, remat=self.remat, scan=self.scan, name=name, **kwargs)

    if c.prelude_layers:
      x_BxLxD, (prelude, _) = stack(c.prelude_layers, 'prelude')(
        x_BxLxD, (prelude, shallow, 0), context
      )
    h_RxBxLxD = None
    if c.order == 'sequence':
      by_layer = jax.tree.map(lambda t: t.swapaxes(0, 1), looped)
      x_BxLxD, (block, _) = stack(c.block_layers, 'block', looped=True, repeats=R)(
        x_BxLxD, (_swap(block), by_layer, 0), context
      )
      block = _swap(block)
    elif self.scan:
      run = nn.scan(
        Stack,
        variable_broadcast='params',
        variable_axes={AUX: 0},
        split_rngs={'params': False},
        in_axes=(0, nn.broadcast),
        length=R,
      )(
        c, c.block_layers, looped=True, keep=return_loops, remat=self.remat, scan=True, name='block'
      )
      first = jax.tree.map(lambda t: t[:R], looped)
      x_BxLxD, (block, h_RxBxLxD) = run(x_BxLxD, (block, first, jnp.arange(R)), context)
    else:
      run = stack(c.block_layers, 'block', looped=True, keep=return_loops)
      new, states = [], []
      for r in range(R):
        xs = (at_index(block, r), at_index(looped, r), r)
        x_BxLxD, (kv, h_BxLxD) = run(x_BxLxD, xs, context)
        new.append(kv)
        states.append(h_BxLxD)
      block = in_form_of(block, new)
      h_RxBxLxD = jnp.stack(states) if return_loops else None
    if return_exits:
      # Each loop's output goes through the coda as separate rows.
      x_BxLxD, context = _fold(h_RxBxLxD), context.repeat_rows(R)
    if c.coda_layers:
      x_BxLxD, (coda, _) = stack(c.coda_layers, 'coda')(x_BxLxD, (coda, deep, 0), context)
    if not c.end_norm:
      x_BxLxD = Norm(c, c.d_model, name='final_norm')(x_BxLxD)
    self.make_head()
    if c.exit_gate:  # The engine reads it.
      ExitGate(c.d_model, name='exit_gate')()
    cache = None if cache is None else Cache(prelude, block, coda)
    if return_exits:
      exits_RxBxLxD = _unfold(x_BxLxD, R)
      return Output(exits_RxBxLxD[-1], h_RxBxLxD, cache, exits_RxBxLxD)
    return Output(x_BxLxD, h_RxBxLxD, cache)

  def embed(self, tokens_BxL):
    """Token embeddings in the compute dtype, [B, L, D]."""
    c = self.config
    init = nn.initializers.normal(c.d_model**-0.5)
    if c.weights != 'float':
      init = quantized_init(init, 'int8', axis=-1)
    init = partitioned(init, ('vocab', 'embed'), group_axis=-1)
    table_VxD = Table(init, (c.vocab_size, c.d_model), name='embed')()
    if not isinstance(table_VxD, dict):
      # Whole rows: from parts of rows the partitioner would make every row on every device.
      # Behind the gather as well: the gradient's rows are then added up where they arise.
      table_VxD = constrain(gather(table_VxD, ('vocab', 'embed')), ('vocab', None))
    x_BxLxD = embed(c, table_VxD, tokens_BxL, self.dtype)
    return constrain(x_BxLxD, ('batch', 'length', 'act_embed'))

  def make_head(self):
    """The untied head's parameters; `logits` applies them."""
    c = self.config
    if not c.tie_embeddings:
      init = nn.initializers.normal(c.d_model**-0.5)
      if c.weights != 'float':
        init = quantized_init(init, 'int8')
      init = partitioned(init, ('embed', 'vocab'))
      Table(init, (c.d_model, c.vocab_size), 'kernel', name='head')()


class ExitGate(nn.Module):
  """The parameters of a model's own exit gate."""

  d_model: int

  @nn.compact
  def __call__(self):
    normal = nn.initializers.normal(self.d_model**-0.5)
    init = nn.with_logical_partitioning(normal, ('embed', None))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
    kernel = self.param('kernel', init, (self.d_model, 1), jnp.float32)
    return kernel, self.param('bias', zeros, (1,), jnp.float32)


class Table(nn.Module):
  """One array of parameters."""

  init_fn: nn.initializers.Initializer
  shape: tuple[int, int]
  leaf: str = 'table'

  @nn.compact
  def __call__(self):
    return self.param(self.leaf, self.init_fn, self.shape, jnp.float32)


def _fold(h_RxBxLxD):
  """Loops as rows, [B * R, L, D]: a row's loops stay on its own device."""
  R, B, L, D = h_RxBxLxD.shape
  return h_RxBxLxD.swapaxes(0, 1).reshape(B * R, L, D)


def _unfold(x_BRxLxD, R: int):
  """Rows as loops again, [R, B, L, D]."""
  return x_BRxLxD.reshape(-1, R, *x_BRxLxD.shape[1:]).swapaxes(0, 1)


def _swap(block):
  """Block KVs by loop and layer, as KVs by layer and loop, and back."""
  if block is None:
    return None
  if type(block) is tuple:
    return tuple(zip(*block, strict=True))
  return jax.tree.map(lambda t: t.swapaxes(0, 1), block)


def check_loops(config: ModelConfig, loops: int, return_loops: bool = False):
  """Raises InputError unless the model can run this many loops."""
  if not 1 <= loops <= config.loops:
    raise InputError(f'loops={loops}: this model runs from 1 to {config.loops} loops.')
  if return_loops and config.order != 'cycle':
    raise InputError(
      f'order={config.order!r}: only the cycle order has an output after '
      'each loop; convert with order=cycle.'
    )


def make_context(
  config: ModelConfig, tokens_BxL, positions_BxL=None, segments_BxL=None, length: int = 0
) -> Context:
  """Positions (0.. by default), segments and rotary tables of a batch.

  `length` is that of the texts, for tables that depend on it; by default L.
  """
  if positions_BxL is None:
    positions_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1])[None, :], tokens_BxL.shape)
  cos, sin = rope_tables(config, positions_BxL, length)
  real_BxL = None if segments_BxL is None else segments_BxL > 0
  return Context(positions_BxL, segments_BxL, cos, sin, real_BxL=real_BxL)


def attn_specs(config: ModelConfig) -> tuple[AttnSpec, AttnSpec, AttnSpec]:
  """Windows and rotary tables of prelude [P], block [R, N] and coda [C]."""
  P, L = config.prelude_layers, config.depth

  def by_part(values):
    if len(set(values)) <= 1 and not any(values):
      return None, None, None
    v = np.asarray(values, np.int32)
    return v[:P], v[config.block_depths()], v[L - config.coda_layers :]

  windows, ropes = by_part(config.windows), by_part(config.rope_index)
  prelude, block, coda = (
    AttnSpec(*map(_device, part)) for part in zip(windows, ropes, strict=True)
  )
  return prelude, block, coda


def _device(values):
  return None if values is None else jnp.asarray(values)


def forward(
  config: ModelConfig,
  params,
  tokens_BxL,
  *,
  positions_BxL=None,
  segment_ids_BxL=None,
  cache: Cache | None = None,
  loops: int | None = None,
  return_loops: bool = False,
  return_exits: bool = False,
  return_aux: bool = False,
  key=None,
  dtype=jnp.float32,
  remat: str = 'none',
  scan: bool = True,
) -> Output:
  """Runs tokens through the model, up to the final norm.

  Args:
    config: the model's shape.
    params: as `init.init_params` gives them; for `scan=False` unstacked or not.
    tokens_BxL: int token ids.
    positions_BxL: of each token in its document; 0.. by default. With a
      cache, the slots the tokens are written to.
    segment_ids_BxL: tokens attend within equal ids only; 0 is padding.
    cache: from `init_cache`; attention then reads it instead of the batch.
    loops: how many loops to run, 1..R; None for all.
    return_loops: also return the block's output after each loop.
    return_exits: also return what the head would read, had all tokens left
      after each loop; takes no cache.
    return_aux: also return what the relaxations return besides their outputs.
    key: for the noise of relaxations that have some in training; None for none.
    dtype: of the computation.
    remat: 'none', 'full' or 'dots'.
    scan: scan over layers and loops, or unroll them.

  Raises:
    InputError: a loop count that the model does not allow.
  """
  chex.assert_rank(tokens_BxL, 2)
  for given in (positions_BxL, segment_ids_BxL):
    if given is not None:
      chex.assert_equal_shape([given, tokens_BxL])
  if not scan:
    params = unstack(params)
  model: Any = Transformer(config, dtype, remat, scan)
  where = (tokens_BxL, positions_BxL, segment_ids_BxL, cache)
  inputs = (*where, loops, return_loops, return_exits, key)
  with float32_is_float32(dtype):
    if not return_aux:
      return model.apply({'params': params}, *inputs)
    out, sown = model.apply({'params': params}, *inputs, mutable=[AUX])
  return out._replace(aux=collect(config, sown.get(AUX, {}), scan))


def embed(config: ModelConfig, table_VxD, tokens_BxL, dtype=jnp.float32):
  """Rows of the embedding table, scaled where the family does so."""
  x_BxLxD = dense(rows(table_VxD, tokens_BxL), dtype)
  if config.scale_embeddings:
    x_BxLxD *= jnp.asarray(config.d_model**0.5, dtype)
  return x_BxLxD
