"""The train state and the train step: pure, one jitted function.

A step runs the child and, in the same program, the parent for distillation.
Parameters of the parent that equal frozen ones of the child are shared
(`rrt.train.teacher`).

B batch, L length, D model, R loops.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flax import struct, traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from rrt.config import ModelConfig
from rrt.models import lm_head, transformer
from rrt.models.init import abstract_params
from rrt.models.relaxed import after_step
from rrt.ops.quantize import cast_floats
from rrt.pieces import cast
from rrt.relax.base import Aux
from rrt.train.divergences import TopK
from rrt.train.exit_losses import ExitObjective, exit_losses
from rrt.train.gradients import accumulate, gradient_norms
from rrt.train.losses import Losses, Objective, Teacher, losses, top_k
from rrt.train.optim import paths
from rrt.train.placement import gather_block, param_shardings, place

Batch = dict[str, jax.Array]
Params = dict[str, Any]
# What distillation needs of the parent's forward pass (`teacher_outputs`).
OUTPUTS = ('teacher_hidden', 'teacher_ids', 'teacher_log_p')


class TrainState(struct.PyTreeNode):
  """The state of a run.

  Attributes:
    step: batches taken so far, skipped ones included; int32.
    params: the child's parameters, float32.
    opt_state: of the trained parameters.
    skipped: number of steps without an update, as loss or gradient was not
      finite.
    skipped_in_a_row: those since the last good step.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  skipped: jax.Array
  skipped_in_a_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
  """Static arguments of a train step.

  Attributes:
    config: the child.
    objective: the losses.
    optimizer: over the trained parameters (`optim.make_optimizer`).
    trained: paths of the trained parameters.
    clip: global gradient norm to clip to, 0 for none.
    teacher_config: the parent, or None without distillation.
    shared: paths that the parent reads from the child.
    cached: the parent's `OUTPUTS` come with the batch.
    accumulate: microbatches a step.
    dtype: of the computation; weights stay float32.
    remat: 'none', 'full' or 'dots'.
    exits: losses of the loops before the last.
    gather: 'once' gathers the block over fsdp before its loops, 'loop' layer by layer
      in every loop.
  """

  config: ModelConfig
  objective: Objective
  optimizer: optax.GradientTransformation
  trained: frozenset[str]
  clip: float = 1.0
  teacher_config: ModelConfig | None = None
  shared: frozenset[str] = frozenset()
  cached: bool = False
  accumulate: int = 1
  dtype: Any = jnp.float32
  remat: str = 'none'
  exits: ExitObjective = dataclasses.field(default_factory=ExitObjective)
  gather: str = 'once'


def split(params: Params, trained: frozenset[str]) -> tuple[Params, Params]:
  """The parameters at `trained` paths and the others, as flat dicts."""
  flat = traverse_util.flatten_dict(params, sep='/')
  return (
    {k: v for k, v in flat.items() if k in trained},
    {k: v for k, v in flat.items() if k not in trained},
  )


def merge(*flat: Params) -> Params:
  """The nested tree of flat dicts."""
  return traverse_util.unflatten_dict({k: v for part in flat for k, v in part.items()}, sep='/')


def _floats(params):
  """Parameters as the state has them: float32, codes as they are."""
  float32 = lambda x: cast(x, np.dtype('float32')) if jnp.issubdtype(x.dtype, jnp.floating) else x
  return jax.tree.map(float32, params)


def _init(params, optimizer, trained) -> TrainState:
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero,
    params=cast_floats(params, jnp.float32),
    opt_state=optimizer.init(split(params, trained)[0]),
    skipped=zero,
    skipped_in_a_row=zero,
  )


