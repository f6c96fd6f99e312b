"""The quality-depth curve: what leaving early costs, gate by gate.

A text is read with exits, all tokens at once (`rrt.models.early`), as the engine
would write it token by token, and compared with the same model at
full depth: mean loops, agreement of the most likely tokens, nats lost.

Gates that cost O(D) decide from the states they meet ('learned', 'change').
Others are there to compare with: 'margin' and 'entropy' run coda and head
after every loop, 'oracle' knows what full depth will say (the paper's exits).

B batch, L row length, D model, V vocabulary, N tokens, R loops.
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
from rrt.infer import exits
from rrt.infer.decode import cast
from rrt.models import passes, transformer
from rrt.models.early import forward_early

if TYPE_CHECKING:
  from rrt.pretrained import LanguageModel

LIVE = ('learned', 'change')
WITH_HEAD = ('margin', 'entropy', 'oracle')
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
HEADERS = (
  'gate', 'skipped loops', 'threshold', 'loops', 'agree %', 'nats/token',
  'nats lost',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
  """One gate at one threshold.

  Attributes:
    gate: its kind.
    kv: what skipped loops keep of a token.
    threshold: of its score.
    mean_loops: loops a token, over all tokens.
    agreement: share of scored tokens whose most likely successor is that of
      full depth.
    nll_nats: cross-entropy of the text.
    lost_nats: above that of full depth.
    tokens: how many were scored.
    row_agreement: the agreement of each row, to judge its spread.
    row_lost: the nats lost of each row.
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
    """The figures without those of each row."""
    fields = dataclasses.asdict(self)
    return {k: v for k, v in fields.items() if not k.startswith('row_')}


@dataclasses.dataclass(frozen=True)
class Static:
  """A text after every loop, had all its tokens left there.

  Attributes:
    tokens_NxL: the rows, padded.
    scored_NxL: whether a token's successor is scored.
    nll_NxL: negative log-likelihood of it at full depth.
    top_NxL: the most likely successor at full depth.
    scores: by gate, [R - 1, N, L]: the score after each loop.
    states_RxNxLxD: the block's outputs, float32, if asked for.
    right_RxNxL: whether the most likely successor after each loop is that of
      full depth.
  """

  tokens_NxL: np.ndarray
  scored_NxL: np.ndarray
  nll_NxL: np.ndarray
  top_NxL: np.ndarray
  scores: dict[str, np.ndarray]
  right_RxNxL: np.ndarray
  states_RxNxLxD: np.ndarray | None = None


def check(config) -> None:
  """Raises InputError for a model whose tokens cannot leave early."""
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
  states: bool = False,
  progress: Callable[[int], None] | None = None,
) -> Static:
  """Reads rows once, with coda and head after every loop.

  Args:
    model: of two loops or more, in cycle order.
    rows: tokens, from `perplexity.make_rows`.
    gate: arrays of a gate: of a learned one, to score with it too, and its
      lens.
    batch: rows in one pass.
    dtype: of the computation.
    states: keep the block's outputs, to fit a gate on.
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
    out = _static(
      params, gate, part, config=model.config, dtype=dtype, states=states
    )
    found.append(jax.device_get(out))
    if progress:
      progress(sum(map(len, rows[first : first + batch])))
  nll, top, right, scores, kept = zip(*found, strict=True)
  wide = lambda parts: np.concatenate(parts, 1)
  return Static(
    tokens_NxL, scored_NxL, np.concatenate(nll), np.concatenate(top),
    {k: wide([s[k] for s in scores]) for k in scores[0]}, wide(right),
    wide(kept) if states else None,
  )  # fmt: skip


def curve(
  model: LanguageModel,
  static: Static,
  gates: Sequence[str],
  arrays: Any = None,
  *,
  kv: str = 'propagate',
  shares: Sequence[float] = SHARES,
  batch: int = 4,
  dtype: str = 'float32',
  progress: Callable[[int], None] | None = None,
) -> list[Point]:
  """Points of each gate, from hardly any exits to nearly all.

  Args:
    model: the model.
    static: from `read_static`, over the text to measure on.
    gates: kinds, of `LIVE` and `WITH_HEAD`.
    arrays: of the learned gate.
    kv: what skipped loops keep of a token.
    shares: thresholds are those at which about this share of the tokens
      leaves after the first loop.
    batch: rows in one pass.
    dtype: of the computation.
    progress: called with the number of tokens after each pass.
  """
  points = []
  for gate in gates:
    if gate == 'learned' and 'kernel' not in (arrays or {}):
      raise InputError(
        'gate=learned: this model has no gate; python -m rrt.fit_gate fits one.'
      )
    for threshold in thresholds(static, gate, shares):
      points.append(
        measure(
          model, static, gate, threshold, arrays, kv=kv, batch=batch,
          dtype=dtype, progress=progress,
        )
      )  # fmt: skip
  return points


def table(points: Sequence[Point]) -> list[tuple]:
  """Rows of a table of points, under `HEADERS`."""
  return [
    (
      p.gate, p.kv, p.threshold, p.mean_loops, 100 * p.agreement, p.nll_nats,
      p.lost_nats,
    )
    for p in points
  ]  # fmt: skip


def parse_gates(text: str) -> list[str]:
  """Gates named on a command line.

  Raises:
    InputError: one does not exist.
  """
  known = (*LIVE, *WITH_HEAD)
  if text == 'all':
    return list(known)
  names = [name.strip() for name in text.split(',')]
  for name in names:
    if name not in known:
      raise InputError(f'exits={name!r}: must be all or some of {known}.')
  return names


def thresholds(
  static: Static, gate: str, shares: Sequence[float]
) -> list[float]:
  """Scores that about these shares of the first loop's tokens reach."""
  if gate == 'oracle':
    return [1.0]
  first = static.scores[gate][0][static.scored_NxL]
  return [float(np.quantile(first, 1 - share)) for share in shares]


