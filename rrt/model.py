"""A language model: configuration, parameters, tokenizer and provenance."""

from __future__ import annotations

import dataclasses
from typing import Any

from rrt.config import ModelConfig
from rrt.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
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
