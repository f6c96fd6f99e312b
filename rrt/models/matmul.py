"""The matrix product of activations and a kernel, as exact as is asked for.

The kernel's gradient is x^T dy. Automatic differentiation asks for it as
(dy^T x)^T, for which XLA's CPU backend transposes dy by a strided loop that it
fuses with all that made dy: a training step of SmolLM2-135M then takes 1.25
times as long.

The same backend adds up a product's terms one after the other, where other
libraries add up a few sums side by side, and rounding errors grow with the
length of a sum. So under `jax.default_matmul_precision('highest')` float32 sums
on a CPU are cut into short pieces, at a price of 15 % in time.
"""

import contextlib

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

# What the remat policy 'dots' saves.
NAME = 'matmul'
# Terms of one float32 sum on a CPU with precision 'highest'.
LONGEST = 192


def float32_is_float32(dtype) -> contextlib.AbstractContextManager:
  """The context in which products of a float32 computation are float32.

  GPUs would round the factors to TF32, TPUs to bfloat16. In it, what is jitted
  asks for float32; an explicit choice by the user is left alone.
  """
  if jnp.dtype(dtype) == jnp.float32 and precision() is None:
    return jax.default_matmul_precision('float32')
  return contextlib.nullcontext()


def precision() -> str | None:
  """What `jax.default_matmul_precision` is set to."""
  return getattr(jax.config, 'jax_default_matmul_precision')  # noqa: B009


def matmul(x_BxLxD, kernel_DxF):
  """x W in the dtype of x, [B, L, F]; differentiable once, in reverse."""
  return checkpoint_name(_matmul(x_BxLxD, kernel_DxF), NAME)


@jax.custom_vjp
def _matmul(x_BxLxD, kernel_DxF):
  kernel_DxF = kernel_DxF.astype(x_BxLxD.dtype)
  count = _pieces(kernel_DxF.shape[0], x_BxLxD.dtype)
  if count == 1:
    return x_BxLxD @ kernel_DxF
  return sum(
    x @ kernel
    for x, kernel in zip(
      jnp.array_split(x_BxLxD, count, -1),
      jnp.array_split(kernel_DxF, count, 0),
      strict=True,
    )
  )


def _pieces(terms: int, dtype) -> int:
  """How many sums a product's terms are shared out to."""
  exact = dtype == jnp.float32 and precision() == 'highest'
  if not exact or jax.default_backend() != 'cpu':
    return 1
  return -(-terms // LONGEST)


def _forward(x_BxLxD, kernel_DxF):
  return _matmul(x_BxLxD, kernel_DxF), (x_BxLxD, kernel_DxF)


def _backward(saved, dy_BxLxF):
  x_BxLxD, kernel_DxF = saved
  product = jax.lax.dot_general
  with float32_is_float32(dy_BxLxF.dtype):
    dx_BxLxD = product(
      dy_BxLxF, kernel_DxF.astype(dy_BxLxF.dtype), (((2,), (1,)), ((), ()))
    )
    dkernel_DxF = product(x_BxLxD, dy_BxLxF, (((0, 1), (0, 1)), ((), ())))
  return dx_BxLxD, dkernel_DxF.astype(kernel_DxF.dtype)


_matmul.defvjp(_forward, _backward)
