"""What a sharded step sends between devices, read off its compiled program."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from rrt import sharding
from rrt.models.init import init_params
from rrt.ops.mesh_axes import ROWS
from rrt.relax.lora import Lora
from rrt.train import optim
from rrt.train import step as step_lib
from rrt.train.losses import Objective
from tests import runs

BYTES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'pred': 1}
WIDE = dict(d_model=64, d_ff=128, num_heads=8, num_kv_heads=8, head_dim=8, vocab_size=512)


def compiled(sizes, config, gather='once', dtype='float32') -> str:
  """The optimized program of a step."""
  mesh = sharding.make_mesh(sizes)
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  o = optim.Optimizer()
  trained = step_lib.trained_paths(optim.trainable(o, shapes))
  weights, _ = step_lib.split(shapes, trained)
  spec = step_lib.Step(
    config,
    Objective(distillation=0.0, chunk_tokens=64),
    optim.make_optimizer(o, weights, 10),
    trained,
    gather=gather,
    dtype=jnp.dtype(dtype),
  )
  state = step_lib.abstract_state(spec, mesh)
  step = step_lib.jit_step(spec, mesh, jax.tree.map(lambda x: x.sharding, state))
  rows = NamedSharding(mesh, PartitionSpec(ROWS))
  ints, floats = (jax.ShapeDtypeStruct((16, 32), d, sharding=rows) for d in ('int32', 'float32'))
  names = ('tokens', 'targets', 'segment_ids', 'positions')
  batch = {name: ints for name in names} | {'weights': floats}
  with jax.set_mesh(mesh):
    return step.lower(state, {}, batch).compile().as_text()


def gathered_bytes(program: str) -> int:
  """Bytes that a step's all-gathers make, those in loops as often as the loops run."""
  functions: dict[str, list[str]] = {}
  for line in program.splitlines():
    if start := re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      functions[start[1]] = lines = []
    elif functions:
      lines.append(line)
  inside = {}
  for name, lines in functions.items():
    for line in lines:
      if body := re.search(r'while\(.*body=%?([\w.\-]+)', line):
        count = re.search(r'known_trip_count.*?"n":"(\d+)"', line)
        assert count, line
        inside[body[1]] = name, int(count[1])

  def times(name):
    outer, count = inside.get(name, (None, 1))
    return count * (times(outer) if outer else 1)

  total = 0
  for name, lines in functions.items():
    for line in lines:
      if found := re.search(r'= (.*?) all-gather(-start)?\(', line):
        for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', found[1]):
          size = math.prod(int(n) for n in shape.split(',') if n)
          total += times(name) * BYTES[kind] * size
  return total


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'fsdp': 4, 'tensor': 2}], ids=str)
def test_the_block_is_gathered_once_for_all_loops(sizes):
  """Three loops gather less than half of what three untied blocks do."""
  parent = dataclasses.replace(runs.PARENT, **WIDE)
  shape = dict(prelude=0, block=2, loops=3, coda=0, loop_norms=True)
  child = parent.with_recursion(**shape, relax=(Lora(q=8, up=8),))
  untied = gathered_bytes(compiled(sizes, parent))
  every_loop = gathered_bytes(compiled(sizes, child, gather='loop'))
  once = gathered_bytes(compiled(sizes, child))
  assert every_loop > 0.9 * untied
  assert once < 0.5 * untied


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'tensor': 2}], ids=str
)
def test_nothing_is_made_whole_where_the_partitioner_finds_no_way(sizes, capfd):
  """XLA warns of it on stderr, as it did of the embedding's rows."""
  parent = dataclasses.replace(runs.PARENT, **WIDE)
  child = parent.with_recursion(
    prelude=1, block=2, loops=2, coda=1, loop_norms=True, relax=(Lora(q=8, up=8),)
  )
  program = compiled(sizes, child)
  assert 'all-gather' in program
  assert 'rematerialization' not in capfd.readouterr().err
