"""Prelude, block and coda as separate passes, for depth-wise batching.

A token runs through `run_prelude` (embedding and prelude), one `block_pass` a
loop, and `run_coda` (coda and final norm). Each row of a pass is a token of its
own sequence at its own position and, in the block, in its own loop; its result
does not depend on the other rows.

B batch, L query length, D model, R loops, N block layers.
"""

import chex
from flax import linen as nn
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models.attention import Attention, AttnSpec, Context
from rrt.models.layers import Norm
from rrt.models.stack import Stack, unstack
from rrt.models.transformer import attn_specs, embed
from rrt.ops.matmul import float32_is_float32
from rrt.relax.base import Place


def run_prelude(config: ModelConfig, params, tokens_BxL, context, kvs, dtype, scan: bool = False):
  """Embedding and prelude.

  Args:
    config: the model's shape.
    params: of the whole model; for `scan=False` unstacked.
    tokens_BxL: int token ids.
    context: from `make_context`.
    kvs: the rows' KVs by prelude layer, or None.
    dtype: of the computation.
    scan: as in `forward`.

  Returns:
    (x_BxLxD, kvs): the input of the block's first loop, and the written KVs.
  """
  chex.assert_rank(tokens_BxL, 2)
  x_BxLxD = embed(config, params['embed']['table'], tokens_BxL, dtype)
  if not config.prelude_layers:
    return x_BxLxD, kvs
  stack = Stack(config, config.prelude_layers, scan=scan)
  with float32_is_float32(dtype):
    x_BxLxD, (kvs, _) = stack.apply(
      {'params': params['prelude']}, x_BxLxD, (kvs, attn_specs(config)[0], 0), context
    )
  return x_BxLxD, kvs


def run_coda(config: ModelConfig, params, x_BxLxD, context: Context, kvs, scan: bool = False):
  """Coda and final norm of the block's output; arguments as for `run_prelude`.

  Returns:
    (hidden_BxLxD, kvs): the input of the head, and the written KVs.
  """
  with float32_is_float32(x_BxLxD.dtype):
    if config.coda_layers:
      stack = Stack(config, config.coda_layers, scan=scan)
      x_BxLxD, (kvs, _) = stack.apply(
        {'params': params['coda']}, x_BxLxD, (kvs, attn_specs(config)[2], 0), context
      )
    if config.end_norm:
      return x_BxLxD, kvs
    norm: nn.Module = Norm(config, config.d_model)
    return norm.apply({'params': params['final_norm']}, x_BxLxD), kvs


def block_pass(
  config: ModelConfig,
  params,
  x_BxLxD,
  loop,
  context: Context,
  kvs=None,
  remat: str = 'none',
  scan: bool = True,
):
  """One pass through a CYCLE block: the step that depth-wise batching runs.

  Args:
    config: the model's shape.
    params: of the whole model; for `scan=False` unstacked or not.
    x_BxLxD: the residual stream.
    loop: int scalar, or int [B]: each row's own loop.
    context: from `make_context`.
    kvs: the rows' KVs of their own loops by layer, or None.
    remat: as in `forward`.
    scan: as in `forward`.

  Returns:
    (x_BxLxD, kvs). A row's result does not depend on the other rows.
  """
  chex.assert_shape(x_BxLxD, (None, None, config.d_model))
  chex.assert_rank(jnp.asarray(loop), {0, 1})
  if not scan:
    params = unstack(params)
  stack = Stack(config, config.block_layers, looped=True, remat=remat, scan=scan)
  xs = (kvs, block_attn_specs(config, loop), loop)
  with float32_is_float32(x_BxLxD.dtype):
    x_BxLxD, (kvs, _) = stack.apply({'params': params['block']}, x_BxLxD, xs, context)
  return x_BxLxD, kvs


def block_attn_specs(config: ModelConfig, loop) -> AttnSpec:
  """Windows and rotary tables of the block's layers, [N] or [N, B].

  `loop` is an int scalar, or int [B].
  """
  window, rope = attn_specs(config)[1]
  of_loop = lambda t_RxN: None if t_RxN is None else t_RxN[loop].T
  return AttnSpec(of_loop(window), of_loop(rope))


def fill_pass(config: ModelConfig, params, x_BxLxD, loop, context, kvs):
  """Writes keys and values of x for a loop, without attention and MLP.

  State propagation (CALM, arXiv 2207.07061): the loops that a token skipped
  cache the projections of its hidden state at the exit.

  Args:
    config: the model's shape.
    params: of the whole model, from `unstack`.
    x_BxLxD: the block's output at the exit.
    loop: int scalar, or int [B]: the loop that each row writes.
    context: from `make_context`.
    kvs: the rows' KVs of these loops by layer.

  Returns:
    The written KVs.
  """
  all_specs = block_attn_specs(config, loop)
  new = []
  with float32_is_float32(x_BxLxD.dtype):
    for n in range(config.block_layers):
      of_layer = params['block'][f'layers_{n}']
      y_BxLxD = x_BxLxD
      if config.pre_norms:
        norm: nn.Module = Norm(config, config.d_model, looped=True)
        y_BxLxD = norm.apply({'params': of_layer['attn_norm']}, x_BxLxD, loop)
      attn_spec = AttnSpec(*(None if t is None else t[n] for t in all_specs))
      attention: nn.Module = Attention(config, looped=True)
      place = Place(loop, n)
      new.append(
        attention.apply(
          {'params': of_layer['attn']},
          y_BxLxD,
          kvs[n],
          attn_spec,
          place,
          context,
          method='write_kv',
        )
      )
  return tuple(new)
