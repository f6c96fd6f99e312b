"""Learned exit gates: fitted to agree with full depth, kept with the model.

A gate is one logistic regression a loop on the normalised residual stream: it
estimates how near what this loop would say is to what full depth will say. Its
threshold is calibrated on text that the fit has not seen. A lens, one affine
map a loop, brings what leaves early to where the last loop would have left it;
it is fitted by least squares, and may then be tuned (`rrt.evals.lens`).

N tokens, D model, E = D + 1, R loops.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from rrt.errors import InputError
from rrt.infer import exits

if TYPE_CHECKING:
  from rrt.evals.depth import Point

_KEY = 'exits'  # of a model's meta
NEVER = 2.0  # A threshold that no score reaches.
RIDGE = 30.0  # Penalty of a gate's regression.
LENS_WIDTH = 1024  # H, hidden units of a tuned lens.


@dataclasses.dataclass(frozen=True)
class Gate:
  """When tokens leave.

  Attributes:
    kind: 'learned' or 'change'; see `exits.score`.
    threshold: the score at which they do.
    arrays: of a learned gate: `kernel` [R - 1, D] and `bias` [R - 1]; of its
      lens: `lens_kernel` [R - 1, D, D] and `lens_bias` [R - 1, D], of a tuned
      one `lens_in` [R - 1, D, H] and `lens_out` [R - 1, H, D] too.
    kv: what skipped loops keep of a token, as calibrated.
    promise: what the threshold was calibrated to, and on what.
  """

  kind: str
  threshold: float
  arrays: dict[str, np.ndarray] | None = None
  kv: str = 'propagate'
  promise: dict[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Plain values for a model's meta."""
    arrays: dict[str, str] | None = None
    if self.arrays is not None:
      arrays = {k: _text(v) for k, v in self.arrays.items()}
    return dataclasses.asdict(self) | {'arrays': arrays}


def store(meta: dict[str, Any], gate: Gate) -> dict[str, Any]:
  """A model's meta with a gate in it."""
  return meta | {_KEY: gate.to_json()}


def stored(model) -> Gate | None:
  """The gate that was kept with a model.

  Raises:
    InputError: it does not fit the model.
  """
  fields = model.meta.get(_KEY)
  if fields is None:
    return None
  try:
    arrays = fields['arrays']
    if arrays is not None:
      shapes = _shapes(model.config)
      arrays = {k: _array(v, shapes[k]) for k, v in arrays.items()}
    gate = Gate(**fields | {'arrays': arrays})
    exits.check_kind(gate.kind)
    check_arrays(gate.kind, arrays, model.config)
    return gate
  except (KeyError, TypeError, ValueError) as e:
    raise InputError(f"The model's exit gate cannot be used: {e}.") from e


def check_arrays(kind: str, arrays: Any, config) -> None:
  """Raises InputError where a gate's arrays miss something or do not fit."""
  arrays = arrays or {}
  needed = {'learned': ('kernel', 'bias'), 'replay': ('loops',)}
  for name in needed.get(kind, ()):
    if name not in arrays:
      raise InputError(
        f'gate={kind!r}: has no array {name!r}. A model has a learned gate '
        'when python -m rrt.fit_gate has fitted it.'
      )
  if ('lens_kernel' in arrays) != ('lens_bias' in arrays):
    raise InputError('A lens needs both lens_kernel and lens_bias.')
  if ('lens_in' in arrays) != ('lens_out' in arrays):
    raise InputError('A tuned lens needs both lens_in and lens_out.')
  if 'lens_in' in arrays and 'lens_kernel' not in arrays:
    raise InputError('A tuned lens needs lens_kernel and lens_bias too.')
  for name, shape in _shapes(config).items():
    if name in arrays and np.shape(arrays[name]) != shape:
      raise InputError(
        f'The array {name!r} of a gate has the shape '
        f'{np.shape(arrays[name])}; this model needs {shape}.'
      )


def _shapes(config) -> dict[str, tuple[int, ...]]:
  """Of the arrays of gates and lenses, by name."""
  R, D, H = config.loops - 1, config.d_model, LENS_WIDTH
  return {
    'kernel': (R, D), 'bias': (R,), 'lens_kernel': (R, D, D),
    'lens_bias': (R, D), 'lens_in': (R, D, H), 'lens_out': (R, H, D),
  }  # fmt: skip


def stored_lens(model) -> dict[str, np.ndarray] | None:
  """The lens alone of the gate that was kept with a model."""
  gate = stored(model)
  if gate is None or gate.arrays is None or not exits.has_lens(gate.arrays):
    return None
  return {k: v for k, v in gate.arrays.items() if k.startswith('lens_')}


def _text(array: np.ndarray) -> str:
  data = np.ascontiguousarray(array, np.float32).astype('<f4').tobytes()
  return base64.b64encode(data).decode('ascii')


def _array(text: str, shape: tuple[int, ...]) -> np.ndarray:
  array = np.frombuffer(base64.b64decode(text, validate=True), '<f4')
  if array.size != math.prod(shape) or not np.isfinite(array).all():
    raise ValueError(f'its arrays are not finite numbers of shape {shape}')
  return array.reshape(shape).astype(np.float32)


