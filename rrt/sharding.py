"""Device meshes and the table of rules from logical axes to mesh axes.

Parameters and activations name their axes differently, so that sharding
`embed` of the parameters over `fsdp` leaves the residual stream alone.
"""

from collections.abc import Mapping
import functools
import math

from flax import linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rrt.config import ModelConfig
from rrt.errors import InputError

AXES = ('data', 'fsdp', 'tensor')

RULES = (
  # Parameters.
  ('embed', 'fsdp'),
  ('vocab', 'tensor'),
  ('heads', 'tensor'),
  ('kv', 'tensor'),
  ('mlp', 'tensor'),
  ('layers', None),
  ('loops', None),
  ('rank', None),
  ('norm', None),
  # Activations.
  ('batch', ('data', 'fsdp')),
  ('length', None),
  ('act_embed', None),
  ('act_heads', 'tensor'),
  ('act_kv', 'tensor'),
  ('act_mlp', 'tensor'),
  ('act_vocab', 'tensor'),
)

# A mistyped axis name raises instead of silently replicating the array.
constrain = functools.partial(
  nn.with_logical_constraint, rules=RULES, fallback=nn.spmd.RulesFallback.RAISE_ERROR
)


def make_mesh(sizes: Mapping[str, int] | None = None) -> jax.sharding.Mesh:
  """A mesh with the axes data, fsdp and tensor.

  Args:
    sizes: devices by axis; absent axes are 1; one may be -1 for all remaining
      devices. None puts all devices on `data`.

  Raises:
    InputError: an unknown axis, or sizes that do not multiply to the number
      of devices.
  """
  sizes = dict(sizes or {'data': -1})
  for name, size in sizes.items():
    if name not in AXES:
      raise InputError(f'mesh.{name}: unknown axis; the axes are {AXES}.')
    if size == 0 or size < -1:
      raise InputError(f'mesh.{name}={size}: must be above 0, or -1.')
  shape = [sizes.get(name, 1) for name in AXES]
  count = jax.device_count()
  if shape.count(-1) > 1:
    raise InputError(f'mesh={sizes}: only one axis may be -1.')
  if -1 in shape:
    rest = -math.prod(shape)
    shape[shape.index(-1)] = max(count // rest, 1)
  if math.prod(shape) != count:
    raise InputError(
      f'mesh={dict(zip(AXES, shape))} takes {math.prod(shape)} devices, '
      f'but there are {count}; make the sizes multiply to {count}.'
    )
  # Auto axes: linen layers do not work on Explicit ones.
  return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES))


def check_mesh(config: ModelConfig, mesh: jax.sharding.Mesh, batch: int = 0):
  """Raises InputError if a mesh axis does not divide the dimension that it shards."""
  tensor, fsdp = mesh.shape['tensor'], mesh.shape['fsdp']
  rows = mesh.shape['data'] * fsdp
  for axis, size, field, value in (
    ('tensor', tensor, 'num_heads', config.num_heads),
    ('tensor', tensor, 'num_kv_heads', config.num_kv_heads),
    ('tensor', tensor, 'd_ff', config.d_ff),
    ('tensor', tensor, 'vocab_size', config.vocab_size),
    ('fsdp', fsdp, 'd_model', config.d_model),
    ('data * fsdp', rows, 'batch', batch),
  ):
    if value % size:
      raise InputError(
        f'mesh axis {axis}={size} does not divide {field}={value}; choose a size that does.'
      )


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """The mesh axes of an array with these logical axes.

  Raises:
    KeyError: a name that RULES does not have.
  """
  table = dict(RULES)
  return PartitionSpec(*(None if a is None else table[a] for a in axes))


def shardings(abstract_boxed, mesh: jax.sharding.Mesh):
  """NamedShardings of a tree of boxed (logically annotated) arrays."""

  def place(x):
    if isinstance(x, nn.LogicallyPartitioned):
      return NamedSharding(mesh, spec(x.names))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(
    place, abstract_boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
