"""Cached decoding of ragged batches: prefill and decode steps, and their driver.

`extend` prefills a chunk of right-padded prompts, `begin` samples each row's
first token, `advance` decodes in a while-loop until all rows are done or a
number of tokens is reached. A row's tokens depend on its own prompt, settings
and seed only.

B batch, L tokens of a chunk, D model, V vocabulary, T tokens of one call.
"""

from collections.abc import Sequence
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.infer.sampling import Array, SamplingArrays, sample
from rrt.models import lm_head, transformer
from rrt.models.cache import Cache, as_empty, init_cache
from rrt.models.params import bucket, cast, transpose_kernels
from rrt.models.stack import unstack

CALL = 32  # tokens that one call of `advance` can hold
CHUNK_TOKENS = 8192  # of all rows in one prefill call; bounds the memory
_SOON = 256  # tokens that the first cache has room for behind the prompts


class DecodeRows(NamedTuple):
  """Decoding state of each row of a batch.

  Attributes:
    token_B: the last sampled token, not yet in the cache.
    position_B: the cache slot of this token.
    count_B: number of tokens sampled.
    max_new_tokens_B: limit of `count_B`.
    done_B: whether the row has finished.
  """

  token_B: Array
  position_B: Array
  count_B: Array
  max_new_tokens_B: Array
  done_B: Array


class Static(NamedTuple):
  """Static arguments of a compiled step."""

  config: ModelConfig
  loops: int
  dtype: str


_jit = functools.partial(jax.jit, static_argnames=('static',))


@functools.partial(_jit, donate_argnames=('cache', 'last_BxD'))
def extend(params, cache, last_BxD, tokens_BxL, start, length_B, *, static):
  """Runs tokens at positions start.. into the cache.

  Without a start they are the first tokens, and the cache must be empty.

  Returns:
    The hidden state of each row's last prompt token, where this chunk or an
    earlier one holds it, and the cache.
  """
  B, L = tokens_BxL.shape
  if start is None:
    start, cache = 0, as_empty(cache)
  positions_L = start + jnp.arange(L, dtype=jnp.int32)
  out = transformer.forward(
    static.config,
    params,
    tokens_BxL,
    positions_BxL=jnp.broadcast_to(positions_L[None, :], (B, L)),
    cache=cache,
    loops=static.loops,
    dtype=static.dtype,
    scan=False,
  )
  at_B = length_B - 1 - start
  end_BxD = out.hidden_BxLxD[jnp.arange(B), jnp.clip(at_B, 0, L - 1)]
  here_B = (at_B >= 0) & (at_B < L)
  return jnp.where(here_B[:, None], end_BxD, last_BxD), out.cache


@_jit
def begin(params, last_BxD, rows, sampling, eos_E, *, static):
  """Samples each row's first token from its prompt's last hidden state."""
  return _sample(params, last_BxD, rows, sampling, eos_E, static)


@functools.partial(_jit, donate_argnames=('cache',))
def advance(params, cache, rows, sampling, eos_E, limit, *, static):
  """Decodes until `limit` tokens are sampled or all rows are done.

  Returns:
    tokens_BxT: sampled tokens, T = `CALL`; -1 for rows that were done.
    rows: the new decoding state.
    cache: the written cache.
  """

  def body(carry):
    i, out_BxT, rows, cache = carry
    step = transformer.forward(
      static.config,
      params,
      rows.token_B[:, None],
      positions_BxL=rows.position_B[:, None],
      cache=cache,
      loops=static.loops,
      dtype=static.dtype,
      scan=False,
    )
    # A row that is done feeds its last token to the same slot for ever.
    moved_B = rows.position_B + jnp.where(rows.done_B, 0, 1)
    was_done_B = rows.done_B
    rows = _sample(
      params, step.hidden_BxLxD[:, 0], rows._replace(position_B=moved_B), sampling, eos_E, static
    )
    token_B = jnp.where(was_done_B, -1, rows.token_B)
    return i + 1, out_BxT.at[:, i].set(token_B), rows, step.cache

  def more(carry):
    i, _, rows, _ = carry
    return (i < limit) & ~jnp.all(rows.done_B)

  out_BxT = jnp.full((rows.token_B.shape[0], CALL), -1, jnp.int32)
  carry = (jnp.int32(0), out_BxT, rows, cache)
  _, out_BxT, rows, cache = jax.lax.while_loop(more, body, carry)
  return out_BxT, rows, cache


def _sample(params, hidden_BxD, rows, sampling, eos_E, static):
  """Samples the next token of each row; rows that are done are unchanged."""
  head = static.config, params, hidden_BxD, static.dtype
  if sampling is None:
    token_B = lm_head.greedy_token(*head)
  else:
    logits_BxV = lm_head.logits(*head)
    token_B = sample(logits_BxV, sampling, rows.count_B)
  token_B = jnp.where(rows.done_B, rows.token_B, token_B)
  count_B = rows.count_B + jnp.where(rows.done_B, 0, 1)
  ended_B = jnp.any(token_B[:, None] == eos_E[None, :], -1)
  done_B = rows.done_B | ended_B | (count_B >= rows.max_new_tokens_B)
  return rows._replace(token_B=token_B, count_B=count_B, done_B=done_B)


