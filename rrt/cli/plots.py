"""Curves of a run, and the demo's page: one HTML file with its pictures."""

from collections.abc import Sequence
import html
import io
import logging
from typing import Any

from rrt.errors import InputError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
       padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .9em; text-align: left; vertical-align: top;
         border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; }
.loop1 { background: #c8e6c9 } .loop2 { background: #fff3b0 }
.loop3 { background: #ffd6a5 } .loop4 { background: #ffadad }
.loop5 { background: #e0bbff }
"""


def open_pyplot():
  """matplotlib's pyplot, drawing to memory.

  Raises:
    InputError: matplotlib is not installed.
  """
  try:
    import matplotlib
  except ImportError as e:
    raise InputError(
      'The curves need matplotlib: pip install "relaxed-recursive-transformers[demo]".'
    ) from e
  matplotlib.use('Agg')
  # It tells of the fonts that it lists, once, at the level of absl's programs.
  logging.getLogger('matplotlib').setLevel(logging.WARNING)
  from matplotlib import pyplot

  return pyplot


def loss_curves(history: Sequence[dict[str, Any]], levels: dict[str, float]) -> str:
  """Training losses and held-out cross-entropy by step, as SVG.

  Args:
    history: rows of metrics of a run.
    levels: held-out cross-entropies to draw as lines, in nats, by name.

  Raises:
    InputError: matplotlib is not installed.
  """
  pyplot = open_pyplot()
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
  steps = [r for r in history if 'train/loss' in r]
  for key, name in (
    ('train/cross_entropy', 'cross-entropy'),
    ('train/distillation', 'divergence from the parent'),
  ):
    points = [(r['step'], r[key]) for r in steps if key in r]
    if points:
      left.plot(*zip(*points, strict=True), label=name)
  left.set(xlabel='step', ylabel='nats a token', title='training text')
  left.set_ylim(bottom=0)
  heldout = [(r['step'], r['eval/cross_entropy']) for r in history if 'eval/cross_entropy' in r]
  if heldout:
    right.plot(*zip(*heldout, strict=True), 'o-', label='child, uptrained')
  for i, (name, value) in enumerate(levels.items()):
    right.axhline(value, ls='--', color=f'C{i + 1}', label=name)
  right.set(xlabel='step', ylabel='nats a token', title='held-out text')
  for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend()
  return svg(figure)


def frontier(rows: Sequence[Sequence[Any]], parent: tuple[int, int, float]) -> str:
  """Cross-entropy by parameters of the children considered, as SVG.

  Args:
    rows: name, unique parameters, layers run and nats of each child.
    parent: the parent's unique parameters, layers run and nats.

  Raises:
    InputError: matplotlib is not installed.
  """
  pyplot = open_pyplot()
  figure, axes = pyplot.subplots(figsize=(7, 4.5))
  points = [row[1:] for row in rows] + [list(parent)]
  params, layers, nats = zip(*points, strict=True)
  dots = axes.scatter([p / 1e6 for p in params], nats, c=layers, cmap='viridis_r', zorder=2)
  figure.colorbar(dots, label='layers run')
  best, edge = float('inf'), []
  for p, _, n in sorted(points, key=lambda point: (point[0], point[2])):
    if n < best:
      best = n
      edge.append((p / 1e6, n))
  axes.plot(*zip(*edge, strict=True), color='0.6', zorder=1)
  axes.annotate('parent', (parent[0] / 1e6, parent[2]), xytext=(-40, 8), textcoords='offset points')
  axes.set(xlabel='unique parameters, millions', ylabel='nats a token, held-out calibration text')
  axes.grid(alpha=0.3)
  return svg(figure)


def depth_curve(points: Sequence[Any], loops: int) -> str:
  """Quality against depth, a line for each gate and policy, as SVG.

  Args:
    points: of `rrt.evals.depth`.
    loops: of the model at full depth.

  Raises:
    InputError: matplotlib is not installed.
  """
  pyplot = open_pyplot()
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
  lines: dict[tuple[str, str], list[Any]] = {}
  for point in points:
    lines.setdefault((point.gate, point.kv), []).append(point)
  for (gate, kv), of_line in lines.items():
    of_line.sort(key=lambda p: p.mean_loops)
    x = [p.mean_loops for p in of_line]
    name = f'{gate}, {kv}'
    left.plot(x, [p.lost_nats for p in of_line], 'o-', label=name)
    right.plot(x, [100 * p.agreement for p in of_line], 'o-', label=name)
  left.set(xlabel='loops a token', ylabel='nats lost', title='cross-entropy')
  right.set(xlabel='loops a token', ylabel='%', title='agreement with full depth')
  for axes in (left, right):
    axes.set_xlim(0.95, loops + 0.05)
    axes.grid(alpha=0.3)
  left.legend(fontsize='small')
  return svg(figure)


def svg(figure) -> str:
  """The figure as an <svg> element; it is closed."""
  figure.tight_layout()
  buffer = io.StringIO()
  figure.savefig(buffer, format='svg')
  open_pyplot().close(figure)
  return buffer.getvalue()[buffer.getvalue().index('<svg') :]


def demo_page(
  *,
  title: str,
  prompts: Sequence[str],
  rows: dict[str, dict[str, Any]],
  history: Sequence[dict[str, Any]],
  seconds: float,
  tokens_a_step: int,
  exits: dict[str, Any],
  ways: dict[str, dict[str, Any]],
) -> str:
  """The demo's report as one HTML page without outside parts."""
  say = html.escape
  # The plain start, three times as high, would flatten the curve: it is in
  # the table.
  levels = {
    'parent': rows['parent']['nll_nats'],
    'calibrated start': rows['calibrated']['nll_nats'],
  }
  numbers = ''.join(
    _row(
      name,
      f'{r["params_unique"]:,}',
      f'{r["nll_nats"]:.3f}',
      f'{r["bits_per_byte"]:.3f}',
      f'{r["seconds"]:.0f}',
    )
    for name, r in rows.items()
  )
  texts = ''.join(
    f'<h3>{say(prompt)} ...</h3><table>'
    + ''.join(
      f'<tr><th>{say(name)}</th><td>{say(r["texts"][i])}</td></tr>' for name, r in rows.items()
    )
    + '</table>'
    for i, prompt in enumerate(prompts)
  )
  steps = max((r['step'] for r in history if 'train/loss' in r), default=0)
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{say(title)}</title>
<style>{_STYLE}</style></head><body>
<h1>{say(title)}</h1>
<p>Held-out text, {steps} steps of {tokens_a_step:,} tokens, {seconds:.0f} s
in all.</p>
<table><tr><th>model</th><th class="number">parameters</th>
<th class="number">nats a token</th><th class="number">bits a byte</th>
<th class="number">seconds to make</th></tr>{numbers}</table>
{loss_curves(history, levels)}
<h2>What they write</h2>{texts}
{_exits(exits, ways) if exits else ''}
</body></html>
"""


def _row(name: str, *numbers: str) -> str:
  """A row of a table: what it is about, then its numbers."""
  cells = ''.join(f'<td class="number">{n}</td>' for n in numbers)
  return f'<tr><td>{html.escape(name)}</td>{cells}</tr>'


def _exits(exits: dict[str, Any], ways: dict[str, dict[str, Any]]) -> str:
  """The part of the page about tokens that leave early."""
  say = html.escape
  held, first = exits['held'], exits['first']
  # The text with the most exits.
  depths = [sum(n for _, n in text) for text in ways['exits']['pieces']]
  shown = depths.index(min(depths))
  numbers = ''.join(
    _row(
      name,
      f'{w["tokens_per_second"]:.1f}',
      f'{w["loops"]:.2f}',
      f'{w["same"]} of {len(w["tokens"])}',
    )
    for name, w in ways.items()
  )
  texts = ''.join(
    f'<p><b>{say(name)}</b><br>{say(w["prompts"][shown])}'
    + ''.join(
      f'<span class="loop{min(n, 5)}">{say(piece)}</span>' for piece, n in w['pieces'][shown]
    )
    + '</p>'
    for name, w in ways.items()
  )
  legend = ' '.join(
    f'<span class="loop{min(n, 5)}">after loop {n}</span>' for n in range(1, exits['loops'] + 1)
  )
  return f"""<h2>Tokens that leave early</h2>
<p>All of them after loop 1: {first.lost_nats:+.3f} nats a token,
{100 * first.agreement:.0f} % as at full depth. The gate, calibrated to lose
less than {exits['exit_loss']} nats: {held.mean_loops:.2f} loops a token,
{held.lost_nats:+.3f} nats, {100 * held.agreement:.0f} % as at full depth.</p>
<table><tr><th>engine, {len(ways['exits']['tokens'])} texts at once</th>
<th class="number">tokens a second</th><th class="number">loops a token</th>
<th class="number">as full depth</th></tr>{numbers}</table>
<p>{legend}</p>{texts}"""
