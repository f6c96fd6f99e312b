"""Device meshes and the table of rules from logical axes to mesh axes.

Parameters and activations name their axes differently, so that sharding
`embed` of the parameters over `fsdp` leaves the residual stream alone.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.ops.mesh_axes import ROWS, row_count
from rrt.relax.trees import relaxed_hosts

AXES = ('data', 'fsdp', 'expert', 'tensor')
_AUTO = (AxisType.Auto,) * len(AXES)
WHOLE = 1 << 20  # Bytes of float32 that may be whole on every device of fsdp.

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
  ('expert', 'expert'),
  ('norm', None),
  # Tables that are looked up: each device of fsdp has some columns, and keeps them.
  ('slots', None),
  ('values', 'fsdp'),
  # Activations.
  ('batch', ROWS),
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


def gather(x, axes: tuple[str | None, ...], dtype=None):
  """An array whole over fsdp; its gradient goes back to its own shards, in float32.

  A plain constraint would give the gradient the layout of the whole array: one on every
  device that is added up over all of them, where each needs its share alone. Call it inside
  `jax.set_mesh`; without an fsdp axis it is a cast.

  Args:
    x: float32 parameters, or others that have no gradient.
    axes: their logical axes.
    dtype: of the result; x's own by default.
  """
  dtype = x.dtype if dtype is None else dtype
  sizes = jax.sharding.get_abstract_mesh().shape
  if sizes.get('fsdp', 1) == 1:
    return x.astype(dtype)
  stored = spec(axes, x.shape, sizes)
  return _gathered(x, stored, PartitionSpec(*map(_without_fsdp, stored)), dtype)


def _without_fsdp(axis):
  """A mesh axis of an array, or several, as they are once it is gathered."""
  return axis[0] if isinstance(axis, tuple) else None if axis == 'fsdp' else axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x, stored: PartitionSpec, whole: PartitionSpec, dtype):
  return jax.lax.with_sharding_constraint(x.astype(dtype), whole)


def _gathered_fwd(x, stored, whole, dtype):
  return _gathered(x, stored, whole, dtype), None


def _gathered_bwd(stored, whole, dtype, _, g):
  del whole, dtype
  return (jax.lax.with_sharding_constraint(g.astype(np.float32), stored),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with the axes data, fsdp, expert and tensor; rows are split over the first three.

  Args:
    sizes: devices by axis; absent axes are 1; one may be -1 for all remaining
      devices. None puts all devices on `data`.
    devices: that it is made of; None for all of this machine, or machines.

  Raises:
    InputError: an unknown axis, or sizes that do not multiply to the number
      of devices.
  """
  devices = jax.devices() if devices is None else devices
  found = mesh_sizes(sizes or {'data': -1}, len(devices))
  # Auto axes: linen layers do not work on Explicit ones.
  return Mesh(_arranged(tuple(found.values()), devices), AXES, axis_types=_AUTO)


