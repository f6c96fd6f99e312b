"""AdamW and Muon with rules by parameter path: trained parameters, rates, decay.

A parameter's path is its name in the tree, such as 'block/layers/mlp/up/kernel'
or 'final_norm/scale'. Rules are regular expressions that are searched for in
it: '^block/.*kernel$' matches the shared matrices, the name of a kind of
relaxation all parameters of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rrt.errors import InputError
from rrt.ops.quantize import KINDS
from rrt.relax import registry

SCHEDULES = ('cosine', 'linear', 'constant')
METHODS = ('adamw', 'muon', 'adamw_rows')
# Ends of the paths of quantized matrices.
CODES = ('/step', *(f'/{kind}' for kind in KINDS))
# What `train` may be besides a pattern.
TRAIN = ('all', 'relaxations', 'tables')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The optimizer: warm-up, a schedule, clipping, and rules by path.

  Attributes:
    train: 'all' (as in the paper), 'relaxations' (and norms), 'tables' (the values of
      memory layers, the experts of PEER), or a pattern of paths; other parameters are frozen, without moments or gradients.
    method: 'adamw', or 'muon': matrices are updated by their orthogonalised
      momentum (Jordan et al., 2024), scaled to the size of AdamW's updates
      (arXiv 2502.16982), so that rates carry over; embedding, head, gains and
      biases keep AdamW. 'adamw_rows' keeps one second moment for all of a row's entries:
      for tables of memory layers, half of whose moments it saves.
    learning_rate: the peak.
    warmup_steps: of linear warm-up; the last of them has the peak.
    schedule: after the warm-up: 'cosine' or 'linear' down to `final_rate`,
      or 'constant'.
    final_rate: share of the peak that the schedule reaches at the last step.
    beta1, beta2, eps, weight_decay: of AdamW; norms are not decayed.
    clip: global L2 norm to clip gradients to; 0 does not clip.
    rules: (pattern, {field: value}) pairs; the first whose pattern matches a path
      overrides these fields for it: any above but `train` and `clip`, and
      'multiplier' (of the learning rate). A rule with a weight decay decays all it
      matches. Values of memory layers have a multiplier of 10 where no rule names them
      (`rrt.relax.base.Relaxation.rates`).
  """

  train: str = 'all'
  method: str = 'adamw'
  learning_rate: float = 3e-4
  warmup_steps: int = 0
  schedule: str = 'cosine'
  final_rate: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 1.0
  rules: tuple[tuple[str, dict[str, Any]], ...] = ()

  def __post_init__(self):
    def need(ok, field, why):
      if not ok:
        value = getattr(self, field)
        raise InputError(f'optimizer.{field}={value!r}: {why}.')

    positive = lambda x: 0 < x < math.inf
    need(positive(self.learning_rate), 'learning_rate', 'must be above 0')
    need(self.warmup_steps >= 0, 'warmup_steps', 'must be 0 or more')
    need(self.method in METHODS, 'method', f'must be one of {METHODS}')
    need(self.schedule in SCHEDULES, 'schedule', f'must be one of {SCHEDULES}')
    need(0 <= self.final_rate <= 1, 'final_rate', 'must lie in 0 to 1')
    for field in ('beta1', 'beta2'):
      need(0 <= getattr(self, field) < 1, field, 'must lie in 0 to below 1')
    need(positive(self.eps), 'eps', 'must be above 0')
    need(self.weight_decay >= 0, 'weight_decay', 'must be 0 or more')
    need(self.clip >= 0, 'clip', 'must be 0 or more; 0 does not clip')
    for rule in self.rules:
      if not (
        isinstance(rule, tuple)
        and len(rule) == 2
        and isinstance(rule[0], str)
        and isinstance(rule[1], Mapping)
      ):
        raise InputError(
          f'optimizer.rules: {rule!r} is not a pair of a pattern and a dict; '
          "write them as (('norm', {'multiplier': 0.5}),)."
        )
    for pattern in (self.train, *(p for p, _ in self.rules)):
      try:
        re.compile(pattern_of(pattern))
      except re.error as e:
        raise InputError(f'optimizer: {pattern!r} is no regular expression: {e}.') from e
    for _, fields in self.rules:
      self.override(fields)

  def override(self, fields: dict[str, Any]) -> Optimizer:
    """These settings with a rule's fields in their place."""
    fields = dict(fields)
    multiplier = fields.pop('multiplier', 1.0)
    for name, value in (('multiplier', multiplier), *fields.items()):
      if name not in ('schedule', 'method') and not isinstance(value, (int, float)):
        raise InputError(f'optimizer.rules: {name}={value!r}: must be a number.')
    known = {f.name for f in dataclasses.fields(self)}
    for name in fields:
      if name not in known - {'train', 'clip', 'rules'}:
        raise InputError(
          f'optimizer.rules: unknown field {name!r}; a rule may set '
          "'multiplier', method, learning_rate, warmup_steps, schedule, final_rate, "
          'beta1, beta2, eps or weight_decay.'
        )
    fields['learning_rate'] = multiplier * fields.get('learning_rate', self.learning_rate)
    return dataclasses.replace(self, rules=(), **fields)


