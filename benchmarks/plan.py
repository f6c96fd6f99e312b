r"""The planner's closed form against XLA's own figure, program by program.

  pip install -e ".[plan]"
  JAX_PLATFORMS=cpu python -m benchmarks.plan --out=benchmarks/results/plan.json

Compiles train steps for TPUs that need not be there, half a minute to two minutes each, and
prints bytes a chip of both. The factors of `rrt.planner.memory` were fitted to the programs of
FITTED; those of CHECKED were not used for them.
"""

from __future__ import annotations

import json
from pathlib import Path
import re
import statistics
import time
from typing import Any

from absl import flags
import jax

from rrt import command, sharding
from rrt.cli.plan import QUICK
from rrt.config import ModelConfig
from rrt.convert.plan import plan
from rrt.planner import search, topology
from rrt.planner.memory import Memory
from rrt.planner.program import train_program
from rrt.train.recipe import Recipe

FLAGS = flags.FLAGS
_ONLY = flags.DEFINE_string('only', '', 'Programs whose name has this text.')
_OUT = flags.DEFINE_string('out', None, 'File for the results; programs that it has are kept.')


def _shape(heads: int, groups: int, size: int, **fields: Any) -> ModelConfig:
  return ModelConfig(
    num_heads=heads, num_kv_heads=groups, head_dim=size, max_context=4096, **fields
  )


def _llama(vocab: int, width: int, ff: int, layers: int, *heads: int, tied: bool = True):
  return _shape(
    *heads,
    family='llama',
    vocab_size=vocab,
    d_model=width,
    d_ff=ff,
    block_layers=layers,
    tie_embeddings=tied,
  )


