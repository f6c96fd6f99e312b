"""Memory layers: a pool of values that the loops look up (Berges et al., arXiv 2412.09764).

    y = sum_j weight_j * values[slot_j]          weights: softmax of each head's scores
    out = W2 (y * silu(W1 x))                    gated ("Memory+"); else a gain on y

One pool for all positions and loops; queries, keys, W1 and W2 belong to a position, the query's
bias to a position and loop. W2, or the gain, starts at zero: the model is unchanged.

B batch, L length, D model, V value size, M positions, N slots, J slots a token.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.errors import InputError
from rrt.ops import embedding_bag
from rrt.ops.matmul import matmul
from rrt.relax.base import Leaf, Leaves, Place
from rrt.relax.hosts import Host
from rrt.relax.lookup import Lookup, rms_norm


@dataclasses.dataclass(frozen=True)
class Memory(Lookup):
  """A memory layer beside the MLP at some layers of the block; see `Lookup` for its fields.

  Attributes:
    dim: V, size of a value; 0 for the model's width.
    gated: with W1 and W2; else the value size is the model's width.
    value_norm: y is divided by its root mean square. Not in the paper: the mean of many small
      random values is so small that W2, which starts at zero, would get next to no gradient.
  """

  kind: ClassVar[str] = 'memory'
  unmergeable: ClassVar[str] = 'no untied family has memory layers'
  rates: ClassVar[dict[str, float]] = {'memory_values': 10.0}

  dim: int = 0
  gated: bool = True
  value_norm: bool = True

  def width(self, host: Host) -> int:
    """V."""
    return self.dim or host.d_out

  def check(self, hosts: tuple[Host, ...]) -> None:
    super().check(hosts)
    if not isinstance(self.dim, int) or self.dim < 0:
      raise InputError(f'memory.dim={self.dim!r}: must be a whole number, 0 or more.')
    if not self.gated and self.width(hosts[0]) != hosts[0].d_out:
      raise InputError(
        f'memory.dim={self.dim}: without gates values are added to the stream; make it '
        f'd_model={hosts[0].d_out}, or 0.'
      )

  def leaves(self, host: Host) -> dict[str, Leaf]:
    M, V, D = len(self.positions), self.width(host), host.d_out
    normal, zeros = nn.initializers.normal, nn.initializers.zeros
    found = super().leaves(host)
    found['memory_values'] = Leaf((self.slots, V), ('slots', 'values'), normal(V**-0.5))
    if self.gated:
      axes = (None, host.axes[0], None), (None, None, host.axes[1])
      found['memory_gate'] = Leaf((M, D, V), axes[0], normal(D**-0.5))
      found['memory_out'] = Leaf((M, V, D), axes[1], zeros)
    else:
      found['memory_out'] = Leaf((M, D), (None, 'norm'), zeros)
    return found

  def look(self, params: Leaves, x, y, place: Place, m, host: Host):
    found = self.find(params, x, place.loop, m, host)
    B, L, J = found.index_BxLxJ.shape
    flat = lambda z: z.reshape(B * L, J)
    value_TxV = embedding_bag.bag(
      params['memory_values'], flat(found.index_BxLxJ), flat(found.weight_BxLxJ)
    )
    if self.value_norm:
      value_TxV = rms_norm(value_TxV.astype(jnp.float32))
    value_BxLxV = value_TxV.reshape(B, L, -1).astype(x.dtype)
    leaf = lambda name: params[f'memory_{name}'][m].astype(x.dtype)
    if self.gated:
      value_BxLxV *= jax.nn.silu(matmul(x, leaf('gate')))
      out_BxLxD = matmul(value_BxLxV, leaf('out'))
    else:
      out_BxLxD = value_BxLxV * leaf('out')[None, None]
    return self.joined(y, out_BxLxD), self.aux(self.usage(found, place), host)
