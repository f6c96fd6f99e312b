"""The parent's predictions on disk: computed once, read by every later run.

Runs that see the same rows (the same text, seed, batch and length) need the same
predictions of the parent. With `teacher_cache` a step reads them from a directory, and
runs the parent only for batches that no run has seen: its hidden states after the
final norm, from which the head makes all logits again, or with `loss.top_k` its most
likely tokens. One file a batch, named by what the parent read.

B batch, L length, D model, K most likely tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
import zipfile

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.train.placement import to_mesh
from rrt.train.step import OUTPUTS, Batch, Params, Step, merge, split, teacher_outputs

READ = ('tokens', 'segment_ids', 'positions')  # What the parent sees of a batch.


class TeacherCache:
  """A directory of the parent's predictions."""

  def __init__(self, path: str | Path, spec: Step, parent: LanguageModel, mesh):
    """Opens or makes the directory.

    Args:
      path: shared by runs of any parent and any settings.
      spec: with the parent (`rrt.train.teacher.with_teacher`).
      parent: the model; its values are part of the files' names.
      mesh: where batches go; of one process.
    """
    self._mesh, self._k = mesh, spec.objective.top_k
    self._run = jax.jit(
      lambda params, own, batch: teacher_outputs(spec, merge(own, _shared(spec, params)), batch)
    )
    self._dtype = jnp.dtype(spec.dtype)
    self._dir = Path(path) / f'{fingerprint(parent)}_{self._kind()}'
    self._dir.mkdir(parents=True, exist_ok=True)

  def __call__(self, rows: dict[str, np.ndarray], params: Params, own: Params) -> Batch:
    """A batch on the mesh, with the parent's predictions.

    Args:
      rows: tokens, targets, segment_ids, positions and weights, all [B, L].
      params: the child's, with what the parent shares.
      own: the parent's own parameters, flat.
    """
    path = self._dir / f'{_digest(*(rows[name] for name in READ))}.npz'
    batch = to_mesh(rows, self._mesh)
    found = self._read(path, rows['tokens'].shape)
    if found is not None:
      return batch | to_mesh(found, self._mesh)
    outputs = self._run(params, own, batch)
    self._write(path, {name: np.asarray(value) for name, value in outputs.items()})
    return batch | outputs

  def _kind(self) -> str:
    return f'top{self._k}' if self._k else f'hidden_{self._dtype.name}'

  def _read(self, path: Path, shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where it is not there or damaged."""
    try:
      with np.load(path) as file:
        found = {name: file[name] for name in OUTPUTS if name in file}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
      return None
    if not found or any(x.shape[:2] != shape for x in found.values()):
      return None
    # numpy has no bfloat16: its bits are kept as uint16.
    return {k: x.view(self._dtype) if x.dtype == np.uint16 else x for k, x in found.items()}

  def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
    plain = {k: x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for k, x in arrays.items()}
    new = path.with_suffix(f'.{os.getpid()}.tmp')
    try:
      with new.open('wb') as file:
        np.savez(file, **plain)  # type: ignore[arg-type]
      os.replace(new, path)
    except OSError as e:
      new.unlink(missing_ok=True)
      raise InputError(f'teacher_cache: {path.parent}: {e.strerror}.') from e


def fingerprint(model: LanguageModel) -> str:
  """16 hexadecimal digits that differ between models of other configs or values."""
  flat = traverse_util.flatten_dict(model.params, sep='/')
  about = json.dumps([repr(model.config), sorted(flat)])
  return _digest(np.frombuffer(about.encode(), np.uint8), *(flat[k] for k in sorted(flat)))


def _digest(*arrays: Any) -> str:
  hashed = hashlib.blake2b(digest_size=8)
  for x in arrays:
    x = np.ascontiguousarray(x)
    hashed.update(f'{x.dtype} {x.shape}'.encode())
    hashed.update(x.reshape(-1).view(np.uint8).data)
  return hashed.hexdigest()


def _shared(spec: Step, params: Params) -> Params:
  """What the parent reads of the child's parameters, flat."""
  return split(params, spec.shared)[0]
