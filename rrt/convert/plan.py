"""`ConvertConfig`, and the shape of the child that it describes."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import difflib
from typing import Any

import numpy as np

from rrt.config import ModelConfig
from rrt.config_checks import ORDERS, is_whole
from rrt.convert import calibration_data, drop, rank_budget, size
from rrt.errors import InputError
from rrt.models.added_loops import config_with_loops
from rrt.relax import registry
from rrt.relax.base import Relaxation
from rrt.relax.hosts import hosts_of
from rrt.relax.ranks import LoopRanks, parse_ranks, with_ranks

INITS = ('calibrated', 'stepwise', 'average', 'lower', 'upper', 'random')
RELAX_INITS = ('fit', 'zero')
# Fields that `params` finds values for.
CHOSEN = (
  *('prelude', 'block', 'loops', 'coda', 'order', 'init', 'rank', 'budget', 'relax'),
  *('relax_init', 'drop', 'refit', 'add_loops', 'sweeps'),
)
REFITS = ('after', 'around', 'none')


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """How a vanilla model becomes a recursive one.

  Attributes:
    prelude: layers kept as they are before the block.
    block: layers of the block; None for what the rest leaves.
    loops: times the block runs.
    coda: layers of their own after the block.
    order: 'cycle' or 'sequence'.
    init: of the block's shared weights, one of `INITS`.
    rank: of the low-rank term on every linear, or by component:
      `{'q': 32, ...}`; where the loops differ a tuple, one a loop. Capped at
      the smaller side of the matrix. 0 for none. Also the words that
      `rrt convert --rank` takes.
    budget: parameters of low-rank terms to spend over positions and matrices
      where they regain most, instead of `rank`.
    alpha: the low-rank product is scaled by alpha / rank; None for 1. The
      factors make up for it.
    relax: further relaxations, behind the low-rank one: objects, or words
      such as 'gain' (see `rrt.relax.registry.parse`).
    relax_init: 'fit' starts relaxations from what the shared weights lack,
      'zero' without effect.
    loop_norms: every loop keeps its own norm gains.
    weights: 'float', or 'int8', 'int4' or 'nf4': all matrices are rounded, and
      relaxations and later layers fitted to what rounding left.
    drop: layers of the parent that are deleted before the rest is arranged:
      '16-19', '3,16-19', (16, 17), or 'auto:4' for the run of four whose
      deletion moves the residual stream of the calibration text least.
    add_loops: the loops after the first stand for no layer of the parent: prelude + block
      + coda are the layers that `drop` leaves, and the loops start closed
      (`rrt.models.added_loops`), so that the child computes what the model without
      them does. `relax` must close what writes to the residual stream; without any it
      is gain:start=0,components=o+down.
    refit: which layers of their own the calibration refits: 'after' those of the
      coda and those behind a deleted layer, 'around' the two before it as well,
      'none'.
    sweeps: times that the calibration goes through the layers, at most: from the second
      on, shared weights are chosen for what all loops of the child got and were asked for
      in the sweep before, not for the parent's inputs of the later loops. It ends when the
      tokens that fits are checked on come no nearer to the parent, and the best stays.
    params: unique parameters of the child, '103M' or '0.75x' of the parent's: the
      conversion searches for the best arrangement (`rrt.convert.search`), and
      everything above but `alpha` and `loop_norms` is its choice.
    layers_run: with `params`, the most layers that a token may pass.
    calibration: path of the text to fit on and to measure on; None takes
      English text found in the installation (in a recipe its training part).
    calibration_tokens: how many to fit on.
  """

  prelude: int = 0
  block: int | None = None
  loops: int = 2
  coda: int = 0
  order: str = 'cycle'
  init: str = 'calibrated'
  rank: int | str | tuple[int, ...] | Mapping[str, LoopRanks] | None = 0
  budget: int | None = None
  alpha: float | None = None
  relax: tuple[str | Relaxation, ...] = ()
  relax_init: str = 'fit'
  loop_norms: bool = True
  weights: str = 'float'
  drop: str | tuple[int, ...] = ()
  refit: str = 'after'
  add_loops: bool = False
  sweeps: int = 1
  params: str | int | None = None
  layers_run: int | None = None
  calibration: str | None = None
  calibration_tokens: int = 8192

  def replace(self, **changes) -> ConvertConfig:
    """The same with some fields changed.

    Raises:
      InputError: a field that does not exist.
    """
    known = [f.name for f in dataclasses.fields(self)]
    for name in changes:
      if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f'did you mean {near[0]}?' if near else f'the fields are {", ".join(known)}.'
        raise InputError(f'{name}={changes[name]!r}: a conversion has no such field; {hint}')
    return dataclasses.replace(self, **changes)

  def without_loops(self) -> ConvertConfig:
    """The conversion to the vanilla model that `add_loops` begins with."""
    vanilla = dict(prelude=0, block=None, loops=1, coda=0, relax=(), rank=0, alpha=None, sweeps=1)
    return self.replace(add_loops=False, loop_norms=False, **vanilla)

  def relaxations(self) -> tuple[Relaxation, ...]:
    """`relax` as objects."""
    words = (self.relax,) if isinstance(self.relax, (str, Relaxation)) else self.relax
    return tuple(registry.parse(r) if isinstance(r, str) else r for r in words)


def recommended(layers: int, loops: int) -> tuple[int, int]:
  """(prelude, coda) of about a quarter of the layers each, for a block of whole loops."""
  if loops == 1:
    return 0, 0
  prelude = coda = round(layers / 4)
  while coda and (layers - prelude - coda) % loops:
    coda -= 1
  return (prelude, coda) if (layers - prelude - coda) % loops == 0 else (0, 0)


def plan(parent: ModelConfig, convert: ConvertConfig) -> ModelConfig:
  """The shape of the child that `to_recursive` makes of a parent.

  Checks everything that does not need the weights. A budget's ranks are
  only known when it is spent; here the child is without low-rank terms then.

  Raises:
    InputError: a field that is invalid or has no effect.
  """
  c = convert
  if c.init not in INITS:
    raise InputError(f'init={c.init!r}: must be one of {", ".join(INITS)}.')
  if c.relax_init not in RELAX_INITS:
    raise InputError(f'relax_init={c.relax_init!r}: must be one of {", ".join(RELAX_INITS)}.')
  _check_vanilla(parent)
  if parent.num_experts and c.budget is not None:
    raise InputError(f'budget={c.budget}: is not for parents with experts; give rank.')
  if c.params is not None:
    return _stand_in(parent, c)
  if c.layers_run is not None:
    raise InputError(f'layers_run={c.layers_run!r}: has no effect without params.')
  dropped = drop.parse(c.drop, parent.depth)
  if c.add_loops:
    return with_added_loops(plan(parent, c.without_loops()), c)
  config = arrange(drop.config_without(parent, dropped), c)
  _check_refit(c, bool(dropped))
  rank_budget.check(c.budget, c.rank)
  calibration_data.check_tokens(c.calibration_tokens)
  config = with_relaxations(config, c, c.rank)
  _check_closed(config, c)
  _check_sweeps(config, c)
  low_rank = c.budget is not None or len(config.relax) > len(c.relaxations())
  if c.alpha is not None and not low_rank:
    raise InputError(f'alpha={c.alpha!r}: has no effect without a rank or a budget.')
  if c.relax_init != RELAX_INITS[0] and c.budget is None and not config.relax:
    raise InputError(f'relax_init={c.relax_init!r}: has no effect without a relaxation.')
  return config


def with_relaxations(config: ModelConfig, convert: ConvertConfig, rank: Any) -> ModelConfig:
  """A child's config with low-rank terms of some ranks and the further ones.

  Raises:
    InputError: ranks or relaxations that cannot work.
  """
  rank = parse_ranks(rank) if isinstance(rank, str) else rank
  low_rank = with_ranks(config, rank, convert.alpha)
  further = convert.relaxations()
  first = tuple(r for r in further if r.leads)
  rest = tuple(r for r in further if not r.leads)
  return dataclasses.replace(config, relax=first + low_rank + rest)


def with_added_loops(config: ModelConfig, convert: ConvertConfig) -> ModelConfig:
  """The shape that `add_loops` makes of the vanilla model of `without_loops`.

  Raises:
    InputError: layers that do not add up, loops that do not start closed, or a field that
      has no effect.
  """
  c = convert
  for name in ('order', 'init', 'budget', 'relax_init', 'sweeps'):
    if getattr(c, name) != getattr(ConvertConfig(), name):
      raise InputError(
        f'{name}={getattr(c, name)!r}: has no effect with add_loops, whose loops stand for '
        'no layers; leave it out.'
      )
  if not c.relaxations():
    c = c.replace(relax=('gain:start=0,components=o+down',))
  shape = (c.prelude, c.block, c.loops, c.coda)
  looped = config_with_loops(config, *shape, c.relaxations(), c.loop_norms)
  return with_relaxations(looped, c, c.rank)


def _check_vanilla(parent: ModelConfig) -> None:
  if parent.weights != 'float':
    raise InputError(
      f'The parent has weights={parent.weights!r}; convert the model that it was rounded from.'
    )
  if parent.end_norm or parent.loops != 1 or parent.relax:
    state = f'is already recursive (loops={parent.loops})'
    if parent.loops == 1:
      state = 'has relaxations, although it is not recursive (loops=1)'
    raise InputError(
      f'The parent {state}; convert a vanilla model, or export this one to an untied model first.'
    )


def _stand_in(parent: ModelConfig, c: ConvertConfig) -> ModelConfig:
  """For a child that is yet to be found: layers deleted until its size is reached."""
  for name in CHOSEN:
    value, default = getattr(c, name), getattr(ConvertConfig(), name)
    if value != default and (value or default):
      raise InputError(
        f'{name}={value!r} and params={c.params!r} are both given: params chooses it; '
        'leave one of them out.'
      )
  count = max(size.deletions(size.target(c.params, parent), parent), 1)
  if c.layers_run is not None:
    if not is_whole(c.layers_run, 1):
      raise InputError(f'layers_run={c.layers_run!r}: must be a whole number, 1 or more.')
    count = max(count, parent.depth - c.layers_run)
  return dataclasses.replace(drop.config_without(parent, count), weights=c.weights)


def _starts_closed(config: ModelConfig) -> bool:
  return any(r.closes(h) for r in config.relax for h in r.hosts(config))


def _check_closed(config: ModelConfig, c: ConvertConfig) -> None:
  """Raises InputError for loops that start closed on weights that are no layer's own."""
  if not _starts_closed(config):
    return
  if c.init not in ('calibrated', 'lower'):
    raise InputError(
      f'init={c.init!r}: loops that start closed leave the shared weights to the first loop; '
      'take init=calibrated, or init=lower for its layers unchanged.'
    )
  if c.budget is not None:
    raise InputError(
      f'budget={c.budget}: is spent on what shared weights lack, which loops that start closed '
      'do not use; give rank.'
    )


