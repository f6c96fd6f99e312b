"""Scores a text with coda and head after every loop of the block.

Gates, lenses and thresholds are fitted on these figures, in which all tokens
leave after the same loop.

B batch, L row length, D model, V vocabulary, C tokens of a chunk, N rows,
R loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.evals.perplexity import HEAD_CHUNK
from rrt.exits import score as score_lib
from rrt.exits.forward import forward_early
from rrt.models import lm_head, passes, transformer
from rrt.models.params import cast

if TYPE_CHECKING:
  from rrt.model import LanguageModel

LIVE = ('learned', 'change', 'hazard')
# Arrays without which a gate cannot score.
NEEDS = {'learned': 'kernel', 'hazard': 'hazard_kernel'}
WITH_HEAD = ('margin', 'entropy', 'oracle')


@dataclasses.dataclass(frozen=True)
class EveryLoop:
  """Figures of a text after every loop, with all tokens leaving there.

  Attributes:
    tokens_NxL: the rows, padded.
    scored_NxL: whether the next token is scored.
    nll_NxL: its negative log-likelihood at full depth.
    top_NxL: the most likely next token at full depth.
    scores: by gate, [R - 1, N, L]: the score after each loop but the last.
    right_RxNxL: [R - 1, N, L], whether the most likely next token after each
      loop but the last equals that of full depth.
    divergence_RxNxL: [R - 1, N, L], KL(full depth || this loop) of the next
      token's distribution, in nats; None unless `fitting`.
    states_RxNxLxD: the block's outputs after all R loops, float32; None unless
      `fitting`.
  """

  tokens_NxL: np.ndarray
  scored_NxL: np.ndarray
  nll_NxL: np.ndarray
  top_NxL: np.ndarray
  scores: dict[str, np.ndarray]
  right_RxNxL: np.ndarray
  divergence_RxNxL: np.ndarray | None = None
  states_RxNxLxD: np.ndarray | None = None


def check(config) -> None:
  """Raises InputError for a model without early exits."""
  if config.loops < 2 or config.order != 'cycle':
    raise InputError(
      f'This model has loops={config.loops} in the {config.order} order; '
      'exits need two loops or more, in the cycle order.'
    )


def read_static(
  model: LanguageModel,
  rows: Sequence[Sequence[int]],
  gate: Any = None,
  *,
  batch: int = 4,
  dtype: str = 'float32',
  fitting: bool = False,
  progress: Callable[[int], None] | None = None,
) -> EveryLoop:
  """Scores rows in one pass, with coda and head after every loop.

  Args:
    model: of two loops or more, in cycle order.
    rows: tokens, from `perplexity.make_rows`.
    gate: arrays of a gate: of a learned one, to compute its scores, and of its
      lens.
    batch: rows in one pass.
    dtype: of the computation.
    fitting: whether to return divergences and the block's outputs, which lenses
      and gates are fitted on.
    progress: called with the number of tokens after each pass.

  Raises:
    InputError: the model has no exits.
  """
  check(model.config)
  params = cast(model.params, dtype)
  tokens_NxL, scored_NxL = _pad(rows)
  found = []
  for first in range(0, len(rows), batch):
    part = tokens_NxL[first : first + batch]
    out = _static(params, gate, part, config=model.config, dtype=dtype, fitting=fitting)
    found.append(jax.device_get(out))
    if progress:
      progress(sum(map(len, rows[first : first + batch])))
  nll, top, right, scores, apart, kept = zip(*found, strict=True)
  wide = lambda parts: np.concatenate(parts, 1)
  return EveryLoop(
    tokens_NxL,
    scored_NxL,
    np.concatenate(nll),
    np.concatenate(top),
    {k: wide([s[k] for s in scores]) for k in scores[0]},
    wide(right),
    wide(apart) if fitting else None,
    wide(kept) if fitting else None,
  )


def _pad(rows):
  width = max(map(len, rows))
  tokens_NxL = np.zeros((len(rows), width), np.int32)
  scored_NxL = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    tokens_NxL[i, : len(row)] = row
    scored_NxL[i, : len(row) - 1] = True
  return tokens_NxL, scored_NxL


@functools.partial(jax.jit, static_argnames=('config', 'dtype', 'fitting'))
def _static(params, gate, tokens_BxL, *, config, dtype, fitting):
  met: list[tuple[jax.Array, jax.Array]] = []

  def stay(loops, before_BxLxD, after_BxLxD):
    del loops
    met.append((before_BxLxD, after_BxLxD))
    return jnp.zeros(tokens_BxL.shape, bool)

  out = forward_early(config, params, tokens_BxL, stay, 'exact_fill', dtype)
  context = transformer.make_context(config, tokens_BxL)
  targets_BxL = jnp.roll(tokens_BxL, -1, 1)
  read = functools.partial(read_hidden, config, params, dtype)
  nll_BxL, top_BxL, _, _ = read(out.hidden_BxLxD, targets_BxL)
  kinds = [k for k in LIVE if k not in NEEDS or NEEDS[k] in (gate or {})]
  score_of = {k: score_lib.by_loop(k, gate) for k in kinds}
  scores: dict[str, list] = {k: [] for k in ('margin', 'entropy', *kinds)}
  right, apart = [], []
  for r, (before_BxLxD, after_BxLxD) in enumerate(met):
    hidden_BxLxD = _leave(config, params, gate, context, after_BxLxD, r + 1)
    _, r_top_BxL, margin_BxL, entropy_BxL = read(hidden_BxLxD, targets_BxL)
    right.append(r_top_BxL == top_BxL)
    if fitting:
      apart.append(divergence(config, params, dtype, out.hidden_BxLxD, hidden_BxLxD))
    sure = _confidences(config, margin_BxL, entropy_BxL)
    for kind in sure:
      scores[kind].append(sure[kind])
    for kind in kinds:
      scores[kind].append(score_of[kind](before_BxLxD, after_BxLxD, r + 1))
  kept = None
  if fitting:
    all_loops = [after for _, after in met] + [out.left_BxLxD]
    kept = jnp.stack(all_loops).astype(jnp.float32)
  stacked = {k: jnp.stack(v) for k, v in scores.items()}
  apart_RxBxL = jnp.stack(apart) if fitting else None
  return nll_BxL, top_BxL, jnp.stack(right), stacked, apart_RxBxL, kept


def confidence(kind, config, params, gate, context, after_BxLxD, loops, dtype):
  """Confidence of the prediction after some loops, [B, L].

  Computed with all tokens leaving after these loops.

  Args:
    kind: 'margin', the probability difference of the two likeliest tokens, or
      'entropy', 1 - entropy / log(V).
    config: the model's shape.
    params: of the whole model, stacked.
    gate: arrays with the lens, if any.
    context: from `transformer.make_context`.
    after_BxLxD: the block's output.
    loops: int, the number of loops run.
    dtype: of the computation.
  """
  hidden_BxLxD = _leave(config, params, gate, context, after_BxLxD, loops)
  zero_BxL = jnp.zeros(hidden_BxLxD.shape[:2], jnp.int32)
  _, _, margin_BxL, entropy_BxL = read_hidden(config, params, dtype, hidden_BxLxD, zero_BxL)
  return _confidences(config, margin_BxL, entropy_BxL)[kind]


def _leave(config, params, gate, context, after_BxLxD, loops):
  """The head's input of tokens that leave after some loops, [B, L, D]."""
  loops_BxL = jnp.full(after_BxLxD.shape[:2], loops)
  read_BxLxD = score_lib.through_lens(gate, after_BxLxD, loops_BxL)
  return passes.run_coda(config, params, read_BxLxD, context, None, scan=True)[0]