def paths(tree) -> Any:
  """The same tree with each leaf's path, 'a/b/c', in its place."""
  return jax.tree_util.tree_map_with_path(lambda path, _: '/'.join(str(k.key) for k in path), tree)


def pattern_of(train: str) -> str:
  """The pattern that `Optimizer.train` stands for."""
  if train == 'relaxations':
    return (
      rf'(^|/)({"|".join(registry.KINDS)})(_\w+)?$|_norm/scale$|/bias$|/router/(weights|shared)$'
    )
  if train == 'tables':
    return rf'(^|/)({"|".join(registry.tables())})$'
  return '' if train == 'all' else train


def is_decayed(path: str) -> bool:
  """Whether weight decay applies: not to gains, whose neutral value is 1, nor to biases."""
  kind = registry.kind_of_path(path)
  if kind is not None:
    return registry.class_of(kind).decay
  return not path.endswith(('/scale', '/bias'))


def trainable(o: Optimizer, params) -> Any:
  """A tree of bools: which parameters are trained.

  Raises:
    InputError: the pattern is in no path.
  """
  pattern = pattern_of(o.train)
  states = registry.states()
  wanted = lambda p: re.search(pattern, p) is not None and p.rsplit('/', 1)[-1] not in states
  chosen = jax.tree.map(wanted, paths(params))
  for path in jax.tree.leaves(jax.tree.map(lambda p, yes: p * yes, paths(params), chosen)):
    if path.endswith(CODES):
      raise InputError(
        f'optimizer.train={o.train!r} matches {path}, which is quantized and stays as it is; '
        "take 'relaxations', or a pattern of low-rank terms, gains and norms."
      )
  if not any(jax.tree.leaves(chosen)):
    raise InputError(
      f'optimizer.train={o.train!r} is in the path of no parameter; paths '
      f'look like {_examples(params)}.'
    )
  return chosen


def schedule(o: Optimizer, steps: int) -> optax.Schedule:
  """Learning rate by step, 0 to steps - 1.

  The first step of a warm-up has 1 / warmup_steps of the rate, not none of
  it: a step that changes nothing is a step lost.
  """
  # The highest rate is that of step `top`, `final_rate` that of the last step.
  top = max(o.warmup_steps - 1, 0)
  after = max(steps - 1 - top, 1)
  if o.schedule == 'cosine':
    main = optax.cosine_decay_schedule(o.learning_rate, after, o.final_rate)
  elif o.schedule == 'linear':
    main = optax.linear_schedule(o.learning_rate, o.learning_rate * o.final_rate, after)
  else:
    main = optax.constant_schedule(o.learning_rate)
  if not o.warmup_steps:
    return main
  first = o.learning_rate / o.warmup_steps
  warmup = optax.linear_schedule(first, o.learning_rate, top)
  return optax.join_schedules([warmup, main], [top])