def measure(
  model: LanguageModel,
  static: Static,
  gate: str,
  threshold: float,
  arrays: Any = None,
  *,
  kv: str = 'propagate',
  batch: int = 4,
  dtype: str = 'float32',
  progress: Callable[[int], None] | None = None,
) -> Point:
  """Reads the text with exits; arguments as for `curve`."""
  params = cast(model.params, dtype)
  live = gate in LIVE
  depth_NxL = np.zeros_like(static.tokens_NxL)
  if not live:
    depth_NxL = replayed(static, gate, threshold)
  found = []
  for first in range(0, len(depth_NxL), batch):
    part = slice(first, first + batch)
    out = _early(
      params, arrays, np.float32(threshold),
      static.tokens_NxL[part], depth_NxL[part], config=model.config,
      kind=gate if live else 'replay', kv=kv, dtype=dtype,
    )  # fmt: skip
    found.append(jax.device_get(out))
    if progress:
      progress(int(static.scored_NxL[part].sum()))
  nll, top, depth = map(np.concatenate, zip(*found, strict=True))
  scored = static.scored_NxL
  lost_NxL = np.where(scored, nll - static.nll_NxL, 0.0).astype(np.float64)
  same_NxL = scored & (top == static.top_NxL)
  of_row = scored.sum(1)
  return Point(
    gate, kv, threshold,
    mean_loops=float(depth[scored].mean()),
    agreement=float(same_NxL.sum() / scored.sum()),
    nll_nats=float(nll[scored].astype(np.float64).mean()),
    lost_nats=float(lost_NxL.sum() / scored.sum()),
    tokens=int(scored.sum()),
    row_agreement=tuple(map(float, same_NxL.sum(1) / of_row)),
    row_lost=tuple(map(float, lost_NxL.sum(1) / of_row)),
  )  # fmt: skip


def replayed(static: Static, gate: str, threshold: float) -> np.ndarray:
  """After how many loops each token leaves by a gate that needs the head."""
  score = static.right_RxNxL if gate == 'oracle' else static.scores[gate]
  reached = np.asarray(score) >= threshold
  never = np.ones_like(reached[:1])
  return np.argmax(np.concatenate([reached, never]), 0).astype(np.int32) + 1


def _pad(rows):
  width = max(map(len, rows))
  tokens_NxL = np.zeros((len(rows), width), np.int32)
  scored_NxL = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    tokens_NxL[i, : len(row)] = row
    scored_NxL[i, : len(row) - 1] = True
  return tokens_NxL, scored_NxL