def _confidences(config, margin_BxL, entropy_BxL):
  # As for live gates, the first position is never sure.
  sure_BxL = 1 - entropy_BxL / math.log(config.vocab_size)
  first = lambda score_BxL: score_BxL.at[:, 0].set(0)
  return {'margin': first(margin_BxL), 'entropy': first(sure_BxL)}


def read_hidden(config, params, dtype, hidden_BxLxD, targets_BxL):
  """Loss, argmax, probability margin and entropy, all [B, L].

  Runs the head chunk by chunk on hidden states after the final norm.
  """

  def one(x):
    hidden_CxD, targets_C = x
    logits_CxV = lm_head.logits(config, params, hidden_CxD, dtype)
    log_p_CxV = jax.nn.log_softmax(logits_CxV, -1)
    hit_C = jnp.take_along_axis(log_p_CxV, targets_C[:, None], -1)[:, 0]
    p_CxV = jnp.exp(log_p_CxV)
    top_C = jnp.argmax(logits_CxV, -1).astype(jnp.int32)
    best_C = jnp.max(p_CxV, -1)
    is_top_CxV = jnp.arange(config.vocab_size)[None, :] == top_C[:, None]
    second_C = jnp.max(jnp.where(is_top_CxV, 0.0, p_CxV), -1)
    entropy_C = -jnp.sum(p_CxV * log_p_CxV, -1)
    return -hit_C, top_C, best_C - second_C, entropy_C

  return _by_chunk(one, hidden_BxLxD, targets_BxL)


def divergence(config, params, dtype, full_BxLxD, hidden_BxLxD):
  """KL(full || hidden) of the head's distributions for two states, nats, [B, L]."""

  def one(x):
    full_CxV, log_p_CxV = (
      jax.nn.log_softmax(lm_head.logits(config, params, h_CxD, dtype), -1) for h_CxD in x
    )
    return (jnp.sum(jnp.exp(full_CxV) * (full_CxV - log_p_CxV), -1),)

  return _by_chunk(one, full_BxLxD, hidden_BxLxD)[0]


def _by_chunk(one, *of_tokens):
  """Maps a function of C tokens over arrays [B, L, ...], chunk by chunk."""
  B, L = of_tokens[0].shape[:2]
  chunk = min(HEAD_CHUNK, B * L)
  pad = -(B * L) % chunk

  def chunks(t):
    t = t.reshape(B * L, *t.shape[2:])
    t = jnp.pad(t, ((0, pad),) + ((0, 0),) * (t.ndim - 1))
    return t.reshape(-1, chunk, *t.shape[1:])

  found = jax.lax.map(one, tuple(map(chunks, of_tokens)))
  return tuple(t.reshape(-1)[: B * L].reshape(B, L) for t in found)
