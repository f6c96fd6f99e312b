"""Log-probabilities of a prompt's own tokens, for `echo`.

L tokens of a prompt, V vocabulary, A alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rrt.infer.engine.state import EngineShape
from rrt.models import lm_head, transformer
from rrt.models.params import power_bucket

_ROWS = 64  # Rows whose logits exist at a time.
Score = tuple[float, list[tuple[int, float]]]


def score_prompt(shape: EngineShape, params, prompt: Sequence[int], count: int) -> list[Score]:
  """Log-probabilities of a prompt's tokens but the first, at full depth.

  Args:
    shape: the engine's.
    params: its parameters.
    prompt: token ids.
    count: alternatives to return, up to the engine's `logprobs`.

  Returns:
    For each token its log-probability, and the likeliest tokens with theirs.
  """
  size = min(power_bucket(len(prompt)), shape.config.max_context)
  tokens_L = np.zeros(size, np.int32)
  tokens_L[: len(prompt)] = prompt
  out = _score(
    params, tokens_L, config=shape.config, dtype=shape.dtype, most=max(shape.logprobs, 1)
  )
  own_L, top_LxA, top_logprob_LxA = jax.device_get(out)
  return [
    (
      float(own_L[i]),
      [(int(t), float(p)) for t, p in zip(top_LxA[i, :count], top_logprob_LxA[i, :count])],
    )
    for i in range(len(prompt) - 1)
  ]


@functools.partial(jax.jit, static_argnames=('config', 'dtype', 'most'))
def _score(params, tokens_L, *, config, dtype, most):
  out = transformer.forward(config, params, tokens_L[None], dtype=dtype, scan=False)
  L = tokens_L.shape[0]
  rows = min(_ROWS, L)
  pad = -L % rows
  hidden_LxD = jnp.pad(out.hidden_BxLxD[0], ((0, pad), (0, 0)))
  next_L = jnp.pad(jnp.roll(tokens_L, -1), (0, pad))

  def some(part):
    hidden_BxD, next_B = part
    logits_VxB = lm_head.logits_by_column(config, params, hidden_BxD, dtype)
    log_p_BxV = jax.nn.log_softmax(logits_VxB.T.astype(jnp.float32), -1)
    top_logprob_BxA, top_BxA = jax.lax.top_k(log_p_BxV, most)
    own_B = jnp.take_along_axis(log_p_BxV, next_B[:, None], 1)[:, 0]
    return own_B, top_BxA.astype(jnp.int32), top_logprob_BxA

  cut = lambda x: x.reshape(-1, rows, *x.shape[1:])
  found = jax.lax.map(some, (cut(hidden_LxD), cut(next_L)))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:L], found)
