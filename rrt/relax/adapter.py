"""Task adapters: LoRA for a task, on a block whose other weights stay as they are.

y = x W + scale * x A B, before the other relaxations: with one pair of factors for all
loops it can be merged into the shared weight, with one a loop into the loops' own
low-rank terms.

I inputs, O outputs, R loops, r rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.ops.matmul import matmul
from rrt.relax.base import NO_AUX, Leaf, Leaves, Relaxation
from rrt.relax.hosts import LINEAR_AXES, Host
from rrt.relax.lora import Lora, low_rank
from rrt.relax.trees import own_leaves, subtree


@dataclasses.dataclass(frozen=True)
class Adapter(Relaxation):
  """A low-rank term for a task, on each of some linears of the block.

  Attributes:
    rank: r, capped at the smaller side of the matrix.
    by_loop: a pair of factors a loop; otherwise one for all loops.
    components: the linears that have it; 'all' for the seven.
    alpha: the product is scaled by alpha / rank; None means a scale of 1.
  """

  kind: ClassVar[str] = 'adapter'
  site: ClassVar[str] = 'linear'
  matrices: ClassVar[bool] = True

  rank: int = 8
  by_loop: bool = False
  components: tuple[str, ...] = ('q', 'v')
  alpha: float | None = None

  def __post_init__(self):
    if self.components in ('all', ('all',)):
      object.__setattr__(self, 'components', tuple(LINEAR_AXES))

  @property
  def leads(self) -> bool:
    return True

  def check(self, hosts: tuple[Host, ...]) -> None:
    whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
    if not whole or self.rank < 1:
      raise InputError(f'adapter.rank={self.rank!r}: must be a whole number, 1 or more.')
    if not isinstance(self.by_loop, bool):
      raise InputError(f'adapter.by_loop={self.by_loop!r}: must be true or false.')
    if self.alpha is not None and not 0 < float(self.alpha) < 1e300:
      raise InputError(f'adapter.alpha={self.alpha!r}: must be a finite number above 0, or none.')
    if not self.components or len(set(self.components)) < len(self.components):
      raise InputError(
        f'adapter.components={self.components!r}: must name one linear or more, each once.'
      )
    for name in self.components:
      if name not in LINEAR_AXES:
        raise InputError(
          f'adapter.components names {name!r}; the linears are {", ".join(LINEAR_AXES)}.'
        )

  @property
  def scale(self) -> float:
    """The factor of the product in the forward pass."""
    return 1.0 if self.alpha is None else self.alpha / self.rank

  def leaves(self, host: Host) -> dict[str, Leaf]:
    if host.name not in self.components:
      return {}
    r = min(self.rank, host.d_in, host.d_out)
    lead, axes = ((host.loops,), ('loops',)) if self.by_loop else ((), ())
    start = nn.initializers.normal(host.d_in**-0.5)
    zeros = nn.initializers.zeros
    return {
      'adapter_a': Leaf((*lead, host.d_in, r), (*axes, host.axes[0], 'rank'), start),
      'adapter_b': Leaf((*lead, r, host.d_out), (*axes, 'rank', host.axes[1]), zeros),
    }

  def apply(self, params: Leaves, x, y, loop, host: Host):
    a, b = params['adapter_a'], params['adapter_b']
    if self.by_loop:
      return y + low_rank(x, a, b, loop, self.scale), NO_AUX
    added = matmul(matmul(x, a), b)
    return y + added * jnp.asarray(self.scale, added.dtype), NO_AUX

  def factors(self, params: Leaves, position) -> tuple[np.ndarray, np.ndarray]:
    """(A, scale * B) of one position, float64; `params` are of all layers."""
    loop, layer = position
    a, b = (np.asarray(params[k][layer], np.float64) for k in ('adapter_a', 'adapter_b'))
    if self.by_loop:
      a, b = a[loop], b[loop]
    return a, self.scale * b

  def merge(self, base_IxO: np.ndarray, params: Leaves, position, host: Host):
    a, b = self.factors(params, position)
    return base_IxO + a @ b

  def square_norm(self, params: Leaves, host: Host):
    a, b = (params[k] for k in ('adapter_a', 'adapter_b'))
    product = jnp.einsum('n...ir,n...ro->n...io', a, b) * self.scale
    by_layer = jnp.sum(product**2, (-2, -1))
    total = jnp.sum(by_layer, 0)
    return total if self.by_loop else jnp.full((host.loops,), total)


def into_low_rank(adapter: Adapter, config, block) -> tuple[tuple[Relaxation, ...], dict]:
  """An adapter by loop as columns of the loops' low-rank terms.

  Args:
    adapter: of the configuration.
    config: the `ModelConfig` with it.
    block: `params['block']`, numpy.

  Returns:
    (the relaxations without it, new leaves of the terms by the path of their host).

  Raises:
    InputError: a gain stands between the two.
  """
  rest = tuple(r for r in config.relax if r is not adapter)
  kinds = [type(r) for r in rest]
  before = rest[: kinds.index(Lora)] if Lora in kinds else rest
  if before:
    raise InputError(
      f'relax: {before[0].kind!r} stands between the adapter and the low-rank terms; keep the '
      'adapter beside the model.'
    )
  old = next((r for r in rest if isinstance(r, Lora)), Lora())
  ranks: dict[str, Any] = {name: getattr(old, name) for name in config.shapes()}
  found: dict[str, dict[str, np.ndarray]] = {}
  for host in adapter.hosts(config):
    tree = subtree(block, host)
    terms, own = own_leaves(tree, old.kind), own_leaves(tree, adapter.kind)
    if not own:
      if terms:  # Its scale goes into the factor.
        found[host.path] = terms | {'lora_b': np.asarray(terms['lora_b']) * old.scale(host.name)}
      continue
    table_RxN = old.ranks(host)
    r, dtype = own['adapter_a'].shape[-1], np.asarray(own['adapter_a']).dtype
    width = int(table_RxN.max()) + r
    a = np.zeros((host.layers, host.loops, host.d_in, width), dtype)
    b = np.zeros((host.layers, host.loops, width, host.d_out), dtype)
    for (loop, n), rank in np.ndenumerate(table_RxN):
      if rank:
        a[n, loop, :, :rank] = terms['lora_a'][n, loop, :, :rank]
        b[n, loop, :rank] = old.scale(host.name) * np.asarray(terms['lora_b'][n, loop, :rank])
      new = slice(rank, rank + r)
      a[n, loop, :, new], b[n, loop, new] = adapter.factors(own, (loop, n))
    found[host.path] = {'lora_a': a, 'lora_b': b}
    total_RxN = table_RxN + r
    same = len({*total_RxN.flat}) == 1
    ranks[host.name] = int(total_RxN.flat[0]) if same else tuple(map(tuple, total_RxN.tolist()))
  return (Lora(**ranks), *(r for r in rest if not isinstance(r, Lora))), found
