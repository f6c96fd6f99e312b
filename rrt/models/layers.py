"""Norm, linear, rotary embedding and gated MLP: functions and linen modules.

B batch, L length, D model, F out or ffn, H heads, Dh head size, R loops,
T rotary tables.

`loop` is an int scalar, or int [B] with one loop a row; whatever differs by
loop is looked up with it, so that training and depth-wise batching run the
same code.
"""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig, Rope
from rrt.models.relaxed import AUX, Relaxed, pooled_of, relax, relaxations_of
from rrt.ops.activation import activate
from rrt.ops.matmul import TransposedKernel, matmul
from rrt.ops.quantize import quantize
from rrt.relax.base import Place
from rrt.relax.hosts import LINEAR_AXES, MLP, at_loop

# What the remat policy 'dots' saves: the outputs of linears.
LINEAR = 'linear'
# Outside the block, where loops make no difference.
HERE = Place()


def rms_norm(x, gain, eps: float, unit_offset: bool):
  """RMSNorm over the last axis in float32, then the gain.

  Args:
    x: [..., D].
    gain: of x's rank, broadcast against it.
    eps: added to the mean square.
    unit_offset: multiply by 1 + gain in float32 (Gemma) instead of by gain
      in x's dtype (Llama).
  """
  x32 = x.astype(jnp.float32)
  y32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + eps)
  if unit_offset:
    return (y32 * (1.0 + gain.astype(jnp.float32))).astype(x.dtype)
  return y32.astype(x.dtype) * gain.astype(x.dtype)


def layer_norm(x, gain, bias, eps: float):
  """LayerNorm over the last axis in float32."""
  x32 = x.astype(jnp.float32)
  x32 -= jnp.mean(x32, -1, keepdims=True)
  y32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + eps)
  return (y32 * gain.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int, length: int = 0):
  """Angular frequencies of one rotary table, a numpy float32 [Dh / 2].

  `length` is that of the text, if the table has none of its own.

  Each step is rounded to float32, as transformers and torch do it. The last
  bit counts: an angle is a frequency times a position.
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  if rope.scaling == 'none':
    return np.zeros(head_dim // 2, np.float32)
  length, original = rope.length or length, rope.original_context
  if rope.scaling == 'dynamic' and length > original:
    grown = rope.factor * length / original - (rope.factor - 1)
    base = rope.base * grown ** (head_dim / (head_dim - 2))
    return rope_frequencies(Rope(base), head_dim)
  power = (float(rope.base) ** exponent.astype(np.float64)).astype(np.float32)
  freq = np.float32(1.0) / power
  if rope.scaling == 'linear':
    return freq / np.float32(rope.factor)
  if rope.scaling == 'longrope':
    factors = rope.long_factors if length > original else rope.short_factors
    return np.float32(1.0) / (np.asarray(factors, np.float32) * power)
  if rope.scaling == 'yarn':
    return _yarn(rope, head_dim, freq)
  if rope.scaling == 'llama3':
    wavelength = np.float32(2 * math.pi) / freq
    low = np.float32(rope.original_context / rope.low_freq_factor)
    high = np.float32(rope.original_context / rope.high_freq_factor)
    slowed = freq / np.float32(rope.factor)
    ramp = (
      np.float32(rope.original_context) / wavelength - np.float32(rope.low_freq_factor)
    ) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    smooth = (1 - ramp) * freq / np.float32(rope.factor) + ramp * freq
    smooth = np.where(wavelength > low, slowed, smooth)
    return np.where(wavelength < high, freq, smooth)
  return freq


def _yarn(rope: Rope, head_dim: int, freq):
  """Frequencies divided by the factor below a ramp of dimensions, kept above it."""

  def dimension(rotations: float) -> float:
    turns = rope.original_context / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.base))

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  high = high + 0.001 if low == high else high
  steps = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
  kept = np.float32(1) - np.clip(steps, 0, 1).astype(np.float32)
  return (freq / np.float32(rope.factor)) * (1 - kept) + freq * kept


def rope_tables(config: ModelConfig, positions_BxL, length: int = 0):
  """Cosines and sines of all rotary tables, float32 [T, B, L, Dh / 2].

  `length` is that of the texts, by default L.
  """
  size = config.rotary_dim or config.head_dim
  length = length or positions_BxL.shape[1]
  freq_TxK = np.stack([rope_frequencies(r, size, length) for r in config.ropes])
  angle = positions_BxL.astype(jnp.float32)[None, :, :, None] * freq_TxK[:, None, None, :]
  factor_T = np.array([r.attention_factor for r in config.ropes], np.float32)
  if (factor_T == 1).all():
    return jnp.cos(angle), jnp.sin(angle)
  factor_Tx1x1x1 = factor_T[:, None, None, None]
  return jnp.cos(angle) * factor_Tx1x1x1, jnp.sin(angle) * factor_Tx1x1x1


def apply_rope(x_BxLxHxDh, cos_BxLxK, sin_BxLxK):
  """Rotates the two halves of each head's first 2 K dimensions against each other."""
  cos, sin = cos_BxLxK[:, :, None, :], sin_BxLxK[:, :, None, :]
  size = 2 * cos.shape[-1]
  if size < x_BxLxHxDh.shape[-1]:
    rotated = apply_rope(x_BxLxHxDh[..., :size], cos_BxLxK, sin_BxLxK)
    return jnp.concatenate([rotated, x_BxLxHxDh[..., size:]], -1)
  x1, x2 = jnp.split(x_BxLxHxDh.astype(jnp.float32), 2, -1)
  y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
  return y.astype(x_BxLxHxDh.dtype)


