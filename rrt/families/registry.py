"""The supported checkpoint families, and which one a checkpoint belongs to."""

from __future__ import annotations

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import gemma, gpt_neox, grok, llama, mixtral, olmo2, ouro, phi, qwen, smollm3
from rrt.families.base import Family

# Models that are asked for, and why they do not fit.
_REFUSED = {
  'huginn_raven': 'it norms the sum of the residual stream and what a layer writes, and begins '
  'its loops from noise, which an adapter mixes with the embeddings'
}


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
    ouro.FAMILY,
    mixtral.MIXTRAL,
    mixtral.QWEN2_MOE,
    mixtral.QWEN3_MOE,
    grok.FAMILY,
  )


def family_of(config: ModelConfig) -> Family:
  """The family of a model configuration."""
  return next(f for f in families() if f.name == config.family)


def family_for(model_type: str | None) -> Family:
  """The family of a config.json.

  Raises:
    InputError: no family has this model type.
  """
  if model_type in _REFUSED:
    raise InputError(f'model_type={model_type!r} is not supported: {_REFUSED[model_type]}.')
  known: list[str] = []
  for family in families():
    known += family.model_types
    if model_type in family.model_types:
      return family
  raise InputError(
    f'model_type={model_type!r} is not supported; this version reads {", ".join(known)}.'
  )
