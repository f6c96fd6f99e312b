r"""Says how much memory a training run or a server takes on chips that need not be there.

rrt plan --config=experiments/tinyllama_11x2.py --topology=v5e:4x4 --mesh=fsdp=16
rrt plan --model=child --topology=h100:1 --slots=64 --context=4096
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

from absl import flags
import jax

from rrt import command, console, sharding
from rrt.checkpoints.load import load_config
from rrt.errors import InputError
from rrt.models.count import count_params
from rrt.models.init import abstract_params
from rrt.planner import search as search_lib
from rrt.planner import topology as topology_lib
from rrt.planner.memory import Memory, rules_of_thumb, serve_memory
from rrt.planner.program import train_program
from rrt.train.config_file import config_error, define_config_flag
from rrt.train.recipe import Recipe
from rrt.train.setup import planned

FLAGS = command.Flags(
  'Says how much memory a training run or a server takes on a chip.',
  'rrt plan --config=experiments/tinyllama_11x2.py --topology=v5e:4x4 \\\n    --mesh=fsdp=16',
  flags.FLAGS,
)
explain = config_error
# Compiled in a tenth of the time, with the same memory to 1.5 %.
QUICK = {'exec_time_optimization_effort': -1.0}
GIB = topology_lib.GIB


def define_flags() -> None:
  """Defines the flags; importing this module for anything else defines none.

  Raises:
    InputError: ml_collections is not installed.
  """
  define_config_flag()
  FLAGS.needed.add('config')
  FLAGS.needed.string('model', None, 'Instead of --config: a model to serve.')
  FLAGS.needed.string(
    'topology', None, 'The chips: v5e:4x4, v5p:2x2x4, 2xv6e:8x8 (two slices), h100:8.'
  )
  FLAGS.usual.list('mesh', None, "Chips by axis, such as data=2,fsdp=8; the recipe's by default.")
  FLAGS.usual.bool(
    'compile',
    False,
    'Compiles the step for the topology (TPU) and takes the figure of the compiler.',
  )
  FLAGS.usual.bool('search', False, 'Tries all meshes, each with the largest batch that fits.')
  FLAGS.usual.integer('slots', 32, 'With --model: sequences at a time.')
  FLAGS.usual.integer('context', 2048, 'With --model: tokens of a sequence.')
  FLAGS.rare.integer('page', 128, 'With --model: tokens of a page of the cache.')
  FLAGS.rare.enum('dtype', 'bfloat16', ['float32', 'bfloat16'], 'With --model: of the weights.')
  FLAGS.rare.enum(
    'kv_dtype', 'bfloat16', ['float32', 'bfloat16', 'int8'], 'With --model: of the cache.'
  )


def main(_) -> int:
  """Plans, prints, and returns 0 if it fits and 1 if not."""
  f = flags.FLAGS
  begin = time.monotonic()
  if not f.topology or bool(f.config) == bool(f.model):
    raise InputError('--topology, and one of --config and --model, are needed; see --help.')
  jax.config.update('jax_platforms', 'cpu')  # Nothing runs, whatever chips there are.
  topology = topology_lib.parse(f.topology)
  if f.model:
    return _serve(topology, begin)
  for name in ('slots', 'context', 'page', 'dtype', 'kv_dtype'):
    if f[name].present:
      raise InputError(f'--{name} has no effect without --model.')
  recipe = Recipe.from_dict(f.config.to_dict())
  parent = load_config(recipe.parent)
  child = load_config(recipe.child) if recipe.child else planned(recipe, parent)
  if f.search:
    return _search(recipe, parent, child, topology, begin)
  sizes = _mesh(f.mesh, recipe, topology)
  recipe = dataclasses.replace(recipe, mesh=sizes)
  tiles = topology.kind.platform == 'tpu'
  memory = search_lib.analytic(recipe, parent, child, sizes, tiles)
  seconds = time.monotonic() - begin
  _show(memory, topology, count_params(child).unique)
  peak, compiled = memory.peak, None
  if f.compile:
    compiled = peak = _compile(recipe, parent, child, sizes, topology)
    print(f'XLA, compiled for {topology}: {peak / GIB:.2f} GiB a chip')
  return _end(
    topology,
    peak,
    {
      'mesh': sizes,
      'batch': recipe.batch,
      'length': recipe.length,
      'analytic_bytes': memory.peak,
      'compiled_bytes': compiled,
      'parts': memory.parts,
      'analytic_seconds': seconds,
      'seconds': time.monotonic() - begin,
    },
    estimated=compiled is None,
  )


def _mesh(given: list[str] | None, recipe: Recipe, topology) -> dict[str, int]:
  """Chips by axis.

  Raises:
    InputError: an unknown axis, or sizes that do not make up the topology.
  """
  sizes = dict(recipe.mesh)
  if given is not None:
    sizes = {}
    for part in given:
      axis, _, size = part.partition('=')
      if not size.removeprefix('-').isdigit():
        raise InputError(f'--mesh={",".join(given)}: write axes as data=2,fsdp=8.')
      sizes[axis.strip()] = int(size)
  return sharding.mesh_sizes(sizes, topology.count)


def _compile(recipe, parent, child, sizes, topology) -> int:
  """Bytes a chip of the compiled step."""
  mesh = sharding.make_mesh(sizes, topology_lib.devices(topology))
  program = train_program(recipe, parent, child, mesh)
  lowered = program.lower('tpu')
  try:
    found = lowered.compile(compiler_options=QUICK).memory_analysis()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    # The compiler ends with it where a program does not fit.
    print(f'the compiler: {str(e).splitlines()[0][:200]}')
    return _used(str(e), topology)
  return int(found.peak_memory_in_bytes)


def _used(message: str, topology) -> int:
  """The bytes that the compiler says a program would use: above what a chip has."""
  # "Used 20.3G of 15.7G hbm", "temporaries (447.04G) exceeds available HBM (95.74G)".
  number = re.search(r'(?:Used |\()([\d.]+)([GM])', message)
  used = float(number[1]) * (GIB if number[2] == 'G' else 1 << 20) if number else 0
  return max(int(used), topology.room + 1)


def _search(recipe, parent, child, topology, begin) -> int:
  found = search_lib.search(recipe, parent, child, topology)
  if not found:
    raise InputError(f'topology={topology}: no mesh of its chips divides this model.')
  console.table(
    [
      [
        ' '.join(f'{axis}={n}' for axis, n in one.mesh.items()),
        one.rows or 'none fits',
        one.rows * one.mesh['data'] * one.mesh['fsdp'],
        f'{one.memory.peak / GIB:.2f}',
      ]
      for one in found
    ],
    [f'mesh of {topology}', 'rows a chip', 'rows in all', 'GiB a chip'],
  )
  best = found[0]
  return _end(
    topology,
    best.memory.peak,
    {
      'mesh': best.mesh,
      'rows': best.rows,
      'length': recipe.length,
      'analytic_bytes': best.memory.peak,
      'considered': len(found),
      'seconds': time.monotonic() - begin,
    },
    estimated=True,
  )


def _serve(topology, begin) -> int:
  f = flags.FLAGS
  for name in ('mesh', 'compile', 'search'):
    if f[name].present:
      raise InputError(f'--{name} has no effect without --config: a model is served by one chip.')
  for name in ('slots', 'context', 'page'):
    if getattr(f, name) < 1:
      raise InputError(f'--{name}={getattr(f, name)}: must be above 0.')
  config = load_config(f.model)
  memory = serve_memory(
    config, abstract_params(config), f.slots, f.context, f.page, f.dtype, f.kv_dtype
  )
  _show(memory, topology, count_params(config).unique)
  return _end(
    topology,
    memory.peak,
    {
      'slots': f.slots,
      'context': f.context,
      'analytic_bytes': memory.peak,
      'parts': memory.parts,
      'seconds': time.monotonic() - begin,
    },
  )


def _show(memory: Memory, topology, parameters: int) -> None:
  share = lambda n: f'{100 * n / topology.room:.1f} %'
  rows: list[list[Any]] = [[k, f'{v / GIB:.3f}', share(v)] for k, v in memory.parts.items()]
  rows.append(['together', f'{memory.peak / GIB:.3f}', share(memory.peak)])
  phase = f' at its fullest, in the {memory.phase} phase' if memory.phase else ''
  console.table(rows, [f'a chip of {topology}{phase}', 'GiB', 'of what it has'])
  rules = [f'{k} {v / GIB:.2f}' for k, v in rules_of_thumb(parameters).items()]
  print('rules of thumb for one chip, GiB: ' + '; '.join(rules))


def _end(topology, peak: int, fields: dict[str, Any], estimated: bool = False) -> int:
  fits = peak <= topology.room
  if estimated and fits and peak > topology.room / 1.1:
    tells = '; --compile tells' if topology.kind.platform == 'tpu' else ''
    print(f'close: the closed form may be off by 10 %{tells}')
  kept = f', {topology.kind.reserve / GIB:.1f} kept by the runtime' if topology.kind.reserve else ''
  print(
    f'{"fits" if fits else "does not fit"}: {peak / GIB:.2f} of {topology.room / GIB:.2f} GiB a '
    f'chip{kept}, on {math.prod(topology.shape) * topology.slices} chips'
  )
  console.finish({'topology': str(topology), 'fits': fits, 'room_bytes': topology.room, **fields})
  return 0 if fits else 1
