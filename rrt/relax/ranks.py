"""Low-rank relaxations from ranks: one number, by linear, by loop, or tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rrt.errors import InputError
from rrt.relax.base import LINEAR_AXES, Relaxation, hosts_of
from rrt.relax.lora import Lora

# One rank for all loops, or one a loop.
LoopRanks = int | tuple[int, ...]


def with_ranks(
  config, rank: LoopRanks | Mapping[str, LoopRanks] | None, alpha: float | None = None
) -> tuple[Relaxation, ...]:
  """LoRA of some ranks, capped at the matrices; () where all are 0.

  Args:
    config: the child's `ModelConfig`.
    rank: one for all seven linears, or by component (`q` to `down`); each a
      whole number or a tuple of R of them, one a loop.
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
    capped[name] = _capped(config, name, 0 if value is None else value)
  if not any(np.any(value) for value in capped.values()):
    return ()
  return (Lora(**capped, alpha=None if alpha is None else float(alpha)),)


def _capped(config, name: str, value: LoopRanks):
  """A component's rank, or its table [R][N] where loops differ."""
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


def with_tables(tables: Mapping[str, np.ndarray], alpha: float | None) -> tuple[Relaxation, ...]:
  """LoRA of rank tables, component -> int [R, N]; () where all are 0."""
  if not any(table.any() for table in tables.values()):
    return ()
  ranks: dict[str, Any] = {
    name: tuple(tuple(int(v) for v in row) for row in table) for name, table in tables.items()
  }
  return (Lora(**ranks, alpha=alpha),)


def ranks_of(config) -> dict[str, np.ndarray]:
  """Ranks of all low-rank relaxations by component, int [R, N]; zeros for none."""
  tables = {
    name: np.zeros((config.loops, config.block_layers), np.int32) for name in config.shapes()
  }
  for relaxation in config.relax:
    if isinstance(relaxation, Lora):
      for host in hosts_of(config, 'linear'):
        tables[host.name] += relaxation.table(host.name, host.loops, host.layers)
  return tables
