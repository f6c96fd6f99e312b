"""A forward pass of whole texts with early exits: masked loops.

A token's exit depends on its own state and on the keys and values that earlier
tokens left in the loops that they skipped. Both are known loop by loop, so no
decoding is needed: in each loop all tokens run, and those that have left keep
their state. The result is what the engine computes token by token after a
prompt of one token; longer prompts it prefills at full depth.

B batch, L length, D model, N block layers, G kv groups, Dh head size, R loops.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models import passes
from rrt.models.cache import HeldKV
from rrt.models.transformer import make_context


class Early(NamedTuple):
  """Output of a forward pass with early exits.

  Attributes:
    hidden_BxLxD: after coda and final norm.
    depth_BxL: int, the number of loops that each token ran.
    left_BxLxD: the block's output at each token's exit.
  """

  hidden_BxLxD: jax.Array
  depth_BxL: jax.Array
  left_BxLxD: jax.Array


def forward_early(
  config: ModelConfig,
  params,
  tokens_BxL,
  leaves: Callable[[int, jax.Array, jax.Array], jax.Array],
  kv: str = 'propagate',
  dtype='float32',
  lens: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Early:
  """Forward pass with early exits.

  Args:
    config: the model's shape, of cycle order.
    params: of the whole model, stacked.
    tokens_BxL: int token ids.
    leaves: (loops run, x before the last of them, x after it), both
      [B, L, D], to bool [B, L]: which tokens leave.
    kv: cache policy of skipped loops: 'write_ahead', 'propagate' or 'exact_fill';
      see `rrt.infer.engine.config.EngineConfig`.
    dtype: of the computation.
    lens: (block's output, depth_BxL) to what the coda reads; see
      `rrt.exits.score.through_lens`.
  """
  B, L = tokens_BxL.shape
  G, Dh, R = config.num_kv_heads, config.head_dim, config.loops
  context = make_context(config, tokens_BxL)
  x_BxLxD, _ = passes.run_prelude(config, params, tokens_BxL, context, None, dtype, scan=True)
  left_BxL = jnp.zeros((B, L), bool)
  depth_BxL = jnp.full((B, L), R, jnp.int32)
  held = None
  if kv == 'write_ahead':
    zero = jnp.zeros((config.block_layers, B, L, G, Dh), dtype)
    held = HeldKV(zero, zero, _by_layer(config, left_BxL))
  out_BxLxD = x_BxLxD
  for r in range(R):
    before_BxLxD = x_BxLxD
    if kv != 'exact_fill':
      context = context._replace(left_BxL=left_BxL)
    if held is not None:
      held = held._replace(left_BxL=_by_layer(config, left_BxL))
    x_BxLxD, held = passes.block_pass(config, params, x_BxLxD, r, context, held)
    out_BxLxD = jnp.where(left_BxL[:, :, None], out_BxLxD, x_BxLxD)
    if r + 1 < R:
      goes_BxL = leaves(r + 1, before_BxLxD, x_BxLxD) & ~left_BxL
      depth_BxL = jnp.where(goes_BxL, r + 1, depth_BxL)
      left_BxL |= goes_BxL
  context = context._replace(left_BxL=None)
  read_BxLxD = lens(out_BxLxD, depth_BxL) if lens else out_BxLxD
  hidden_BxLxD, _ = passes.run_coda(config, params, read_BxLxD, context, None, scan=True)
  return Early(hidden_BxLxD, depth_BxL, out_BxLxD)


def _by_layer(config: ModelConfig, left_BxL):
  """One copy a block layer, for the scan over layers."""
  return jnp.broadcast_to(left_BxL, (config.block_layers, *left_BxL.shape))
