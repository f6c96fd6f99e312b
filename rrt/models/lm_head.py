"""The LM head: logits, the most likely token, and parts of the head.

D model, V vocabulary, B rows.
"""

import chex
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.ops.attention import softcap
from rrt.ops.matmul import float32_is_float32
from rrt.ops.quantize import dense


def logits(config: ModelConfig, params, hidden, dtype=jnp.float32):
  """Logits of hidden states [..., D], float32 [..., V]."""
  chex.assert_axis_dimension(hidden, -1, config.d_model)
  if config.tie_embeddings:
    table, axis = params['embed']['table'], 1
  else:
    table, axis = params['head']['kernel'], 0
  contract = (((hidden.ndim - 1,), (axis,)), ((), ()))
  with float32_is_float32(dtype):
    found = jax.lax.dot_general(
      hidden.astype(dtype), dense(table, dtype), contract, preferred_element_type=jnp.float32
    )
  return softcap(found, config.final_softcap)


def logits_by_column(config: ModelConfig, params, hidden_BxD, dtype):
  """`logits` as [V, B], the layout from which a CPU samples fastest.

  A tied table is the left operand, and the argmax runs down the columns: 0.75 of
  the time of `logits` and an argmax along its rows.
  """
  if not config.tie_embeddings:
    logits_BxV = logits(config, params, hidden_BxD, dtype)
    # XLA would transpose the product itself, into a bfloat16 one it cannot run.
    return jax.lax.optimization_barrier(logits_BxV).T
  table_VxD = dense(params['embed']['table'], dtype, after=hidden_BxD)
  with float32_is_float32(dtype):
    found_VxB = jax.lax.dot_general(
      table_VxD,
      hidden_BxD.astype(dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
  return softcap(found_VxB, config.final_softcap)


def greedy_token(config: ModelConfig, params, hidden_BxD, dtype=jnp.float32):
  """The token with the highest logit of each row, int [B]."""
  return likeliest(logits_by_column(config, params, hidden_BxD, dtype))


def likeliest(logits_VxB):
  """The first token with the highest logit of each column, int [B].

  A max and a min instead of an argmax, which XLA's CPU backend does not vectorize:
  it takes as long as the head's product.
  """
  V = logits_VxB.shape[0]
  token_Vx1 = jnp.arange(V, dtype=jnp.int32)[:, None]
  is_top_VxB = logits_VxB == jnp.max(logits_VxB, 0, keepdims=True)
  # With a NaN no logit equals the maximum: return a valid token all the same.
  return jnp.min(jnp.where(is_top_VxB, token_Vx1, V - 1), 0)


def first_tokens(config: ModelConfig, params, count: int):
  """Head parameters of the first `count` tokens, for `logits`."""
  if config.tie_embeddings:
    return {'embed': {'table': jax.tree.map(lambda t: t[:count], params['embed']['table'])}}
  return {'head': {'kernel': jax.tree.map(lambda t: t[:, :count], params['head']['kernel'])}}


def kernel(config: ModelConfig, params):
  """The head as [D, V]; the transposed table where embeddings are tied."""
  if config.tie_embeddings:
    return dense(params['embed']['table']).T
  return dense(params['head']['kernel'])
