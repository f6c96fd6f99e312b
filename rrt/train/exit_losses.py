"""Early-exit losses of the loops before the last.

The paper's early-exit training (section 3.7, appendix E): the shared coda, norm
and head run on the block's output after every loop, and each loop's cross-entropy
is added to the loss with a coefficient. Loops before the last are also distilled
from the last, with a stopped gradient.

B batch, L length, D model, V vocabulary, R loops.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.train.losses import Losses, Objective, check_weights, losses

COEFFICIENTS = ('none', 'weighted', 'aggressive')


@dataclasses.dataclass(frozen=True)
class ExitObjective:
  """Coefficients and weights of the early-exit losses.

  Attributes:
    coefficients: of the loops' losses. 'none' trains the last loop alone;
      'weighted' is i / (1 + .. + R) for loop i, the last included;
      'aggressive' is 1 for the last loop and `weight` for each other.
    weight: c of 'aggressive'; the paper tries 0.3, 0.1, 0.05 and 0.01 and
      settles on 0.1.
    cross_entropy: weight, within a loop's loss, of the text.
    distillation: weight, within it, of KL(last loop || this loop).
    temperature: of that distillation.
  """

  coefficients: str = 'none'
  weight: float = 0.1
  cross_entropy: float = 1.0
  distillation: float = 1.0
  temperature: float = 1.0

  def __post_init__(self):
    if self.coefficients not in COEFFICIENTS:
      raise InputError(f'exits.coefficients={self.coefficients!r}: must be one of {COEFFICIENTS}.')
    check_weights(self, 'exits', ('weight', 'cross_entropy', 'distillation'))

  def of_loops(self, loops: int) -> tuple[float, ...]:
    """The coefficient of each loop's loss, the last loop's at the end."""
    if self.coefficients == 'weighted':
      total = loops * (loops + 1) / 2
      return tuple((i + 1) / total for i in range(loops))
    if self.coefficients == 'aggressive':
      return (self.weight,) * (loops - 1) + (1.0,)
    return (0.0,) * (loops - 1) + (1.0,)


def exit_losses(
  exits: ExitObjective,
  objective: Objective,
  hidden_RxBxLxD: jax.Array,
  head_DxV: jax.Array,
  targets_BxL: jax.Array,
  weights_BxL: jax.Array,
  cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Losses of the loops before the last.

  Args:
    exits: coefficients and weights.
    objective: of the run; its chunks bound the logits that exist at a time.
    hidden_RxBxLxD: what the head reads after each loop.
    head_DxV: the head.
    targets_BxL: the next token's id.
    weights_BxL: float32, the factor of each token.
    cap: soft-cap of the logits.

  Returns:
    The weighted sum of their losses, a float32 scalar, and the cross-entropy
    of each, [R - 1].
  """
  chex.assert_rank(hidden_RxBxLxD, 4)
  inner = Objective(
    cross_entropy=exits.cross_entropy,
    distillation=exits.distillation,
    temperature=exits.temperature,
    chunk_tokens=objective.chunk_tokens,
  )
  teacher = (hidden_RxBxLxD[-1], head_DxV)
  factors = exits.of_loops(hidden_RxBxLxD.shape[0])
  found: list[Losses] = [
    losses(inner, h, head_DxV, targets_BxL, weights_BxL, teacher, (cap, cap))
    for h in hidden_RxBxLxD[:-1]
  ]
  total = sum(a * f.loss for a, f in zip(factors[:-1], found, strict=True))
  return jnp.asarray(total), jnp.stack([f.cross_entropy for f in found])
