"""The supported checkpoint families, and which one a checkpoint belongs to."""

from __future__ import annotations

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import gemma, gpt_neox, llama, olmo2, phi, qwen, smollm3
from rrt.families.base import Family


def families() -> tuple[Family, ...]:
  """All supported families, in the order of error messages."""
  return (
    llama.FAMILY,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    qwen.QWEN2,
    qwen.QWEN3,
    smollm3.FAMILY,
    phi.FAMILY,
    olmo2.FAMILY,
    gpt_neox.FAMILY,
  )


def family_of(config: ModelConfig) -> Family:
  """The family of a model configuration."""
  return next(f for f in families() if f.name == config.family)


def family_for(model_type: str | None) -> Family:
  """The family of a config.json.

  Raises:
    InputError: no family has this model type.
  """
  known: list[str] = []
  for family in families():
    known += family.model_types
    if model_type in family.model_types:
      return family
  raise InputError(
    f'model_type={model_type!r} is not supported; this version reads {", ".join(known)}.'
  )
