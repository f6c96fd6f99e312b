"""Gradients of a step: their sum over microbatches, their norms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rrt import sharding as sharding_lib
from rrt.relax import registry


def accumulate(grad_fn, trained: dict[str, Any], batch: dict[str, Any], count: int):
  """Sums of a batch's gradients and losses over `count` microbatches.

  Args:
    grad_fn: (trained, microbatch) -> ((loss, aux), gradients).
    trained: flat parameters.
    batch: arrays [B, ...]; `count` divides B.

  Returns:
    (aux, gradients).
  """

  def cut(x):
    # Every count-th row: each device keeps rows of its own in all of them.
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  def one(total, micro):
    micro = {k: sharding_lib.constrain(v, ('batch', 'length')) for k, v in micro.items()}
    (_, aux), grads = grad_fn(trained, micro)
    return jax.tree.map(jnp.add, total, (aux, grads)), None

  micros = {k: cut(v) for k, v in batch.items()}
  first = {k: v[0] for k, v in micros.items()}
  shapes = jax.eval_shape(lambda t, m: grad_fn(t, m), trained, first)
  (_, aux), grads = shapes
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (aux, grads))
  return jax.lax.scan(one, zeros, micros)[0]


def gradient_norms(grads: dict[str, Any]):
  """The global norm of flat gradients, and one a group of parameters.

  Groups: each kind of relaxation, norms (with biases), and the weights of each part (embed,
  prelude, block, coda, head).
  """
  squares: dict[str, jax.Array] = {}
  for path, g in grads.items():
    group = registry.kind_of_path(path) or path.split('/')[0]
    if path.endswith(('/scale', '/bias')):
      group = 'norms'
    square = jnp.sum(jnp.square(g.astype(jnp.float32)))
    squares[group] = squares.get(group, 0.0) + square
  norms = {k: jnp.sqrt(v) for k, v in squares.items()}
  return jnp.sqrt(sum(squares.values())), norms
