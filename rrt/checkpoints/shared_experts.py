"""Shared experts of Qwen2-MoE: one wide MLP in its files, experts of the usual width here.

An MLP is a sum over its hidden units, so that one of m F units is m experts of F, behind the E among
which the router chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from rrt.checkpoints.safetensors import TensorInfo, Tensors
from rrt.config import ModelConfig

_MATRICES = ('gate_proj', 'up_proj', 'down_proj')


def _names(config: ModelConfig) -> Iterator[tuple[str, list[str], int]]:
  """(the tensor in the files, the experts' that it stands for, the axis of hidden units)."""
  experts = range(config.num_experts, config.copies('up'))
  for depth in range(config.depth):
    head = f'model.layers.{depth}.mlp'
    for name in _MATRICES:
      parts = [f'{head}.experts.{e}.{name}.weight' for e in experts]
      yield f'{head}.shared_expert.{name}.weight', parts, int(name == 'down_proj')


class Split:
  """A view of a checkpoint in which the shared expert is several."""

  def __init__(self, tensors: Tensors, config: ModelConfig):
    self._tensors, self._width = tensors, config.d_ff
    self._whole: dict[str, tuple[str, int, int]] = {}
    self.infos = dict(tensors.infos)
    for whole, parts, axis in _names(config):
      info = self.infos.get(whole)
      if info is None or len(info.shape) != 2 or info.shape[axis] != config.d_ff * len(parts):
        continue  # The reader says what is wrong with it.
      del self.infos[whole]
      shape = (info.shape[0], config.d_ff) if axis else (config.d_ff, info.shape[1])
      for i, part in enumerate(parts):
        self._whole[part] = whole, axis, i * config.d_ff
        self.infos[part] = TensorInfo(shape, info.dtype)

  def chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """As `Tensors.chunks`."""
    whole, axis, first = self._whole.get(name, (name, None, 0))
    for start, rows in self._tensors.chunks(whole):
      if axis is None:
        yield start, rows
      elif axis == 1:
        yield start, rows[:, first : first + self._width]
      else:
        low, high = max(start, first), min(start + len(rows), first + self._width)
        if low < high:
          yield low - first, rows[low - start : high - start]


def joined(config: ModelConfig, tensors: dict[str, Any]) -> dict[str, Any]:
  """Tensors by name with the shared experts in one, as files have them."""
  for whole, parts, axis in _names(config):
    tensors[whole] = np.concatenate([np.asarray(tensors.pop(p)) for p in parts], axis)
  return tensors
