"""Layers with experts in a conversion: which experts correspond, and their weights fitted.

Experts of tied layers have no common order. `match` pairs those that do the same on the
calibration text: a high cosine between what they write for the same inputs, and a high
correlation between the gates that the routers of their layers give them on the same tokens.
Routers are reordered with their experts, and stay each loop's own, as norm gains do.

`fit` fits each expert as a linear of its own, on the inputs that its layer's router sends it,
weighted by their gates. Unlike o, experts do not take up the error that the residual stream has
gathered: a token's error would have to be split among those that it takes.

T tokens, D model, F hidden units of an expert, E experts, R loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert.permute import match_units
from rrt.models.experts import ExpertMlp
from rrt.models.params import bucket
from rrt.ops import least_squares, routing
from rrt.ops.activation import activate
from rrt.relax.hosts import MLP

COMPARED = 256  # Tokens of each layer on which experts are compared.
# Share of all tokens in the covariance of an expert's, which may be few or none.
REST = 1e-3


class Look(NamedTuple):
  """A layer's experts at work.

  Attributes:
    mlp: its parameters.
    x_TxD: what it reads.
    gate_TxE: zero for experts that are not chosen.
  """

  mlp: Mapping[str, Any]
  x_TxD: jax.Array
  gate_TxE: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _gates(config: ModelConfig, mlp, x_TxD):
  routes: Any = ExpertMlp(config).apply({'params': mlp}, x_TxD[None], method='routes')
  return routing.dense_gates(routes)


def look(config: ModelConfig, mlp, x_TxD) -> Look:
  """A layer's experts on the inputs of its MLP."""
  return Look(mlp, x_TxD, _gates(config, mlp, x_TxD))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, expert, x_TxD):
  """What the down projection of one expert reads, [T, F]."""
  up_TxF = x_TxD @ expert['up']
  if not config.gated:
    return activate(up_TxF, config.activation)
  return activate(x_TxD @ expert['gate'], config.activation) * up_TxF


def _expert(mlp, e: int) -> dict[str, Any]:
  """One expert's matrices by name."""
  return {name: jnp.asarray(part['kernels'][e]) for name, part in mlp.items() if name != 'router'}


def match(config: ModelConfig, first: Look, other: Look) -> tuple[np.ndarray, ...]:
  """Which experts of a layer stand for those of the first, and their hidden units for theirs.

  Returns:
    (order_E, units_ExF, signs_ExF): expert `order[e]` of `other` stands at e, its unit
    `units[e, i]`, times `signs[e, i]`, at i.
  """
  from scipy import optimize  # Comes with jax; slow to import.

  E = config.copies('up')
  x_TxD = jnp.concatenate([first.x_TxD[:COMPARED], other.x_TxD[:COMPARED]])

  def written(seen: Look):
    hidden = [_hidden(config, _expert(seen.mlp, e), x_TxD) for e in range(E)]
    down = seen.mlp['down']['kernels']
    flat = jnp.stack([(h @ jnp.asarray(down[e])).reshape(-1) for e, h in enumerate(hidden)])
    powers = [jnp.mean(h**2, 0) for h in hidden]
    return flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-30), powers

  (a, power_a), (b, power_b) = written(first), written(other)
  score_ExE = np.array(a @ b.T + _correlation(first.gate_TxE, other.gate_TxE))
  routed_E = np.arange(E) < config.num_experts
  score_ExE[routed_E[:, None] != routed_E[None, :]] = -np.inf  # Shared ones among themselves.
  _, order_E = optimize.linear_sum_assignment(score_ExE, maximize=True)
  c_DxD = x_TxD.T @ x_TxD / len(x_TxD)
  found = [
    match_units(_expert(first.mlp, e), _expert(other.mlp, o), c_DxD, power_a[e], power_b[o])
    for e, o in enumerate(order_E)
  ]
  units, signs = zip(*found, strict=True)
  return order_E, np.stack(units), np.stack(signs)


