"""Bytes of a model's exports, in closed form: on disk, and as weights in memory."""

from __future__ import annotations

from typing import NamedTuple

from rrt.checkpoints import save_gguf
from rrt.checkpoints.save_hf_tied import check_tied
from rrt.checkpoints.save_peft import check_peft
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.models.count import count_params, norm_leaves
from rrt.models.untie import check_mergeable, untied_config
from rrt.relax.hosts import hosts_of
from rrt.relax.trees import relaxed_hosts

# Bytes of 32 weights in a GGUF file.
_BLOCK = {'f32': 128, 'f16': 64, 'bf16': 64, 'q8_0': 34, 'q4_0': 18}


class Size(NamedTuple):
  """Bytes of one format.

  Attributes:
    format: of `rrt export`; of a GGUF file with the type of its matrices.
    disk: of the weights' files, without headers and tokenizer.
    memory: of the weights once they are loaded; llama.cpp maps its file.
  """

  format: str
  disk: int
  memory: int


def sizes(config: ModelConfig, dtype: str, quantize: str = 'q8_0') -> list[Size]:
  """The sizes of all formats that can hold a model, untied ones first.

  Args:
    config: of the model, recursive or not.
    dtype: 'float32', 'bfloat16' or 'float16': of all formats but GGUF.
    quantize: type of a GGUF file's matrices.
  """
  width = 4 if dtype == 'float32' else 2
  counted = {
    'hf': (check_mergeable, lambda: width * count_params(untied_config(config)).unique),
    f'gguf {quantize}': (save_gguf.arch_of, lambda: _gguf(config, quantize)),
    'peft': (check_peft, lambda: width * _peft(config)),
    'hf-tied': (check_tied, lambda: width * count_params(config).unique),
  }
  found = []
  for name, (check, count) in counted.items():
    try:
      check(config)
    except InputError:
      continue
    found.append(Size(name, count(), count()))
  return found


def _gguf(config: ModelConfig, quantize: str) -> int:
  """Bytes of all tensors of the untied model; vectors are float32."""
  c = untied_config(config)

  def matrix(rows: int, width: int) -> int:
    kind = 'f16' if quantize.startswith('q') and width % 32 else quantize
    return rows * width * _BLOCK[kind] // 32

  heads = 1 if c.tie_embeddings else 2
  layer = sum(matrix(d_out, d_in) for d_in, d_out in c.shapes().values())
  matrices = heads * c.vocab_size * c.d_model + c.depth * sum(a * b for a, b in c.shapes().values())
  vectors = count_params(c).unique - matrices
  rope = c.head_dim // 2 if c.ropes[0].scaling == 'llama3' else 0
  return heads * matrix(c.vocab_size, c.d_model) + c.depth * layer + 4 * (vectors + rope)


def _peft(config: ModelConfig) -> int:
  """Weights of base and adapter: vectors that differ by loop are in both."""
  c = config
  count = count_params(c).unique
  if not c.loop_norms:
    return count
  N, RN = c.block_layers, c.loops * c.block_layers
  count += N * sum(c.norm_sizes().values()) * norm_leaves(c)
  if c.biases:  # They ride on the low-rank terms, every one of which then has one.
    low_rank = {host.name for _, host, _ in relaxed_hosts(c)}
    for host in hosts_of(c, 'linear'):
      count += N * host.d_out * (host.name in c.biases)
      count += RN * host.d_out * (host.name in low_rank and host.name not in c.biases)
      bare = host.name in c.biases and host.name not in low_rank
      count += RN * (host.d_in + host.d_out) * bare
  return count
