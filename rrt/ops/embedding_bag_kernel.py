"""Pallas kernels of `rrt.ops.embedding_bag`.

On TPUs rows come from HBM by asynchronous copies: the indices of a few tokens are prefetched into
scalar memory, and while one row is added up the next ones are on their way. On GPUs (Triton)
a program adds up the rows of one token; no GPU has run it yet, so that it is not chosen by itself.

T tokens, J rows a token, N rows of the table, D columns.
"""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

_TOKENS = 8  # Of a program: a tile of float32 rows.
_AHEAD = 8  # Rows that are on their way.


def sum_rows(values_NxD, index_TxJ, weight_TxJ, interpret: bool = False):
  """sum_j weight[t, j] * values[index[t, j]], [T, D] in the dtype of the values.

  Args:
    values_NxD: the table; D a multiple of 128 on a TPU.
    index_TxJ: int32 rows.
    weight_TxJ: their weights.
    interpret: run in Pallas's interpreter, without a TPU.
  """
  (T, J), D = index_TxJ.shape, values_NxD.shape[1]
  pad = -T % _TOKENS
  index_TxJ = jnp.pad(index_TxJ, ((0, pad), (0, 0)))
  weight_TxJ = jnp.pad(weight_TxJ.astype(jnp.float32), ((0, pad), (0, 0)))
  ahead = min(_AHEAD, J)

  def body(index, weight, values, out, rows, sems):
    def copy(i):
      """The i-th read of this program: row i % J of token i // J."""
      row, lane = index[jax.lax.div(i, J), jax.lax.rem(i, J)], jax.lax.rem(i, ahead)
      return pltpu.make_async_copy(values.at[pl.ds(row, 1)], rows.at[pl.ds(lane, 1)], sems.at[lane])

    for i in range(ahead):
      copy(jnp.int32(i)).start()

    def of_token(t, _):
      def add(j, y):
        i = t * J + j
        copy(i).wait()
        y += weight[t, j] * rows[pl.ds(jax.lax.rem(i, ahead), 1), :].astype(jnp.float32)

        @pl.when(i + ahead < _TOKENS * J)
        def _():
          copy(i + ahead).start()

        return y

      y_1xD = jax.lax.fori_loop(0, J, add, jnp.zeros((1, D), jnp.float32))
      out[pl.ds(t, 1), :] = y_1xD.astype(out.dtype)
      return _

    jax.lax.fori_loop(0, _TOKENS, of_token, 0)

  of_tokens = pl.BlockSpec((_TOKENS, J), lambda t: (t, 0), memory_space=pltpu.SMEM)
  kernel = pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((T + pad, D), values_NxD.dtype),
    grid=((T + pad) // _TOKENS,),
    in_specs=[of_tokens, of_tokens, pl.BlockSpec(memory_space=pl.ANY)],
    out_specs=pl.BlockSpec((_TOKENS, D), lambda t: (t, 0)),
    scratch_shapes=[pltpu.VMEM((ahead, D), values_NxD.dtype), pltpu.SemaphoreType.DMA((ahead,))],
    interpret=interpret,
  )
  return kernel(index_TxJ, weight_TxJ, values_NxD)[:T]


def sum_rows_gpu(values_NxD, index_TxJ, weight_TxJ, interpret: bool = False):
  """`sum_rows` for GPUs: a program a token, columns padded to a power of two."""
  from jax.experimental.pallas import triton

  (T, J), D = index_TxJ.shape, values_NxD.shape[1]
  wide = pl.next_power_of_2(D)
  pad = pl.next_power_of_2(J) - J

  def body(index, weight, values, out):
    inside = jax.lax.broadcasted_iota(jnp.int32, (1, wide), 1) < D
    all_columns = pl.ds(0, wide)

    def add(j, y):
      row = triton.load(values.at[pl.ds(index[0, j], 1), all_columns], mask=inside, other=0.0)
      return y + weight[0, j] * row.astype(jnp.float32)

    y = jax.lax.fori_loop(0, J, add, jnp.zeros((1, wide), jnp.float32))
    triton.store(out.at[pl.ds(0, 1), all_columns], y.astype(out.dtype), mask=inside)

  of_token = pl.BlockSpec((1, J + pad), lambda t: (t, 0))
  kernel = pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((T, D), values_NxD.dtype),
    grid=(T,),
    in_specs=[of_token, of_token, pl.BlockSpec(values_NxD.shape, lambda t: (0, 0))],
    out_specs=pl.BlockSpec((1, D), lambda t: (t, 0)),
    compiler_params=triton.CompilerParams(num_warps=4),
    interpret=interpret,
  )
  widen = lambda x: jnp.pad(x, ((0, 0), (0, pad)))
  return kernel(widen(index_TxJ), widen(weight_TxJ.astype(jnp.float32)), values_NxD)
