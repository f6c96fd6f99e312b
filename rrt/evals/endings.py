"""Log-likelihoods of endings given contexts, for few-shot tasks.

The endings of one context share its prefill: the context runs once into a cache,
which is repeated for its endings. Requests are grouped by padded shape, so that
few shapes compile, and the head runs on the endings' tokens alone.

Q contexts, L their length, E endings of each, M tokens fed of an ending (all
but the last), T = M + 1 its length, D model.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.evals.perplexity import token_losses
from rrt.models import transformer
from rrt.models.cache import init_cache
from rrt.models.params import bucket

_COMPILE_TOKENS = 4096  # rather pad this many tokens than compile once more

Pair = tuple[Sequence[int], Sequence[int]]  # context and ending, token ids


class Batch(NamedTuple):
  """Groups of one padded shape.

  Attributes:
    groups: by context, the indices of its requests.
    shape: Q, L, E, T.
  """

  groups: list[list[int]]
  shape: tuple[int, int, int, int]


def score_endings(
  config: ModelConfig,
  params,
  pairs: Sequence[Pair],
  *,
  loops: int | None = None,
  dtype: str = 'float32',
  batch_tokens: int = 4096,
  progress: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
  """Scores each ending after its context.

  Args:
    config: the model's shape.
    params: its parameters, stacked, on the device.
    pairs: contexts of at least one token, truncated from the left if too long,
      and endings of at least one.
    loops: how many loops of the block to run; None for all.
    dtype: of the computation.
    batch_tokens: padded tokens of a pass, about.
    progress: called with the number of pairs after each pass.

  Returns:
    For each pair the log-likelihood in nats, summed over the ending, and
    whether it is the greedy continuation.

  Raises:
    InputError: an ending as long as the model's context.
  """
  loops = config.loops if loops is None else loops
  pairs = [fit(config, *pair) for pair in pairs]
  found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
  for batch in plan(config, pairs, batch_tokens):
    arrays, picks = _arrays(pairs, batch)
    nll_N, greedy_N = jax.device_get(
      _score(params, *arrays, config=config, loops=loops, dtype=dtype)
    )
    first = 0
    for i in picks:
      last = first + len(pairs[i][1])
      found[i] = (
        -float(nll_N[first:last].astype(np.float64).sum()),
        bool(greedy_N[first:last].all()),
      )
      first = last
    if progress:
      progress(len(picks))
  return found


def fit(config: ModelConfig, context, ending) -> Pair:
  """Truncates the context from the left until both fit."""
  if not len(context) or not len(ending):
    raise InputError('A context and an ending need at least one token each.')
  # The ending's last token is predicted, never fed.
  room = config.max_context - (len(ending) - 1)
  if room < 1:
    raise InputError(
      f'An ending of {len(ending)} tokens does not fit the context of {config.max_context}.'
    )
  return tuple(context[-room:]), tuple(ending)


def plan(config: ModelConfig, pairs: Sequence[Pair], batch_tokens: int) -> Iterator[Batch]:
  """Groups pairs by context, and contexts by padded shape, longest first."""
  by_context: dict[tuple[int, ...], list[int]] = {}
  for i, (context, _) in enumerate(pairs):
    by_context.setdefault(tuple(context), []).append(i)
  by_shape: dict[tuple[int, int, int], list[list[int]]] = {}
  for context, indices in by_context.items():
    indices.sort(key=lambda i: -len(pairs[i][1]))
    length = bucket(len(context), config.max_context)
    while indices:
      longest = len(pairs[indices[0]][1])
      fed = bucket(longest - 1, least=4) if longest > 1 else 0
      many = min(len(indices), max(batch_tokens // (length + fed), 1), 8)
      group, indices = indices[:many], indices[many:]
      shape = (bucket(many, least=1), length, fed + 1)
      by_shape.setdefault(shape, []).append(group)
  for (E, L, T), groups in _merge(by_shape):
    rows = max(batch_tokens // _tokens(E, L, T), 1)
    Q = min(rows, bucket(len(groups), least=1))
    for first in range(0, len(groups), Q):
      yield Batch(groups[first : first + Q], (Q, L, E, T))


def _tokens(E: int, L: int, T: int) -> int:
  """Number of padded tokens of one context with its endings."""
  return L + E * (T - 1)


def _merge(by_shape):
  """Merges small shapes into the next larger one, to compile fewer programs.

  Compiling a shape takes as long as some thousands of tokens.
  """
  merged: list[tuple[tuple[int, int, int], list[list[int]]]] = []
  for shape, groups in sorted(by_shape.items(), reverse=True):
    if merged and merged[-1][0][0] == shape[0]:
      last, others = merged[-1]
      both = (shape[0], max(last[1], shape[1]), max(last[2], shape[2]))
      extra = sum(
        len(g) * (_tokens(*both) - _tokens(*old)) for old, g in ((last, others), (shape, groups))
      )
      if extra <= _COMPILE_TOKENS:
        merged[-1] = (both, others + groups)
        continue
    merged.append((shape, groups))
  return merged


def _arrays(pairs, batch: Batch):
  """The padded arrays of a batch, and its requests in the order of `pick_N`."""
  Q, L, E, T = batch.shape
  context_QxL = np.zeros((Q, L), np.int32)
  length_Q = np.ones(Q, np.int32)
  ending_QxExT = np.zeros((Q, E, T), np.int32)
  wanted_QxExT = np.zeros((Q, E, T), bool)
  picks = []
  for q, group in enumerate(batch.groups):
    context = pairs[group[0]][0]
    context_QxL[q, : len(context)] = context
    length_Q[q] = len(context)
    for e, i in enumerate(group):
      ending = pairs[i][1]
      ending_QxExT[q, e, : len(ending)] = ending
      wanted_QxExT[q, e, : len(ending)] = True
      picks.append(i)
  wanted = np.flatnonzero(wanted_QxExT)
  pick_N = np.zeros(wanted_QxExT.size, np.int32)
  pick_N[: len(wanted)] = wanted
  count = np.int32(len(wanted))
  return (context_QxL, length_Q, ending_QxExT, pick_N, count), picks


@functools.partial(jax.jit, static_argnames=('config', 'loops', 'dtype'))
def _score(params, context_QxL, length_Q, ending_QxExT, pick_N, count, *, config, loops, dtype):
  """Losses of the picked ending tokens, in the order of `pick_N`."""
  Q, L = context_QxL.shape
  _, E, T = ending_QxExT.shape
  M = T - 1
  run = functools.partial(transformer.forward, config, params, loops=loops, dtype=dtype)
  slots = min(L + M, config.max_context)
  cache = init_cache(config, Q, slots, dtype, scan=True, loops=loops)
  out = run(context_QxL, cache=cache)
  end_QxD = out.hidden_BxLxD[jnp.arange(Q), length_Q - 1]
  D = end_QxD.shape[-1]
  hidden_QxExTxD = jnp.broadcast_to(end_QxD[:, None, None], (Q, E, 1, D))
  if M:
    # The batch is the fourth axis from the end of every cache array.
    wide = jax.tree.map(lambda t: jnp.repeat(t, E, axis=t.ndim - 4), out.cache)
    # Padding of the context lies in slots that an ending overwrites before
    # any of its tokens can see them.
    positions_QExM = jnp.repeat(length_Q, E)[:, None] + jnp.arange(M, dtype=jnp.int32)[None, :]
    out = run(ending_QxExT[:, :, :-1].reshape(Q * E, M), positions_BxL=positions_QExM, cache=wide)
    hidden_QxExTxD = jnp.concatenate([hidden_QxExTxD, out.hidden_BxLxD.reshape(Q, E, M, D)], 2)
  return token_losses(
    config,
    params,
    hidden_QxExTxD.reshape(-1, D)[pick_N],
    ending_QxExT.reshape(-1)[pick_N],
    dtype,
    count,
  )
