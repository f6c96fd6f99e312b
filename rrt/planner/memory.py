"""Bytes on one device, by what takes them, in closed form.

What a train step is given (parameters, moments, the parent, a batch) is exact: shapes and
shardings are those of the program. What it makes is the larger of two phases: the loss,
when the logits of a chunk exist beside all that the backward pass will read, and the
backward pass of the layers, when one of them is computed again. Sizes follow from shapes; the
few factors in `FACTORS` were fitted to XLA's figures for 100 programs for TPUs
(`python -m benchmarks.plan` compares).

B rows of a device, L length, D model, F MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models.pages import layout_bytes, make_cache_layout
from rrt.planner.program import TrainProgram, local_bytes
from rrt.train import step as step_lib
from rrt.train.losses import chunk_length

# Arrays of the size of a chunk's logits in float32, without and for a parent; float32 copies
# of the trained parameters in the backward pass; arrays [B, L, D] and [B, L, F] of one layer that
# is computed again, with its gradients; further gradients of the head where there are
# microbatches, and of the tables of memory layers (from one program).
FACTORS = {
  'logits': 1.58,
  'parent_logits': 1.11,
  'gradients': 1.29,
  'layer_d_model': 16.9,
  'layer_d_ff': 3.22,
  'heads_of_microbatches': 0.37,
  'pools': 4.7,
}
# How much more remat='none' keeps than the outputs of linears.
_ALL = 3.02


@dataclasses.dataclass(frozen=True)
class Memory:
  """What one device holds at its fullest moment.

  Attributes:
    parts: bytes by name.
    phase: of a train step, 'loss' or 'backward'.
  """

  parts: dict[str, int]
  phase: str = ''

  @property
  def peak(self) -> int:
    """Bytes of all parts."""
    return sum(self.parts.values())


def train_memory(program: TrainProgram, tiles: bool = True) -> Memory:
  """Of a train step.

  Args:
    program: the step, on a mesh of devices or an abstract one.
    tiles: whether arrays are padded to the tiles of a TPU's memory.
  """
  spec, c = program.spec, program.spec.config
  sizes = dict(program.mesh.shape)
  tensor, fsdp = sizes.get('tensor', 1), sizes.get('fsdp', 1)
  L = program.batch['tokens'].shape[1]
  rows = program.batch['tokens'].shape[0] // spec.accumulate
  B, e = rows // (sizes.get('data', 1) * fsdp), jnp.dtype(spec.dtype).itemsize
  D, V = c.d_model, c.vocab_size
  width = _linear_width(c) / tensor + 2 * D
  stream = B * L * D * e
  kept = {'full': 0.0, 'dots': width, 'none': _ALL * (width + D)}[spec.remat] * B * L * e
  kept_layers = c.depth * (stream + kept)
  trained, _ = step_lib.split(program.state.params, spec.trained)
  gradients = local_bytes(trained)
  block = 0.0
  if spec.gather == 'once' and fsdp > 1 and c.loops > 1:
    leaves = jax.tree.leaves(program.state.params['block'])
    block = sum(math.prod(x.shape) * e / tensor for x in leaves if x.ndim > 2)
  chunk = B * chunk_length(rows, L, spec.objective.chunk_tokens) * V / tensor * 4
  teacher = spec.teacher_config is not None
  head = 'embed/table' if c.tie_embeddings else 'head/kernel'
  heads = D * V / tensor * e * (1 + (teacher and not spec.cached and head not in spec.shared))
  f = FACTORS
  logits = chunk * (f['logits'] + f['parent_logits'] * teacher)
  summed = gradients if spec.accumulate > 1 else 0
  copies = 1 + f['heads_of_microbatches'] * (spec.accumulate > 1)
  loss = {
    'kept for the backward pass': kept_layers,
    'block, gathered': block,
    'heads, gathered': heads,
    "head's gradient": D * V / tensor * 4 * (head in spec.trained) * copies,
    'logits of a chunk': logits,
    'gradients': summed,
  }
  again = kept_layers * c.block_layers / c.depth if c.loops > 1 else 0  # Of one loop.
  wide = f['layer_d_model'] * D + f['layer_d_ff'] * c.d_ff * _experts(c) / tensor
  layer = B * L * e * wide * (spec.remat == 'full')
  backward = {
    'kept for the backward pass': kept_layers + again,
    'block, gathered': block,
    'heads, gathered': heads,
    'gradients': gradients * f['gradients'] + summed,
    'a layer, computed again': layer,
    'pools': f['pools'] * _pools(program),
  }
  phase, made = max(
    ('loss', loss), ('backward', backward), key=lambda phase: sum(phase[1].values())
  )
  size = padded_bytes if tiles else local_bytes
  given = {
    'parameters': size(program.state.params),
    'moments': size(program.state.replace(params=())),
    'parent': size(program.teacher),
    'batch': size(program.batch),
  }
  parts = {k: int(v) for k, v in (given | made).items() if v}
  return Memory(parts, phase)


def serve_memory(
  config: ModelConfig, params: Any, slots: int, context: int, page: int, dtype: Any, kv_dtype: Any
) -> Memory:
  """Of the engine with all slots at full context.

  Args:
    config: the model.
    params: its parameters or their shapes, as stored.
    slots: sequences at a time.
    context: tokens of one.
    page: tokens of a page.
    dtype: of the computation, in which float weights are kept.
    kv_dtype: of the cache.
  """
  e = jnp.dtype(dtype).itemsize
  floats = lambda x: e if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype.itemsize
  weights = sum(math.prod(x.shape) * floats(x) for x in jax.tree.leaves(params))
  cache = layout_bytes(config, make_cache_layout(config, slots, context, page), page, kv_dtype)
  c = config
  # A prompt runs alone, through one layer at a time; its keys and values are copied then.
  prompt = context * (3 * c.d_model + _linear_width(c)) * e
  prompt += context * 2 * c.num_kv_heads * c.head_dim * c.depth * e
  parts = {
    'weights': weights,
    'cache': cache,
    'logits': slots * c.vocab_size * 4,
    'a prompt': prompt,
  }
  return Memory({k: int(v) for k, v in parts.items()})


def rules_of_thumb(parameters: int) -> dict[str, int]:
  """Bytes by the field's rules for so many parameters, on one device."""
  return {
    'weights in float32 (4 bytes each)': 4 * parameters,
    'weights in bfloat16 (2)': 2 * parameters,
    'training in bfloat16 alone (8)': 8 * parameters,
    'training with AdamW in mixed precision (16)': 16 * parameters,
  }