PARENTS = {
  'smol': _llama(49152, 576, 1536, 30, 9, 3, 64),
  'tiny': _llama(32000, 2048, 5632, 22, 32, 4, 64, tied=False),
  'l1b': _llama(128256, 2048, 8192, 16, 32, 8, 64),
  'l3b': _llama(128256, 3072, 8192, 28, 24, 8, 128),
  'l8b': _llama(128256, 4096, 14336, 32, 32, 8, 128, tied=False),
  'qwen': _shape(
    *(14, 2, 64),
    family='qwen2',
    vocab_size=151936,
    d_model=896,
    d_ff=4864,
    block_layers=24,
    tie_embeddings=True,
    biases=('q', 'k', 'v'),
  ),
  'gemma3': _shape(
    *(4, 1, 256),
    family='gemma3',
    vocab_size=262144,
    d_model=1152,
    d_ff=6912,
    block_layers=26,
    tie_embeddings=True,
    qk_norm=True,
    post_norms=True,
  ),
  'g2b': _shape(
    *(8, 1, 256), family='gemma', vocab_size=256000, d_model=2048, d_ff=16384, block_layers=18
  ),
}
# Parent, prelude + block x loops + coda, rank, chips, mesh, rows a chip, their length, remat,
# tokens of a chunk of logits, with the parent or alone, gather, microbatches, what is trained.
FITTED = """
tiny   0+11x2+0 256 v5e:4x4    fsdp=16          1 2048 full 16384 parent once 1 all
tiny   0+11x2+0 256 v5e:4x4    fsdp=16          1 2048 dots 16384 parent once 1 all
tiny   0+11x2+0   0 v5e:4x4    fsdp=8,tensor=2  2 2048 full  8192 parent once 1 all
tiny   4+7x2+4   64 v5e:2x4    fsdp=8           1 4096 full  8192 alone  once 1 all
tiny   0+11x2+0  64 v5e:2x2    fsdp=4           2 1024 full  2048 parent loop 1 all
smol   8+7x2+8   64 v5e:2x2    data=4           4 1024 none  8192 parent once 1 all
smol   8+7x2+8   64 v5e:2x2    data=4           8 1024 full  8192 parent once 1 all
smol   0+10x3+0 128 v5e:2x2    fsdp=4           8 2048 dots  8192 parent once 1 all
smol   0+15x2+0   0 v5e:2x2    data=4          16 512 dots 16384 alone  once 1 all
qwen   4+8x2+4   64 v5e:2x4    fsdp=8           2 2048 full  8192 parent once 1 all
qwen   0+12x2+0 128 v6e:2x2    fsdp=4           4 2048 dots  4096 parent once 1 all
gemma3 4+6x3+4   64 v6e:2x2    fsdp=4           1 2048 full  2048 alone  once 1 all
g2b    0+9x2+0   64 v5e:4x4    fsdp=16          1 2048 full  8192 parent once 1 all
g2b    0+9x2+0   64 v5p:2x2x2  fsdp=8           2 2048 full  8192 parent once 1 all
l1b    0+8x2+0  128 v5e:4x4    fsdp=16          2 1024 full  8192 parent once 1 all
l1b    2+6x2+2   64 v6e:2x4    fsdp=4,tensor=2  2 2048 dots  8192 alone  once 1 all
l3b    0+14x2+0 128 v5p:2x2x2  fsdp=8           1 2048 full  8192 parent once 1 all
l8b    0+16x2+0 512 v5p:2x2x4  fsdp=16          1 2048 full 16384 parent once 1 all
l8b    0+16x2+0  64 v5p:2x2x4  fsdp=16          2 2048 full 16384 parent loop 1 all
smol   8+7x2+8   64 v5e:2x2    fsdp=4           8 1024 full  4096 parent once 2 all
tiny   0+11x2+0 256 v5e:4x4    fsdp=16          2 2048 full 16384 parent once 1 relaxations
l3b    4+10x2+4  64 v5e:4x8    fsdp=32          1 2048 full 16384 parent once 1 all
tiny   3+8x2+3  128 v5e:4x4    fsdp=16          2 2048 full 16384 parent once 1 all
tiny   0+11x2+0  32 v5e:2x4    fsdp=8           1 2048 dots  4096 alone  once 1 all
tiny   0+11x2+0 128 v6e:2x2    fsdp=4           4 1024 full  4096 parent once 1 all
tiny   1+10x2+1  64 v5e:4x4    fsdp=8,tensor=2  1 4096 full 16384 parent once 1 all
smol   2+13x2+2  32 v5e:2x2    data=4           8 512 dots  4096 parent once 1 all
smol   0+10x3+0  64 v5e:2x2    fsdp=4          16 1024 full  8192 alone  once 1 all
smol   8+7x2+8   64 v6e:2x2    data=2,fsdp=2    8 1024 full  8192 parent once 1 all
qwen   0+8x3+0   64 v5e:2x4    fsdp=8           1 2048 full  4096 parent once 1 all
qwen   6+6x2+6  128 v5e:4x4    fsdp=16          2 1024 dots  8192 alone  once 1 all
gemma3 1+8x3+1   32 v5e:4x4    fsdp=16          1 1024 full  4096 parent once 1 all
g2b    2+7x2+2   32 v6e:2x4    fsdp=8           1 2048 full  4096 alone  once 1 all
l1b    0+8x2+0   64 v5e:4x4    fsdp=8,tensor=2  2 2048 full 16384 parent once 1 all
l1b    4+4x2+4  128 v5p:2x2x1  fsdp=4           4 2048 full  8192 parent loop 1 all
l3b    0+14x2+0  64 v5p:2x2x2  fsdp=8           2 1024 dots  8192 parent once 1 all
l8b    0+16x2+0 128 v5p:2x2x4  fsdp=16          1 4096 full 16384 parent once 1 all
l8b    4+12x2+4 256 v6e:4x8    fsdp=32          1 2048 full 32768 alone  once 1 all
tiny   2+9x2+2   64 v5e:4x4    fsdp=16          2 1024 full  8192 parent once 1 all
tiny   0+11x2+0 128 v5p:2x2x1  fsdp=4           2 2048 dots  8192 parent once 1 all
tiny   5+6x2+5    0 v5e:2x4    data=2,fsdp=4    1 2048 full  4096 alone  once 1 all
smol   6+9x2+6   32 v5e:2x2    data=4           8 1024 full  4096 parent once 1 all
smol   0+15x2+0  64 v5e:2x2    data=4           4 1024 dots  4096 parent once 1 all
smol   3+8x3+3   64 v6e:2x2    fsdp=4           8 2048 full 16384 parent once 1 all
qwen   2+10x2+2  32 v5e:2x4    fsdp=8           2 1024 full  4096 parent once 1 all
qwen   0+12x2+0  64 v5e:4x4    fsdp=16          1 2048 full  8192 parent loop 1 all
gemma3 2+11x2+2  64 v5e:4x4    fsdp=16          1 2048 full  8192 parent once 1 all
g2b    0+9x2+0  128 v6e:2x4    fsdp=8           1 1024 full  4096 parent once 1 all
g2b    1+8x2+1   32 v5p:2x2x2  fsdp=8           1 2048 dots  4096 parent once 1 all
l1b    1+7x2+1   64 v5e:2x4    fsdp=8           1 2048 full  4096 parent once 1 all
l1b    0+8x2+0  256 v5e:4x4    fsdp=16          1 4096 full 16384 parent once 1 relaxations
l3b    2+12x2+2  64 v5p:2x2x2  fsdp=8           1 4096 full  8192 parent once 1 all
l3b    0+14x2+0  32 v6e:4x4    fsdp=16          2 1024 full  8192 parent once 2 all
l8b    0+16x2+0 256 v5p:2x2x2  fsdp=8           1 2048 full  8192 parent once 1 all
smol   5+10x2+5  64 v5e:2x2    fsdp=4          48 2048 full 65536 alone  once 1 all
smol   5+10x2+5  64 v5e:2x2    fsdp=4          80 2048 full 65536 alone  once 1 all
smol   8+7x2+8   64 v5e:2x2    data=4          32 1024 full 16384 parent once 1 all
smol   0+10x3+0  64 v5e:2x2    fsdp=4          16 1024 dots 16384 alone  once 1 all
tiny   0+11x2+0 128 v5e:4x4    fsdp=16         16 2048 full 65536 parent once 1 all
tiny   4+7x2+4   64 v5e:2x4    fsdp=8           8 4096 full 32768 alone  once 1 all
tiny   0+11x2+0  64 v6e:2x4    fsdp=8           8 2048 dots 32768 parent once 1 all
l1b    0+8x2+0   64 v5e:4x4    fsdp=16          8 2048 full 16384 alone  once 1 all
qwen   0+12x2+0  64 v5e:2x4    fsdp=8          16 2048 full 16384 parent once 1 all
qwen   8+4x2+8   64 v5p:2x2x1  fsdp=4           8 1024 none  8192 alone  once 1 all
gemma3 1+12x2+1  64 v6e:2x4    fsdp=8          16 1024 full 16384 alone  once 1 all
g2b    0+9x2+0   64 v5p:2x2x2  fsdp=8          16 2048 full 16384 parent once 1 all
l3b    0+14x2+0  64 v5p:2x2x2  fsdp=8          16 2048 full 16384 parent once 1 all
l8b    0+16x2+0  64 v5p:2x2x4  fsdp=16         16 2048 full 65536 parent once 1 all
tiny   3+8x2+3   32 v5e:2x4    fsdp=8           2 2048 full  8192 parent once 1 all
tiny   0+11x2+0   0 v6e:2x2    data=2,fsdp=2    2 1024 full  4096 parent once 1 all
tiny   2+6x3+2   64 v5e:4x4    fsdp=8,tensor=2  2 2048 full  8192 parent once 1 all
tiny   0+11x2+0 128 v5e:2x4    fsdp=8           2 1024 full  8192 parent once 1 relaxations
smol   8+7x2+8  128 v5e:2x2    data=4          16 512 full  8192 parent once 1 all
smol   0+10x3+0  32 v6e:2x2    fsdp=4           4 2048 dots  8192 parent once 1 all
smol   5+10x2+5  64 v5e:2x4    fsdp=8           8 2048 full  8192 alone  once 1 all
qwen   0+12x2+0  32 v5e:2x2    fsdp=4           2 2048 full  4096 parent once 1 all
qwen   2+10x2+2 128 v6e:2x4    fsdp=8           2 2048 dots  8192 parent once 1 all
gemma3 0+13x2+0  64 v5e:2x4    fsdp=8           1 2048 full  4096 parent once 1 all
g2b    0+6x3+0   64 v5e:4x4    fsdp=16          2 1024 full  8192 parent once 1 all
l1b    0+8x2+0   64 v6e:2x2    fsdp=4           2 1024 full  4096 parent once 2 all
l1b    3+5x2+3   32 v5e:4x4    fsdp=16          1 2048 dots  8192 parent once 1 all
l3b    2+8x3+2   64 v5p:2x2x2  fsdp=8           2 2048 full 16384 parent once 1 all
l8b    0+16x2+0 128 v5p:2x2x4  fsdp=16          1 2048 dots 16384 parent once 1 all
l8b    4+8x3+4   64 v6e:4x8    fsdp=32          1 4096 full 32768 parent once 1 all
tiny   2+9x2+2  128 v5e:4x8    fsdp=32          4 2048 full 32768 parent once 1 all
tiny   5+4x3+5   64 v5e:2x4    fsdp=8           4 1024 full  8192 alone  once 2 all
tiny   0+11x2+0  64 v6e:4x4    fsdp=8,tensor=2  4 2048 full 16384 parent once 1 all
smol   6+6x3+6   32 v5e:2x2    data=4          24 1024 full 16384 parent once 1 all
smol   0+15x2+0 128 v6e:2x2    fsdp=4          32 1024 dots 16384 parent once 1 all
smol   10+5x2+10 64 v5e:2x4    data=2,fsdp=4   16 2048 full 16384 alone  once 1 all
qwen   3+6x3+3   64 v5e:4x4    fsdp=16          8 2048 full 32768 parent once 1 all
qwen   0+12x2+0  32 v6e:2x2    fsdp=4           4 1024 full  8192 parent once 4 all
gemma3 3+10x2+3  64 v5e:4x4    fsdp=16          4 2048 full 16384 parent once 1 all
g2b    0+9x2+0   64 v6e:4x4    fsdp=16          4 1024 full 16384 parent once 1 all
l1b    0+8x2+0   32 v5e:4x4    fsdp=16          4 2048 full 16384 parent once 1 all
l1b    2+4x3+2   64 v6e:2x4    fsdp=8           2 2048 dots  8192 parent once 1 all
l3b    4+10x2+4 128 v5p:2x2x2  fsdp=8           8 2048 full 16384 alone  once 1 all
l3b    0+14x2+0  64 v6e:4x8    fsdp=32          2 2048 full 32768 parent once 2 all
l8b    0+16x2+0  64 v5p:2x2x4  fsdp=16          4 2048 full 32768 parent once 1 relaxations
l8b    8+8x2+8   64 v6e:4x8    fsdp=32          2 2048 full 32768 parent once 1 all
"""
# Drawn at random among those that fill 15 to 90 % of a chip, two a parent.
CHECKED = """
smol   2+13x2+2  256 v5e:2x4    data=2,fsdp=4    8 2048 full 16384 parent once 1 all
tiny   3+8x2+3    32 v6e:4x4    fsdp=16          8 4096 full  4096 parent once 2 all
l1b    0+8x2+0    64 v6e:4x4    fsdp=16         16 4096 full 32768 parent once 1 all
l3b    2+12x2+2   16 v6e:4x4    data=2,fsdp=8    1 4096 full  8192 parent once 1 all
l8b    3+13x2+3   32 v5p:2x2x4  data=2,fsdp=8    8 1024 dots 16384 alone  once 1 all
qwen   1+11x2+1   32 v5e:2x4    data=2,fsdp=4    2 1024 full 32768 parent once 1 all
gemma3 3+10x2+3  256 v5e:2x4    fsdp=8           2 1024 full  4096 parent once 1 all
g2b    1+8x2+1    16 v6e:2x4    fsdp=8           4 1024 full  4096 alone  once 1 all
smol   4+11x2+4   16 v5e:2x2    data=2,fsdp=2    4 4096 full 16384 alone  once 1 all
tiny   4+7x2+4   256 v5e:2x4    fsdp=8           8 2048 full  8192 parent once 1 all
l1b    3+5x2+3   256 v5e:4x4    fsdp=8,tensor=2  2 4096 full 16384 alone  once 1 all
l3b    3+11x2+3  128 v6e:4x4    fsdp=16          4 1024 full 32768 parent once 1 all
l8b    4+12x2+4  256 v6e:4x8    fsdp=32          4 2048 full  8192 alone  once 1 all
qwen   3+9x2+3   128 v5e:2x4    fsdp=8          16 4096 full  4096 parent once 1 all
gemma3 1+12x2+1   16 v5e:4x4    fsdp=16         16 1024 full 32768 parent once 1 all
g2b    4+5x2+4   128 v6e:4x4    fsdp=16          1 4096 dots 32768 parent once 1 all
"""


