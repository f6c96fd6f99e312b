"""The shape of a child: how its depth is arranged, and its LoRA ranks."""

import dataclasses

import numpy as np

from rrt.config import COMPONENTS, ORDERS, LoraConfig, ModelConfig, is_number
from rrt.errors import InputError

# One rank for all loops, or one a loop.
LoopRanks = int | tuple[int, ...]


def arrange(
  parent: ModelConfig,
  *,
  prelude: int,
  block: int | None,
  loops: int,
  coda: int,
  order: str,
  loop_norms: bool,
) -> ModelConfig:
  """The child's config, without LoRA.

  Args:
    parent: a vanilla model's config.
    prelude: layers of their own before the block.
    block: layers of the block; None for what the rest leaves.
    loops: times the block runs.
    coda: layers of their own after the block.
    order: 'cycle' or 'sequence'.
    loop_norms: whether gains differ by loop.

  Raises:
    InputError: the parent is recursive, or prelude + block x loops + coda
      is not its depth; then with the nearest choices that are.
  """
  if parent.loops != 1 or parent.lora is not None:
    state = f'is already recursive (loops={parent.loops})'
    if parent.loops == 1:
      state = 'has LoRA, although it is not recursive (loops=1)'
    raise InputError(
      f'The parent {state}; convert a vanilla model, or export this one to an untied model first.'
    )
  if order not in ORDERS:
    raise InputError(f'order={order!r}: must be one of {", ".join(ORDERS)}.')
  for name, value, least in (
    ('prelude', prelude, 0),
    ('loops', loops, 1),
    ('coda', coda, 0),
    ('block', 1 if block is None else block, 1),
  ):
    if not isinstance(value, int) or value < least:
      raise InputError(f'{name}={value!r}: must be a whole number, {least} or more.')
  depth = parent.depth
  left = depth - prelude - coda
  if block is None and left > 0 and left % loops == 0:
    block = left // loops
  if block is None or prelude + block * loops + coda != depth:
    given = '' if block is None else f'block {block} x '
    choices = '; or '.join(_nearest(depth, prelude, block, loops, coda))
    raise InputError(
      f'The parent has {depth} layers, which prelude {prelude} + {given}'
      f'loops {loops} + coda {coda} cannot make up. Choose {choices}.'
    )
  return parent.with_recursion(
    prelude=prelude, block=block, loops=loops, coda=coda, order=order, loop_norms=loop_norms
  )


def _nearest(depth, prelude, block, loops, coda, count: int = 3) -> list[str]:
  """The arrangements of a depth that differ least from what was asked."""
  found = []
  for p in range(depth):
    for c in range(depth - p):
      rest = depth - p - c
      for r in range(1, rest + 1):
        if rest % r or (r == 1 and loops != 1 and depth > 1):
          continue
        n = rest // r
        away = abs(p - prelude) + abs(c - coda) + 2 * abs(r - loops)
        away += 0 if block is None else abs(n - block)
        # Of equals, the more even split between prelude and coda.
        found.append((away, abs(p - c), p, n, r, c))
  return [f'prelude={p} block={n} loops={r} coda={c}' for _, _, p, n, r, c in sorted(found)[:count]]


def with_ranks(
  config: ModelConfig, rank: LoopRanks | dict[str, LoopRanks] | None, alpha: float | None = None
) -> ModelConfig:
  """A child's config with LoRA; ranks are capped at the matrices.

  Args:
    config: from `arrange`.
    rank: one for all seven linears, or by component (`q` to `down`); each a
      whole number or a tuple of R of them, one a loop.
    alpha: LoRA's scale is alpha / the largest rank; None for 1.

  Raises:
    InputError: a negative rank, an unknown component, ranks for another
      number of loops, an alpha of 0.
  """
  if alpha is not None and not is_number(alpha):
    raise InputError(f'alpha={alpha!r}: must be a finite number above 0.')
  ranks = rank if isinstance(rank, dict) else dict.fromkeys(COMPONENTS, rank)
  capped = {}
  for name, value in ranks.items():
    if name not in COMPONENTS:
      raise InputError(f'rank names {name!r}; the linears are {", ".join(COMPONENTS)}.')
    capped[name] = _capped(config, name, 0 if value is None else value)
  lora = None
  if any(np.any(value) for value in capped.values()):
    lora = LoraConfig(**capped, alpha=None if alpha is None else float(alpha))
  return dataclasses.replace(config, lora=lora)


def _capped(config: ModelConfig, name: str, value: LoopRanks):
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


def is_full_rank(config: ModelConfig) -> bool:
  """Whether LoRA can tell every weight of every position apart."""
  return config.lora is not None and all(
    config.lora.table(name, config.loops, config.block_layers).min() == min(shape)
    for name, shape in config.shapes().items()
  )


def source_layers(config: ModelConfig, init: str) -> np.ndarray:
  """Which depth of the parent each block layer is taken from, int [N].

  stepwise (paper, section 2; figure 2): evenly spaced over the depths that
  the block replaces, halves rounded to even, the first and last kept. lower
  and upper: the first and the last N of them.
  """
  depths = np.sort(config.block_depths().reshape(-1))
  N = config.block_layers
  if init == 'stepwise':
    steps = np.linspace(0, len(depths) - 1, N)
    return depths[np.round(steps).astype(int)]
  return depths[:N] if init == 'lower' else depths[-N:]