@jax.jit
def _correlation(a_TxE, b_TxE):
  """Of each column of one with each of the other, [E, E]; 0 where one never changes."""
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=0, keepdims=True), 1e-30)
  centered = lambda x: x - jnp.mean(x, 0, keepdims=True)
  return unit(centered(a_TxE)).T @ unit(centered(b_TxE))


def reorder(mlp: Mapping[str, Any], order_E, units_ExF, signs_ExF) -> dict[str, Any]:
  """The same layer with its experts, and their hidden units, in another order."""
  found = dict(mlp)
  weights_DxE = jnp.asarray(mlp['router']['weights'])
  routed_E = order_E[: weights_DxE.shape[1]]
  found['router'] = {**mlp['router'], 'weights': weights_DxE[:, routed_E]}
  for name in MLP:
    if name in mlp:
      kernels_ExIxO, axis = jnp.asarray(mlp[name]['kernels'])[order_E], int(name != 'down')
      kernels_ExIxO = jax.vmap(lambda w, i, axis=axis: jnp.take(w, i, axis))(
        kernels_ExIxO, units_ExF
      )
      # A unit's up and down weights may both be negated.
      signs = {'up': signs_ExF[:, None, :], 'down': signs_ExF[:, :, None]}.get(name, 1.0)
      found[name] = {**mlp[name], 'kernels': kernels_ExIxO * signs}
  return found


def fit(
  config: ModelConfig,
  layer: dict[str, Any],
  looks: list[Look],
  ridge: float,
  fit_one: Callable[[str, int, Any, Any], Any],
) -> None:
  """Fits the experts of a block layer in one loop; merged ones replace those of `layer`.

  Args:
    config: the parent's.
    layer: of this loop, its gains and routers the child's.
    looks: of this loop on the child's inputs, and in the first loop those of the later ones.
    ridge: see `CalibrationConfig`.
    fit_one: (linear, expert, covariances [R, I, I], weights [R, I, O]) -> the merged weight.
  """
  wholes = [_covariance(one.x_TxD) for one in looks]
  merged: dict[str, list[Any]] = {name: [] for name in layer['mlp'] if name != 'router'}
  for e in range(config.copies('up')):
    experts = [_expert(one.mlp, e) for one in looks]
    rows = [_rows(one, e) for one in looks]
    weigh = lambda values, rows=rows: [
      _covariance(v * gate, len(one.x_TxD))
      for v, (_, gate), one in zip(values, rows, looks, strict=True)
    ]
    inputs = [x for x, _ in rows]
    cs_RxDxD = jnp.stack(
      [
        least_squares.damp(c + REST * whole, ridge)
        for c, whole in zip(weigh(inputs), wholes, strict=True)
      ]
    )
    for name in MLP:
      if name not in merged:
        continue
      cs = cs_RxDxD
      if name == 'down':  # Behind the merged gate and up of this loop.
        hidden = [_hidden(config, w, x) for w, x in zip(experts, inputs, strict=True)]
        cs = jnp.stack([least_squares.damp(c, ridge) for c in weigh(hidden)])
      experts[0][name] = fit_one(name, e, cs, jnp.stack([w[name] for w in experts]))
      merged[name].append(experts[0][name])
  for name, kernels in merged.items():
    layer['mlp'][name] = {**layer['mlp'][name], 'kernels': jnp.stack(kernels)}


def _rows(seen: Look, e: int):
  """(inputs, gates [T, 1]) of the tokens that take an expert; gates of 0 up to a bucket of lengths."""
  gate_T = np.asarray(seen.gate_TxE[:, e])
  index = np.flatnonzero(gate_T)
  index = np.pad(index, (0, bucket(len(index)) - len(index)))
  real = np.arange(len(index)) < np.count_nonzero(gate_T)
  return seen.x_TxD[jnp.asarray(index)], jnp.asarray(gate_T[index] * real)[:, None]


def _covariance(x_TxI, tokens: int | None = None):
  return x_TxI.T @ x_TxI / (tokens or len(x_TxI))
