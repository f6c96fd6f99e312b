"""The quality-depth curve of early exits, by gate and threshold.

A text is scored with early exits in one parallel forward pass
(`rrt.exits.forward`), which computes what the engine does token by token, and
compared with full depth: mean loops, top-1 agreement, nats lost.

'learned' and 'change' gates score the block's output at a cost of O(D). The
others are baselines: 'margin' and 'entropy' run coda and head after every loop,
'oracle' uses the prediction of full depth (the paper's exits).

B batch, L row length, D model, V vocabulary, N tokens, R loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.evals.every_loop import LIVE, WITH_HEAD, EveryLoop, read_hidden
from rrt.exits import score as score_lib
from rrt.exits.forward import forward_early
from rrt.exits.gate import check_arrays
from rrt.models.params import cast

if TYPE_CHECKING:
  from rrt.model import LanguageModel

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
HEADERS = ('gate', 'skipped loops', 'threshold', 'loops', 'agree %', 'nats/token', 'nats lost')


@dataclasses.dataclass(frozen=True)
class Point:
  """One gate at one threshold.

  Attributes:
    gate: its kind.
    kv: cache policy for the loops that a token skipped.
    threshold: of the gate's score.
    mean_loops: loops a token, over scored tokens.
    agreement: top-1 agreement with full depth, a share of the scored tokens.
    nll_nats: cross-entropy of the text.
    lost_nats: its excess over full depth.
    tokens: number of scored tokens.
    row_agreement: the agreement by row, for confidence bounds.
    row_lost: the nats lost by row.
  """

  gate: str
  kv: str
  threshold: float
  mean_loops: float
  agreement: float
  nll_nats: float
  lost_nats: float
  tokens: int
  row_agreement: tuple[float, ...] = ()
  row_lost: tuple[float, ...] = ()

  def plain(self) -> dict[str, Any]:
    """The figures without the per-row ones."""
    fields = dataclasses.asdict(self)
    return {k: v for k, v in fields.items() if not k.startswith('row_')}


def curve(
  model: LanguageModel,
  static: EveryLoop,
  gates: Sequence[str],
  arrays: Any = None,
  *,
  kv: str = 'propagate',
  shares: Sequence[float] = SHARES,
  batch: int = 4,
  dtype: str = 'float32',
  progress: Callable[[int], None] | None = None,
) -> list[Point]:
  """Measures each gate at thresholds from few exits to many.

  Args:
    model: the model.
    static: of the text, from `every_loop.read_static`.
    gates: kinds, of `LIVE` and `WITH_HEAD`.
    arrays: of the learned gate.
    kv: cache policy for the loops that a token skipped.
    shares: thresholds are chosen so that about these shares of the tokens
      leave after the first loop.
    batch: rows in one pass.
    dtype: of the computation.
    progress: called with the number of tokens after each pass.
  """
  points = []
  for gate in gates:
    check_arrays(gate, arrays, model.config)
    for threshold in thresholds(static, gate, shares):
      points.append(
        measure(
          model, static, gate, threshold, arrays, kv=kv, batch=batch, dtype=dtype, progress=progress
        )
      )
  return points


def table(points: Sequence[Point]) -> list[tuple]:
  """Table rows of points, for the columns `HEADERS`."""
  return [
    (p.gate, p.kv, p.threshold, p.mean_loops, 100 * p.agreement, p.nll_nats, p.lost_nats)
    for p in points
  ]


def parse_gates(text: str) -> list[str]:
  """Parses a comma-separated list of gate kinds.

  Raises:
    InputError: an unknown kind.
  """
  known = (*LIVE, *WITH_HEAD)
  if text == 'all':
    return list(known)
  names = [name.strip() for name in text.split(',')]
  for name in names:
    if name not in known:
      raise InputError(f'exits={name!r}: must be all or some of {known}.')
  return names


def thresholds(static: EveryLoop, gate: str, shares: Sequence[float]) -> list[float]:
  """Quantiles of the first loop's scores, for these shares of exits."""
  if gate == 'oracle':
    return [1.0]
  first = static.scores[gate][0][static.scored_NxL]
  return [float(np.quantile(first, 1 - share)) for share in shares]


def measure(
  model: LanguageModel,
  static: EveryLoop,
  gate: str,
  threshold: float,
  arrays: Any = None,
  *,
  kv: str = 'propagate',
  batch: int = 4,
  dtype: str = 'float32',
  progress: Callable[[int], None] | None = None,
) -> Point:
  """Scores the text with one gate and threshold; arguments as for `curve`."""
  params = cast(model.params, dtype)
  live = gate in LIVE
  depth_NxL = np.zeros_like(static.tokens_NxL)
  if not live:
    depth_NxL = replayed(static, gate, threshold)
  found = []
  for first in range(0, len(depth_NxL), batch):
    part = slice(first, first + batch)
    out = _early(
      params,
      arrays,
      np.float32(threshold),
      static.tokens_NxL[part],
      depth_NxL[part],
      config=model.config,
      kind=gate if live else 'replay',
      kv=kv,
      dtype=dtype,
    )
    found.append(jax.device_get(out))
    if progress:
      progress(int(static.scored_NxL[part].sum()))
  nll, top, depth = map(np.concatenate, zip(*found, strict=True))
  scored = static.scored_NxL
  lost_NxL = np.where(scored, nll - static.nll_NxL, 0.0).astype(np.float64)
  same_NxL = scored & (top == static.top_NxL)
  of_row = scored.sum(1)
  return Point(
    gate,
    kv,
    threshold,
    mean_loops=float(depth[scored].mean()),
    agreement=float(same_NxL.sum() / scored.sum()),
    nll_nats=float(nll[scored].astype(np.float64).mean()),
    lost_nats=float(lost_NxL.sum() / scored.sum()),
    tokens=int(scored.sum()),
    row_agreement=tuple(map(float, same_NxL.sum(1) / of_row)),
    row_lost=tuple(map(float, lost_NxL.sum(1) / of_row)),
  )


def replayed(static: EveryLoop, gate: str, threshold: float) -> np.ndarray:
  """Loops that each token runs under a gate that needs the head, [N, L].

  The first token of a row runs all loops, as with live gates.
  """
  score = static.right_RxNxL if gate == 'oracle' else static.scores[gate]
  reached = np.asarray(score) >= threshold
  never = np.ones_like(reached[:1])
  depth_NxL = np.argmax(np.concatenate([reached, never]), 0) + 1
  depth_NxL[:, 0] = len(reached) + 1
  return depth_NxL.astype(np.int32)


@functools.partial(jax.jit, static_argnames=('config', 'kind', 'kv', 'dtype'))
def _early(params, arrays, threshold, tokens_BxL, depth_BxL, *, config, kind, kv, dtype):
  score_of = score_lib.by_loop(kind, arrays)

  def leaves(loops, before_BxLxD, after_BxLxD):
    if kind == 'replay':
      return depth_BxL <= loops
    return score_of(before_BxLxD, after_BxLxD, loops) >= threshold

  lens = functools.partial(score_lib.through_lens, arrays)
  out = forward_early(config, params, tokens_BxL, leaves, kv, dtype, lens)
  nll_BxL, top_BxL, _, _ = read_hidden(
    config, params, dtype, out.hidden_BxLxD, jnp.roll(tokens_BxL, -1, 1)
  )
  return nll_BxL, top_BxL, out.depth_BxL