def abstract_state(spec: Step, mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state; nothing is allocated."""
  by_path = traverse_util.flatten_dict(param_shardings(spec.config, mesh), sep='/')
  shapes = jax.eval_shape(
    lambda params: _init(params, spec.optimizer, spec.trained), abstract_params(spec.config)
  )

  def sharding_of(path, x):
    # Parameters are nested; the optimizer's moments are flat dicts, whose
    # last key is a parameter's whole path.
    names = [k.key for k in path if hasattr(k, 'key')]
    s = by_path.get('/'.join(names)) or by_path.get((names or [''])[-1])
    return s or NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(path, x)), shapes
  )


def init_state(spec: Step, params: Params, mesh) -> TrainState:
  """The sharded state at step 0.

  The arrays of `params` are copied, never donated. Each process makes its own shards alone.
  """
  abstract = abstract_state(spec, mesh)
  out = jax.tree.map(lambda x: x.sharding, abstract)

  def rest() -> TrainState:
    # Moments do not depend on the parameters' values.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.params)
    return _init(zeros, spec.optimizer, spec.trained).replace(params=())

  with jax.set_mesh(mesh):
    state = jax.jit(rest, out_shardings=out.replace(params=()))()
    return state.replace(params=place(_floats(params), out.params))


def jit_step(spec: Step, mesh, state_shardings):
  """The jitted step: (state, teacher, batch) -> (state, metrics).

  The state is donated. Call it inside `jax.set_mesh(mesh)`.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.jit(
    lambda state, teacher, batch: train_step(spec, state, teacher, batch),
    donate_argnums=0,
    out_shardings=(state_shardings, replicated),
  )


def train_step(
  spec: Step, state: TrainState, teacher: Params, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update from one batch.

  Args:
    spec: the static parts.
    state: before the step.
    teacher: the parent's own parameters as a flat dict ({} without one).
    batch: tokens, targets, segment_ids, positions and weights, all [B, L].

  Returns:
    The state after the step and its metrics: mean losses over target tokens,
    `tokens` (their number), gradient norms, and the relative change of the
    residual stream in each loop after the first.
  """
  trained, frozen = split(state.params, spec.trained)
  # Dividing by the whole batch's count makes accumulation exact.
  tokens = jnp.sum(batch['weights'].astype(jnp.float32))
  scale = 1.0 / jnp.maximum(tokens, 1.0)

  def loss_fn(trained, micro):
    child = merge(trained, frozen)
    if spec.gather == 'once':
      child |= {'block': gather_block(spec.config, child['block'], spec.dtype)}
    parent = merge(teacher, {k: v for k, v in frozen.items() if k in spec.shared})
    aux = batch_losses(spec, child, parent, micro, scale, noise_key(state.step, micro))
    return aux.sums.loss, aux

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if spec.accumulate == 1:
    (_, aux), grads = grad_fn(trained, batch)
  else:
    aux, grads = accumulate(grad_fn, trained, batch, spec.accumulate)
  sums = aux.sums

  norm, norms = gradient_norms(grads)
  if spec.clip:
    shorten = jnp.minimum(1.0, spec.clip / jnp.maximum(norm, 1e-30))
    grads = jax.tree.map(lambda g: g * shorten, grads)
  updates, opt_state = spec.optimizer.update(grads, state.opt_state, trained)
  new = optax.apply_updates(trained, updates)

  good = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
  keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(good, x, y), a, b)
  moved = after_step(spec.config, merge(new, frozen), aux.relax.routes)
  bad = 1 - good.astype(jnp.int32)
  after = state.replace(
    step=state.step + 1,
    params=keep(moved, state.params),
    opt_state=keep(opt_state, state.opt_state),
    skipped=state.skipped + bad,
    skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
  )
  metrics = {
    'loss': sums.loss,
    'cross_entropy': sums.cross_entropy,
    'distillation': sums.distillation,
    'tokens': tokens,
    'grad_norm': norm,
    'skipped': after.skipped,
    'skipped_in_a_row': after.skipped_in_a_row,
    **{f'grad_norm/{k}': v for k, v in norms.items()},
  }
  for name in ('z_loss', 'hidden'):
    if getattr(spec.objective, name):
      metrics[name] = getattr(sums, name)
  for r, change in enumerate(aux.loop_change_R):
    metrics[f'loop_change/{r + 2}'] = change
  for r, nats in enumerate(aux.exits_R):
    metrics[f'exit_cross_entropy/{r + 1}'] = nats
  for name, value in {**aux.relax.losses, **aux.relax.stats}.items():
    entries = [('', value)] if not value.ndim else enumerate(value.reshape(-1))
    metrics |= {f'relax/{name}/{i}'.rstrip('/'): v for i, v in entries}
  return after, metrics


class BatchLosses(NamedTuple):
  """Losses and statistics of one (micro)batch.

  Attributes:
    sums: the losses; those of relaxations are in `sums.loss` alone.
    loop_change_R: relative change of x in loops 2..R.
    exits_R: cross-entropies after loops 1..R-1, [0] without early-exit losses.
    relax: losses and statistics of the relaxations.
  """

  sums: Losses
  loop_change_R: jax.Array
  exits_R: jax.Array
  relax: Aux


def noise_key(step, batch):
  """A key of a step's own, and of a microbatch's by its tokens."""
  key = jax.random.fold_in(jax.random.key(0), step)
  return jax.random.fold_in(key, jnp.sum(batch['tokens'], dtype=jnp.uint32))


def batch_losses(spec: Step, child, parent, batch, scale, key=None) -> BatchLosses:
  """Losses of one (micro)batch.

  Args:
    spec: the static parts.
    child, parent: parameters.
    batch: tokens, targets, segment_ids, positions and weights, all [B, L].
    scale: of the weights: 1 / tokens of the whole batch.
    key: for the noise of relaxations; None for none.
  """
  weights_BxL = batch['weights'] * scale
  many = spec.config.loops > 1 and spec.config.order == 'cycle'
  early = spec.exits.coefficients != 'none'
  out = transformer.forward(
    spec.config,
    child,
    batch['tokens'],
    return_loops=many,
    return_exits=early,
    return_aux=bool(spec.config.relax),
    key=key,
    remat=spec.remat,
    **_where(spec, batch),
  )
  teacher = None
  if spec.teacher_config is not None:
    found = batch if spec.cached else teacher_outputs(spec, parent, batch)
    teacher = _teacher(spec, spec.teacher_config, parent, found)
  head = lm_head.kernel(spec.config, child)
  text = batch['targets'], weights_BxL
  cap = spec.config.final_softcap
  caps = cap, spec.teacher_config.final_softcap if spec.teacher_config else None
  sums = losses(spec.objective, out.hidden_BxLxD, head, *text, teacher, caps)
  exits_R = jnp.zeros((0,))
  if out.exits_RxBxLxD is not None:
    loss, exits_R = exit_losses(spec.exits, spec.objective, out.exits_RxBxLxD, head, *text, cap)
    last = spec.exits.of_loops(spec.config.loops)[-1]
    sums = sums._replace(loss=last * sums.loss + loss)
  # Of the whole batch's tokens: microbatches add up.
  share = jnp.sum(weights_BxL)
  aux = jax.tree.map(lambda value: share * value, out.aux)
  sums = sums._replace(loss=sums.loss + sum(aux.losses.values()))
  return BatchLosses(sums, share * loop_changes(out.loops_RxBxLxD), exits_R, aux)


def teacher_outputs(spec: Step, parent, batch) -> dict[str, jax.Array]:
  """What distillation needs of the parent's forward pass, by the names of `OUTPUTS`.

  Hidden states after the final norm, [B, L, D]; with `top_k` ids and
  log-probabilities, [B, L, K].
  """
  config = spec.teacher_config
  assert config is not None
  hidden_BxLxD = transformer.forward(
    config, parent, batch['tokens'], **_where(spec, batch)
  ).hidden_BxLxD
  if not spec.objective.top_k:
    return {'teacher_hidden': hidden_BxLxD}
  o, head = spec.objective, lm_head.kernel(config, parent)
  found = top_k(hidden_BxLxD, head, o.top_k, config.final_softcap, o.chunk_tokens)
  return {'teacher_ids': found.ids_BxLxK, 'teacher_log_p': found.log_p_BxLxK}


def _teacher(spec: Step, config: ModelConfig, parent, outputs) -> Teacher:
  """`teacher_outputs` as the losses take them, without gradients."""
  if spec.objective.top_k:
    return jax.lax.stop_gradient(TopK(outputs['teacher_ids'], outputs['teacher_log_p']))
  head = lm_head.kernel(config, parent)
  return jax.lax.stop_gradient((outputs['teacher_hidden'], head))


def _where(spec: Step, batch) -> dict[str, Any]:
  return {
    'positions_BxL': batch['positions'],
    'segment_ids_BxL': batch['segment_ids'],
    'dtype': spec.dtype,
  }


def loop_changes(h_RxBxLxD: jax.Array | None) -> jax.Array:
  """|h_r - h_(r-1)| / |h_(r-1)| of the block's outputs, float32 [R - 1]."""
  if h_RxBxLxD is None:
    return jnp.zeros((0,))
  h = jax.lax.stop_gradient(h_RxBxLxD).astype(jnp.float32)
  square = lambda x: jnp.sum(x**2, axis=(1, 2, 3))
  return jnp.sqrt(square(h[1:] - h[:-1]) / jnp.maximum(square(h[:-1]), 1e-30))


def trained_paths(mask) -> frozenset[str]:
  """The paths at which a tree of bools is true."""
  names = jax.tree.leaves(paths(mask))
  return frozenset(n for n, chosen in zip(names, jax.tree.leaves(mask)) if chosen)
