"""Deletes layers of a parent: which ones, the model without them, its targets.

A deleted layer costs its parameters and its compute at once, so that deletion is
the baseline of every recursive child of as many parameters. The layers that
remain are refitted as a coda is (`rrt.convert.calibrate`): with `refit='after'`
those behind the first gap, on the child's own inputs, towards the parent's
residual stream; with 'around' the two before each gap as well, which take a half
and all of the way to the stream behind it.

B rows, L length, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert.activations import LayerActivations, Stream, embedded
from rrt.errors import InputError
from rrt.model import LanguageModel

AUTO_TOKENS = 2048  # Tokens on which 'auto' compares what may be deleted.
BRIDGE = 2  # Layers before a gap that refit='around' fits towards the stream behind it.

Drop = str | tuple[int, ...]


def parse(drop: Drop, depth: int) -> tuple[int, ...] | int:
  """The depths that '16-19' or '3,16-19' names, or the count of 'auto:4'.

  Args:
    drop: as `ConvertConfig.drop`.
    depth: layers of the parent.

  Raises:
    InputError: no such layers, or none would be left.
  """
  example = 'give 16-19, 3,16-19 or auto:4'
  if isinstance(drop, str) and drop.startswith('auto:'):
    count = drop.removeprefix('auto:')
    if not count.isdigit() or not 0 < int(count) < depth:
      raise InputError(f'drop={drop!r}: auto takes a count from 1 to {depth - 1}, as in auto:4.')
    return int(count)
  found: list[int] = []
  for part in drop.split(',') if isinstance(drop, str) else drop:
    ends = str(part).strip().split('-') if str(part).strip() else []
    if not 1 <= len(ends) <= 2 or not all(e.isdigit() for e in ends):
      if isinstance(drop, str) and not drop.strip():
        continue
      raise InputError(f'drop={drop!r}: {part!r} is no layer and no range of layers; {example}.')
    if int(ends[-1]) < int(ends[0]):
      raise InputError(f'drop={drop!r}: {part!r} ends before it begins; {example}.')
    found += range(int(ends[0]), int(ends[-1]) + 1)
  if len(set(found)) < len(found):
    raise InputError(f'drop={drop!r}: names a layer twice.')
  if found and max(found) >= depth:
    raise InputError(f'drop={drop!r}: the parent has the layers 0 to {depth - 1}.')
  if len(found) == depth:
    raise InputError(f'drop={drop!r}: no layer would be left.')
  return tuple(sorted(found))


def count_of(dropped: tuple[int, ...] | int) -> int:
  """How many layers are deleted."""
  return dropped if isinstance(dropped, int) else len(dropped)


def in_words(depths: Sequence[int]) -> str:
  """(3, 16, 17, 18) as '3, 16-18'."""
  parts = []
  for _, run in itertools.groupby(enumerate(depths), lambda pair: pair[1] - pair[0]):
    found = [d for _, d in run]
    parts.append(f'{found[0]}-{found[-1]}' if len(found) > 1 else str(found[0]))
  return ', '.join(parts)


def kept_of(config: ModelConfig, dropped: Sequence[int]) -> list[int]:
  """The parent's depths that remain, by the depth that each will have."""
  return [d for d in range(config.depth) if d not in set(dropped)]


def config_without(config: ModelConfig, dropped: tuple[int, ...] | int) -> ModelConfig:
  """A vanilla model's config without some layers.

  Of a count, whose layers are not known yet, those in the middle stand for them.
  """
  if isinstance(dropped, int):
    start = (config.depth - dropped) // 2
    dropped = tuple(range(start, start + dropped))
  kept = kept_of(config, dropped)
  pick = lambda values: tuple(values[d] for d in kept) if values else ()
  return dataclasses.replace(
    config,
    prelude_layers=0,
    block_layers=len(kept),
    coda_layers=0,
    windows=pick(config.windows),
    rope_index=pick(config.rope_index),
  )


