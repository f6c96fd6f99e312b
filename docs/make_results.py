"""Makes the measured part of the documentation from benchmarks/results/*.json.

    python docs/make_results.py

Writes tables and pictures into docs/generated/, which is not committed; `make docs`
runs it first. The table of shapes comes from the closed-form counts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
import types
from typing import Any

from benchmarks import pictures
from rrt.cli import plots
from rrt.config import ModelConfig
from rrt.models.count import count_params
from rrt.planner import search
from rrt.relax.ranks import with_ranks
from rrt.train.recipe import Recipe

HERE = Path(__file__).parent
RESULTS = HERE.parent / 'benchmarks' / 'results'
OUT = HERE / 'generated'


def table(headers: list[str], rows: list[list[Any]]) -> str:
  """A Markdown table; numbers are right-aligned."""
  number = [
    bool(rows) and all(isinstance(r[i], (int, float)) for r in rows) for i in range(len(headers))
  ]
  lines = ['| ' + ' | '.join(headers) + ' |']
  lines.append('|' + '|'.join('---:' if n else '---' for n in number) + '|')
  lines += ['| ' + ' | '.join(map(cell, row)) + ' |' for row in rows]
  return '\n'.join(lines) + '\n'


def cell(value: Any) -> str:
  """A value as the tables show it."""
  if isinstance(value, float):
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
  return f'{value:,}' if isinstance(value, int) else '' if value is None else str(value)


def scalars(figures: dict[str, Any]) -> dict[str, Any]:
  """The figures that are numbers or short texts, of nested objects by path."""
  found: dict[str, Any] = {}
  for name, value in figures.items():
    if isinstance(value, dict):
      found |= {f'{name}, {k}': v for k, v in scalars(value).items()}
    elif isinstance(value, (int, float)) or (isinstance(value, str) and len(value) < 80):
      found[name] = value
  return found


def machine(figures: dict[str, Any]) -> str:
  """The line that says what a file was measured on."""
  m = figures.get('machine', figures)
  if 'cpu' not in m:
    return ''
  units = ', '.join(u for u, name in (('AVX-512', 'avx512'), ('AMX', 'amx')) if m.get(name))
  parts = [f'{m.get("cores", 2)} cores of {m["cpu"]}' + (f' with {units}' if units else '')]
  parts += [f'{p} {m[p]}' for p in ('jax', 'torch', 'transformers') if p in m]
  return '; '.join(parts) + '.\n'


def serving_runs() -> str:
  """All runs of `benchmarks.serving`: a table and a picture each."""
  parts = ['# Serving: all runs\n\nMade from `benchmarks/results/serving_*.json`.\n']
  columns = ('tokens_per_second', 'seconds', 'seconds_iqr', 'times_tied', 'mean_loops', 'bound')
  names = ('tokens/s', 'seconds', 'iqr', 'times tied', 'loops', 'bound')
  for path in sorted(RESULTS.glob('serving_*.json')):
    figures = json.loads(path.read_text())
    rungs = {k: v for k, v in figures.items() if isinstance(v, dict) and 'tokens_per_second' in v}
    if not rungs:
      continue
    parts.append(f'## {path.stem}\n\n{machine(figures)}')
    if 'seconds' in next(iter(rungs.values())):
      pictures.draw(figures, OUT / f'{path.stem}.svg')
      parts.append(f'![Tokens a second of each contender]({path.stem}.svg)\n')
    rows = [[name, *(row.get(c) for c in columns)] for name, row in rungs.items()]
    kept = [i for i in range(len(columns)) if any(r[i + 1] is not None for r in rows)]
    headers = ['', *(names[i] for i in kept)]
    parts.append(table(headers, [[r[0], *(r[i + 1] for i in kept)] for r in rows]))
  return '\n'.join(parts)


def exit_runs() -> str:
  """The quality-depth curves."""
  parts = ['# Early exits: all points\n\nMade from `benchmarks/results/exits_*.json`.\n']
  for path in sorted(RESULTS.glob('exits_*.json')):
    figures = json.loads(path.read_text())
    points = [types.SimpleNamespace(**p) for p in figures.get('exits', [])]
    if not points:
      continue
    (OUT / f'{path.stem}.svg').write_text(plots.depth_curve(points, figures['loops']))
    parts.append(
      f'## {path.stem}\n\n{figures["model"]}; full depth {figures["nll_nats"]:.3f} nats.\n'
    )
    parts.append(f'![Nats lost and agreement by mean loops]({path.stem}.svg)\n')
    rows = [
      [p.gate, p.kv, p.threshold, p.mean_loops, p.lost_nats, 100 * p.agreement] for p in points
    ]
    parts.append(
      table(['gate', 'cache', 'threshold', 'loops a token', 'nats lost', 'agreement, %'], rows)
    )
  return '\n'.join(parts)


def other_runs() -> str:
  """Every other file, all its numbers."""
  parts = ['# All other figures\n\nMade from `benchmarks/results/*.json`.\n']
  for path in sorted(RESULTS.glob('*.json')):
    if path.stem.startswith(('serving_', 'exits_')) and 'tasks' not in path.stem:
      continue
    figures = json.loads(path.read_text())
    rows = [[name, value] for name, value in scalars(figures).items()]
    parts.append(f'## {path.stem}\n\n{machine(figures)}\n' + table(['figure', 'value'], rows))
  return '\n'.join(parts)


SIZES = {
  'SmolLM2-135M': (49_152, 576, 1536, 9, 3, 64, 30, True),
  'Llama 3.2 1B': (128_256, 2048, 8192, 32, 8, 64, 16, True),
  'Llama 3.1 8B': (128_256, 4096, 14_336, 32, 8, 128, 32, False),
}


def training(child: ModelConfig, parent: ModelConfig) -> float:
  """GiB a chip of 16, as the planner has it; the parent itself is trained without one."""
  recipe = Recipe.from_dict(
    {
      'batch': 16,
      'length': 2048,
      'dtype': 'bfloat16',
      'remat': 'full',
      'loss': {'chunk_tokens': 16384, 'distillation': float(child is not parent)},
    }
  )
  return search.analytic(recipe, parent, child, {'fsdp': 16}, True).peak / 2**30


def shapes() -> str:
  """Parameters, bytes of weights, of cache and of training by shape, in closed form."""
  rows = []
  for name, (vocab, d, f, h, g, size, layers, tied) in SIZES.items():
    parent = ModelConfig(
      family='llama',
      vocab_size=vocab,
      d_model=d,
      d_ff=f,
      num_heads=h,
      num_kv_heads=g,
      head_dim=size,
      block_layers=layers,
      tie_embeddings=tied,
    )
    cache = 2 * layers * g * size * 2 / 1024
    total = count_params(parent).unique
    gib = training(parent, parent)
    words = f'{layers} layers, not looped'
    rows.append([name, words, total, total * 2 / 2**30, cache, gib, 1.0])
    quarter = round(layers / 4)
    quarter += (layers - 2 * quarter) % 2
    for prelude, loops, coda in ((quarter, 2, quarter), (0, 2, 0)):
      rank = 64 if d < 2000 else 128
      block = (layers - prelude - coda) // loops
      config = parent.with_recursion(
        prelude=prelude, block=block, loops=loops, coda=coda, loop_norms=True
      )
      config = dataclasses.replace(config, relax=with_ranks(config, rank, None))
      unique = count_params(config).unique
      words = f'{block} layers run {loops} times'
      if prelude:
        words = f'{prelude} layers, {words}, {coda} layers'
      words = f'{words}; rank {rank}'
      gib = training(config, parent)
      rows.append([name, words, unique, unique * 2 / 2**30, cache, gib, unique / total])
  return table(
    [
      'model',
      'shape',
      'parameters',
      'weights, GiB (bfloat16)',
      'cache, KiB a token',
      'training, GiB a chip',
      'of the parent',
    ],
    rows,
  )


def plan() -> str:
  """The planner's closed form beside the compiler's figures."""
  figures = json.loads((RESULTS / 'plan.json').read_text())
  groups = [
    [
      {'fitted': 'fitted to', 'checked': 'others'}[name],
      figures[name]['programs'],
      figures[name]['mean_error'],
      figures[name]['median_error'],
      figures[name]['worst_error'],
    ]
    for name in ('fitted', 'checked')
  ]
  rows = [
    [
      r['name'],
      round(r['compiled_bytes'] / 2**30, 2),
      round(100 * (r['analytic_bytes'] / r['compiled_bytes'] - 1), 1),
      r['compile_seconds'],
    ]
    for r in figures['programs']
    if not r['fitted']
  ]
  heads = ['programs', 'number', 'mean error, %', 'median, %', 'worst, %']
  return (
    table(heads, groups)
    + '\nThe others, drawn at random among shapes that fill 15 to 90 % of a chip (`python -m '
    f'benchmarks.plan`, {figures["compiler"]}). No factor comes from them, but the last change of '
    'the form was made when they were known:\n\n'
    + table(['program', 'compiled, GiB a chip', 'closed form, %', 'seconds to compile'], rows)
  )


def main() -> None:
  """Writes all generated files."""
  OUT.mkdir(exist_ok=True)
  for name, make in (
    ('serving_runs', serving_runs),
    ('exit_runs', exit_runs),
    ('other_runs', other_runs),
    ('shapes', shapes),
    ('plan', plan),
  ):
    (OUT / f'{name}.md').write_text(make())


if __name__ == '__main__':
  main()
