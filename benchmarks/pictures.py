"""The pictures beside the tables of `serving`."""

from pathlib import Path

from rrt.cli import plots


def draw(figures: dict, out: Path) -> None:
  """Speed of each rung and, under load, waits and goodput, as one SVG."""
  pyplot = plots.open_pyplot()
  rungs = {
    name: row
    for name, row in figures.items()
    if isinstance(row, dict) and 'tokens_per_second' in row
  }
  loads = figures.get('arrivals', [])
  count = 3 if loads else 1
  figure, all_axes = pyplot.subplots(1, count, figsize=(5.5 * count, 4), squeeze=False)
  drain, *others = all_axes[0]
  names = list(rungs)[::-1]
  speeds = [rungs[n]['tokens_per_second'] for n in names]
  # The quartiles of the seconds, as those of the speed to first order.
  spread = [
    rungs[n]['seconds_iqr'] / rungs[n]['seconds'] * v / 2
    for n, v in zip(names, speeds, strict=True)
  ]
  bars = drain.barh(names, speeds, xerr=spread)
  drain.bar_label(bars, fmt='%.0f', padding=6)
  drain.margins(x=0.15)
  drain.set(xlabel='tokens a second', title='all requests wait at the start')
  full = rungs.get('depth-wise') or rungs.get('tied')
  if full:
    bound = figures['bound'] * full['tokens_per_second']
    drain.axvline(bound, ls='--', color='C3')
    drain.set_title('drain; dashed: bound of the replayed exits', fontsize=11)
  for axes, field, label in zip(
    others,
    ('ttft_p50', 'goodput'),
    ('median seconds to the first token', 'requests a second within limits'),
    strict=False,
  ):
    rates = sorted({row['rate'] for row in loads})
    if len(rates) == 1:
      bars = axes.barh([r['rung'] for r in loads][::-1], [r[field] for r in loads][::-1])
      axes.bar_label(bars, fmt='%.2f', padding=4)
      axes.margins(x=0.15)
      axes.set(xlabel=label, title=f'{rates[0]:.2f} requests a second arrive')
      continue
    for name in dict.fromkeys(row['rung'] for row in loads):
      points = [(r['rate'], r[field]) for r in loads if r['rung'] == name]
      axes.plot(*zip(*points, strict=True), 'o-', label=name)
    axes.set(xlabel='requests a second that arrive', ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  out.write_text(plots.svg(figure))