class Norm(nn.Module):
  """RMSNorm or LayerNorm; inside the block gain and bias may differ by loop."""

  config: ModelConfig
  size: int
  looped: bool = False

  @nn.compact
  def __call__(self, x, loop=0):
    c = self.config
    zeros_or_ones = nn.initializers.constant(0.0 if c.unit_offset_norm else 1.0)
    shape: tuple[int, ...] = (self.size,)
    axes: tuple[str, ...] = ('norm',)
    if self.looped and c.loop_norms:
      shape, axes = (c.loops, *shape), ('loops', *axes)

    def leaf(name, init):
      value: Any = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
      if len(shape) == 2:
        return at_loop(value, loop, x.ndim)
      return value.reshape((1,) * (x.ndim - 1) + value.shape)

    gain = leaf('scale', zeros_or_ones)
    if c.norm == 'layer':
      return layer_norm(x, gain, leaf('bias', nn.initializers.zeros), c.norm_eps)
    return rms_norm(x, gain, c.norm_eps, c.unit_offset_norm)


class Linear(nn.Module):
  """y = x W + b, and inside the block its relaxations of the product."""

  config: ModelConfig
  component: str
  looped: bool = False

  @nn.compact
  def __call__(self, x_BxLxD, place: Place = HERE):
    c = self.config
    shape = c.shapes()[self.component]
    scaled = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
    if c.weights != 'float':
      scaled = quantized_init(scaled, c.weights)
    kernel_DxF: Any = self.get_variable('params', 'kernel')
    if isinstance(kernel_DxF, TransposedKernel):
      if kernel_DxF.shape != shape:
        raise ValueError(
          f'{self.component}: a kernel of {kernel_DxF.shape} was given, and {shape} is needed.'
        )
    else:
      init = partitioned(scaled, LINEAR_AXES[self.component])
      kernel_DxF = self.param('kernel', init, shape, jnp.float32)
    relaxed = relaxations_of(self, c, self.component, self.looped)
    y_BxLxF = relax(self, relaxed, x_BxLxD, matmul(x_BxLxD, kernel_DxF), place)
    # Kept with its relaxations: apart they would be two arrays and more.
    y_BxLxF = checkpoint_name(y_BxLxF, LINEAR)
    if self.component not in c.biases:
      return y_BxLxF
    axes: tuple[str, ...] = LINEAR_AXES[self.component][1:]
    size: tuple[int, ...] = shape[1:]
    if self.looped and c.loop_norms:
      size, axes = (c.loops, *size), ('loops', *axes)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
    bias: Any = self.param('bias', zeros, size, jnp.float32)
    bias = at_loop(bias, place.loop, y_BxLxF.ndim) if len(size) == 2 else bias[None, None]
    return y_BxLxF + bias.astype(y_BxLxF.dtype)


