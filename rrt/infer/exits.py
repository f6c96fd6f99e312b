"""Exit gates: after which loop a token leaves the block.

A gate gives each row a score that costs O(D) and never the vocabulary; a row
leaves when its score reaches the row's threshold. A threshold above 1 never
lets a token leave before the last loop.

B rows, D model, R loops, S slots, T drawn tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rrt.errors import InputError

KINDS = ('none', 'learned', 'change', 'replay')


def check_kind(kind: str) -> None:
  """Raises InputError for a gate that does not exist."""
  if kind not in KINDS:
    raise InputError(f'gate={kind!r}: must be one of {KINDS}.')


def score(kind: str, gate: Any, before_BxD, after_BxD, loop_B, slot_B, count_B):
  """How sure each row is to need no further loop, float32 [B] in 0..1.

  Args:
    kind: one of `KINDS`.
    gate: arrays of the gate. 'learned': `kernel` [R - 1, D] and `bias`
      [R - 1]. 'replay': `loops` int [S, T], after how many loops the t-th
      drawn token of a slot leaves. Others: None.
    before_BxD: the residual stream before the loop.
    after_BxD: after it.
    loop_B: int, how many loops the row has run, 1..R.
    slot_B: int, the row's slot.
    count_B: int, how many tokens the slot has drawn.
  """
  if kind == 'learned':
    unit_BxD = _unit(after_BxD) * after_BxD.shape[1] ** 0.5
    r_B = jnp.minimum(loop_B - 1, gate['kernel'].shape[0] - 1)
    kernel_BxD = gate['kernel'].astype(jnp.float32)[r_B]
    return jax.nn.sigmoid(
      jnp.sum(unit_BxD * kernel_BxD, -1) + gate['bias'][r_B]
    )
  if kind == 'change':
    return jnp.sum(_unit(before_BxD) * _unit(after_BxD), -1)
  if kind == 'replay':
    loops_SxT = gate['loops']
    due_B = loops_SxT[slot_B, count_B % loops_SxT.shape[1]]
    return (loop_B >= due_B).astype(jnp.float32)
  return jnp.zeros(loop_B.shape, jnp.float32)


def _unit(x_BxD):
  x_BxD = x_BxD.astype(jnp.float32)
  square_Bx1 = jnp.sum(x_BxD**2, -1, keepdims=True)
  return x_BxD * jax.lax.rsqrt(square_Bx1 + 1e-12)