def programs(table: str) -> list[tuple]:
  """The rows of a table, numbers as numbers."""
  number = lambda word: int(word) if word.isdigit() else word
  return [tuple(map(number, line.split())) for line in table.splitlines() if line]


TEACHER = {'parent': 'distilled', 'alone': 'alone'}


def name_of(row: tuple) -> str:
  """A program in words."""
  parent, shape, rank, chips, mesh, rows, length, remat, chunk, kd, gather, parts, train = row
  words = [parent, shape, f'rank {rank}', chips, mesh, f'{rows} x {length}', remat]
  words += [f'chunk {chunk}', TEACHER[kd], f'gather {gather}']
  words += [f'{parts} microbatches'] * (parts > 1) + [train] * (train != 'all')
  return ', '.join(words)


PROGRAMS = {name_of(row): row for row in programs(FITTED + CHECKED)}


def settings(row: tuple):
  """(topology, mesh, recipe, parent, child) of a program."""
  parent, shape, rank, chips, mesh, rows, length, remat, chunk, kd, gather, parts, train = row
  found = re.fullmatch(r'(\d+)\+(\d+)x(\d+)\+(\d+)', shape)
  assert found
  prelude, block, loops, coda = map(int, found.groups())
  sizes = {axis: int(n) for axis, n in (part.split('=') for part in mesh.split(','))}
  recipe = Recipe.from_dict(
    {
      'batch': rows * sizes.get('data', 1) * sizes.get('fsdp', 1),
      'length': length,
      'dtype': 'bfloat16',
      'remat': remat,
      'accumulate': parts,
      'gather': gather,
      'mesh': sizes,
      'optimizer': {'train': train},
      'loss': {'chunk_tokens': chunk, 'distillation': float(kd == 'parent')},
      'convert': {
        'prelude': prelude,
        'block': block,
        'loops': loops,
        'coda': coda,
        'rank': rank,
        'loop_norms': False,
      },
    }
  )
  parent = PARENTS[parent]
  return topology.parse(chips), sizes, recipe, parent, plan(parent, recipe.convert)


