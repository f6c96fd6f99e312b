"""The size that a conversion is asked for, in parameters and in deleted layers."""

from __future__ import annotations

import re

from rrt.config import ModelConfig
from rrt.convert import drop
from rrt.errors import InputError
from rrt.models.count import count_params


def target(params: str | int | None, parent: ModelConfig) -> int:
  """The number of parameters that '103M', '0.75x' or 103_000_000 stands for.

  Raises:
    InputError: it is none of them, or no child of the parent has so many.
  """
  whole = count_params(parent).unique
  text = str(params).strip()
  match = re.fullmatch(r'(\d+(?:\.\d+)?)([kKmMbBgGx]?)', text.replace('_', ''))
  if match is None or isinstance(params, bool):
    raise InputError(f'params={params!r}: give a count such as 103M, or a share such as 0.75x.')
  unit = {'': 1, 'k': 1e3, 'm': 1e6, 'b': 1e9, 'g': 1e9, 'x': whole}[match[2].lower()]
  found = round(float(match[1]) * unit)
  least = count_params(drop.config_without(parent, parent.depth - 1)).unique
  if not least <= found < whole:
    raise InputError(
      f'params={params!r}: must lie from {least:,} (one layer) to below the {whole:,} '
      'of the parent.'
    )
  return found


def deletions(params: int, parent: ModelConfig) -> int:
  """The fewest layers whose deletion leaves no more than `params` parameters."""
  L, whole = parent.depth, count_params(parent).unique
  layer = (whole - count_params(drop.config_without(parent, L - 1)).unique) // (L - 1)
  return -(-(whole - params) // layer)
