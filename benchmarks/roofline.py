"""What the machine could do at most: bounds on a rung's speed and its waits.

A pass takes no less than its multiplications at the rate of a large product,
and no less than reading its weights once at the rate of a large sum. Both rates
are measured; keys, values, activations and low-rank terms are left out, so a
bound is kind to the contender.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import common
from rrt.models import count

_SIZE = 2048  # Of the product's sides.
_READ = 2**28  # Bytes.
_RUNS, _CHAIN = 5, 4  # Products one after the other in a run.


@dataclasses.dataclass(frozen=True)
class Costs:
  """Parameters that a token passes, the embedding's table apart.

  Attributes:
    ends: in prelude and coda.
    head: in the head.
    block: in each loop.
    loops: R.
    tied: whether the loops share them.
  """

  ends: int
  head: int
  block: int
  loops: int
  tied: bool = True

  @classmethod
  def of(cls, config, tied: bool = True) -> 'Costs':
    """Those of a recursive model, or of its untied export."""
    layer = count.linears(config)
    ends = layer * (config.prelude_layers + config.coda_layers)
    head = config.vocab_size * config.d_model
    return cls(ends, head, layer * config.block_layers, config.loops, tied)

  def passed(self, depth: float) -> float:
    """Parameters that a token meets at a mean depth."""
    return self.ends + self.head + depth * self.block

  @property
  def held(self) -> int:
    """Parameters that a pass reads."""
    blocks = 1 if self.tied else self.loops
    return self.ends + self.head + self.block * blocks


@dataclasses.dataclass(frozen=True)
class Roof:
  """The machine's two rates.

  Attributes:
    flops: additions and multiplications a second.
    bandwidth: bytes read a second.
    width: bytes of a parameter.
  """

  flops: float
  bandwidth: float
  width: int

  @classmethod
  def measure(cls, dtype: str) -> 'Roof':
    """The best of some runs of jax and, on a CPU, of torch."""
    a = jnp.full((_SIZE, _SIZE), 1 / _SIZE, dtype)
    data = jnp.ones(_READ // 4, jnp.float32)
    chain = jax.jit(lambda a: jax.lax.fori_loop(0, _CHAIN, lambda i, x: x @ a, a))
    add = jax.jit(jnp.sum)
    multiplied = [_best(lambda: jax.block_until_ready(chain(a))) / _CHAIN]
    read = [_best(lambda: jax.block_until_ready(add(data)))]
    torch = _torch() if jax.default_backend() == 'cpu' else None
    if torch:
      b = torch.ones(_SIZE, _SIZE, dtype=getattr(torch, dtype))
      floats = torch.ones(_READ // 4)
      multiplied.append(_best(lambda: b @ b))
      read.append(_best(floats.sum))
    return cls(2 * _SIZE**3 / min(multiplied), _READ / min(read), jnp.dtype(dtype).itemsize)

  def seconds(self, costs: Costs, depth: float, rows: int) -> float:
    """Least time of a token each in some rows."""
    return self._least(costs, rows * costs.passed(depth))

  def prompt_seconds(self, costs: Costs, tokens: int) -> float:
    """Least time of a prompt and a first token, at full depth."""
    layers = costs.passed(costs.loops) - costs.head
    return self._least(costs, tokens * layers + costs.head)

  def _least(self, costs: Costs, passed: float) -> float:
    read = self.width * costs.held / self.bandwidth
    return max(2 * passed / self.flops, read)


def _torch():
  """torch, where it is installed."""
  with contextlib.suppress(ImportError):
    import torch

    return torch
  return None


def _best(run) -> float:
  return min(common.take_turns({'': run}, _RUNS)[''])
