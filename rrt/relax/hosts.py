"""Hosts: the parts of a block layer that relaxations sit on.

D model, I inputs and O outputs of a host, N layers of the block, R loops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# The linears that a layer with experts has once an expert.
MLP = ('gate', 'up', 'down')
SITES = ('linear', 'mlp', 'kv', 'block')
# Logical axes of the seven linears' inputs and outputs; see `rrt.sharding`.
LINEAR_AXES = {
  'q': ('embed', 'heads'),
  'k': ('embed', 'kv'),
  'v': ('embed', 'kv'),
  'o': ('heads', 'embed'),
  'gate': ('embed', 'mlp'),
  'up': ('embed', 'mlp'),
  'down': ('mlp', 'embed'),
}


class Host(NamedTuple):
  """The part of a block layer that a relaxation sits on.

  Attributes:
    site: one of `SITES`.
    name: of the linear ('q' to 'down'), or the site's own name.
    path: of the subtree with its parameters, in a block layer: 'attn/q',
      'mlp', 'attn'; of the block itself ''.
    d_in, d_out: I and O. For 'kv', O is the size of keys (or values) of all
      heads.
    axes: logical axes of inputs and outputs.
    loops, layers: R and N; N is 1 for the block itself. Each expert of a model with
      experts counts as a layer: the linear of layer n and expert e is n E + e of N E.
    units, activation, gated: of the model's MLP, for the site 'mlp'; no units where it
      has experts.
    experts: E of a linear that a layer has once an expert, else 0. Its leaves have an
      axis of experts behind that of the layers.
  """

  site: str
  name: str
  path: str
  d_in: int
  d_out: int
  axes: tuple[str, str]
  loops: int
  layers: int
  units: int = 0
  activation: str = ''
  gated: bool = False
  experts: int = 0

  @property
  def leaf(self) -> str:
    """The name of the linear's own matrix beside its relaxations."""
    return 'kernels' if self.experts else 'kernel'

  def instances(self, layer: int) -> Any:
    """Where the linears of a block layer lie among all N of the host: its own, or its experts'."""
    if not self.experts:
      return layer
    return slice(layer * self.experts, (layer + 1) * self.experts)


def part_of(component: str) -> str:
  """The subtree of a layer that holds a linear: 'attn' or 'mlp'."""
  return 'mlp' if component in MLP else 'attn'


def hosts_of(config, site: str) -> tuple[Host, ...]:
  """The hosts of a site in a `ModelConfig`'s block."""
  c = config
  kv = c.num_kv_heads * c.head_dim
  if site == 'linear':
    found = []
    for name, (d_in, d_out) in c.shapes().items():
      counts = c.loops, c.block_layers * c.copies(name)
      experts = c.copies(name) if c.copies(name) > 1 else 0
      at = f'{part_of(name)}/{name}', d_in, d_out, LINEAR_AXES[name]
      found.append(Host(site, name, *at, *counts, experts=experts))
    return tuple(found)
  both = ('embed', 'embed')
  if site == 'mlp':
    counts, mlp = (c.loops, c.block_layers), (c.d_ff, c.activation, c.gated)
    if c.num_experts:
      mlp = (0, *mlp[1:])
    return (Host(site, site, 'mlp', c.d_model, c.d_model, both, *counts, *mlp),)
  if site == 'kv':
    return (Host(site, site, 'attn', c.d_model, kv, ('embed', 'kv'), c.loops, c.block_layers),)
  return (Host(site, site, '', c.d_model, c.d_model, both, c.loops, 1),)


def at_loop(table_RxD, loop, ndim: int):
  """Rows of a per-loop table, shaped to broadcast against an ndim array.

  Returns [1, .., 1, D] for a scalar loop, [B, 1, .., 1, D] for one a row.
  """
  rows = table_RxD[loop]
  lead = rows.shape[:1] if rows.ndim == 2 else (1,)
  return rows.reshape(*lead, *(1,) * (ndim - 2), rows.shape[-1])