def fit_lens(
  states_RxNxD: np.ndarray, ridge: float = 0.01
) -> dict[str, np.ndarray]:
  """Affine maps from each loop's output to the last one's.

  Least squares, each token weighted by the inverse size of its target, since
  a norm follows and a few tokens have states a hundred times as large.

  Args:
    states_RxNxD: the block's outputs after every loop.
    ridge: added to the second moments, as a share of each.

  Returns:
    `lens_kernel` [R - 1, D, D] and `lens_bias` [R - 1, D]: what is added is
    x @ kernel + bias.
  """
  last_NxD = states_RxNxD[-1].astype(np.float64)
  weight_Nx1 = np.sqrt((last_NxD**2).mean(1, keepdims=True) + 1e-12) ** -1
  kernels, biases = [], []
  for x_NxD in states_RxNxD[:-1].astype(np.float64):
    one_Nx1 = np.ones((len(x_NxD), 1))
    x_NxE = np.concatenate([x_NxD, one_Nx1], 1) * weight_Nx1
    moments_ExE = x_NxE.T @ x_NxE
    moments_ExE += np.diag(ridge * np.diag(moments_ExE) + 1e-9)
    wanted_ExD = x_NxE.T @ ((last_NxD - x_NxD) * weight_Nx1)
    map_ExD = np.linalg.solve(moments_ExE, wanted_ExD)
    kernels.append(map_ExD[:-1])
    biases.append(map_ExD[-1])
  return {
    'lens_kernel': np.array(kernels, np.float32),
    'lens_bias': np.array(biases, np.float32),
  }


def fit(
  states_RxNxD: np.ndarray, target_RxN: np.ndarray, ridge: float = RIDGE
) -> dict[str, np.ndarray]:
  """Logistic regressions on states, one a loop.

  Args:
    states_RxNxD: the block's outputs after each loop but the last.
    target_RxN: what a score should be, in 0..1: whether the most likely token
      is that of full depth, or exp(-nats lost).
    ridge: weight of the squared kernel against the sum of losses.

  Returns:
    `kernel` [R - 1, D] and `bias` [R - 1].
  """
  kernels, biases = [], []
  for states_NxD, target_N in zip(states_RxNxD, target_RxN, strict=True):
    unit = states_NxD / np.maximum(
      np.linalg.norm(states_NxD, axis=1, keepdims=True), 1e-6
    )
    D = unit.shape[1]
    weights = _logistic(unit * D**0.5, target_N.astype(np.float64), ridge)
    kernels.append(weights[:-1])
    biases.append(weights[-1])
  return {
    'kernel': np.array(kernels, np.float32),
    'bias': np.array(biases, np.float32),
  }


def _logistic(x_NxD: np.ndarray, y_N: np.ndarray, ridge: float) -> np.ndarray:
  """Kernel and, at the end, bias of a ridge logistic regression (Newton)."""
  x = np.concatenate([x_NxD, np.ones((len(x_NxD), 1), x_NxD.dtype)], 1)
  x = x.astype(np.float64)
  penalty = np.full(x.shape[1], ridge)
  penalty[-1] = 1e-6
  share = min(max(y_N.mean(), 1e-4), 1 - 1e-4)
  w = np.zeros(x.shape[1])
  w[-1] = math.log(share / (1 - share))

  def loss(w):
    z = x @ w
    return np.sum(np.logaddexp(0, z) - y_N * z) + 0.5 * np.sum(penalty * w**2)

  now = loss(w)
  for _ in range(50):
    p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
    slope = x.T @ (p - y_N) + penalty * w
    curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
    step = np.linalg.solve(curvature, slope)
    size = 1.0
    while loss(w - size * step) > now and size > 1e-6:
      size /= 2
    w -= size * step
    before, now = now, loss(w)
    if before - now < 1e-6 * len(y_N):
      break
  return w


def choose(
  points: Sequence[Point],
  *,
  agreement: float | None = None,
  loss: float | None = None,
  confidence: float = 0.95,
) -> tuple[Point, float] | None:
  """The deepest saving that keeps a promise, by fixed-sequence testing.

  Points are tried from the most careful on, and the first that cannot be
  shown to keep the promise ends the search; so the confidence holds for the
  chosen one although many were tried (Learn-then-Test, arXiv 2110.01052).
  Tokens of a row are not independent, so the bound is a one-sided t interval
  over rows. It holds as far as rows are independent pieces of one kind of
  text and thresholds are not chosen by them; rows that follow each other in a
  text, and thresholds at their quantiles, are near to that and not it.

  Args:
    points: of one gate.
    agreement: promised share of tokens that equal full depth's.
    loss: or promised nats a token above full depth.
    confidence: of the bound.

  Returns:
    The point and its bound (a lower one of the agreement, an upper one of
    the loss); None where not even the most careful keeps the promise.
  """
  if (agreement is None) == (loss is None):
    raise InputError('Give either an agreement or a loss to promise.')
  best = None
  for point in sorted(points, key=lambda p: -p.threshold):
    if agreement is not None:
      bound = lower_bound(point.row_agreement, confidence)
      kept = bound >= agreement
    else:
      bound = -lower_bound([-v for v in point.row_lost], confidence)
      kept = bound <= (loss or 0.0)
    if not kept:
      break
    best = (point, bound)
  return best


def lower_bound(values: Sequence[float], confidence: float) -> float:
  """One-sided lower bound of the mean of independent values.

  Student's t through its normal approximation (Abramowitz and Stegun
  26.7.5).
  """
  n = len(values)
  if n < 2:
    return -math.inf
  mean = float(np.mean(values))
  error = float(np.std(values, ddof=1)) / math.sqrt(n)
  z, v = statistics.NormalDist().inv_cdf(confidence), n - 1
  t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
  return mean - t * error
