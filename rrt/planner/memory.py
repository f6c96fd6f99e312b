"""Bytes on one device by what takes them, in closed form.

The arguments of a train step (parameters, moments, the parent, a batch) are exact. What
the step makes meanwhile is the larger of two phases: behind the forward pass, when the
logits of a chunk exist, and in the backward pass of the layers. Both are sums of arrays
whose sizes follow from shapes and shardings, with factors that were fitted to XLA's own
figures for TPUs (`python -m benchmarks.plan`).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    parts: by name; those that exist at the peak together.
    peak: their sum.
  """

  parts: dict[str, int]

  @property
  def peak(self) -> int:
    """Bytes at the fullest moment."""
    return sum(self.parts.values())
