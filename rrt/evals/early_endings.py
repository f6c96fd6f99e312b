"""Log-likelihoods of endings with early exits.

As in serving, the context is prefilled at full depth, and from its last token on
each token leaves when its gate's score reaches the threshold. `rrt.evals.endings`
is the same at a fixed depth.

B rows, L tokens of a row.
"""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.evals import every_loop
from rrt.evals.endings import Pair, fit
from rrt.evals.perplexity import token_losses
from rrt.exits import score as score_lib
from rrt.exits.forward import forward_early
from rrt.exits.gate import Gate
from rrt.models import transformer
from rrt.models.params import bucket


def score_endings(
  config: ModelConfig,
  params,
  pairs: Sequence[Pair],
  gate: Gate,
  *,
  dtype: str = 'float32',
  batch_tokens: int = 4096,
  progress: Callable[[int], None] | None = None,
) -> tuple[list[tuple[float, bool]], float]:
  """Scores each ending after its context; arguments as `endings.score_endings`.

  Args:
    config: the model's shape.
    params: its parameters, stacked, on the device.
    pairs: contexts and endings, token ids.
    gate: kind, threshold and cache policy; also the kinds margin and entropy,
      which the engine does not have: for them the coda's keys and values of
      earlier tokens are computed as if those had left after the same loop.
    dtype: of the computation.
    batch_tokens: padded tokens of a pass, about.
    progress: called with the number of pairs after each pass.

  Returns:
    For each pair the log-likelihood in nats, summed over the ending, and
    whether it is the greedy continuation; and the mean loops of the tokens that
    may leave.

  Raises:
    InputError: an ending as long as the model's context.
  """
  pairs = [fit(config, *pair) for pair in pairs]
  found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
  loops = tokens = 0
  by_length: dict[int, list[int]] = {}
  for i, (context, ending) in enumerate(pairs):
    length = bucket(len(context) + len(ending) - 1, config.max_context)
    by_length.setdefault(length, []).append(i)
  for length, indices in by_length.items():
    rows = min(max(batch_tokens // length, 1), len(indices))
    for first in range(0, len(indices), rows):
      picked = indices[first : first + rows]
      fed_BxL = np.zeros((rows, length), np.int32)
      next_BxL = np.zeros((rows, length), np.int32)
      start_B = np.full(rows, length, np.int32)
      end_B = np.zeros(rows, np.int32)
      for row, i in enumerate(picked):
        context, ending = pairs[i]
        whole = [*context, *ending]
        fed_BxL[row, : len(whole) - 1] = whole[:-1]
        next_BxL[row, : len(whole) - 1] = whole[1:]
        start_B[row], end_B[row] = len(context) - 1, len(whole) - 1
      nll, greedy, depth = jax.device_get(
        _score(
          params,
          gate.arrays,
          np.float32(gate.threshold),
          fed_BxL,
          next_BxL,
          start_B,
          config=config,
          kind=gate.kind,
          kv=gate.kv,
          dtype=dtype,
        )
      )
      for row, i in enumerate(picked):
        of_ending = slice(start_B[row], end_B[row])
        found[i] = (
          -float(nll[row, of_ending].astype(np.float64).sum()),
          bool(greedy[row, of_ending].all()),
        )
        loops += int(depth[row, of_ending].sum())
        tokens += int(end_B[row] - start_B[row])
      if progress:
        progress(len(picked))
  return found, loops / max(tokens, 1)


@functools.partial(jax.jit, static_argnames=('config', 'kind', 'kv', 'dtype'))
def _score(params, arrays, threshold, fed_BxL, next_BxL, start_B, *, config, kind, kv, dtype):
  """Loss, whether it is the argmax, and loops of every token."""
  may_BxL = jnp.arange(fed_BxL.shape[1])[None, :] >= start_B[:, None]

  context = transformer.make_context(config, fed_BxL)
  score_of = score_lib.by_loop(kind, arrays)

  def leaves(loops, before_BxLxD, after_BxLxD):
    if kind in every_loop.WITH_HEAD:
      score_BxL = every_loop.confidence(
        kind, config, params, arrays, context, after_BxLxD, loops, dtype
      )
    else:
      score_BxL = score_of(before_BxLxD, after_BxLxD, loops)
    return (score_BxL >= threshold) & may_BxL

  lens = functools.partial(score_lib.through_lens, arrays)
  out = forward_early(config, params, fed_BxL, leaves, kv, dtype, lens)
  D = out.hidden_BxLxD.shape[-1]
  nll_N, greedy_N = token_losses(
    config, params, out.hidden_BxLxD.reshape(-1, D), next_BxL.reshape(-1), dtype
  )
  shape = fed_BxL.shape
  return nll_N.reshape(shape), greedy_N.reshape(shape), out.depth_BxL
