"""Softmax attention over a batch's own keys or cached ones, and its masks.

B batch, L query length, S key length, H heads, G kv groups, M = H / G queries a
group, Dh head size.
"""

import functools

import chex
import jax
import jax.numpy as jnp

# Queries of a run of `attend_causal`: at least, and runs: at most.
MIN_RUN = 64
MAX_RUNS = 8


def visible(queries_BxL, keys_BxS, window=None):
  """Causal (and windowed) visibility by position, bool [B, L, S].

  Token j is visible from i iff i - window < j <= i; window 0 is unlimited.
  """
  i, j = queries_BxL[:, :, None], keys_BxS[:, None, :]
  mask = j <= i
  if window is None:
    return mask
  window = jnp.reshape(window, (-1, 1, 1))
  return mask & ((j > i - window) | (window == 0))


def softcap(z, cap: float | None):
  """cap tanh(z / cap), float32 as its input; z without a cap."""
  return z if cap is None else cap * jnp.tanh(z / cap)


def attend(q_BxLxHxDh, k_BxGxDhxS, v_BxGxSxDh, mask_BxLxS, cap: float | None = None):
  """Softmax attention in float32; q is already scaled.  [B, L, H, Dh].

  The heads of a group are stacked along the queries and the keys lie
  transposed, so that both products are plain batched matrix products: XLA on
  CPU is 3 (prefill) to 10 times (decoding) slower on the einsums over
  [B, S, G, Dh], which it transposes at every step. `cap`: see `softcap`.
  """
  chex.assert_rank([q_BxLxHxDh, k_BxGxDhxS, v_BxGxSxDh, mask_BxLxS], [4, 4, 4, 3])
  B, L, H, Dh = q_BxLxHxDh.shape
  G, S = k_BxGxDhxS.shape[1], k_BxGxDhxS.shape[3]
  M = H // G
  q_BxGxMxLxDh = q_BxLxHxDh.reshape(B, L, G, M, Dh).transpose(0, 2, 3, 1, 4)
  att_BxGxMLxS = jnp.einsum(
    'bgqd,bgds->bgqs',
    q_BxGxMxLxDh.reshape(B, G, M * L, Dh),
    k_BxGxDhxS,
    preferred_element_type=jnp.float32,
  )
  att_BxGxMLxS = softcap(att_BxGxMLxS, cap)
  att_BxGxMxLxS = jnp.where(
    mask_BxLxS[:, None, None, :, :], att_BxGxMLxS.reshape(B, G, M, L, S), -1e30
  )
  att_BxGxMxLxS = jax.nn.softmax(att_BxGxMxLxS, -1).astype(q_BxLxHxDh.dtype)
  o_BxGxMLxDh = jnp.einsum('bgqs,bgsd->bgqd', att_BxGxMxLxS.reshape(B, G, M * L, S), v_BxGxSxDh)
  o_BxGxMxLxDh = o_BxGxMLxDh.reshape(B, G, M, L, Dh)
  return o_BxGxMxLxDh.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def attend_causal(q_BxLxHxDh, k_BxGxDhxL, v_BxGxLxDh, mask_BxLxL, cap: float | None = None):
  """`attend` where no token sees a later one of its row.  [B, L, H, Dh].

  Runs of queries see only the keys up to their last: with 8 of them that is
  9/16 of the products, and scores that stay in a CPU's cache (forward and
  backward take a third of the time at 512 tokens). The backward pass computes
  the scores again: they are never kept, as in FlashAttention.
  """
  L = q_BxLxHxDh.shape[1]
  step = max(MIN_RUN, -(-L // MAX_RUNS))
  outs = []
  for begin in range(0, L, step):
    end = min(begin + step, L)
    outs.append(
      jax.checkpoint(functools.partial(attend, cap=cap))(
        q_BxLxHxDh[:, begin:end],
        k_BxGxDhxL[..., :end],
        v_BxGxLxDh[:, :, :end],
        mask_BxLxL[:, begin:end, :end],
      )
    )
  return jnp.concatenate(outs, 1)
