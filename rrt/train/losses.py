"""The training losses: cross-entropy, and distillation from the parent.

Logits are the largest array of a training step; here they are computed for one
chunk of tokens at a time. Gradients are computed in the same pass, so that a chunk
costs three matrix products with the head (logits, hidden gradient, head gradient)
where rematerialisation needs four, plus one with the teacher's head.

Axes: B batch, L length, C positions of a chunk, D model, V vocabulary, K most
likely tokens, S devices over which the rows of a batch are split.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.ops.attention import softcap
from rrt.ops.matmul import float32_is_float32
from rrt.ops.mesh_axes import row_count
from rrt.sharding import constrain
from rrt.train.divergences import DIVERGENCES, TopK, divergence, top_k_divergence

Caps = tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A weighted sum of losses, each averaged over the target tokens.

  Attributes:
    cross_entropy: weight of the cross-entropy with the text, in nats.
    distillation: weight of the divergence from the parent; 0 runs no parent.
    divergence: 'forward_kl' KL(parent || child), 'reverse_kl', 'jsd' (the
      Jensen-Shannon divergence, halves weighted equally) or 'tvd' (total
      variation distance).
    temperature: divides the logits of parent and child inside the
      divergence, which is then multiplied by its square, so that gradients
      keep their size.
    top_k: distil from the parent's probabilities of its so many most likely
      tokens and of all others together; 0 distils from all of them.
    hidden: weight of the squared distance of the child's hidden states, after the
      final norm, from the parent's, relative to the size of these.
    z_loss: weight of the squared log-partition function.
    chunk_tokens: how many tokens' logits exist at a time, over the whole
      (global) batch. Never more than half a batch.
  """

  cross_entropy: float = 1.0
  distillation: float = 1.0
  divergence: str = 'forward_kl'
  temperature: float = 1.0
  top_k: int = 0
  hidden: float = 0.0
  z_loss: float = 0.0
  chunk_tokens: int = 512

  def __post_init__(self):
    if self.divergence not in DIVERGENCES:
      raise InputError(f'loss.divergence={self.divergence!r}: must be one of {DIVERGENCES}.')
    check_weights(self, 'loss', ('cross_entropy', 'distillation', 'hidden', 'z_loss'))
    if self.hidden and (self.top_k or not self.distillation):
      raise InputError(
        f'loss.hidden={self.hidden}: needs the hidden states of the parent; leave top_k out, '
        'and set distillation above 0.'
      )
    if self.top_k < 0:
      raise InputError(f'loss.top_k={self.top_k!r}: must be 0 or more.')
    if self.top_k and self.temperature != 1:
      raise InputError(
        f'loss.top_k={self.top_k} and loss.temperature={self.temperature}: the probability of '
        'all other tokens together is known at temperature 1 only; leave one of them out.'
      )
    if self.chunk_tokens < 1:
      raise InputError(f'loss.chunk_tokens={self.chunk_tokens!r}: must be 1 or more.')


def check_weights(objective: Any, name: str, weights: tuple[str, ...]) -> None:
  """Raises InputError for invalid weights or temperature.

  Args:
    objective: with `weights`, cross_entropy, distillation and temperature.
    name: of its config, for the message.
    weights: fields that must be 0 or more.
  """
  for field in weights:
    value = getattr(objective, field)
    if not 0 <= value < math.inf:
      raise InputError(f'{name}.{field}={value!r}: a weight must be 0 or more.')
  if not objective.cross_entropy + objective.distillation > 0:
    raise InputError(
      f'{name}.cross_entropy and {name}.distillation are both 0: nothing is '
      'left to learn from; set one of them above 0.'
    )
  if not 0 < objective.temperature < math.inf:
    raise InputError(f'{name}.temperature={objective.temperature!r}: must be above 0.')


# What a child is distilled from: the parent's (hidden_BxLxD, head_DxV), or a part of its logits.
Teacher = tuple[jax.Array, jax.Array] | TopK


class Losses(NamedTuple):
  """Weighted sums over tokens; float32 scalars."""

  loss: jax.Array
  cross_entropy: jax.Array
  distillation: jax.Array
  z_loss: jax.Array
  hidden: jax.Array


