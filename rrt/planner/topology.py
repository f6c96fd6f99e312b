"""Accelerators by name: chips, their memory, and devices to compile for without them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import Any

import jax
import numpy as np

from rrt.errors import InputError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Kind:
  """One kind of chip.

  Attributes:
    name: as in a topology's name.
    platform: 'tpu' or 'gpu'.
    memory: bytes a chip that a program can have, as published.
    reserve: bytes of it that runtime and compiler keep.
    dims: axes of its torus; 0 for a plain number of chips.
  """

  name: str
  platform: str
  memory: int
  reserve: int
  dims: int = 0


# TPU: the memory that XLA's compiler names as available (libtpu 0.0.42).
# GPU: the card's memory; contexts of CUDA, cuBLAS and cuDNN as reserve.
KINDS = {
  k.name: k
  for k in (
    Kind('v5e', 'tpu', int(15.75 * GIB), 0, 2),
    Kind('v5p', 'tpu', int(95.74 * GIB), 0, 3),
    Kind('v6e', 'tpu', int(31.25 * GIB), 0, 2),
    Kind('l4', 'gpu', 24 * 10**9, int(0.8 * GIB)),
    Kind('a100', 'gpu', 80 * 10**9, int(0.8 * GIB)),
    Kind('h100', 'gpu', 80 * 10**9, int(0.8 * GIB)),
    Kind('h200', 'gpu', 141 * 10**9, int(0.8 * GIB)),
    Kind('b200', 'gpu', 180 * 10**9, int(0.8 * GIB)),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips that a program runs on.

  Attributes:
    kind: of the chips.
    shape: chips by axis of a slice.
    slices: how many slices, or (GPU) nodes count as one.
  """

  kind: Kind
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def count(self) -> int:
    """Chips in all."""
    return int(np.prod(self.shape)) * self.slices

  @property
  def room(self) -> int:
    """Bytes a chip that a program may take."""
    return self.kind.memory - self.kind.reserve

  def __str__(self) -> str:
    slices = f'{self.slices}x' if self.slices > 1 else ''
    return f'{slices}{self.kind.name}:{"x".join(map(str, self.shape))}'


def parse(text: str) -> Topology:
  """The topology of 'v5e:4x4', '2xv5e:4x4' (two slices) or 'h100:8'.

  Raises:
    InputError: no such chip or shape.
  """
  found = re.fullmatch(r'(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)', text.strip().lower())
  known = 'give one such as v5e:4x4, v5p:2x2x4, 2xv6e:8x8 (two slices) or h100:8'
  if found is None:
    raise InputError(f'topology={text!r}: {known}.')
  slices, name, shape = found.groups()
  if name not in KINDS:
    raise InputError(f'topology={text!r}: the chips known are {", ".join(KINDS)}; {known}.')
  kind, sizes = KINDS[name], tuple(map(int, shape.split('x')))
  if 0 in sizes or slices == '0':
    raise InputError(f'topology={text!r}: has no chips.')
  if len(sizes) != (kind.dims or 1):
    form = 'x'.join('ABC'[: kind.dims]) if kind.dims else 'COUNT'
    raise InputError(f'topology={text!r}: chips of {name} are counted as {name}:{form}.')
  if kind.dims and any(n % 2 for n in sizes[:2]) and set(sizes) != {1}:
    raise InputError(
      f'topology={text!r}: slices of {name} are made of hosts of 2x2 chips; make both sides even.'
    )
  return Topology(kind, sizes, int(slices or 1))


@functools.cache
def devices(topology: Topology) -> tuple[Any, ...]:
  """The TPU devices of a topology, to compile for; no TPU is needed.

  Raises:
    InputError: it is no TPU's, libtpu is not installed or knows no such shape.
  """
  if topology.kind.platform != 'tpu':
    raise InputError(
      f'topology={topology}: programs can be compiled for TPUs alone where none is there; leave '
      '--compile out.'
    )
  from jax.experimental import topologies

  if not _libtpu():
    raise InputError(
      'compiling for TPUs needs libtpu: pip install "relaxed-recursive-transformers[plan]".'
    )
  # libtpu would ask the metadata server of a cloud for a TPU that is not there.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  # Compilers share no chip, so that several may run at once.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  shape = 'x'.join(map(str, topology.shape))
  more = {'num_slices': topology.slices} if topology.slices > 1 else {}
  try:
    found = topologies.get_topology_desc(
      topology_name=f'{topology.kind.name}:{shape}', platform='tpu', **more
    )
    return tuple(found.devices)
  except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as e:
    why = str(e).strip().splitlines()[0][:200]
    raise InputError(f'topology={topology}: libtpu has no such slice ({why}).') from e


def _libtpu() -> bool:
  """Whether libtpu is there, as a package or by TPU_LIBRARY_PATH."""
  from importlib.util import find_spec

  return bool(os.environ.get('TPU_LIBRARY_PATH')) or find_spec('libtpu') is not None
