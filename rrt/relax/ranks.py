"""Low-rank relaxations from ranks: one number, by linear, by loop, or tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rrt.errors import InputError
from rrt.relax.base import Relaxation
from rrt.relax.hosts import LINEAR_AXES, hosts_of
from rrt.relax.lora import Lora

LOW_RANK = Lora  # The relaxation that ranks are of.
# One rank for all loops, or one a loop.
LoopRanks = int | tuple[int, ...]


def parse_ranks(text: str) -> LoopRanks | dict[str, LoopRanks]:
  """'64', '32/96' by loop, or 'q:32,down:32/96' by linear.

  Raises:
    InputError: it is none of them.
  """

  def one(text: str) -> LoopRanks:
    ranks_R = tuple(map(int, text.split('/')))
    return ranks_R if len(ranks_R) > 1 else ranks_R[0]

  try:
    if ':' not in text:
      return one(text)
    pairs = [pair.split(':') for pair in text.split(',')]
    ranks = {name.strip(): one(value) for name, value in pairs}
  except ValueError as e:
    raise InputError(
      f'rank={text!r}: give a whole number, q:32,v:32,... by linear, or 32/96 by loop.'
    ) from e
  if len(ranks) < len(pairs):
    raise InputError(f'rank={text!r}: give each linear once.')
  return ranks


def with_ranks(
  config, rank: LoopRanks | Mapping[str, LoopRanks] | None, alpha: float | None = None
) -> tuple[Relaxation, ...]:
  """LoRA of some ranks, capped at the matrices; () where all are 0.

  Args:
    config: the child's `ModelConfig`.
    rank: one for all seven linears, or by component (`q` to `down`); each a
      whole number, a tuple of R of them, one a loop, or an array [R, N].
    alpha: LoRA's scale is alpha / the largest rank; None for 1.

  Raises:
    InputError: a negative rank, an unknown component, ranks for another
      number of loops, an alpha of 0.
  """
  if alpha is not None and not (
    isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < 1e300
  ):
    raise InputError(f'alpha={alpha!r}: must be a finite number above 0.')
  ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(LINEAR_AXES, rank)
  capped: dict[str, Any] = {}
  for name, value in ranks.items():
    if name not in LINEAR_AXES:
      raise InputError(f'rank names {name!r}; the linears are {", ".join(LINEAR_AXES)}.')
    if name not in config.shapes():  # The gate of an MLP without one.
      continue
    capped[name] = _capped(config, name, 0 if value is None else value)
  if not any(np.any(value) for value in capped.values()):
    return ()
  return (Lora(**capped, alpha=None if alpha is None else float(alpha)),)


def _capped(config, name: str, value: LoopRanks | np.ndarray) -> Any:
  """A component's rank, or its table [R][N] where positions differ."""
  if isinstance(value, np.ndarray):  # A table already, of a budget.
    return tuple(tuple(int(v) for v in row) for row in value)
  ranks_R = value if isinstance(value, tuple) else (value,) * config.loops
  for r in ranks_R:
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
      raise InputError(
        f'rank={value!r}: must be a whole number, 0 or more, or a tuple of them, one a loop.'
      )
  if len(ranks_R) != config.loops:
    raise InputError(
      f'rank={value!r} has {len(ranks_R)} numbers; the model has {config.loops} loops.'
    )
  ranks_R = tuple(min(r, *config.shapes()[name]) for r in ranks_R)
  if len(set(ranks_R)) == 1:
    return ranks_R[0]
  return tuple((r,) * config.block_layers for r in ranks_R)


def ranks_of(config) -> dict[str, np.ndarray]:
  """Ranks of all low-rank relaxations by component, int [R, N]; zeros for none."""
  tables = {
    name: np.zeros((config.loops, config.block_layers), np.int32) for name in config.shapes()
  }
  for relaxation in config.relax:
    if isinstance(relaxation, Lora):
      for host in hosts_of(config, 'linear'):
        ranks_RxN = relaxation.ranks(host)
        tables[host.name] += ranks_RxN[:, :: host.experts or 1]
  return tables