def losses(
  objective: Objective,
  hidden_BxLxD: jax.Array,
  head_DxV: jax.Array,
  targets_BxL: jax.Array,
  weights_BxL: jax.Array,
  teacher: Teacher | None = None,
  caps: Caps = (None, None),
) -> Losses:
  """All losses of a batch, with logits of one chunk at a time.

  Differentiable in `hidden_BxLxD` and `head_DxV`, through `loss` alone.
  Products run in the dtype of `hidden_BxLxD`; softmaxes and sums in float32.

  Args:
    objective: which losses, with which weights.
    hidden_BxLxD: the child's output after its final norm.
    head_DxV: the child's head.
    targets_BxL: the next token's id.
    weights_BxL: float32, the factor of each token; 0 where there is no
      target. Divide them by their sum for a mean.
    teacher: the parent's (hidden_BxLxD, head_DxV), of any width D, or its most
      likely tokens; needed when `objective.distillation` is above 0, ignored otherwise.
    caps: soft-caps of the child's and of the parent's logits
      (`ModelConfig.final_softcap`).
  """
  chex.assert_rank([hidden_BxLxD, head_DxV], [3, 2])
  chex.assert_equal_shape([targets_BxL, weights_BxL])
  chex.assert_equal_shape_prefix([hidden_BxLxD, targets_BxL], 2)
  if not objective.distillation:
    teacher = None
  elif teacher is None:
    raise ValueError('distillation needs the hidden states or the logits of a teacher.')
  if teacher is not None and not isinstance(teacher, TopK):
    t_BxLxD, t_DxV = teacher
    teacher = t_BxLxD, constrain(t_DxV.astype(t_BxLxD.dtype), (None, 'vocab'))
  rest = jax.lax.stop_gradient((targets_BxL, weights_BxL, teacher))
  sums = _losses((objective, caps), hidden_BxLxD, head_DxV, rest)
  if teacher is None or isinstance(teacher, TopK) or not objective.hidden:
    return sums
  teacher_BxLxD, weights_BxL = jax.lax.stop_gradient((teacher[0], weights_BxL))
  distance = hidden_distance(hidden_BxLxD, teacher_BxLxD, weights_BxL)
  return sums._replace(loss=sums.loss + objective.hidden * distance, hidden=distance)


def hidden_distance(hidden_BxLxD, teacher_BxLxD, weights_BxL) -> jax.Array:
  """The weighted sum of |child - parent|^2 / |parent|^2 over tokens, float32."""
  h_BxLxD, t_BxLxD = hidden_BxLxD.astype(jnp.float32), teacher_BxLxD.astype(jnp.float32)
  gap_BxL = jnp.sum((h_BxLxD - t_BxLxD) ** 2, axis=-1)
  return jnp.sum(weights_BxL * gap_BxL / jnp.maximum(jnp.sum(t_BxLxD**2, axis=-1), 1e-30))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static, hidden_BxLxD, head_DxV, rest) -> Losses:
  return _over_chunks(static, hidden_BxLxD, head_DxV, rest, None)[0]


def _losses_fwd(static, hidden, head, rest):
  """Values and gradients in one pass over the chunks."""
  wanted = (hidden.perturbed, head.perturbed)
  rest = jax.tree.map(lambda leaf: leaf.value, rest, is_leaf=_is_primal)
  return _over_chunks(static, hidden.value, head.value, rest, wanted)


def _losses_bwd(static, gradients, cotangents: Losses):
  del static
  g = cotangents.loss
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None
  d_hidden, d_head, like = gradients
  scale = lambda d, like: None if d is None else (g * d).astype(like.dtype)
  return scale(d_hidden, like[0]), scale(d_head, like[1]), None


def _is_primal(x: Any) -> bool:
  return hasattr(x, 'perturbed')


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