def _check_sweeps(config: ModelConfig, c: ConvertConfig) -> None:
  """Raises InputError for `sweeps` that cannot be or have no effect."""
  if not is_whole(c.sweeps, 1):
    raise InputError(f'sweeps={c.sweeps!r}: must be a whole number, 1 or more.')
  if c.sweeps == 1:
    return
  for why, holds in (
    (f'with init={c.init!r}', c.init != 'calibrated'),
    ("on one loop, whose weights are nobody else's", config.loops == 1),
    ('with loops that start closed, which share nothing yet', _starts_closed(config)),
    ("on experts, which are fitted to the parent's inputs", bool(config.num_experts)),
  ):
    if holds:
      raise InputError(f'sweeps={c.sweeps}: a second sweep has no effect {why}.')


def _check_refit(c: ConvertConfig, drops: bool) -> None:
  """Raises InputError for a `refit` that is unknown or has no effect."""
  if c.refit not in REFITS:
    raise InputError(f'refit={c.refit!r}: must be one of {", ".join(REFITS)}.')
  if c.refit == REFITS[0]:
    return
  if c.init != 'calibrated':
    raise InputError(f'refit={c.refit!r}: has no effect with init={c.init!r}.')
  if not drops and (c.refit == 'around' or not c.coda):
    raise InputError(f'refit={c.refit!r}: has no effect without deleted layers; give drop too.')


