"""What a checkpoint family is: a table of tensor names and a config translation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import numpy as np

from rrt.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a family's table.

  Attributes:
    path: of the leaf in the parameter tree; of a layer if the names have a `{}`.
    hf: Hugging Face's name, with `{}` for the depth, and `{e}` for the expert where each
      has a tensor.
    gguf: llama.cpp's name; '' for families that are not read from its files.
    kind: 'table', 'gain' and 'bias' are stored unchanged, 'linear' is transposed;
      'q' and 'k' are linears, 'q_bias' and 'k_bias' biases, whose rows are
      interleaved in Llama's GGUF files.
    fused: linears whose outputs the tensor holds one after the other, this row's
      among them; () for a tensor of its own.
    by_head: they alternate head by head.
  """

  path: str
  hf: str
  gguf: str
  kind: str = 'linear'
  fused: tuple[str, ...] = ()
  by_head: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
  """A checkpoint family.

  Attributes:
    name: `ModelConfig.family`.
    model_types: values of `model_type` in config.json.
    rows: the table of names.
    fields: of config.json that `from_hf` reads or refuses, besides
      `rrt.families.fields.COMMON`; others are refused unless they are harmless.
    from_hf: config.json as a dict -> ModelConfig.
    to_hf: ModelConfig of an untied model -> config.json as a dict.
    gguf_permuted: whether GGUF files interleave q and k rows (llama.cpp's RoPE
      pairs).
    gguf_gain_offset: constant that GGUF files add to norm gains.
    scaled: field of config.json by which logits are multiplied; the final norm's gain takes
      it up.
    own_code: published with Python code of its own (`auto_map`), which transformers
      lacks; other families with such code are refused.
  """

  name: str
  model_types: tuple[str, ...]
  rows: tuple[Row, ...]
  fields: tuple[str, ...]
  from_hf: Callable[[dict[str, Any]], ModelConfig]
  to_hf: Callable[[ModelConfig], dict[str, Any]]
  gguf_permuted: bool = False
  gguf_gain_offset: float = 0.0
  scaled: str = ''
  own_code: bool = False


def row_shape(config: ModelConfig, path: str) -> tuple[int, ...]:
  """Shape of a row's leaf in the parameter tree, without the axes of layers and experts."""
  parts = path.split('/')
  if parts[-1] == 'table':
    return (config.vocab_size, config.d_model)
  if parts[0] == 'head':
    return (config.d_model, config.vocab_size)
  if parts[0] == 'exit_gate':
    return (config.d_model, 1) if parts[-1] == 'kernel' else (1,)
  if parts[-2] == 'router':
    return (config.d_model, config.num_experts if parts[-1] == 'weights' else 1)
  if parts[-1] in ('kernel', 'kernels'):
    return config.shapes()[parts[-2]]
  norm = parts[-2].endswith('_norm')
  if parts[-1] == 'bias' and not norm:
    return config.shapes()[parts[-2]][1:]
  return (config.norm_sizes().get('/'.join(parts[:-1]), config.d_model),)


def tensor_rows(config: ModelConfig, row: Row, style: str = 'hf') -> tuple[np.ndarray, int]:
  """Which rows of a fused tensor are a leaf's, in its order, and how many there are.

  llama.cpp's files (`style` 'gguf') have whole parts, one after the other.
  """
  sizes = [config.shapes()[name][1] for name in row.fused]
  at = row.fused.index(row.path.split('/')[-2])
  if row.by_head and style == 'hf':  # [heads, parts, head_dim]: parts of equal size.
    index_HxPxDh = np.arange(sum(sizes)).reshape(config.num_heads, len(sizes), -1)
    return index_HxPxDh[:, at].reshape(-1), sum(sizes)
  first = sum(sizes[:at])
  return np.arange(first, first + sizes[at]), sum(sizes)


def wanted_rows(config: ModelConfig, family: Family) -> Iterator[Row]:
  """The rows of the family's table that a model's configuration uses."""
  for row in family.rows:
    part, *_, leaf = row.path.split('/')
    linear = row.path.split('/')[-2]
    if part == 'exit_gate' or linear == 'end_norm':
      yield row
      continue
    norm = linear.endswith('_norm') and part != 'final_norm'
    missing = (
      (part == 'head' and config.tie_embeddings)
      or (norm and row.path.rpartition('/')[0] not in config.norm_sizes())
      or (leaf == 'bias' and not linear.endswith('_norm') and linear not in config.biases)
      or (leaf == 'bias' and linear.endswith('_norm') and config.norm != 'layer')
    )
    if not missing:
      yield row