def mesh_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
  """Devices on each axis; absent axes are 1, and one may be -1 for the rest of `count`.

  Raises:
    InputError: as `make_mesh`.
  """
  for name, size in sizes.items():
    if name not in AXES:
      raise InputError(f'mesh.{name}: unknown axis; the axes are {AXES}.')
    if size == 0 or size < -1:
      raise InputError(f'mesh.{name}={size}: must be above 0, or -1.')
  shape = [sizes.get(name, 1) for name in AXES]
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
  return dict(zip(AXES, shape))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """All devices as an array: neighbours on a torus close together, slices along data.

  Raises:
    InputError: several slices that the data axis does not divide among itself.
  """
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if shape[0] % slices:
    raise InputError(
      f'mesh.data={shape[0]}: the devices lie in {slices} slices, between which only data '
      'should cross; make it a multiple of them.'
    )
  within = (shape[0] // slices, *shape[1:])
  return mesh_utils.create_hybrid_device_mesh(
    within, (slices, *(1,) * (len(shape) - 1)), devices, allow_split_physical_axes=True
  )


def row_groups(mesh: Mesh, batch: int | None = None) -> tuple[int, int]:
  """(which rows of a batch this process feeds, into how many parts they are cut).

  The rows follow from the sharding, not from the number of the process: where a tensor
  group spans hosts, several processes feed the same rows.

  Args:
    mesh: of all processes.
    batch: rows of the global batch; by default one for each device that has rows of its own.

  Raises:
    InputError: a batch whose rows no process can feed in one piece.
  """
  count = row_count(mesh.shape)
  rows, total = NamedSharding(mesh, PartitionSpec(ROWS)), batch or count
  held = [s or (slice(None),) for s in rows.addressable_devices_indices_map((total,)).values()]
  parts = sorted({(s[0].start or 0, total if s[0].stop is None else s[0].stop) for s in held})
  size = sum(stop - start for start, stop in parts)
  first = parts[0][0]
  if parts[-1][1] - first != size or first % size or total % size:
    raise InputError(
      f'mesh={dict(mesh.shape)}: the rows of a batch of {total} that belong to this process are '
      'not neighbours; choose other sizes of data and fsdp.'
    )
  return first // size, total // size


def check_mesh(config: ModelConfig, mesh: Mesh | AbstractMesh, batch: int = 0):
  """Raises InputError if a mesh axis does not divide the dimension that it shards."""
  tensor, fsdp = mesh.shape['tensor'], mesh.shape['fsdp']
  rows, experts = row_count(mesh.shape), mesh.shape.get('expert', 1)
  for axis, size, field, value in (
    ('tensor', tensor, 'num_heads', config.num_heads),
    ('tensor', tensor, 'num_kv_heads', config.num_kv_heads),
    ('tensor', tensor, 'd_ff', config.d_ff),
    ('tensor', tensor, 'vocab_size', config.vocab_size),
    ('fsdp', fsdp, 'd_model', config.d_model),
    (' * '.join(ROWS), rows, 'batch', batch),
  ):
    if value % size:
      raise InputError(
        f'mesh axis {axis}={size} does not divide {field}={value}; choose a size that does.'
      )
  sharded = [
    leaf.shape[leaf.axes.index('expert')]
    for _, _, leaves in relaxed_hosts(config)
    for leaf in leaves.values()
    if 'expert' in leaf.axes
  ]
  sharded += [config.copies('up')] * (config.num_experts > 0)
  if experts > 1 and not sharded:
    raise InputError(f'mesh.expert={experts}: the model has no experts to split; leave it at 1.')
  for count in sharded:
    if count % experts:
      raise InputError(
        f'mesh axis expert={experts} does not divide the {count} experts of a layer; choose a '
        'size that does.'
      )


def spec(
  axes: tuple[str | None, ...], shape: tuple[int, ...] = (), sizes: Mapping[str, int] | None = None
) -> PartitionSpec:
  """The mesh axes of an array with these logical axes.

  A low-rank factor whose other axis is not on fsdp has its ranks there, and any other array
  that would be larger than `WHOLE` on every device of fsdp its last axis that they divide:
  they and their moments would otherwise take as much memory on a pod as on one device.

  Args:
    axes: logical axes.
    shape: of the array, if known.
    sizes: devices by mesh axis, with a shape.

  Raises:
    KeyError: a name that RULES does not have.
  """
  table = dict(RULES)
  found: list[Any] = [None if a is None else table[a] for a in axes]
  fsdp = (sizes or {}).get('fsdp', 1)
  if not shape or fsdp == 1 or 'fsdp' in found:
    return PartitionSpec(*found)
  if 'rank' in axes and shape[axes.index('rank')] % fsdp == 0:
    found[axes.index('rank')] = 'fsdp'
    return PartitionSpec(*found)
  parts = [(sizes or {}).get(axis, 1) if axis else 1 for axis in found]
  if 4 * math.prod(shape) // math.prod(parts) > WHOLE:
    for i in reversed(range(len(shape))):
      if shape[i] % (parts[i] * fsdp) == 0:
        found[i] = (found[i], 'fsdp') if found[i] else 'fsdp'
        break
  return PartitionSpec(*found)


def shardings(abstract_boxed, mesh: Mesh):
  """NamedShardings of a tree of boxed (logically annotated) arrays."""

  def place(x):
    if isinstance(x, nn.LogicallyPartitioned):
      return NamedSharding(mesh, spec(x.names, x.value.shape, mesh.shape))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(
    place, abstract_boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
