"""Tunes a lens by gradient descent on what the head predicts.

Least squares (`rrt.exits.fit.fit_lens`) match hidden states; what counts are the
predicted distributions. So the maps are tuned, with one hidden layer beside
them, to lower KL(full depth || left after this loop) (tuned lens, arXiv
2303.08112). The model does not change.

N rows, L row length, B rows of a step, D model, H hidden units, R loops, V the
vocabulary's first tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rrt.exits import gate as gate_lib
from rrt.exits import score as score_lib
from rrt.models import lm_head, passes, transformer

if TYPE_CHECKING:
  from rrt.model import LanguageModel

VOCAB = 8192  # V. A whole one takes six times as long.
STEP_TOKENS = 512
RATE = 1e-3  # Adam's, falling to 0 as a cosine.


def tune_lens(
  model: LanguageModel,
  lens: dict[str, Any],
  states_RxNxLxD: np.ndarray,
  scored_NxL: np.ndarray,
  *,
  epochs: int = 4,
  seed: int = 0,
  progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
  """A lens of `fit_lens`, tuned on the states that it was fitted on.

  Each step takes whole rows, about `STEP_TOKENS` tokens, all left after the
  same loop, through coda and head.

  Args:
    model: whose states they are.
    lens: `lens_kernel` and `lens_bias`.
    states_RxNxLxD: the block's outputs after every loop.
    scored_NxL: which tokens count.
    epochs: how often the rows are seen; each leaves out those, of its own
      order, that do not fill a last step.
    seed: of their order and of the hidden layer's first weights.
    progress: called with the number of tokens after each step.

  Returns:
    The arrays of a tuned lens; see `score.through_lens`.
  """
  config = model.config
  count, length = scored_NxL.shape
  B = min(max(STEP_TOKENS // length, 1), count)
  steps = epochs * (count // B)
  last_NxLxD = states_RxNxLxD[-1]
  scale = float(np.sqrt(np.mean(last_NxLxD[scored_NxL] ** 2)))
  schedule = optax.cosine_decay_schedule(RATE, steps)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
  params = jax.device_put(model.params)
  few = lm_head.first_tokens(config, params, min(VOCAB, config.vocab_size))

  def log_p(params, few, x_BxLxD):
    context = transformer.make_context(config, jnp.zeros(x_BxLxD.shape[:2], jnp.int32))
    hidden_BxLxD, _ = passes.run_coda(config, params, x_BxLxD, context, None, scan=True)
    logits_BxLxV = lm_head.logits(config, few, hidden_BxLxD, 'float32')
    return jax.nn.log_softmax(logits_BxLxV, -1)

  def loss(trained, params, few, x_BxLxD, last_BxLxD, scored_BxL):
    lens = trained | {'lens_out': trained['lens_out'] * scale}
    full_BxLxV = log_p(params, few, last_BxLxD)
    early_BxLxV = log_p(params, few, score_lib.apply_lens(lens, x_BxLxD))
    nats_BxL = jnp.sum(jnp.exp(full_BxLxV) * (full_BxLxV - early_BxLxV), -1)
    return jnp.sum(nats_BxL * scored_BxL) / jnp.maximum(jnp.sum(scored_BxL), 1)

  @jax.jit
  def step(trained, moments, params, few, *rows):
    slope = jax.grad(loss)(trained, params, few, *rows)
    change, moments = optimizer.update(slope, moments, trained)
    return optax.apply_updates(trained, change), moments

  tuned = []
  for r in range(config.loops - 1):
    trained: Any = {k: jnp.asarray(v[r]) for k, v in lens.items()}
    trained |= _hidden_layer(config.d_model, seed)
    moments = optimizer.init(trained)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
      shuffled = order.permutation(count)[: count // B * B]
      for picked in shuffled.reshape(-1, B):
        rows = states_RxNxLxD[r, picked], last_NxLxD[picked], scored_NxL[picked]
        trained, moments = step(trained, moments, params, few, *rows)
        if progress:
          progress(int(scored_NxL[picked].sum()))
    tuned.append(trained | {'lens_out': trained['lens_out'] * scale})
  return {k: np.stack([t[k] for t in tuned]) for k in tuned[0]}


def _hidden_layer(d_model: int, seed: int):
  """It adds nothing at first."""
  H = gate_lib.LENS_WIDTH
  start_DxH = jax.random.normal(jax.random.key(seed), (d_model, H))
  return {'lens_in': start_DxH / d_model**0.5, 'lens_out': jnp.zeros((H, d_model))}
