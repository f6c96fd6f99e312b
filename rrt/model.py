"""A language model: configuration, parameters, tokenizer and provenance."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rrt.config import ModelConfig
from rrt.data.tokenizer import Tokenizer
from rrt.tree import flatten


def count_arrays(params: dict[str, Any]) -> int:
  """Parameters in a tree: of quantized matrices the codes, two a byte in four bits."""
  sizes = {
    path: leaf.size * (2 if leaf.dtype == np.uint8 else 1) for path, leaf in flatten(params).items()
  }
  return sum(size for path, size in sizes.items() if not path.endswith('/step'))


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
  """A model with its tokenizer and provenance.

  Attributes:
    config: its shape.
    params: nested dict of arrays; the layout is described in
      `rrt.models.transformer`.
    tokenizer: None where the source had none.
    meta: its source and the steps applied to it; JSON values only.
  """

  config: ModelConfig
  params: dict[str, Any]
  tokenizer: Tokenizer | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    """Five lines: family, shape, parameters, dtype, source."""
    c = self.config
    shape = f'{c.depth} layers'
    if c.loops > 1:
      shape = f'{c.prelude_layers} + {c.block_layers} x {c.loops} + {c.coda_layers} layers'
    if c.relax:
      shape += f', {", ".join(r.kind for r in c.relax)}'
    leaves = list(flatten(self.params).values())
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    return '\n'.join(
      [
        f'LanguageModel of the family {c.family}',
        f'  shape       {shape}; width {c.d_model}, vocabulary {c.vocab_size:,}',
        f'  parameters  {count_arrays(self.params):,}',
        f'  dtype       {", ".join(dtypes)}',
        f'  source      {self.meta.get("source") or self.meta.get("name") or "unknown"}',
      ]
    )
