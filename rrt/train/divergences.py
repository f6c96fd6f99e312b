"""How far the child's distribution over tokens is from the parent's.

B batch, C positions of a chunk, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

DIVERGENCES = ('forward_kl', 'reverse_kl', 'jsd', 'tvd')


class TopK(NamedTuple):
  """The most likely tokens after each position, and their log-probabilities.

  Attributes:
    ids_BxLxK: int32.
    log_p_BxLxK: float32, of a softmax over all tokens.
  """

  ids_BxLxK: jax.Array
  log_p_BxLxK: jax.Array


def top_k_divergence(kind: str, teacher: TopK, s_BxCxV, log_z_BxC, q_BxCxV):
  """`divergence` with all but the parent's most likely tokens as one."""
  ids_BxCxK, log_p_BxCxK = teacher
  least = jnp.finfo(jnp.float32).tiny
  log_of = lambda x: jnp.log(jnp.maximum(x, least))
  others_p_BxCx1 = 1 - jnp.sum(jnp.exp(log_p_BxCxK), axis=-1, keepdims=True)
  put = functools.partial(jnp.put_along_axis, axis=-1, inplace=False)
  others_BxCxV = put(q_BxCxV, ids_BxCxK, 0.0)
  others_q_BxCx1 = jnp.sum(others_BxCxV, axis=-1, keepdims=True)
  log_q_BxCxK = jnp.take_along_axis(s_BxCxV, ids_BxCxK, axis=-1) - log_z_BxC[..., None]
  join = lambda few, rest: jnp.concatenate([few, log_of(rest)], axis=-1)
  value_BxC, d_BxCxK = divergence(
    kind, join(log_p_BxCxK, others_p_BxCx1), join(log_q_BxCxK, others_q_BxCx1)
  )
  share_BxCx1 = d_BxCxK[..., -1:] / jnp.maximum(others_q_BxCx1, least)
  return value_BxC, put(others_BxCxV * share_BxCx1, ids_BxCxK, d_BxCxK[..., :-1])


def divergence(kind: str, log_p: jax.Array, log_q: jax.Array):
  """D(p, q) [B, C] of the parent p and the child q, and dD/d(logits of q).

  For a divergence with derivative g by q, softmax gives q (g - sum(q g)); a
  constant in g falls out. KL(p || q) is the case q - p.
  """
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  if kind == 'forward_kl':
    return jnp.sum(p * (log_p - log_q), axis=-1), q - p
  if kind == 'reverse_kl':
    g = log_q - log_p
    value = jnp.sum(q * g, axis=-1)
  elif kind == 'jsd':
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
    g = 0.5 * (log_q - log_m)
    value = jnp.sum(0.5 * p * (log_p - log_m) + q * g, axis=-1)
  else:
    g = 0.5 * jnp.sign(q - p)
    value = 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)
  return value, q * (g - jnp.sum(q * g, axis=-1, keepdims=True))
