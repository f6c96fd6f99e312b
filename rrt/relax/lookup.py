"""What memory layers and PEER share: queries by loop, sub-keys, and the slots they find.

B batch, L length, D model, M positions with a lookup, H heads, K half the key size, n sub-keys of
a half, N = n^2 slots, k slots a head, J = H k, R loops, r rank.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.ops import product_keys
from rrt.ops.matmul import matmul
from rrt.relax.base import Aux, Leaf, Leaves, Place
from rrt.relax.hosts import Host, at_loop
from rrt.relax.lora import low_rank
from rrt.relax.positioned import Positioned


class Found(NamedTuple):
  """Slots of each token, and their weights.

  Attributes:
    index_BxLxJ: int32 slots, by head.
    weight_BxLxJ: float32, softmax of each head's scores.
  """

  index_BxLxJ: jax.Array
  weight_BxLxJ: jax.Array


@dataclasses.dataclass(frozen=True)
class Lookup(Positioned):
  """A product-key lookup at some layers of the block, into one pool for all of them and all loops.

  Queries and keys belong to a layer; a query differs by loop by a bias, and by a low-rank
  term if asked.

  Attributes:
    slots: N, a square.
    heads: H, each with keys of its own.
    topk: k, slots a head.
    key_dim: size of a key, both halves; 0 for half the model's width.
    query_rank: r of the query's low-rank term by loop; 0 for none.
    qk_norm: RMSNorm of both halves of queries and keys, with gains and a learned temperature.
    instead: the MLP's own output is left out at these layers; its weights stay.
    loops: in which loops they look up; () for all.
  """

  decay: ClassVar[bool] = False

  slots: int = 65536
  heads: int = 4
  topk: int = 32
  key_dim: int = 0
  query_rank: int = 0
  qk_norm: bool = False
  instead: bool = False
  loops: tuple[int, ...] = ()

  @property
  def half(self) -> int:
    """n, sub-keys of a half."""
    return math.isqrt(self.slots)

  def size(self, host: Host) -> int:
    """K, half the size of a key."""
    return (self.key_dim or 2 * (host.d_in // 4)) // 2

  def check(self, hosts: tuple[Host, ...]) -> None:
    for name in ('slots', 'heads', 'topk', 'key_dim', 'query_rank'):
      value, least = getattr(self, name), int(name not in ('key_dim', 'query_rank'))
      if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f'{self.kind}.{name}={value!r}: must be a whole number, {least} or more.')
    if self.half**2 != self.slots:
      near = self.half**2, (self.half + 1) ** 2
      raise InputError(
        f'{self.kind}.slots={self.slots}: product keys need a square; {near[0]} and {near[1]} are '
        'the nearest.'
      )
    if self.topk > self.slots:
      raise InputError(
        f'{self.kind}.topk={self.topk}: there are only slots={self.slots} keys to choose from.'
      )
    if self.key_dim % 2:
      raise InputError(f'{self.kind}.key_dim={self.key_dim}: must be even, for two halves.')
    super().check(hosts)
    if not isinstance(self.loops, tuple) or not all(r in range(hosts[0].loops) for r in self.loops):
      raise InputError(
        f'{self.kind}.loops={self.loops!r}: must be loops, counted from 0 to {hosts[0].loops - 1}, '
        'or nothing for all.'
      )

  def leaves(self, host: Host) -> dict[str, Leaf]:
    M, R, D, H, n, K = self._sizes(host)
    kind, normal = self.kind, nn.initializers.normal
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    wide = 2 * H * K
    xavier = normal((2.0 / (D + wide)) ** 0.5)
    found = {
      'query': Leaf((M, D, wide), (None, host.axes[0], None), xavier),
      'bias': Leaf((M, R, wide), (None, 'loops', None), zeros),
      'keys': Leaf((M, 2, H, n, K), (None,) * 5, _uniform((2 * K) ** -0.5)),
    }
    if r := self.query_rank:
      axes = (None, 'loops', host.axes[0], 'rank'), (None, 'loops', 'rank', None)
      found['query_a'] = Leaf((M, R, D, r), axes[0], normal(D**-0.5))
      found['query_b'] = Leaf((M, R, r, wide), axes[1], zeros)
    if self.qk_norm:
      found['norms'] = Leaf((M, 2, 2, K), (None,) * 4, ones)
      found['temperature'] = Leaf((M,), (None,), ones)
    return {f'{kind}_{name}': leaf for name, leaf in found.items()}

  def _sizes(self, host: Host):
    M, R = len(self.positions), len(self.loops or range(host.loops))
    return M, R, host.d_in, self.heads, self.half, self.size(host)

  def find(self, params: Leaves, x_BxLxD, loop, m, host: Host) -> Found:
    """The slots of each token.

    Args:
      params: the leaves.
      x_BxLxD: the MLP's input.
      loop: int scalar, or int [B].
      m: which of `positions`.
      host: where.
    """
    *_, H, _, K = self._sizes(host)
    B, L, _ = x_BxLxD.shape
    leaf = lambda name: params[f'{self.kind}_{name}'][m]
    if self.loops:  # As indices into the terms that differ by loop.
      index_R = [self.loops.index(r) if r in self.loops else 0 for r in range(host.loops)]
      loop = jnp.asarray(index_R)[loop]
    q_BxLxQ = matmul(x_BxLxD, leaf('query').astype(x_BxLxD.dtype)).astype(jnp.float32)
    q_BxLxQ += at_loop(leaf('bias'), loop, 3)
    if self.query_rank:
      q_BxLxQ += low_rank(x_BxLxD, leaf('query_a'), leaf('query_b'), loop).astype(jnp.float32)
    q_TxHx2xK = q_BxLxQ.reshape(B * L, H, 2, K)
    keys_2xHxnxK = leaf('keys').astype(jnp.float32)
    if self.qk_norm:
      gain_2x2xK = leaf('norms')
      q_TxHx2xK = rms_norm(q_TxHx2xK) * gain_2x2xK[0][None, None]
      keys_2xHxnxK = rms_norm(keys_2xHxnxK) * gain_2x2xK[1][:, None, None]
      q_TxHx2xK *= leaf('temperature') * K**-0.5
    index, score = product_keys.nearest(q_TxHx2xK, keys_2xHxnxK, self.topk)
    weight_TxHxk = jax.nn.softmax(score, -1)
    return Found(index.reshape(B, L, -1), weight_TxHxk.reshape(B, L, -1))

  def read(self, params: Leaves, x, y, place: Place, m, host: Host):
    look = lambda: self.look(params, x, y, place, m, host)
    if not self.loops:
      return look()
    in_loops = jnp.isin(place.loop, jnp.asarray(self.loops))
    if jnp.ndim(place.loop):  # Rows at several loops.
      relaxed, aux = look()
      return jnp.where(in_loops[:, None, None], relaxed, y), aux
    return jax.lax.cond(in_loops, look, lambda: (y, self.nothing(place, host)))

  def nothing(self, place: Place, host: Host) -> Aux:
    return self.aux(jnp.zeros((self.slots,)), host)

  def look(self, params: Leaves, x, y, place: Place, m, host: Host):
    """(the MLP's output y with what is found, Aux), at one of `positions`."""
    raise NotImplementedError

  def joined(self, y, out_BxLxD):
    """The MLP's output with the layer's beside it, or in its place."""
    out_BxLxD = out_BxLxD.astype(y.dtype)
    return out_BxLxD if self.instead else y + out_BxLxD

  def aux(self, usage_N, host: Host):
    """How often each slot was taken, so that the mean over layers is that over `positions`."""
    return Aux({}, {'usage': usage_N * (host.layers / len(self.positions))})

  def usage(self, found: Found, place: Place):
    """Reads of each slot by this call's tokens, float32 [N]; padding does not count."""
    index_BxLxJ = found.index_BxLxJ
    reads_BxLxJ = jnp.ones(index_BxLxJ.shape)
    if place.real_BxL is not None:
      reads_BxLxJ *= place.real_BxL[..., None]
    return jnp.zeros((self.slots,)).at[index_BxLxJ.reshape(-1)].add(reads_BxLxJ.reshape(-1))

  def summarize(self, stats) -> dict[str, jax.Array]:
    """Of a batch, all loops and positions together.

    `used` and `dead` are shares of the slots; `kl` is that of the reads to the uniform
    distribution, in nats.
    """
    if 'usage' not in stats:
      return {}
    usage_N = stats['usage']
    p_N = usage_N / jnp.maximum(jnp.sum(usage_N), 1e-30)
    used = jnp.mean((usage_N > 0).astype(jnp.float32))
    kl = jnp.sum(jnp.where(p_N > 0, p_N * jnp.log(jnp.maximum(p_N, 1e-30) * self.slots), 0.0))
    return {'used': used, 'dead': 1.0 - used, 'kl': kl}


def _uniform(limit: float):
  draw: Any = nn.initializers.uniform(2 * limit)
  return lambda key, shape, dtype=jnp.float32: draw(key, shape, dtype) - limit


def rms_norm(x):
  """x over the root mean square of its last axis."""
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
