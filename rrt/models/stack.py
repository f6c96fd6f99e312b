"""Layers that run one after the other: scanned or unrolled, once or looped.

B batch, L query length, D model.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from rrt.config import ModelConfig
from rrt.models.attention import Attention, Context
from rrt.models.experts import ExpertMlp
from rrt.models.layers import LINEAR, Mlp, Norm
from rrt.models.relaxed import AUX, relax, relaxations_of
from rrt.relax.base import Place
from rrt.sharding import constrain

REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.save_only_these_names(LINEAR),
}


class Layer(nn.Module):
  """Attention and MLP with pre-norms, post-norms or both, as a family has them."""

  config: ModelConfig
  looped: bool = False

  def setup(self):
    c = self.config
    norm = functools.partial(Norm, c, c.d_model, self.looped)
    if c.pre_norms:
      self.attn_norm, self.mlp_norm = norm(), norm()
    if c.post_norms:
      self.attn_post_norm, self.mlp_post_norm = norm(), norm()
    self.attn = Attention(c, self.looped)
    self.mlp = (ExpertMlp if c.num_experts else Mlp)(c, self.looped)

  def __call__(self, x_BxLxD, xs, loop, context: Context):
    """One layer in one loop.

    `xs`: `(kv, attn_spec, layer)`; `kv` is None when no cache is used.
    """
    kv, attn_spec, layer = xs
    before_BxLxD = read_BxLxD = x_BxLxD
    y_BxLxD = self.attn_norm(x_BxLxD, loop) if self.config.pre_norms else x_BxLxD
    place = Place(loop, layer, context.real_BxL, context.key)
    y_BxLxD, kv = self.attn(y_BxLxD, kv, attn_spec, place, context)
    x_BxLxD += self.attn_post(y_BxLxD, loop)
    if not self.config.parallel:
      read_BxLxD = x_BxLxD
    y_BxLxD = self.mlp_norm(read_BxLxD, loop) if self.config.pre_norms else read_BxLxD
    y_BxLxD = self.mlp(y_BxLxD, place, context.pools)
    x_BxLxD += self.mlp_post(y_BxLxD, loop)
    if context.left_BxL is not None:
      left_BxLx1 = context.left_BxL[:, :, None]
      x_BxLxD = jnp.where(left_BxLx1, before_BxLxD, x_BxLxD)
    return constrain(x_BxLxD, ('batch', 'length', 'act_embed')), kv

  def attn_post(self, y_BxLxD, loop):
    """Post-norm of attention's output, if the family has one."""
    post = self.config.post_norms
    return self.attn_post_norm(y_BxLxD, loop) if post else y_BxLxD

  def mlp_post(self, y_BxLxD, loop):
    """Post-norm of the MLP's output, if the family has one."""
    post = self.config.post_norms
    return self.mlp_post_norm(y_BxLxD, loop) if post else y_BxLxD


class RepeatedLayer(Layer):
  """SEQUENCE order: a block layer that runs all its loops in place."""

  repeats: int = 1

  def __call__(self, x_BxLxD, xs, loop, context: Context):
    """`xs`: `(kvs, attn_specs, layer)`, the first two by loop; `loop` is unused."""
    kvs, attn_specs, layer = xs
    new = []
    for r in range(self.repeats):
      kv, attn_spec = at_index(kvs, r), at_index(attn_specs, r)
      x_BxLxD, kv = super().__call__(x_BxLxD, (kv, attn_spec, layer), r, context)
      new.append(kv)
    return x_BxLxD, in_form_of(kvs, new)


def at_index(tree, i):
  """Entry i of python tuples of KVs, or of arrays' leading axis."""
  if type(tree) is tuple:
    return tree[i]
  return jax.tree.map(lambda t: t[i], tree)


def in_form_of(kvs, new):
  """The list `new` in the form of `kvs`: None, a tuple, or stacked arrays."""
  if kvs is None:
    return None
  if type(kvs) is tuple:
    return tuple(new)
  return jax.tree.map(lambda *t: jnp.stack(t), *new)


class Stack(nn.Module):
  """Layers that run one after the other, parameters stacked on axis 0.

  Attributes:
    count: layers.
    repeats: how often the layers of a SEQUENCE block repeat; 0 elsewhere.
    looped: whether this is the block, with relaxations and per-loop norms.
    keep: whether to return x as well, for a scan over loops to stack.
  """

  config: ModelConfig
  count: int
  repeats: int = 0
  looped: bool = False
  keep: bool = False
  remat: str = 'none'
  scan: bool = True

  @nn.compact
  def __call__(self, x_BxLxD, xs, context: Context):
    """The body of the scan over loops; `xs`: `(kvs, attn_specs, loop)` by layer."""
    kvs, attn_specs, loop = xs
    start_BxLxD = x_BxLxD
    pooled = relaxations_of(self, self.config, 'mlp', self.looped, pooled=True)
    inside = context._replace(pools={r.relaxation.kind: r.leaves for r in pooled})
    layer: Any = Layer
    more: dict[str, Any] = {}
    if self.repeats:
      layer, more = RepeatedLayer, {'repeats': self.repeats}
    if pooled and self.remat == 'none':  # Keeps all, but not a pool once a layer, as a scan would.
      layer = nn.remat(layer, prevent_cse=False, policy=jax.checkpoint_policies.everything_saveable)
    if self.remat != 'none':
      layer = nn.remat(layer, prevent_cse=False, policy=REMAT[self.remat])
    if self.scan:
      layers = nn.scan(
        layer,
        variable_axes={'params': 0, AUX: 0},
        split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=self.count,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )(self.config, self.looped, name='layers', **more)
      x_BxLxD, kvs = layers(x_BxLxD, (kvs, attn_specs, jnp.arange(self.count)), loop, inside)
    else:
      new = []
      for i in range(self.count):
        one = layer(self.config, self.looped, name=f'layers_{i}', **more)
        x_BxLxD, kv = one(x_BxLxD, (at_index(kvs, i), at_index(attn_specs, i), i), loop, inside)
        new.append(kv)
      kvs = in_form_of(kvs, new)
    relaxed = relaxations_of(self, self.config, 'block', self.looped)
    y_BxLxD = relax(self, relaxed, start_BxLxD, x_BxLxD, Place(loop))
    if self.looped and self.config.end_norm:
      y_BxLxD = Norm(self.config, self.config.d_model, name='end_norm')(y_BxLxD)
    if y_BxLxD is not x_BxLxD and context.left_BxL is not None:
      y_BxLxD = jnp.where(context.left_BxL[:, :, None], x_BxLxD, y_BxLxD)
    return y_BxLxD, (kvs, y_BxLxD if self.keep else None)


def unstack(params):
  """One subtree a layer, `layers_0` and on, instead of stacked `layers`.

  For `scan=False`: a decode loop over stacked parameters would copy each
  layer's weights at every step.
  """

  def split(part):
    if 'layers' not in part:
      return part
    count = jax.tree.leaves(part['layers'])[0].shape[0]
    rest = {k: v for k, v in part.items() if k != 'layers'}
    return rest | {
      f'layers_{i}': jax.tree.map(lambda t, i=i: t[i], part['layers']) for i in range(count)
    }

  return {
    name: split(part) if name in ('prelude', 'block', 'coda') else part
    for name, part in params.items()
  }