def arrange(parent: ModelConfig, convert: ConvertConfig) -> ModelConfig:
  """The child's config, without relaxations.

  Raises:
    InputError: prelude + block x loops + coda is not the parent's depth; then
      with the nearest choices that are.
  """
  c, block = convert, convert.block
  if c.order not in ORDERS:
    raise InputError(f'order={c.order!r}: must be one of {", ".join(ORDERS)}.')
  for name, value, least in (
    ('prelude', c.prelude, 0),
    ('loops', c.loops, 1),
    ('coda', c.coda, 0),
    ('block', 1 if block is None else block, 1),
  ):
    if not isinstance(value, int) or value < least:
      raise InputError(f'{name}={value!r}: must be a whole number, {least} or more.')
  depth = parent.depth
  left = depth - c.prelude - c.coda
  if block is None and left > 0 and left % c.loops == 0:
    block = left // c.loops
  if block is None or c.prelude + block * c.loops + c.coda != depth:
    given = '' if block is None else f'block {block} x '
    left_out = ' without those of drop' if c.drop else ''
    choices = '; or '.join(_nearest(depth, c.prelude, block, c.loops, c.coda))
    raise InputError(
      f'The parent has {depth} layers{left_out}, which prelude {c.prelude} + {given}'
      f'loops {c.loops} + coda {c.coda} cannot make up. Choose {choices}.'
    )
  return parent.with_recursion(
    prelude=c.prelude,
    block=block,
    loops=c.loops,
    coda=c.coda,
    order=c.order,
    loop_norms=c.loop_norms and (c.loops > 1 or not c.drop),
    weights=c.weights,
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


def is_exact(config: ModelConfig, convert: ConvertConfig) -> bool:
  """Whether a child can only compute what its parent does."""
  if convert.drop or convert.weights != 'float':
    return False
  if convert.add_loops:
    return True
  fits = convert.relax_init == 'fit'
  full = fits and all(
    any(r.is_exact(host) for r in config.relax if r.site == 'linear')
    or any(all(r.adopts(host.name, n) for n in range(host.layers)) for r in config.relax)
    for host in hosts_of(config, 'linear')
  )
  if config.loops == 1:
    return convert.init != 'random' or full
  return config.loop_norms and full


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