@functools.partial(jax.jit, static_argnames=('config', 'dtype', 'states'))
def _static(params, gate, tokens_BxL, *, config, dtype, states):
  met: list[tuple[jax.Array, jax.Array]] = []

  def stay(loops, before_BxLxD, after_BxLxD):
    del loops
    met.append((before_BxLxD, after_BxLxD))
    return jnp.zeros(tokens_BxL.shape, bool)

  out = forward_early(config, params, tokens_BxL, stay, 'exact_fill', dtype)
  context = transformer.make_context(config, tokens_BxL)
  targets_BxL = jnp.roll(tokens_BxL, -1, 1)
  read = functools.partial(_read, config, params, dtype)
  nll_BxL, top_BxL, _, _ = read(out.hidden_BxLxD, targets_BxL)
  learned = gate is not None and 'kernel' in gate
  kinds = [k for k in LIVE if k != 'learned' or learned]
  scores: dict[str, list] = {k: [] for k in ('margin', 'entropy', *kinds)}
  right = []
  for r, (before_BxLxD, after_BxLxD) in enumerate(met):
    read_BxLxD = exits.through_lens(
      gate, after_BxLxD, jnp.full(tokens_BxL.shape, r + 1), config.loops
    )
    hidden_BxLxD, _ = passes.leave(
      config, params, read_BxLxD, context, None, scan=True
    )
    _, r_top_BxL, margin_BxL, entropy_BxL = read(hidden_BxLxD, targets_BxL)
    right.append(r_top_BxL == top_BxL)
    scores['margin'].append(margin_BxL)
    scores['entropy'].append(1 - entropy_BxL / math.log(config.vocab_size))
    for kind in kinds:
      scores[kind].append(
        exits.score_rows(kind, gate, before_BxLxD, after_BxLxD, r + 1)
      )
  kept = None
  if states:
    all_loops = [after for _, after in met] + [out.left_BxLxD]
    kept = jnp.stack(all_loops).astype(jnp.float32)
  stacked = {k: jnp.stack(v) for k, v in scores.items()}
  return nll_BxL, top_BxL, jnp.stack(right), stacked, kept


@functools.partial(jax.jit, static_argnames=('config', 'kind', 'kv', 'dtype'))
def _early(
  params, arrays, threshold, tokens_BxL, depth_BxL, *, config, kind, kv, dtype
):
  def leaves(loops, before_BxLxD, after_BxLxD):
    if kind == 'replay':
      return depth_BxL <= loops
    score_BxL = exits.score_rows(kind, arrays, before_BxLxD, after_BxLxD, loops)
    return score_BxL >= threshold

  lens = functools.partial(_lens, arrays, config.loops)
  out = forward_early(config, params, tokens_BxL, leaves, kv, dtype, lens)
  nll_BxL, top_BxL, _, _ = _read(
    config, params, dtype, out.hidden_BxLxD, jnp.roll(tokens_BxL, -1, 1)
  )
  return nll_BxL, top_BxL, out.depth_BxL


def _lens(arrays, loops, x_BxLxD, depth_BxL):
  return exits.through_lens(arrays, x_BxLxD, depth_BxL, loops)


def _read(config, params, dtype, hidden_BxLxD, targets_BxL):
  """Loss, most likely token, its margin and the entropy, all [B, L]."""
  B, L, D = hidden_BxLxD.shape
  chunk = min(HEAD_CHUNK, B * L)
  pad = -(B * L) % chunk
  hidden = jnp.pad(hidden_BxLxD.reshape(-1, D), ((0, pad), (0, 0)))
  targets = jnp.pad(targets_BxL.reshape(-1), (0, pad))

  def one(x):
    hidden_CxD, targets_C = x
    logits_CxV = transformer.logits(config, params, hidden_CxD, dtype)
    log_p_CxV = jax.nn.log_softmax(logits_CxV, -1)
    hit_C = jnp.take_along_axis(log_p_CxV, targets_C[:, None], -1)[:, 0]
    p_CxV = jnp.exp(log_p_CxV)
    top_C = jnp.argmax(logits_CxV, -1).astype(jnp.int32)
    best_C = jnp.max(p_CxV, -1)
    is_top_CxV = jnp.arange(config.vocab_size)[None, :] == top_C[:, None]
    second_C = jnp.max(jnp.where(is_top_CxV, 0.0, p_CxV), -1)
    entropy_C = -jnp.sum(p_CxV * log_p_CxV, -1)
    return -hit_C, top_C, best_C - second_C, entropy_C

  found = jax.lax.map(
    one, (hidden.reshape(-1, chunk, D), targets.reshape(-1, chunk))
  )
  return tuple(t.reshape(-1)[: B * L].reshape(B, L) for t in found)
