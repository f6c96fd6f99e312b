"""The MLP of a model with experts (Mixtral, Qwen2-MoE, Qwen3-MoE, Grok-1): a router, and their MLPs.

    y = sum over the chosen experts e of gate_e(x) MLP_e(x)

Tokens are sorted by expert, or travel over the mesh axis `expert` (`rrt.ops.expert_parallel`);
none is dropped. Relaxations of gate, up and down are applied to the rows of each expert.

B batch, L length, T = B L tokens, D model, F ffn, E experts, k experts a token, m shared experts,
R loops.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models.layers import HERE, LINEAR
from rrt.models.relaxed import Relaxed, per_expert, pooled_of, relax, relaxations_of
from rrt.ops import expert_parallel, routing
from rrt.ops.activation import activate
from rrt.relax.base import Place
from rrt.relax.hosts import LINEAR_AXES, MLP


class ExpertMlp(nn.Module):
  """What `rrt.models.layers.Mlp` is in a model without experts."""

  config: ModelConfig
  looped: bool = False

  def setup(self):
    linear = lambda name: ExpertLinear(self.config, name, self.looped)
    self.router = Router(self.config, self.looped)
    if self.config.gated:
      self.gate = linear('gate')
    self.up, self.down = linear('up'), linear('down')
    self.relaxed = relaxations_of(self, self.config, 'mlp', self.looped)

  def __call__(self, x_BxLxD, place: Place = HERE, pools=None):
    """`pools` are the leaves of pooled relaxations by kind."""
    c = self.config
    names = [name for name in MLP if name in c.shapes()]
    relaxed, kernels = {}, {}
    for name in names:
      kernel_ExIxO, relaxed[name] = getattr(self, name)()
      leaves = [one.leaves for one in relaxed[name]]
      kernels[name] = {'kernel': kernel_ExIxO, 'relaxed': leaves}
    B, L, D = x_BxLxD.shape
    x_TxD = rows = x_BxLxD.reshape(B * L, D)
    by_row = jnp.ndim(place.loop) > 0
    if by_row:  # Each row's loop travels with it.
      loop_T = jnp.repeat(place.loop, L)
      rows = jnp.concatenate([x_TxD, jax.nn.one_hot(loop_T, c.loops, dtype=x_TxD.dtype)], -1)

    def run(kernels, rows, product, loop):
      x, loop = (rows[..., :D], rows[..., D:]) if by_row else (rows, loop)

      def linear(name, x):
        own = kernels[name]
        y = product(x, own['kernel'].astype(x.dtype))
        for one, leaves in zip(relaxed[name], own['relaxed'], strict=True):
          y = one.relaxation.apply_experts(leaves, x, y, loop, product, one.host)
        return checkpoint_name(y, LINEAR)

      if not c.gated:
        return linear('down', activate(linear('up', x), c.activation))
      return linear('down', activate(linear('gate', x), c.activation) * linear('up', x))

    routes = self.routes(x_BxLxD, place)
    tokens = rows, routes.index_Txk, routes.gate_Txk
    y_TxD, _ = expert_parallel.apply(run, kernels, *tokens, extra=place.loop)
    of_mlp = (*self.relaxed, *pooled_of(c, pools))
    return relax(self, of_mlp, x_BxLxD, y_TxD.reshape(B, L, D), place)

  def routes(self, x_BxLxD, place: Place = HERE) -> routing.Routes:
    """The experts of each token, the shared ones behind those that the router chose."""
    c = self.config
    logits_BxLxE, shared_BxLx1 = self.router(x_BxLxD, place.loop)
    normalise = 'chosen' if c.norm_topk else 'all'
    logits_TxE = logits_BxLxE.reshape(-1, c.num_experts)
    routes = routing.route(logits_TxE, c.experts_per_token, 'softmax', normalise)
    if shared_BxLx1 is None:
      return routes
    m, gate_Tx1 = c.shared_experts, jax.nn.sigmoid(shared_BxLx1.reshape(-1, 1))
    always_m = jnp.broadcast_to(c.num_experts + jnp.arange(m)[None], (len(gate_Tx1), m))
    return routing.Routes(
      jnp.concatenate([routes.index_Txk, always_m], -1),
      jnp.concatenate([routes.gate_Txk, jnp.repeat(gate_Tx1, m, -1)], -1),
      jnp.pad(routes.prob_TxE, ((0, 0), (0, m))),
    )


class Router(nn.Module):
  """x W_r, and the logit of the shared experts' gate, in float32.

  Inside the block W_r may differ by loop, as norm gains do.
  """

  config: ModelConfig
  looped: bool = False

  @nn.compact
  def __call__(self, x_BxLxD, loop=0):
    c = self.config
    own = self.looped and c.loop_norms
    normal = nn.initializers.normal(c.d_model**-0.5)
    x_BxLxD = x_BxLxD.astype(jnp.float32)

    def product(name: str, columns: int):
      shape, axes = (c.d_model, columns), ('embed', None)
      init = nn.with_logical_partitioning(normal, ('loops', *axes) if own else axes)
      weights: Any = self.param(name, init, (c.loops, *shape) if own else shape, jnp.float32)
      weights = (weights[loop] if own else weights).astype(jnp.float32)
      by_row = 'bld,bde->ble' if weights.ndim == 3 else 'bld,de->ble'
      return jnp.einsum(by_row, x_BxLxD, weights, precision=jax.lax.Precision.HIGHEST)

    logits_BxLxE = product('weights', c.num_experts)
    return logits_BxLxE, product('shared', 1) if c.shared_experts else None


class ExpertLinear(nn.Module):
  """The parameters of a linear of all experts, and those of its relaxations."""

  config: ModelConfig
  component: str
  looped: bool = False

  @nn.compact
  def __call__(self) -> tuple[Any, tuple[Relaxed, ...]]:
    c = self.config
    init = per_expert(nn.initializers.variance_scaling(1.0, 'fan_in', 'normal'))
    init = nn.with_logical_partitioning(init, ('expert', *LINEAR_AXES[self.component]))
    shape = (c.copies(self.component), *c.shapes()[self.component])
    kernels = self.param('kernels', init, shape, jnp.float32)
    return kernels, relaxations_of(self, c, self.component, self.looped)