def chunk_length(batch: int, length: int, chunk_tokens: int) -> int:
  """C: positions of each row in a chunk; chunks are as even as they can be."""
  most = max(1, min(chunk_tokens // batch, -(-length // 2)))
  return -(-length // -(-length // most))


def row_shards(batch: int) -> int:
  """S: over how many devices the mesh in use splits the rows of a batch."""
  sizes = jax.sharding.get_abstract_mesh().shape
  count = row_count(sizes)
  return count if batch % count == 0 else 1


def _over_chunks(static, hidden_BxLxD, head_DxV, rest, wanted):
  """Scans over chunks of positions, so that every chunk has all rows.

  The mesh shards rows: with chunks along the length, each device keeps its own
  rows in every chunk.

  Returns:
    (Losses, None or (d_hidden_BxLxD, d_head_DxV in float32, two empty arrays of the
    dtypes that the gradients must have)).
  """
  objective, (cap, teacher_cap) = static
  targets_BxL, weights_BxL, teacher = rest
  few = isinstance(teacher, TopK)
  B, L, _ = hidden_BxLxD.shape
  like = tuple(jnp.zeros((0,), x.dtype) for x in (hidden_BxLxD, head_DxV))
  head_DxV = constrain(head_DxV.astype(hidden_BxLxD.dtype), (None, 'vocab'))
  C = chunk_length(B, L, objective.chunk_tokens)
  S = row_shards(B)
  split = functools.partial(_split, length=C)
  xs = {
    'hidden': split(hidden_BxLxD),
    'targets': split(targets_BxL),
    'weights': split(weights_BxL),
    'teacher': teacher and jax.tree.map(split, teacher if few else teacher[0]),
  }
  want_hidden, want_head = wanted or (False, False)

  def one(carry, x):
    sums, d_head_SxDxV = carry
    s_BxCxV = softcap(_logits(x['hidden'], head_DxV), cap)
    wanted_of = x['teacher']
    if teacher is not None and not few:
      wanted_of = softcap(_logits(x['teacher'], teacher[1]), teacher_cap)
    values, d_BxCxV = _token_losses(objective, s_BxCxV, wanted_of, x['targets'], x['weights'])
    sums = jax.tree.map(jnp.add, sums, values)
    if cap is not None:  # d tanh(z / cap) / d(z / cap) = 1 - tanh^2.
      d_BxCxV *= 1 - (s_BxCxV / cap) ** 2
    d_BxCxV = d_BxCxV.astype(hidden_BxLxD.dtype)
    d_hidden_BxCxD = None
    if want_hidden:
      d_hidden_BxCxD = jnp.einsum('bcv,dv->bcd', d_BxCxV, head_DxV)
    if want_head:
      by_shard = lambda y: y.reshape(S, B // S, *y.shape[1:])
      d_head_SxDxV += jnp.einsum(
        'sbcd,sbcv->sdv',
        by_shard(x['hidden']),
        by_shard(d_BxCxV),
        preferred_element_type=jnp.float32,
      )
    return (sums, d_head_SxDxV), d_hidden_BxCxD

  zero = jnp.zeros((), jnp.float32)
  start: Any = None
  if want_head:
    # A sum for each share of the rows: added up once, behind the loop.
    start = constrain(jnp.zeros((S, *head_DxV.shape), jnp.float32), ('batch', None, 'vocab'))
  with float32_is_float32(hidden_BxLxD.dtype):
    (sums, d_head_SxDxV), d_hidden = jax.lax.scan(one, (Losses(*[zero] * 5), start), xs)
  if wanted is None:
    return sums, None
  d_head_DxV = None
  if want_head:
    # Summed over devices into the shards of the parameter.
    d_head_DxV = constrain(jnp.sum(d_head_SxDxV, axis=0), ('embed', 'vocab'))
  if want_hidden:
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, d_hidden.shape[-1])
    d_hidden = d_hidden[:, :L]
  return sums, (d_hidden, d_head_DxV, like)


def _split(x_BxL: jax.Array, length: int) -> jax.Array:
  """[B, L, ...] to [chunks, B, length, ...], padded with zeros at the end."""
  B, L = x_BxL.shape[:2]
  chunks = -(-L // length)
  if chunks * length != L:
    pad = [(0, 0)] * x_BxL.ndim
    pad[1] = (0, chunks * length - L)
    x_BxL = jnp.pad(x_BxL, pad)
  x = x_BxL.reshape(B, chunks, length, *x_BxL.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _logits(hidden_BxCxD, head_DxV):
  s_BxCxV = jnp.einsum('bcd,dv->bcv', hidden_BxCxD, head_DxV, preferred_element_type=jnp.float32)
  return constrain(s_BxCxV, ('batch', 'length', 'act_vocab'))


def top_k(hidden_BxLxD, head_DxV, k: int, cap: float | None, chunk_tokens: int) -> TopK:
  """The k most likely tokens after each position, with logits of one chunk at a time.

  Args:
    hidden_BxLxD: after the final norm.
    head_DxV: the head.
    k: how many; at most V.
    cap: soft-cap of the logits.
    chunk_tokens: see `Objective`.
  """
  B, L, _ = hidden_BxLxD.shape
  head_DxV = constrain(head_DxV.astype(hidden_BxLxD.dtype), (None, 'vocab'))

  def one(x_BxCxD):
    logits_BxCxV = softcap(_logits(x_BxCxD, head_DxV), cap)
    values_BxCxK, ids_BxCxK = jax.lax.top_k(logits_BxCxV, k)
    log_p_BxCxK = values_BxCxK - jax.nn.logsumexp(logits_BxCxV, axis=-1, keepdims=True)
    return TopK(ids_BxCxK, log_p_BxCxK)

  with float32_is_float32(hidden_BxLxD.dtype):
    found = jax.lax.map(one, _split(hidden_BxLxD, chunk_length(B, L, chunk_tokens)))
  whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, k)[:, :L]
  return jax.tree.map(whole, found)


def _token_losses(objective, s_BxCxV, teacher, targets_BxC, weights_BxC):
  """Sums of the losses, and the gradient of their total by the logits.

  `teacher` is the parent's logits [B, C, V], its `TopK` or None.
  """
  o = objective
  w_BxCx1 = weights_BxC[..., None].astype(jnp.float32)
  total = lambda x_BxC: jnp.sum(x_BxC * weights_BxC)

  # A comparison instead of a gather: it stays local where V is sharded.
  vocab = jax.lax.broadcasted_iota(jnp.int32, s_BxCxV.shape, 2)
  hit_BxCxV = vocab == targets_BxC[..., None]
  log_z_BxC = jax.nn.logsumexp(s_BxCxV, axis=-1)
  ce_BxC = log_z_BxC - jnp.sum(jnp.where(hit_BxCxV, s_BxCxV, 0), axis=-1)
  q_BxCxV = jnp.exp(s_BxCxV - log_z_BxC[..., None])
  pull_BxCx1 = o.cross_entropy + 2 * o.z_loss * log_z_BxC[..., None]
  d_BxCxV = pull_BxCx1 * q_BxCxV - o.cross_entropy * hit_BxCxV

  kd_BxC = jnp.zeros_like(ce_BxC)
  if isinstance(teacher, TopK):
    kd_BxC, d_kd_BxCxV = top_k_divergence(o.divergence, teacher, s_BxCxV, log_z_BxC, q_BxCxV)
    d_BxCxV += o.distillation * d_kd_BxCxV
  elif teacher is not None:
    T = o.temperature
    log_p = jax.nn.log_softmax(teacher / T, axis=-1)
    log_q = jax.nn.log_softmax(s_BxCxV / T, axis=-1)
    kd_BxC, d_kd_BxCxV = divergence(o.divergence, log_p, log_q)
    kd_BxC = T**2 * kd_BxC
    # One factor 1/T is the derivative of s/T.
    d_BxCxV += o.distillation * T * d_kd_BxCxV

  ce, kd, z = total(ce_BxC), total(kd_BxC), total(log_z_BxC**2)
  loss = o.cross_entropy * ce + o.distillation * kd + o.z_loss * z
  return Losses(loss, ce, kd, z, jnp.zeros_like(loss)), w_BxCx1 * d_BxCxV