@functools.partial(jax.jit, static_argnames=('length', 'static'))
def grow(cache: Cache, *, length: int, static: Static) -> Cache:
  """The cache with more slots a row."""
  batch = jax.tree.leaves(cache)[0].shape[0]
  wide = init_cache(static.config, batch, length, static.dtype, loops=static.loops)
  return jax.tree.map(
    lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim), wide, cache
  )


@dataclasses.dataclass
class Clock:
  """Counts tokens and seconds; compilation separately."""

  prefill_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_tokens: int = 0
  decode_seconds: float = 0.0
  compile_seconds: float = 0.0


class Decoder:
  """A model prepared for decoding, and the host loop over a batch.

  Attributes:
    static: the model's shape, the loops it runs, the dtype it computes in.
    params: weights in that dtype on the device, one subtree a layer; see
      `transpose_kernels`.
    clock: tokens and seconds of all calls.
  """

  def __init__(
    self, config: ModelConfig, params, *, loops: int | None = None, dtype: str = 'float32'
  ):
    loops = config.loops if loops is None else loops
    transformer.check_loops(config, loops)
    self.static = Static(config, loops, dtype)
    self.params = transpose_kernels(cast(unstack(params), dtype))
    self.clock = Clock()

  def run(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    *,
    sampling: SamplingArrays | None = None,
    eos: Sequence[int] = (),
    call: int = CALL,
  ):
    """Decodes a batch and yields its sampled tokens.

    Args:
      prompts: token ids of each row; none empty.
      max_new_tokens: limit of each row; prompt and new tokens must fit the
        model's context.
      sampling: settings of the rows; None is greedy.
      eos: tokens that end their row.
      call: tokens of one device call, 1..CALL.

    Yields:
      tokens: list of new ids a row; empty for rows that are done. The consumer
        may send the indices of rows to stop.
    """
    static, clock = self.static, self.clock
    B, context = len(prompts), static.config.max_context
    length_B = np.array([len(p) for p in prompts], np.int32)
    max_new_tokens_B = np.array(max_new_tokens, np.int32)
    eos_E = np.array(sorted(set(eos)) or [-1], np.int32)
    last = int((length_B + max_new_tokens_B).max())
    static = static._replace(config=static.config.for_length(last))
    size = bucket(min(last, int(length_B.max()) + _SOON), context)
    cache = init_cache(static.config, B, size, static.dtype, loops=static.loops)

    began = time.perf_counter() - clock.compile_seconds
    last_BxD, cache = self._prefill(static, prompts, length_B, cache)
    zero_B = np.zeros(B, np.int32)
    rows = DecodeRows(zero_B, length_B, zero_B, max_new_tokens_B, np.zeros(B, bool))
    rows = self._call(static, begin, self.params, last_BxD, rows, sampling, eos_E)
    rows = jax.device_get(rows)
    clock.prefill_tokens += int(length_B.sum())
    clock.prefill_seconds += time.perf_counter() - clock.compile_seconds - began

    ended = yield [[int(t)] for t in rows.token_B]
    while True:
      if ended:
        done_B = np.array(rows.done_B)
        done_B[list(ended)] = True
        rows = rows._replace(done_B=done_B)
      if rows.done_B.all():
        return
      top = int(rows.position_B[~rows.done_B].max()) + call
      if top > size and size < last:
        size = bucket(min(last, max(top, 2 * size)), context)
        cache = grow(cache, length=size, static=static)
      began = time.perf_counter() - clock.compile_seconds
      out_BxT, rows, cache = self._call(
        static, advance, self.params, cache, rows, sampling, eos_E, np.int32(call)
      )
      out_BxT, rows = jax.device_get((out_BxT, rows))
      tokens = [[int(t) for t in row if t >= 0] for row in out_BxT]
      clock.decode_tokens += sum(map(len, tokens))
      clock.decode_seconds += time.perf_counter() - clock.compile_seconds - began
      ended = yield tokens

  def _prefill(self, static: Static, prompts, length_B, cache):
    """Prefills all prompts in chunks of bounded size."""
    B, longest = len(prompts), int(length_B.max())
    most = bucket(min(max(CHUNK_TOKENS // B, 64), longest))
    last_BxD = jnp.zeros((B, static.config.d_model), static.dtype)
    for start in range(0, longest, most):
      width = bucket(min(most, longest - start))
      tokens_BxL = np.zeros((B, width), np.int32)
      for row, prompt in zip(tokens_BxL, prompts, strict=True):
        part = prompt[start : start + width]
        row[: len(part)] = part
      last_BxD, cache = self._call(
        static,
        extend,
        self.params,
        cache,
        last_BxD,
        tokens_BxL,
        np.int32(start) if start else None,
        length_B,
      )
    return last_BxD, cache

  def _call(self, static: Static, step, *args):
    """Runs a compiled step; compiles it, on the clock, the first time."""
    leaves, tree = jax.tree.flatten(args)
    key = (step, static, tree, tuple((x.shape, x.dtype, getattr(x, 'sharding', 0)) for x in leaves))
    if key not in _COMPILED:
      began = time.perf_counter()
      lowered = step.lower(*args, static=static)
      _COMPILED[key] = lowered.compile()
      self.clock.compile_seconds += time.perf_counter() - began
    return _COMPILED[key](*args)


_COMPILED: dict[Any, Any] = {}


def forget_programs() -> None:
  """Frees the compiled steps of all decoders; they are compiled again."""
  _COMPILED.clear()
