"""Reads checkpoint tensors into the parameter tree by a family's table of names.

A table (`rrt.families`) has rows `path | Hugging Face name | GGUF name | kind`.
Tensors are copied chunk by chunk into the stacked arrays, so that memory holds
the model and one chunk. One error lists all faults of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np

from rrt.checkpoints import safetensors
from rrt.checkpoints.safetensors import Tensors
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families.base import Family, Row, row_shape, tensor_rows, wanted_rows
from rrt.pieces import Pieces
from rrt.tree import set_path

DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}

# How many names of a kind an error lists before it counts the others.
MAX_LISTED = 4


@dataclasses.dataclass(frozen=True)
class _Job:
  """One tensor of a checkpoint and its destination in the tree."""

  name: str
  row: Row
  path: str
  depth: Any  # Index into the stacked leaf: None, a layer, or (layer, expert).
  shape: tuple[int, ...]  # As our tree has it.

  @property
  def transposed(self) -> bool:
    return self.row.kind in ('linear', 'q', 'k')


def _jobs(config: ModelConfig, family: Family, style: str) -> list[_Job]:
  jobs = []
  for row in wanted_rows(config, family):
    names = row.hf if style == 'hf' else row.gguf
    shape = row_shape(config, row.path)
    if '{}' not in names:
      jobs.append(_Job(names, row, row.path, None, shape))
      continue
    path = f'block/layers/{row.path}'
    for depth in range(config.block_layers):
      if '{e}' not in names:
        jobs.append(_Job(names.format(depth), row, path, depth, shape))
        continue
      for e in range(config.copies('up')):
        jobs.append(_Job(names.format(depth, e=e), row, path, (depth, e), shape))
  return jobs


def read_params(
  config: ModelConfig,
  family: Family,
  tensors: Tensors,
  *,
  dtype: str = 'float32',
  style: str = 'hf',
  ignore: Callable[[str], bool] = lambda name: False,
  where: str = 'the checkpoint',
  lazy: bool = False,
) -> dict[str, Any]:
  """Reads a checkpoint into the tree of an untied model, or of one block that loops.

  Args:
    config: the model; P = C = 0, and nothing differs by loop.
    family: its table.
    tensors: the checkpoint.
    dtype: of the parameters: 'float32', 'bfloat16' or 'float16'.
    style: 'hf' or 'gguf': which column of the table has the names, and how
      values are stored.
    ignore: names of tensors to skip.
    where: the checkpoint's name in errors.
    lazy: matrices are `Pieces`, read (and checked for NaN) a tensor at a time when they are
      used.

  Raises:
    InputError: lists every tensor that is missing, unexpected, of a wrong
      shape or dtype, or not finite.
  """
  if dtype not in DTYPES:
    raise InputError(f'dtype={dtype!r} must be one of {", ".join(DTYPES)}.')
  faults = _Faults()
  jobs = _jobs(config, family, style)
  expected = {job.name for job in jobs}
  for name in tensors.infos:
    if name not in expected and not ignore(name):
      faults.add('unexpected', name)
  for job in jobs:
    _check(job, config, tensors, style, faults)
  if faults.found:  # Before any memory is taken or any value read.
    raise faults.error(where)
  leaves: dict[str, np.ndarray] = {}
  tree: dict[str, Any] = {}
  if lazy:
    later = {job.path for job in jobs if len(job.shape) > 1}
    for path in later:
      own = [job for job in jobs if job.path == path]
      read = functools.partial(_read_one, config, family, tensors, style, DTYPES[dtype], where)
      set_path(tree, path, _in_pieces(own, DTYPES[dtype], read))
    jobs = [job for job in jobs if job.path not in later]
  for job in jobs:
    if job.path not in leaves:
      lead: tuple[int, ...] = () if job.depth is None else (config.block_layers,)
      if isinstance(job.depth, tuple):
        lead = (config.block_layers, config.copies('up'))
      leaves[job.path] = np.empty(lead + job.shape, DTYPES[dtype])
      set_path(tree, job.path, leaves[job.path])
    leaf = leaves[job.path]
    target = leaf if job.depth is None else leaf[job.depth]
    target = target.T if job.transposed else target
    _read(job, target, config, family, tensors, style, faults)
  if faults.found:
    raise faults.error(where)
  return tree


def _read_one(config, family, tensors, style, dtype, where, job: _Job) -> np.ndarray:
  """One tensor as our tree has it.

  Raises:
    InputError: it is not finite.
  """
  found, faults = np.empty(job.shape, dtype), _Faults()
  target = found.T if job.transposed else found
  _read(job, target, config, family, tensors, style, faults)
  if faults.found:
    raise faults.error(where)
  return found


def _in_pieces(jobs: list[_Job], dtype: np.dtype, read: Callable[[_Job], np.ndarray]) -> Pieces:
  """A leaf of one tensor, or of one for each layer, or each expert of a layer."""
  if jobs[0].depth is None:
    (job,) = jobs
    return Pieces(job.shape, dtype, lambda a, b: read(job)[a:b], job.shape[0])
  by_depth = {job.depth: job for job in jobs}
  if not isinstance(jobs[0].depth, tuple):
    layers = lambda a, b: np.stack([read(by_depth[i]) for i in range(a, b)])
    return Pieces((len(jobs), *jobs[0].shape), dtype, layers)
  depth, experts = (n + 1 for n in max(by_depth))
  of_layer = lambda i: np.stack([read(by_depth[i, e]) for e in range(experts)])
  layers = lambda a, b: np.stack([of_layer(i) for i in range(a, b)])
  return Pieces((depth, experts, *jobs[0].shape), dtype, layers)


class _Faults:
  """The faults of a checkpoint, by kind."""

  def __init__(self):
    self.found: dict[str, list[str]] = {}

  def add(self, kind: str, what: str) -> None:
    self.found.setdefault(kind, []).append(what)

  def error(self, where: str) -> InputError:
    parts = []
    for kind, names in self.found.items():
      more = len(names) - MAX_LISTED
      listed = ', '.join(names[:MAX_LISTED])
      parts.append(f'{len(names)} {kind} ({listed}{f", and {more} more" * (more > 0)})')
    return InputError(f'{where} does not fit its configuration: {"; ".join(parts)}.')


def _check(job: _Job, config: ModelConfig, tensors: Tensors, style: str, faults: _Faults) -> None:
  info = tensors.infos.get(job.name)
  shape = job.shape[::-1] if job.transposed else job.shape
  if job.row.fused:
    shape = (tensor_rows(config, job.row, style)[1], *shape[1:])
  supported = getattr(tensors, 'dtypes', safetensors.DTYPES)
  if info is None:
    faults.add('missing', job.name)
  elif info.shape != shape:
    faults.add('of a wrong shape', f'{job.name} {list(info.shape)} instead of {list(shape)}')
  elif info.dtype not in supported:
    faults.add('of an unsupported dtype', f'{job.name} {info.dtype}')


def _read(job, target, config, family, tensors, style, faults) -> None:
  """Copies one tensor into the tree, chunk by chunk."""
  order = None
  if style == 'gguf' and family.gguf_permuted and job.row.kind[0] in 'qk':
    heads = config.num_heads if job.row.kind[0] == 'q' else config.num_kv_heads
    order = interleaved_rows(heads, config.head_dim)
  offset = 0.0
  if style == 'gguf' and job.row.kind == 'gain':
    offset = family.gguf_gain_offset
  finite = True
  for start, rows in tensors.chunks(job.name):
    if offset:
      rows = rows - rows.dtype.type(offset)
    with np.errstate(over='ignore'):  # Overflow is found below.
      rows = rows.astype(target.dtype, copy=False)
    finite = finite and bool(np.isfinite(rows).all())
    if job.row.fused:
      index, _ = tensor_rows(config, job.row, style)
      inside = (index >= start) & (index < start + len(rows))
      target[inside] = rows[index[inside] - start]
      continue
    where = slice(start, start + len(rows))
    target[where if order is None else order[where]] = rows
  if not finite:
    faults.add('with NaN or Inf', job.name)


def interleaved_rows(heads: int, head_dim: int) -> np.ndarray:
  """Index of the half-split row that each q or k row of a Llama GGUF holds.

  llama.cpp rotates neighbouring pairs, so its files hold a head's rows in the
  order 0, Dh/2, 1, Dh/2 + 1, ...; this package rotates halves, as Hugging Face.
  """
  rows = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
  return rows.swapaxes(1, 2).reshape(-1)