def quantized_init(init, kind: str, axis: int = -2):
  """An initializer whose matrix is quantized."""
  return lambda key, shape, dtype: quantize(init(key, shape, dtype), kind, axis)


def partitioned(init, axes: tuple[str, str], group_axis: int = -2):
  """An initializer with the names of the matrix's axes; of a quantized one, on each part."""
  one = nn.with_logical_partitioning(lambda value: value, axes)
  # Groups may be fewer than a mesh has devices.
  step_axes = tuple(None if i == group_axis % 2 else a for i, a in enumerate(axes))
  step = nn.with_logical_partitioning(lambda value: value, step_axes)

  def boxed(*args):
    value = init(*args)
    if not isinstance(value, dict):
      return one(value)
    return {name: (step if name == 'step' else one)(part) for name, part in value.items()}

  return boxed


class Mlp(nn.Module):
  """down(act(gate(x)) * up(x)) or down(act(up(x))), and inside the block its relaxations."""

  config: ModelConfig
  looped: bool = False

  def setup(self):
    linear = functools.partial(Linear, self.config, looped=self.looped)
    if self.config.gated:
      self.gate = linear('gate')
    self.up, self.down = linear('up'), linear('down')
    self.relaxed = relaxations_of(self, self.config, 'mlp', self.looped)

  def __call__(self, x_BxLxD, place: Place = HERE, pools=None):
    """`pools` are the leaves of pooled relaxations by kind."""
    relaxed = (*self.relaxed, *pooled_of(self.config, pools))
    tokens = x_BxLxD.shape[0] * x_BxLxD.shape[1]
    if len(relaxed) == 1 and relaxed[0].relaxation.replaces_mlp(self.config, tokens):
      found = self._replaced(relaxed[0], x_BxLxD, place)
      if found is not None:
        return found
    h_BxLxF = self.hidden(x_BxLxD, place)
    for relaxation, host, leaves in relaxed:
      h_BxLxF = relaxation.apply_hidden(leaves, x_BxLxD, h_BxLxF, place, host)
    y_BxLxD = self.down(h_BxLxF, place)
    return relax(self, relaxed, x_BxLxD, y_BxLxD, place)

  def _replaced(self, one: Relaxed, x_BxLxD, place: Place):
    """The output where a relaxation stands for the MLP; None where its weights are no arrays."""
    params = self.variables['params']
    kernels = {n: params[n]['kernel'] for n in MLP if 'kernel' in params.get(n, {})}
    if self.is_initializing() or not all(isinstance(k, jax.Array) for k in kernels.values()):
      return None
    # A function of its parameters alone, for one branch of a condition.
    alone = Mlp(self.config, self.looped, parent=None)
    dense = lambda x, place: alone.apply({'params': params}, x, place)
    relaxation = one.relaxation
    y, aux = relaxation.apply_mlp(one.leaves, x_BxLxD, kernels, dense, place, one.host)
    self.sow(AUX, relaxation.kind, aux)
    return y

  def hidden(self, x_BxLxD, place: Place = HERE):
    """The down projection's input, [B, L, F]."""
    if not self.config.gated:
      return activate(self.up(x_BxLxD, place), self.config.activation)
    gate_BxLxF = activate(self.gate(x_BxLxD, place), self.config.activation)
    return gate_BxLxF * self.up(x_BxLxD, place)
