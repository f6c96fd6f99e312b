"""A language model: configuration, parameters, tokenizer and provenance."""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.config import ModelConfig
from rrt.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A model and everything that using it needs.

  Attributes:
    config: its shape.
    params: nested dict of arrays; the layout is described in
      `rrt.models.transformer`.
    tokenizer: None where the source had none.
    meta: where it came from and what was done to it; JSON values only.
  """

  config: ModelConfig
  params: dict[str, Any]
  tokenizer: Tokenizer | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
