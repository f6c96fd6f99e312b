"""Product-key lookup: the k nearest of n^2 keys by comparing with 2 n (arXiv 1907.05242).

A key is a pair of sub-keys; its score is the sum of theirs. The k best keys lie among the pairs of
the k best sub-keys of each half, and of these pairs only those count that fewer than k others
dominate: 119 of 1,024 for k = 32.

T tokens, H heads, n sub-keys of a half, K half the key size, k keys chosen a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def candidate_pairs(k: int, n: int) -> np.ndarray:
  """Pairs (a, c) of ranks in the two halves that can be among the k best, int32 [pairs, 2].

  With both halves sorted, (a, c) is dominated by the (a + 1)(c + 1) - 1 pairs of ranks not
  above its own. Pairs are in the order of their ranks.

  Args:
    k: keys that are chosen.
    n: sub-keys of a half.
  """
  top = min(k, n)
  pairs = [(a, c) for a in range(top) for c in range(top) if (a + 1) * (c + 1) <= k]
  return np.array(pairs, np.int32)


def nearest(query_TxHx2xK, keys_2xHxnxK, k: int):
  """The k keys of highest score, and their scores.

  Of keys of equal score that with the lower index is taken, as a search over all keys would.

  Args:
    query_TxHx2xK: the two halves of each head's query.
    keys_2xHxnxK: sub-keys of both halves.
    k: keys a head, at most n^2.

  Returns:
    (index_TxHxk, score_TxHxk): int32 indices a * n + c, and float32 scores.
  """
  form = 'thsk,shnk->sthn'
  score_2xTxHxn = jnp.einsum(form, query_TxHx2xK, keys_2xHxnxK, preferred_element_type=jnp.float32)
  return nearest_by_score(score_2xTxHxn[0], score_2xTxHxn[1], k)


def nearest_by_score(first_TxHxn, second_TxHxn, k: int):
  """`nearest`, of the scores of both halves."""
  n = first_TxHxn.shape[-1]
  top = min(k, n)
  (v1, i1), (v2, i2) = jax.lax.top_k(first_TxHxn, top), jax.lax.top_k(second_TxHxn, top)
  a, c = candidate_pairs(k, n).T
  score_TxHxp = v1[..., a] + v2[..., c]
  index_TxHxp = i1[..., a] * n + i2[..., c]
  # Twice: the first finds the score of the k-th, the second takes ties by their index.
  last_TxHx1 = jax.lax.top_k(score_TxHxp, k)[0][..., -1:]
  order_TxHxp = jnp.where(score_TxHxp == last_TxHx1, -1 - index_TxHxp, -(n * n) - 2)
  order_TxHxp = jnp.where(score_TxHxp > last_TxHx1, 0, order_TxHxp)
  chosen_TxHxk = jax.lax.top_k(jax.lax.stop_gradient(order_TxHxp), k)[1]
  of = lambda x: jnp.take_along_axis(x, chosen_TxHxk, -1)
  return of(index_TxHxp).astype(jnp.int32), of(score_TxHxp)
