"""PEER: a pool of rank-1 experts found by product keys (He, arXiv 2407.04153).

    y = sum_j weight_j * act(gate[slot_j] . x) * (up[slot_j] . x) * down[slot_j]

without `up` where the model's MLP has no gates. Weights are the softmax of a head's scores times
the slots of a token, so that with N = F slots, all of them taken at equal scores, this is the MLP
whose hidden units the experts are: `upcycled` starts there.

B batch, L length, D model, F hidden units of the MLP, M positions, N slots, J slots a token.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.ops import embedding_bag
from rrt.ops.activation import activate
from rrt.relax.base import Leaf, Leaves, Place
from rrt.relax.hosts import Host
from rrt.relax.lookup import Lookup

ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh')


@dataclasses.dataclass(frozen=True)
class Peer(Lookup):
  """A PEER layer beside the MLP at some layers of the block; see `Lookup` for its fields.

  Attributes:
    activation: of an expert's hidden unit: 'silu', 'gelu' or 'gelu_tanh'.
    gated: experts have an up vector beside the gate's.
  """

  kind: ClassVar[str] = 'peer'
  unmergeable: ClassVar[str] = 'no untied family has a pool of experts'
  rates: ClassVar[dict[str, float]] = {
    f'peer_{name}': 10.0 for name in ('experts_gate', 'experts_up', 'experts_down')
  }

  activation: str = 'gelu'
  gated: bool = False

  def check(self, hosts: tuple[Host, ...]) -> None:
    super().check(hosts)
    if self.activation not in ACTIVATIONS:
      raise InputError(
        f'peer.activation={self.activation!r}: must be one of {", ".join(ACTIVATIONS)}.'
      )

  def leaves(self, host: Host) -> dict[str, Leaf]:
    N, D, normal = self.slots, host.d_in, nn.initializers.normal
    table = lambda init: Leaf((N, D), ('slots', 'values'), init)
    found = super().leaves(host)
    found['peer_experts_gate'] = table(normal(D**-0.5))
    if self.gated:
      found['peer_experts_up'] = table(normal(D**-0.5))
    found['peer_experts_down'] = table(nn.initializers.zeros)
    return found

  def look(self, params: Leaves, x, y, place: Place, m, host: Host):
    found = self.find(params, x, place.loop, m, host)
    B, L, J = found.index_BxLxJ.shape
    index_TxJ, x_TxD = found.index_BxLxJ.reshape(B * L, J), x.reshape(B * L, -1)
    table = lambda name: params[f'peer_experts_{name}']
    hidden_TxJ = activate(embedding_bag.dots(table('gate'), index_TxJ, x_TxD), self.activation)
    if self.gated:
      hidden_TxJ *= embedding_bag.dots(table('up'), index_TxJ, x_TxD)
    weight_TxJ = self.topk * found.weight_BxLxJ.reshape(B * L, J) * hidden_TxJ
    out_BxLxD = embedding_bag.bag(table('down'), index_TxJ, weight_TxJ).reshape(x.shape)
    return self.joined(y, out_BxLxD), self.aux(self.usage(found, place), host)


def upcycled(peer: Peer, leaves: Leaves, mlp: dict[str, np.ndarray]) -> Leaves:
  """The leaves with an MLP's hidden units as experts, and queries that score all alike.

  Where all slots are taken (`topk` = `slots`, one head) the layer then is that MLP. Otherwise a
  token takes the first `topk` units until training tells the queries apart.

  Args:
    peer: with as many slots as the MLP has hidden units.
    leaves: as initialised.
    mlp: kernels 'gate' (if gated) [D, F], 'up' [D, F] and 'down' [F, D].

  Raises:
    InputError: other numbers of slots and units.
  """
  F = mlp['down'].shape[0]
  if peer.slots != F:
    raise InputError(f'peer.slots={peer.slots}: the MLP has {F} hidden units; make it as many.')
  first = mlp['gate'] if peer.gated else mlp['up']
  found = dict(leaves) | {'peer_experts_gate': jnp.asarray(first.T)}
  if peer.gated:
    found['peer_experts_up'] = jnp.asarray(mlp['up'].T)
  found['peer_experts_down'] = jnp.asarray(mlp['down'])
  found['peer_query'] = jnp.zeros_like(leaves['peer_query'])
  return found
