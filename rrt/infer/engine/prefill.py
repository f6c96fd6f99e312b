"""Chunked prefill: prompts enter the cache in launches of bounded size and few shapes.

A prompt of up to `chunk` tokens takes one launch, beside others where they fit; a longer
one takes several, between which the engine runs its calls. Launches have these shapes
(rows, width, cache size), so that all of them can be compiled beforehand:

* 1 x width and 4 x width, width a power of two, up to a chunk in all, for short prompts;
* 1 x chunk, in a cache of 2, 4, 8, ... chunks, for long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.infer import decode
from rrt.infer.engine.request import Request
from rrt.infer.engine.state import EngineShape
from rrt.models.cache import Cache, init_cache
from rrt.models.params import power_bucket

_LEAST = 16  # Tokens of the narrowest launch.
_TOGETHER = 4  # Short prompts that share a launch.


class LaunchShape(NamedTuple):
  """What a launch is compiled for: its rows, tokens a row, and positions of the cache."""

  rows: int
  width: int
  size: int


@dataclasses.dataclass
class Group:
  """Requests that are prefilled together, a row each.

  Attributes:
    requests: at most one of them is longer than a chunk.
    slots: of the requests.
    shape: of its launches.
    done: tokens of each row that are in the cache.
    cache: of all rows; None before the first launch.
  """

  requests: list[Request]
  slots: list[int]
  shape: LaunchShape
  done: int = 0
  cache: Cache | None = None
  last_BxD: Any = None

  @property
  def tokens(self) -> int:
    """Of the longest row: the prompt without its last token."""
    return max(len(r.prompt) for r in self.requests) - 1

  @property
  def complete(self) -> bool:
    """Whether all rows are in the cache."""
    return self.done >= self.tokens


class Prefiller:
  """Runs prefill launches of a model.

  Attributes:
    chunk: tokens of a launch, over its rows.
  """

  def __init__(self, shape: EngineShape, params, chunk: int):
    self._params = params
    self._shape = shape
    self.chunk = min(chunk, shape.context)

  def shape_of(self, tokens: int, rows: int = 1) -> LaunchShape:
    """The launches of `rows` prompts of up to `tokens` tokens before their last one."""
    longest = self._shape.config.max_context
    if tokens <= self.chunk:
      width = min(power_bucket(tokens, _LEAST), self.chunk)
      return LaunchShape(rows, width, width)
    return LaunchShape(1, self.chunk, min(power_bucket(tokens, self.chunk), longest))

  def shapes(self, longest: int) -> list[LaunchShape]:
    """All shapes of prompts of up to `longest` tokens."""
    found = dict.fromkeys(self.shape_of(n) for n in range(1, longest))
    for shape in list(found):
      if shape.size <= self.chunk and self._together(shape.width):
        found[shape._replace(rows=_TOGETHER)] = None
    return list(found)

  def _together(self, width: int) -> bool:
    """Whether several prompts of up to `width` tokens fit into a launch."""
    return _TOGETHER * width <= self.chunk and self._shape.slots >= _TOGETHER

  def take(self, waiting: Sequence[Request], free: Sequence[int]) -> Group:
    """The first requests that fit into one launch, as a group in free slots."""
    requests = list(itertools.islice(waiting, min(_TOGETHER, len(free))))
    longest = max(max(len(r.prompt) for r in requests) - 1, 1)
    fits = longest <= self.chunk and self._together(self.shape_of(longest).width)
    if len(requests) < _TOGETHER or not fits:
      requests = requests[:1]
      longest = max(len(requests[0].prompt) - 1, 1)
    count = len(requests)
    return Group(requests, list(free[:count]), self.shape_of(longest, count))

  def launch(self, group: Group) -> int:
    """Runs the next chunk of a group; returns its tokens, padding included."""
    rows, width, size = group.shape
    config, dtype = self._shape.config, self._shape.dtype
    if group.cache is None:
      group.cache = _init_cache(config, rows, size, dtype)
      group.last_BxD = jnp.zeros((rows, config.d_model), dtype)
    # The last chunk of a cache that is no multiple of a chunk runs some tokens again.
    start = min(group.done, size - width)
    tokens_BxL = np.zeros((rows, width), np.int32)
    lengths_B = [len(r.prompt) - 1 for r in group.requests]
    for row, request in enumerate(group.requests):
      part = request.prompt[start : min(start + width, lengths_B[row])]
      tokens_BxL[row, : len(part)] = part
    group.last_BxD, group.cache = decode.extend(
      self._params,
      group.cache,
      group.last_BxD,
      jnp.asarray(tokens_BxL),
      jnp.int32(start) if start else None,
      jnp.asarray(lengths_B, jnp.int32),
      static=decode.Static(config, config.loops, dtype),
    )
    group.done = start + width
    return rows * width

  def row(self, group: Group, row: int) -> Cache | None:
    """The cache of one of its requests; None for a prompt of one token."""
    if len(group.requests[row].prompt) == 1:
      return None
    return group.cache if group.shape.rows == 1 else _row(group.cache, jnp.int32(row))


_init_cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3))
_row = jax.jit(
  lambda cache, row: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache)
)
