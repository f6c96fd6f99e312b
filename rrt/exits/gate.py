"""Exit gates as they are stored with a model.

A learned gate is one logistic regression a loop on the normalised residual
stream: it estimates how close this loop's prediction is to that of full depth.
Its threshold is calibrated on text that the fit has not seen. A lens, one affine
map a loop, maps the output of an early loop to that of the last; it is fitted by
least squares and may then be tuned (`rrt.exits.tune_lens`).

D model, R loops.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rrt.errors import InputError
from rrt.exits import score as score_lib

if TYPE_CHECKING:
  pass

_KEY = 'exits'  # of a model's meta
NEVER = 2.0  # A threshold that no score reaches.
LENS_WIDTH = 1024  # H, hidden units of a tuned lens.


@dataclasses.dataclass(frozen=True)
class Gate:
  """An exit gate: kind, threshold and arrays.

  Attributes:
    kind: 'learned', 'change' or 'hazard'; see `score.score`.
    threshold: the score at which tokens leave.
    arrays: of a learned gate: `kernel` [R - 1, D] and `bias` [R - 1]; of its
      lens: `lens_kernel` [R - 1, D, D] and `lens_bias` [R - 1, D], of a tuned
      one `lens_in` [R - 1, D, H] and `lens_out` [R - 1, H, D] too.
    kv: cache policy of skipped loops, as calibrated.
    calibration: target, confidence, measured figures and text of the calibration.
  """

  kind: str
  threshold: float
  arrays: dict[str, np.ndarray] | None = None
  kv: str = 'propagate'
  calibration: dict[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Plain values for a model's meta."""
    arrays: dict[str, str] | None = None
    if self.arrays is not None:
      arrays = {k: _text(v) for k, v in self.arrays.items()}
    return dataclasses.asdict(self) | {'arrays': arrays}


def store(meta: dict[str, Any], gate: Gate) -> dict[str, Any]:
  """Adds a gate to a model's meta."""
  return meta | {_KEY: gate.to_json()}


def stored(model) -> Gate | None:
  """The gate stored with a model, or None.

  Raises:
    InputError: the gate does not fit the model.
  """
  fields = model.meta.get(_KEY)
  if fields is None:
    return own_gate(model)
  try:
    arrays = fields['arrays']
    if arrays is not None:
      shapes = _shapes(model.config)
      arrays = {k: _array(v, shapes[k]) for k, v in arrays.items()}
    gate = Gate(**fields | {'arrays': arrays})
    score_lib.check_kind(gate.kind)
    check_arrays(gate.kind, arrays, model.config)
    return gate
  except (KeyError, TypeError, ValueError) as e:
    raise InputError(f"The model's exit gate cannot be used: {e}.") from e


def own_gate(model) -> Gate | None:
  """The gate that a natively looped model was trained with, or None."""
  if not model.config.exit_gate:
    return None
  leaves = model.params['exit_gate']
  arrays = {
    'hazard_kernel': np.asarray(leaves['kernel'], np.float32)[:, 0],
    'hazard_bias': np.asarray(leaves['bias'], np.float32),
  }
  # At 1, as published, no token leaves before the last loop.
  threshold = float(model.meta.get('exit_threshold', 1.0))
  return Gate('hazard', threshold if threshold < 1 else NEVER, arrays)


def check_arrays(kind: str, arrays: Any, config) -> None:
  """Raises InputError for missing arrays or arrays of wrong shapes."""
  arrays = arrays or {}
  needed = {
    'learned': ('kernel', 'bias'),
    'hazard': ('hazard_kernel', 'hazard_bias'),
    'replay': ('loops',),
  }
  for name in needed.get(kind, ()):
    if name not in arrays:
      raise InputError(
        f'gate={kind!r}: has no array {name!r}. A model has a learned gate '
        'when rrt fit-gate has fitted it.'
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
  """Shapes of the arrays of gates and lenses, by name."""
  R, D, H = config.loops - 1, config.d_model, LENS_WIDTH
  return {
    'kernel': (R, D),
    'bias': (R,),
    'hazard_kernel': (D,),
    'hazard_bias': (1,),
    'lens_kernel': (R, D, D),
    'lens_bias': (R, D),
    'lens_in': (R, D, H),
    'lens_out': (R, H, D),
  }


def stored_lens(model) -> dict[str, np.ndarray] | None:
  """The arrays of the lens of the gate stored with a model."""
  gate = stored(model)
  if gate is None or gate.arrays is None or not score_lib.has_lens(gate.arrays):
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
