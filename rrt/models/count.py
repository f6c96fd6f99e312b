"""Parameter counts in closed form, from the configuration alone."""

from typing import NamedTuple

from rrt.config import ModelConfig
from rrt.relax.trees import count_all


class ParamCount(NamedTuple):
  """Number of parameters, unique and of the untied model.

  Attributes:
    unique: distinct parameters; what is stored and trained.
    unique_non_embedding: the same without embedding table and head.
    total: of the untied model of equal depth: each shared weight counted
      once a loop, plus the relaxations.
    total_non_embedding: the same without embedding table and head.
  """

  unique: int
  unique_non_embedding: int
  total: int
  total_non_embedding: int


def linears(config: ModelConfig) -> int:
  """Weights of one layer's seven linears, of all experts."""
  return sum(a * b * config.copies(name) for name, (a, b) in config.shapes().items())


def norm_leaves(config: ModelConfig) -> int:
  """Arrays of a norm: its gain, and the bias of a LayerNorm."""
  return 2 if config.norm == 'layer' else 1


def vectors(config: ModelConfig) -> int:
  """What loops may have of their own: norm gains, biases of linears, the router."""
  gains = sum(config.norm_sizes().values()) * norm_leaves(config)
  biases = sum(config.shapes()[name][1] for name in config.biases)
  router = config.num_experts + (config.shared_experts > 0)
  return gains + biases + config.d_model * router


def count_params(config: ModelConfig) -> ParamCount:
  """Counts parameters in closed form (paper, tables 1 and 3).

  Example:
    >>> rrt.count_params(child.config).unique
    118860096
  """
  c = config
  heads = 1 if c.tie_embeddings else 2
  embedding = heads * c.vocab_size * c.d_model
  layer = linears(c) + vectors(c)
  block = linears(c) + vectors(c) * (c.loops if c.loop_norms else 1)
  own = c.prelude_layers + c.coda_layers
  relaxations = count_all(c)
  final = c.d_model * norm_leaves(c)
  final += (c.d_model + 1) * c.exit_gate
  unique = own * layer + c.block_layers * block + relaxations + final
  total = c.depth * layer + relaxations + final
  return ParamCount(unique + embedding, unique, total + embedding, total)
