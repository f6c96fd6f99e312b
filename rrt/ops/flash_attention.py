"""Attention of a batch to itself by the kernels of libraries, which keep no scores.

On TPUs that is splash attention (jax.experimental.pallas), on GPUs cuDNN through
`jax.nn.dot_product_attention`, elsewhere `attend_causal`. `RRT_ATTENTION` or `using`
overrides the choice; where a kernel cannot take a shape, `attend_causal` does.

B batch, L length, H heads, G kv groups, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from rrt.ops.attention import attend_causal, visible
from rrt.ops.backend import backend
from rrt.ops.choice import Choice
from rrt.ops.mesh_axes import row_axes

IMPLEMENTATIONS = ('auto', 'xla', 'splash', 'cudnn')
_BLOCK = 512  # Most queries, and keys, of a tile of splash attention.
_LANES = 128  # What its tiles are multiples of.
CHOICE = Choice(
  'attention',
  'RRT_ATTENTION',
  IMPLEMENTATIONS,
  lambda: {'tpu': 'splash', 'gpu': 'cudnn'}.get(backend(), 'xla'),
)
using, chosen = CHOICE.using, CHOICE.chosen


def attend_batch(
  q_BxLxHxDh,
  k_BxLxGxDh,
  v_BxLxGxDh,
  positions_BxL,
  segments_BxL=None,
  *,
  window=None,
  windows: Sequence[int] = (0,),
  cap: float | None = None,
):
  """Causal attention of a batch to itself, within segments.  [B, L, H, Dh].

  Args:
    q_BxLxHxDh: queries, scaled.
    k_BxLxGxDh, v_BxLxGxDh: keys and values.
    positions_BxL: of each token in its document; they rise along a row's segments.
    segments_BxL: tokens attend within equal ids only; None for one a row.
    window: sliding window in tokens, 0 for none: a scalar, which may be traced, or [B].
    windows: all values that `window` may have; a kernel is compiled for each.
    cap: see `softcap`.
  """
  args = q_BxLxHxDh, k_BxLxGxDh, v_BxLxGxDh
  kind = chosen()
  if kind == 'xla' or not _fits(kind, *args[:2], window, cap):
    mask_BxLxL = visible(positions_BxL, positions_BxL, window)
    if segments_BxL is not None:
      mask_BxLxL &= segments_BxL[:, :, None] == segments_BxL[:, None, :]
    keys_BxGxDhxL, values_BxGxLxDh = k_BxLxGxDh.transpose(0, 2, 3, 1), v_BxLxGxDh.swapaxes(1, 2)
    return attend_causal(q_BxLxHxDh, keys_BxGxDhxL, values_BxGxLxDh, mask_BxLxL, cap)
  kernel: Any = functools.partial(splash, cap=cap) if kind == 'splash' else dot_product
  sizes = sorted(set(windows)) if window is not None else [0]
  branches = [functools.partial(kernel, window=size) for size in sizes]
  if len(branches) == 1:
    return branches[0](*args, segments_BxL)
  index = jnp.searchsorted(jnp.asarray(sizes), window)
  return jax.lax.switch(index, branches, *args, segments_BxL)


def _fits(kind: str, q_BxLxHxDh, k_BxLxGxDh, window, cap) -> bool:
  """Whether a kernel takes these arguments."""
  if jnp.ndim(window if window is not None else 0):
    return False  # A window a row.
  L, Dh = q_BxLxHxDh.shape[1], q_BxLxHxDh.shape[3]
  if kind == 'splash':
    return L % _LANES == 0
  half = q_BxLxHxDh.dtype in (jnp.bfloat16, jnp.float16)
  return half and q_BxLxHxDh.dtype == k_BxLxGxDh.dtype and Dh % 8 == 0 and Dh <= 128 and cap is None


def dot_product(
  q_BxLxHxDh,
  k_BxLxGxDh,
  v_BxLxGxDh,
  segments_BxL,
  window: int,
  implementation: Literal['xla', 'cudnn'] = 'cudnn',
):
  """By `jax.nn.dot_product_attention`."""
  mask_Bx1xLxL = None
  if segments_BxL is not None:
    mask_Bx1xLxL = segments_BxL[:, None, :, None] == segments_BxL[:, None, None, :]
  return jax.nn.dot_product_attention(
    q_BxLxHxDh,
    k_BxLxGxDh,
    v_BxLxGxDh,
    mask=mask_Bx1xLxL,
    scale=1.0,
    is_causal=True,
    local_window_size=(window - 1, 0) if window else None,
    implementation=implementation,
  )


def splash(
  q_BxLxHxDh,
  k_BxLxGxDh,
  v_BxLxGxDh,
  segments_BxL,
  window: int,
  cap: float | None = None,
  interpret: bool = False,
):
  """By splash attention; rows and heads stay on their devices of a mesh.

  `interpret` runs the kernel in Pallas's interpreter, without a TPU.
  """
  run = functools.partial(_splash, window=window, cap=cap, interpret=interpret)
  if segments_BxL is None:
    segments_BxL = jnp.zeros(q_BxLxHxDh.shape[:2], jnp.int32)
  sizes = jax.sharding.get_abstract_mesh().shape
  if max(sizes.values(), default=1) > 1:
    rows = row_axes()
    heads = 'tensor' if 'tensor' in sizes else None
    spec = PartitionSpec(rows, None, heads, None)
    run = jax.shard_map(
      run, in_specs=(spec, spec, spec, PartitionSpec(rows, None)), out_specs=spec, check_vma=False
    )
  return run(q_BxLxHxDh, k_BxLxGxDh, v_BxLxGxDh, segments_BxL)


def _splash(q_BxLxHxDh, k_BxLxGxDh, v_BxLxGxDh, segments_BxL, *, window, cap, interpret):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

  L, H = q_BxLxHxDh.shape[1:3]
  mask: Any = mask_lib.CausalMask((L, L))
  if window and window < L:
    mask = mask_lib.LocalMask((L, L), (window - 1, 0), 0)
  block = next(n for n in range(min(_BLOCK, L), 0, -_LANES) if L % n == 0)
  sizes = kernel_lib.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    use_fused_bwd_kernel=True,
  )
  kernel = kernel_lib.make_splash_mha(
    mask_lib.MultiHeadMask([mask] * H),
    block_sizes=sizes,
    attn_logits_soft_cap=cap,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  heads_first = lambda x_BxLxHxDh: x_BxLxHxDh.swapaxes(1, 2)
  segments = kernel_lib.SegmentIds(segments_BxL, segments_BxL)
  o_BxHxLxDh = jax.vmap(kernel)(
    heads_first(q_BxLxHxDh), heads_first(k_BxLxGxDh), heads_first(v_BxLxGxDh), segments
  )
  return heads_first(o_BxHxLxDh)


def window_sizes(windows: Sequence[int]) -> tuple[int, ...]:
  """The distinct windows of a model's layers; (0,) where none has one."""
  return tuple(sorted({int(w) for w in np.asarray(windows, int)})) or (0,)
