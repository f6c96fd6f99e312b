"""Scores of exit gates: after which loop a token leaves the block.

A gate gives each row a score in O(D), without the head; a row leaves when its
score reaches the row's threshold. A threshold above 1 never lets a token leave
before the last loop.

B rows, D model, R loops, S slots, T sampled tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.ops.matmul import TransposedKernel, matmul, prefers_transposed

KINDS = ('none', 'learned', 'change', 'hazard', 'replay')


def check_kind(kind: str) -> None:
  """Raises InputError for an unknown kind of gate."""
  if kind not in KINDS:
    raise InputError(f'gate={kind!r}: must be one of {KINDS}.')


def score(kind: str, gate: Any, before_BxD, after_BxD, loop_B, position_B, slot_B, count_B):
  """Score of leaving after this loop, float32 [B] in 0..1.

  The first position scores 0, so that it leaves only at a threshold of 0 or less:
  it is an attention sink, and skipping its later loops degrades all tokens after
  it.

  Args:
    kind: one of `KINDS`.
    gate: arrays of the gate. 'learned': `kernel` [R - 1, D] and `bias`
      [R - 1]. 'hazard': `hazard_kernel` [D] and `hazard_bias` [1]; the score is the
      probability of leaving here for a token that has not left before, and
      `accumulate` adds such scores up. 'replay': `loops` int [S, T], the number of
      loops of the t-th sampled token of a slot. Others: None.
    before_BxD: the residual stream before the loop.
    after_BxD: the residual stream after the loop.
    loop_B: int, the number of loops run, 1..R.
    position_B: int, position of the token.
    slot_B: int, the row's slot.
    count_B: int, number of tokens that the slot has sampled.
  """
  if kind == 'replay':
    loops_SxT = gate['loops']
    due_B = loops_SxT[slot_B, count_B % loops_SxT.shape[1]]
    return (loop_B >= due_B).astype(jnp.float32)
  sure_B = jnp.zeros(loop_B.shape, jnp.float32)
  if kind == 'learned':
    unit_BxD = _unit(after_BxD) * after_BxD.shape[1] ** 0.5
    r_B = jnp.minimum(loop_B - 1, gate['kernel'].shape[0] - 1)
    kernel_BxD = jnp.asarray(gate['kernel'], jnp.float32)[r_B]
    bias_B = jnp.asarray(gate['bias'])[r_B]
    sure_B = jax.nn.sigmoid(jnp.sum(unit_BxD * kernel_BxD, -1) + bias_B)
  if kind == 'hazard':
    kernel_D = jnp.asarray(gate['hazard_kernel'], jnp.float32)
    product_B = after_BxD.astype(jnp.float32) @ kernel_D
    sure_B = jax.nn.sigmoid(product_B + jnp.asarray(gate['hazard_bias'])[0])
  if kind == 'change':
    sure_B = jnp.sum(_unit(before_BxD) * _unit(after_BxD), -1)
  return jnp.where(position_B == 0, 0.0, sure_B)


def accumulate(kind: str, sure, stay):
  """(score, probability of not having left) after a loop.

  Of a 'hazard' gate the score is the probability of having left by now, as Ouro
  thresholds it (arXiv 2510.25741); other scores are as they are.

  Args:
    kind: of the gate.
    sure: from `score`.
    stay: the probability of not having left before.
  """
  if kind != 'hazard':
    return sure, stay
  stay = stay * (1.0 - sure)
  return 1.0 - stay, stay


def by_loop(kind: str, gate: Any):
  """`score_rows` for loops 1, 2, ... in turn: a function (before, after, loops)."""
  stay: Any = 1.0

  def score_of(before_BxLxD, after_BxLxD, loops: int):
    nonlocal stay
    sure_BxL = score_rows(kind, gate, before_BxLxD, after_BxLxD, loops)
    found_BxL, stay = accumulate(kind, sure_BxL, stay)
    return found_BxL

  return score_of


def through_lens(gate: Any, x_BxD, loop_B):
  """Applies the lens to the block's output of rows that leave early.

  A lens maps, for each loop, the block's output after that loop to an estimate
  of that after the last loop (a "tuned lens", arXiv 2303.08112, between loops).
  It is affine and, if tuned, has an added hidden layer. Rows that have run all
  loops are unchanged, and so are all rows without a lens.

  Args:
    gate: arrays of a gate; `lens_kernel` [R - 1, D, D] and `lens_bias`
      [R - 1, D] among them, or not; with them `lens_in` [R - 1, D, H] and
      `lens_out` [R - 1, H, D], or not.
    x_BxD: the block's output, [B, D] or [B, L, D].
    loop_B: int, how many loops each row has run, broadcast against x's leading
      axes.
  """
  if not has_lens(gate):
    return x_BxD
  out_BxD = x_BxD
  for r in range(len(gate['lens_kernel'])):
    lens = {k: v[r] for k, v in gate.items() if k.startswith('lens_')}
    here_B = jnp.asarray(loop_B == r + 1)
    moved_BxD = apply_lens(lens, x_BxD)
    out_BxD = jnp.where(here_B[..., None], moved_BxD, out_BxD)
  return out_BxD


def apply_lens(lens: Any, x_BxD):
  """Applies one loop's lens to all rows, [B, D] or [B, L, D]."""
  dtype = x_BxD.dtype
  lead = (1,) * (x_BxD.ndim - 1)
  bias_D = jnp.asarray(lens['lens_bias'], dtype).reshape(*lead, -1)
  moved_BxD = matmul(x_BxD, lens['lens_kernel']) + bias_D
  if 'lens_in' in lens:
    unit_BxD = (_unit(x_BxD) * x_BxD.shape[-1] ** 0.5).astype(dtype)
    wide_BxH = jax.nn.silu(matmul(unit_BxD, lens['lens_in']))
    moved_BxD += matmul(wide_BxH, lens['lens_out'])
  return x_BxD + moved_BxD


def on_device(gate: Any, dtype: str = 'float32') -> Any:
  """A gate's arrays, for an engine that computes in a dtype.

  A lens becomes a tuple over loops, to avoid slicing in every step.
  """

  def part(name, value):
    if not name.startswith('lens_'):
      return jnp.asarray(value)
    loops = tuple(jnp.asarray(v, dtype) for v in value)
    if name == 'lens_bias' or not prefers_transposed():
      return loops
    return tuple(TransposedKernel(v.T) for v in loops)

  return {k: part(k, v) for k, v in (gate or {}).items()} or None


def has_lens(gate: Any) -> bool:
  """Whether a gate's arrays hold a lens."""
  return gate is not None and 'lens_kernel' in gate


def score_rows(kind: str, gate: Any, before_BxLxD, after_BxLxD, loops: int):
  """`score` of whole rows after the same number of loops, [B, L]."""
  B, L, D = after_BxLxD.shape
  zero_N = jnp.zeros(B * L, jnp.int32)
  score_N = score(
    kind,
    gate,
    before_BxLxD.reshape(-1, D),
    after_BxLxD.reshape(-1, D),
    zero_N + loops,
    jnp.arange(B * L) % L,
    zero_N,
    zero_N,
  )
  return score_N.reshape(B, L)


def _unit(x_BxD):
  x_BxD = x_BxD.astype(jnp.float32)
  square_Bx1 = jnp.sum(x_BxD**2, -1, keepdims=True)
  return x_BxD * jax.lax.rsqrt(square_Bx1 + 1e-12)