def make_optimizer(
  o: Optimizer, params, steps: int, rows: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
  """The gradient transformation for a tree of trained parameters.

  Frozen ones are cut out before (`rrt.train.step`): they have no moments.

  Args:
    o: the settings.
    params: the trained parameters, arrays or shapes.
    steps: of the whole run, for the schedules.
    rows: by path bool [N, 1]: which rows of a table are trained; others stay as they are.

  Raises:
    InputError: a rule's pattern is in no path.
  """
  names = paths(params)
  for pattern, _ in o.rules:
    if not any(re.search(pattern, p) for p in jax.tree.leaves(names)):
      raise InputError(
        f'optimizer.rules: {pattern!r} is in the path of no trained '
        f'parameter; paths look like {_examples(params)}.'
      )
  rules = (*o.rules, *_rates(jax.tree.leaves(names)))
  label = lambda path: next((p for p, _ in rules if re.search(p, path)), 'default')
  settings = {'default': o} | {p: o.override(fields) for p, fields in reversed(rules)}
  decays = {p for p, fields in o.rules if 'weight_decay' in fields}
  labels = jax.tree.map(label, names)
  used = set(jax.tree.leaves(labels))
  make = {'adamw': _adamw, 'muon': _muon, 'adamw_rows': _adamw_rows}
  found = optax.partition(
    {p: make[s.method](s, steps, p in decays) for p, s in settings.items() if p in used}, labels
  )
  if not rows:
    return found

  def of_rows(tree, _=None):
    return jax.tree.map(
      lambda g, path: jnp.where(rows[path], g, 0) if path in rows else g, tree, names
    )

  # Behind the update too: weight decay moves rows without a gradient.
  mask = optax.stateless(of_rows)
  return optax.chain(mask, found, mask)


def _rates(names: list[str]):
  """Rules of the relaxations' own: leaves that need another rate than the model."""
  for name in names:
    kind, leaf = registry.kind_of_path(name), name.rsplit('/', 1)[-1]
    if kind is not None and leaf in registry.class_of(kind).rates:
      yield rf'(^|/){leaf}$', {'multiplier': registry.class_of(kind).rates[leaf]}


def _decayed(everything: bool):
  """A mask for optax: which parameters weight decay applies to."""
  return lambda tree: jax.tree.map(lambda path: everything or is_decayed(path), paths(tree))


def _adamw(o: Optimizer, steps: int, decays: bool) -> optax.GradientTransformation:
  return optax.adamw(
    schedule(o, steps),
    b1=o.beta1,
    b2=o.beta2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    mask=_decayed(decays),
  )


class RowMoments(NamedTuple):
  """Moments of `adamw_rows`: [..., D] and [..., 1]."""

  steps: jax.Array
  mean: Any
  square: Any


def _adamw_rows(o: Optimizer, steps: int, decays: bool) -> optax.GradientTransformation:
  """AdamW whose second moment is the mean over a row, as in Adafactor's rows."""
  tiny = lambda p: jnp.zeros((*p.shape[:-1], 1), p.dtype)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return RowMoments(jnp.zeros((), jnp.int32), zeros, jax.tree.map(tiny, params))

  def update(grads, state, params=None):
    del params
    count = state.steps + 1
    square_of = lambda g: jnp.mean(g**2, -1, keepdims=True)
    mean = optax.tree.update_moment(grads, state.mean, o.beta1, 1)
    square = jax.tree.map(
      lambda v, g: o.beta2 * v + (1 - o.beta2) * square_of(g), state.square, grads
    )
    unbiased = optax.tree.bias_correction(mean, o.beta1, count)
    scale = optax.tree.bias_correction(square, o.beta2, count)
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + o.eps), unbiased, scale)
    return updates, RowMoments(count, mean, square)

  return optax.chain(
    optax.GradientTransformation(init, update),
    optax.add_decayed_weights(o.weight_decay, _decayed(decays)),
    optax.scale_by_learning_rate(schedule(o, steps)),
  )


def _muon(o: Optimizer, steps: int, decays: bool) -> optax.GradientTransformation:
  del decays

  def dimensions(params):
    """Matrices in the last two axes, layers and loops before them; None for others."""
    matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda path: matrix if is_matrix(path) else None, paths(params))

  return optax.contrib.muon(
    schedule(o, steps),
    weight_decay=o.weight_decay,
    adam_b1=o.beta1,
    adam_b2=o.beta2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=dimensions,
  )


def is_matrix(path: str) -> bool:
  """Whether Muon updates a parameter: a matrix that is neither embedding nor head."""
  kind = registry.kind_of_path(path)
  if kind is not None:
    return registry.class_of(kind).matrices
  return path.endswith(('/kernel', '/kernels')) and not path.startswith('head')


def _examples(params) -> str:
  names = jax.tree.leaves(paths(params))
  return ', '.join(repr(n) for n in names[:: max(1, len(names) // 4)][:4])