def analytic(row: tuple) -> Memory:
  """The closed form."""
  _, sizes, recipe, parent, child = settings(row)
  return search.analytic(recipe, parent, child, sizes, True)


def compiled(row: tuple) -> dict[str, Any]:
  """The figures of the compiler."""
  chips, sizes, recipe, parent, child = settings(row)
  mesh = sharding.make_mesh(sizes, topology.devices(chips))
  program = train_program(recipe, parent if recipe.loss.distillation else None, child, mesh)
  lowered = program.lower('tpu')
  begin = time.monotonic()
  found = lowered.compile(compiler_options=QUICK).memory_analysis()
  return {
    'compiled_bytes': found.peak_memory_in_bytes,
    'compiled_arguments': found.argument_size_in_bytes,
    'compile_seconds': round(time.monotonic() - begin, 1),
  }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Errors of the closed form over some programs, in per cent."""
  errors = [100 * (r['analytic_bytes'] / r['compiled_bytes'] - 1) for r in rows]
  sizes = sorted(map(abs, errors))
  return {
    'programs': len(rows),
    'mean_error': round(statistics.mean(sizes), 2),
    'median_error': round(statistics.median(sizes), 2),
    'worst_error': round(max(errors, key=abs), 2),
    'within_8': sum(e < 8 for e in sizes),
  }


def main(_) -> None:
  """Compiles and compares."""
  jax.config.update('jax_platforms', 'cpu')
  out = Path(_OUT.value) if _OUT.value else None
  known = {}
  if out and out.is_file():
    known = {r['name']: r for r in json.loads(out.read_text())['programs']}
  done, fitted_to = [], programs(FITTED)
  for name, row in PROGRAMS.items():
    if _ONLY.value not in name:
      continue
    old = known.get(name) or compiled(row)
    entry = {
      'name': name,
      'fitted': row in fitted_to,
      **{k: old[k] for k in ('compiled_bytes', 'compiled_arguments', 'compile_seconds')},
      'analytic_bytes': analytic(row).peak,
    }
    done.append(entry)
    ratio = entry['analytic_bytes'] / entry['compiled_bytes']
    print(f'{name}: {entry["compiled_bytes"] / 2**30:.3f} GiB, ratio {ratio:.3f}', flush=True)
    result: dict[str, Any] = {'compiler': 'libtpu 0.0.42', 'jax': jax.__version__}
    for group, fitted in (('fitted', True), ('checked', False)):
      rows = [r for r in done if r['fitted'] == fitted]
      if rows:
        result[group] = summary(rows)
    result['programs'] = done
    if out:
      out.write_text(json.dumps(result, indent=1) + '\n')
  print(json.dumps({k: v for k, v in result.items() if k != 'programs'}))


if __name__ == '__main__':
  command.run(main)
