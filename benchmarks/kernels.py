"""Kernels of one device beside each other: attention, paged attention, products by loop.

`python -m benchmarks.gpu` runs them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import best
from rrt.models import pages
from rrt.ops import flash_attention as flash
from rrt.ops import grouped_matmul, paged_attention
from rrt.ops.backend import backend
from rrt.relax import lora


def attention(tiny: bool) -> dict[str, Any]:
  """Forward and backward of the attention that is picked here, and of the plain one."""
  figures: dict[str, Any] = {'picked': flash.chosen()}
  for length, batch in ((128, 2),) if tiny else ((1024, 16), (4096, 4)):
    for heads, groups, size in ((4, 2, 16),) if tiny else ((32, 4, 64), (9, 3, 64)):
      keys = jax.random.split(jax.random.key(0), 3)
      shape = lambda h, b=batch, n=length, s=size: (b, n, h, s)
      q, k, v = (
        jax.random.normal(key, shape(h)).astype('bfloat16')
        for key, h in zip(keys, (heads, groups, groups))
      )
      positions = jnp.tile(jnp.arange(length), (batch, 1))
      flops = 3 * 4 * batch * heads * size * length * (length + 1) / 2
      for kind in sorted({'xla', flash.chosen()}):
        with flash.using(kind):
          run = jax.jit(
            jax.grad(
              lambda q, k, v, p=positions: jnp.sum(
                flash.attend_batch(q, k, v, p).astype(jnp.float32)
              ),
              (0, 1, 2),
            )
          )
          seconds = best(lambda run=run, args=(q, k, v): run(*args))
        figures[f'{batch} x {length}, {heads} heads of {size}, {kind}'] = {
          'milliseconds': 1e3 * seconds,
          'tflops': flops / seconds / 1e12,
        }
  return figures


def grouped(tiny: bool) -> dict[str, Any]:
  """Low-rank terms of rows at mixed loops, by layout, and of one loop for all."""
  d, f, rank, loops = (64, 128, 4, 2) if tiny else (2048, 5632, 256, 2)
  figures = {}
  for rows in (4,) if tiny else (32, 256):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, 1, d)).astype('bfloat16')
    a = jax.random.normal(keys[1], (loops, d, rank)).astype('bfloat16')
    b = jax.random.normal(keys[2], (loops, rank, f)).astype('bfloat16')
    wide = lora.widen(a, b)
    mixed = jnp.arange(rows) % loops
    runs = {
      'one loop': lambda x=x, a=a, b=b: lora.low_rank(x, a, b, 0),
      'wide': lambda x=x, w=wide, n=mixed: lora.low_rank_wide(x, *w, n, loops),
      'grouped': lambda x=x, a=a, b=b, n=mixed: lora.low_rank_grouped(x, a, b, n),
    }
    for name, run in runs.items():
      figures[f'{rows} rows, {name}, microseconds'] = 1e6 * best(jax.jit(run), 20)
  return figures | _experts(tiny)


def _experts(tiny: bool) -> dict[str, Any]:
  """Products of rows with the matrix of their own expert, forward and backward."""
  figures: dict[str, Any] = {'picked for experts': grouped_matmul.chosen()}
  sizes = (64, 64, 4, 32) if tiny else (2048, 1024, 16, 4096) if backend() != 'cpu' else None
  d, f, experts, rows = sizes or (576, 1536, 8, 1024)
  keys = jax.random.split(jax.random.key(0), 3)
  dtype = 'float32' if backend() == 'cpu' else 'bfloat16'
  x = jax.random.normal(keys[0], (rows, d)).astype(dtype)
  w = jax.random.normal(keys[1], (experts, d, f)).astype(dtype)
  index = jax.random.randint(keys[2], (rows,), 0, experts)
  _, sizes_E = grouped_matmul.sorted_by(index, experts)
  kinds = {'dense', 'ragged_dot', 'tiles', grouped_matmul.chosen()}
  for kind in sorted(kinds):
    with grouped_matmul.using(kind):
      run = jax.jit(
        jax.grad(
          lambda x, w: jnp.sum(grouped_matmul.grouped_matmul(x, w, sizes_E).astype(jnp.float32)),
          (0, 1),
        )
      )
      seconds = best(lambda run=run: run(x, w))
    figures[f'{rows} rows, {experts} experts of {d} x {f}, {kind}'] = {
      'milliseconds': 1e3 * seconds,
      'tflops': 6 * rows * d * f / seconds / 1e12,
    }
  one = jax.jit(jax.grad(lambda x, w: jnp.sum((x @ w).astype(jnp.float32)), (0, 1)))
  seconds = best(lambda: one(x, w[0]))
  figures[f'{rows} rows, one matrix of {d} x {f}'] = {
    'milliseconds': 1e3 * seconds,
    'tflops': 6 * rows * d * f / seconds / 1e12,
  }
  return figures


def paged(tiny: bool) -> dict[str, Any]:
  """Decoding attention of slots of mixed lengths: XLA's loop over pages and the kernel."""
  figures: dict[str, Any] = {'picked': paged_attention.chosen()}
  page, size = (16, 16) if tiny else (64, 64)
  for slots, context in ((2, 64),) if tiny else ((8, 2048), (64, 2048), (256, 512)):
    for heads, groups in ((4, 2),) if tiny else ((32, 4), (9, 3)):
      count = context // page
      keys = jax.random.split(jax.random.key(0), 3)
      shape = (slots * count, groups, size, page)
      normal = lambda key, shape: jax.random.normal(key, shape).astype('bfloat16')
      pool = pages.KVPool(normal(keys[0], shape), normal(keys[1], (*shape[:2], page, size)))
      q = normal(keys[2], (slots, 1, heads, size))
      base = (jnp.arange(slots) * count)[:, None]
      # From an eighth of the context to all of it.
      last = jnp.linspace(context // 8, context, slots).astype(int)[:, None] - 1
      kvs = pages.PagedKV(pool, base, jnp.full_like(base, count))
      read = int(jnp.sum(last // page + 1)) * page * groups * size * 2 * 2
      for kind in ('xla', 'pallas'):
        with paged_attention.using(kind):
          run = jax.jit(pages.attend)
          seconds = best(lambda run=run, args=(q, kvs, last): run(*args), 20)
        figures[f'{slots} slots of {context}, {heads} heads, {groups} groups, {kind}'] = {
          'microseconds': 1e6 * seconds,
          'gigabytes_per_second': read / seconds / 1e9,
        }
  return figures