def padded_bytes(tree: Any) -> int:
  """Bytes on one device of a TPU, whose tiles are 8 x 128 (1,024 for vectors)."""
  total = 0
  for x in jax.tree.leaves(tree):
    shape = x.sharding.shard_shape(x.shape)
    total += math.prod(_tiled(shape)) * x.dtype.itemsize
  return total


def _tiled(shape: tuple[int, ...]) -> tuple[int, ...]:
  up = lambda n, tile: -(-n // tile) * tile
  if not shape:
    return ()
  if len(shape) == 1:
    return (up(shape[0], 1024),)
  *lead, a, b = shape
  # Either of the last two axes may be the one of 128.
  return (*lead, *min((up(a, 8), up(b, 128)), (up(a, 128), up(b, 8)), key=math.prod))


def _pools(program: TrainProgram) -> int:
  """Bytes of the trained tables that memory layers look up, on one device."""
  kinds = {r.kind: tuple(r.rates) for r in program.spec.config.relax if r.pooled}
  block = program.state.params['block']
  tables = [block[name] for names in kinds.values() for name in names if name in block]
  paths = {f'block/{name}' for names in kinds.values() for name in names}
  return local_bytes(tables) if paths & program.spec.trained else 0


def _linear_width(config: ModelConfig) -> int:
  """Outputs of a layer's linears for a token, but those that write to the stream."""
  c = config
  heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
  return heads + c.d_ff * (1 + ('gate' in c.shapes())) * _experts(c)


def _experts(config: ModelConfig) -> int:
  """MLPs of a layer that a token passes."""
  return config.experts_per_token + config.shared_experts or 1