def without(model: LanguageModel, dropped: Sequence[int]) -> LanguageModel:
  """A vanilla model without some layers, nothing refitted."""
  if not dropped:
    return model
  kept = kept_of(model.config, dropped)
  layers = jax.tree.map(lambda t: np.asarray(t)[kept], model.params['block']['layers'])
  return dataclasses.replace(
    model,
    config=config_without(model.config, tuple(dropped)),
    params={**model.params, 'block': {'layers': layers}},
  )


def targets(
  streams: dict[int, Stream], kept: Sequence[int], refit: str, depth: int
) -> dict[int, Stream]:
  """The parent's streams by the child's depth: what each kept layer is fitted towards.

  Args:
    streams: the parent's, by its own depths.
    kept: the parent's depth of each layer that remains.
    refit: 'around' moves the layers before a gap towards the stream behind it.
    depth: of the parent.
  """
  found = {i: streams[d] for i, d in enumerate(kept) if d in streams}
  if refit != 'around':
    return found
  for i, after in enumerate([*kept[1:], depth]):
    if after == kept[i] + 1:
      continue
    gap_BxLxD = streams[after - 1].end - streams[kept[i]].end
    layers = [j for j in range(i - BRIDGE + 1, i + 1) if j in found]
    # Layers of another gap stay with it.
    layers = [j for j in layers if kept[i] - kept[j] == i - j]
    for k, j in enumerate(layers):
      start, middle, end = streams[kept[j]]
      share = (k + 1) / len(layers)
      before = share - 0.5 / len(layers)
      found[j] = Stream(start, middle + before * gap_BxLxD, end + share * gap_BxLxD)
  return found


def first_refitted(kept: Sequence[int], refit: str, depth: int) -> int:
  """The child's first depth that is refitted; the child's depth for none."""
  gaps = [i for i, (a, b) in enumerate(zip([-1, *kept], [*kept, depth])) if b != a + 1]
  if not gaps or refit == 'none':
    return len(kept)
  return max(0, gaps[0] - BRIDGE) if refit == 'around' else gaps[0]


class Costs:
  """What deleting a run of layers does to the residual stream, nothing refitted.

  The stream after the last layer is compared with the parent's, both at unit size
  as the final norm makes them.
  """

  def __init__(self, parent: LanguageModel, tokens_BxL: np.ndarray):
    """Runs the parent on the first `AUTO_TOKENS` of the calibration tokens."""
    c, layers = parent.config, parent.params['block']['layers']
    some_BxL = tokens_BxL[: max(1, AUTO_TOKENS // tokens_BxL.shape[1])]
    at_depth: Any = lambda depth: jax.tree.map(lambda t: jnp.asarray(t[depth]), layers)
    self._activations = LayerActivations(c, at_depth, some_BxL)
    x_BxLxD = embedded(c, parent.params['embed']['table'], some_BxL)
    self._streams = self._activations.run(x_BxLxD, 0)
    self._found: dict[int, list[int]] = {}

  def starts(self, count: int, progress: Callable[[int], None] = lambda n: None) -> list[int]:
    """First layers of the runs of `count`, the cheapest to delete first.

    Args:
      count: layers of a run.
      progress: called with 1 after each run.
    """
    if count not in self._found:
      runs = range(self._activations.config.depth - count + 1)
      costs = {}
      for start in runs:
        costs[start] = self._cost(start, count)
        progress(1)
      self._found[count] = sorted(runs, key=lambda start: costs[start])
    return self._found[count]

  def _cost(self, start: int, count: int) -> float:
    depth = self._activations.config.depth
    h_BxLxD = self._streams[start].start
    for d in range(start + count, depth):
      h_BxLxD = self._activations.step(d, self._activations.layer(d), h_BxLxD).end
    return float(np.mean((_unit(h_BxLxD) - _unit(self._streams[depth - 1].end)) ** 2))


def _unit(x_BxLxD: np.ndarray) -> np.ndarray:
  return x_BxLxD / np.sqrt(np.mean(x_BxLxD**2, -1, keepdims=True) + 1e-20)
