"""Appendix K of the paper: what it measured, what it simulated, and our turn.

    python -m benchmarks.paper_tables

The paper's tokens a second (table K.2, prompts of 512 tokens and answers of
2,048) come from its block times (table K.1) and from how many loops its oracle
lets a token take, which it does not print. Rows of one group were trained
alike and differ by the rank of their LoRA, so they share, nearly, one exit
rate: it is taken from the first row of a group, and the other rows follow from
their block times alone. With the same exit rates, the times of table K.3
(prompts of 64, answers of 256) give the ratios of table K.4.

What cannot follow: the static batches of K.2 (the lengths of its sequences are
not published), and the tokens a second of K.4, which in print repeat K.2's.
"""

import dataclasses

import numpy as np

from rrt import command, console
from rrt.infer.engine.simulate import paper_rate

CORPORA = ('SlimPajama', 'RedPajama', 'PG19')


@dataclasses.dataclass(frozen=True)
class Row:
  """One model of tables K.1 to K.4.

  Attributes:
    family, loops, rank: rank 0 has no LoRA.
    weight: c of the aggressive exit losses; 0 for a model without exits.
    block_ms, short_ms: milliseconds a token and loop at the largest batch, in
      K.1 and K.3.
    rates: tokens a second on each corpus, in K.2; of a model without exits
      with continuous batching.
    short_ratio: K.4's speed over the vanilla model's continuous batching.
  """

  family: str
  loops: int
  rank: int
  weight: float
  block_ms: float
  short_ms: float
  rates: tuple[float, float, float]
  short_ratio: float


# Continuous batching of the vanilla models; the last field is unused, the one
# before it of K.2; SHORT has K.4's.
VANILLA = {
  'Gemma': Row('Gemma', 1, 0, 0, 0.616, 0.188, (1622, 1604, 1357), 1),
  'TinyLlama': Row('TinyLlama', 1, 0, 0, 0.815, 0.129, (1227, 1225, 1194), 1),
  'Pythia': Row('Pythia', 1, 0, 0, 1.206, 0.171, (829, 827, 822), 1),
}
SHORT = {'Gemma': (5287, 5060, 4796), 'TinyLlama': (7709, 7481, 4090), 'Pythia': (5813, 5724, 5149)}
ROWS = (
  Row('Gemma', 2, 0, 0.1, 0.265, 0.091, (3159, 3050, 2421), 1.59),
  Row('Gemma', 2, 64, 0.1, 0.323, 0.112, (2357, 2255, 1858), 1.19),
  Row('Gemma', 2, 128, 0.1, 0.324, 0.113, (2355, 2250, 1844), 1.19),
  Row('Gemma', 2, 256, 0.1, 0.372, 0.115, (2047, 1976, 1740), 1.18),
  Row('Gemma', 2, 512, 0.1, 0.422, 0.127, (1806, 1754, 1598), 1.10),
  Row('Gemma', 2, 64, 0.3, 0.323, 0.112, (2454, 2357, 1929), 1.24),
  Row('Gemma', 2, 128, 0.3, 0.324, 0.113, (2445, 2346, 1926), 1.24),
  Row('Gemma', 2, 256, 0.3, 0.372, 0.115, (2123, 2056, 1804), 1.22),
  Row('Gemma', 2, 512, 0.3, 0.422, 0.127, (1870, 1819, 1655), 1.14),
  Row('Gemma', 3, 0, 0.1, 0.182, 0.058, (3120, 3041, 2729), 1.66),
  Row('Gemma', 3, 128, 0.1, 0.221, 0.074, (2290, 2230, 2007), 1.19),
  Row('Gemma', 3, 64, 0.1, 0.182, 0.075, (2334, 2274, 2059), 1.19),
  Row('Gemma', 3, 256, 0.1, 0.226, 0.076, (2281, 2219, 1984), 1.18),
  Row('Gemma', 3, 512, 0.1, 0.237, 0.090, (2181, 2122, 1900), 1.03),
  Row('Gemma', 3, 128, 0.3, 0.221, 0.074, (2376, 2321, 2084), 1.23),
  Row('Gemma', 3, 64, 0.3, 0.182, 0.075, (2427, 2372, 2143), 1.23),
  Row('Gemma', 3, 256, 0.3, 0.226, 0.076, (2359, 2300, 2039), 1.22),
  Row('Gemma', 3, 512, 0.3, 0.237, 0.090, (2251, 2191, 1975), 1.06),
  Row('TinyLlama', 2, 0, 0.1, 0.413, 0.064, (2038, 2023, 1933), 1.62),
  Row('TinyLlama', 2, 64, 0.1, 0.421, 0.068, (1733, 1719, 1617), 1.32),
  Row('TinyLlama', 2, 128, 0.1, 0.421, 0.069, (1733, 1717, 1609), 1.30),
  Row('TinyLlama', 2, 256, 0.1, 0.423, 0.071, (1728, 1714, 1606), 1.28),
  Row('TinyLlama', 2, 512, 0.1, 0.428, 0.075, (1716, 1702, 1581), 1.23),
  Row('TinyLlama', 2, 64, 0.3, 0.421, 0.068, (1810, 1796, 1688), 1.38),
  Row('TinyLlama', 2, 128, 0.3, 0.421, 0.069, (1802, 1787, 1668), 1.35),
  Row('TinyLlama', 2, 256, 0.3, 0.423, 0.071, (1793, 1779, 1668), 1.33),
  Row('TinyLlama', 2, 512, 0.3, 0.428, 0.075, (1778, 1763, 1637), 1.27),
  Row('Pythia', 2, 0, 0.1, 0.606, 0.086, (1339, 1333, 1281), 1.57),
  Row('Pythia', 2, 64, 0.1, 0.626, 0.097, (1205, 1203, 1140), 1.28),
  Row('Pythia', 2, 128, 0.1, 0.642, 0.101, (1156, 1180, 1108), 1.17),
  Row('Pythia', 2, 256, 0.1, 0.662, 0.115, (1138, 1139, 1071), 1.08),
  Row('Pythia', 2, 512, 0.1, 0.702, 0.139, (1051, 1077, 1021), 0.87),
  Row('Pythia', 2, 64, 0.3, 0.626, 0.097, (1254, 1252, 1190), 1.33),
  Row('Pythia', 2, 128, 0.3, 0.642, 0.101, (1200, 1226, 1153), 1.22),
  Row('Pythia', 2, 256, 0.3, 0.662, 0.115, (1180, 1180, 1112), 1.12),
  Row('Pythia', 2, 512, 0.3, 0.702, 0.139, (1088, 1114, 1058), 0.90),
)


@dataclasses.dataclass(frozen=True)
class Found:
  """What follows for a row.

  Attributes:
    row: of the paper.
    fitted: whether its exit rate was taken from itself.
    loops: mean loops of its group, by corpus.
    rates: tokens a second that follow, by corpus.
    error: mean of the corpora's relative errors, signed.
    short_ratio: that follows from K.3's times.
  """

  row: Row
  fitted: bool
  loops: tuple[float, ...]
  rates: tuple[float, ...]
  error: float
  short_ratio: float


def vanilla_rates(family: str) -> tuple[float, ...]:
  """Tokens a second of a full batch of a vanilla model, from K.1."""
  return (paper_rate(VANILLA[family].block_ms, 1),) * len(CORPORA)


def rebuild() -> list[Found]:
  """All rows of K.2 that let tokens leave, from K.1's times."""
  loops_of: dict[tuple, tuple[float, ...]] = {}
  found = []
  for row in ROWS:
    base = VANILLA[row.family]
    # How full the paper's batches were, by what vanilla lost on that corpus.
    full = [r / paper_rate(base.block_ms, 1) for r in base.rates]
    short_full = [r / paper_rate(base.short_ms, 1) for r in SHORT[row.family]]
    group = (row.family, row.loops, bool(row.rank), row.weight)
    fitted = group not in loops_of
    if fitted:
      loops_of[group] = tuple(
        paper_rate(row.block_ms, 1, f) / r for f, r in zip(full, row.rates, strict=True)
      )
    loops = loops_of[group]
    pairs = lambda fs, loops=loops: zip(fs, loops, strict=True)
    rates = tuple(paper_rate(row.block_ms, d, f) for f, d in pairs(full))
    short = [paper_rate(row.short_ms, d, f) for f, d in pairs(short_full)]
    found.append(
      Found(
        row,
        fitted,
        loops,
        rates,
        float(np.mean(np.divide(rates, row.rates))) - 1,
        float(np.mean(short) / np.mean(SHORT[row.family])),
      )
    )
  return found


def main(_):
  found = rebuild()
  console.table(
    [
      (
        f.row.family,
        f.row.loops,
        f.row.rank or '-',
        f.row.weight,
        f.loops[0],
        f.row.rates[0],
        f.rates[0],
        'fitted' if f.fitted else f'{100 * f.error:+.1f} %',
        f.row.short_ratio,
        f.short_ratio,
      )
      for f in found
    ],
    ('model', 'loops', 'rank', 'c', 'mean loops', 'K.2', 'ours', 'error', 'K.4', 'ours'),
  )
  errors = [abs(f.error) for f in found if not f.fitted]
  ratios = [abs(f.short_ratio / f.row.short_ratio - 1) for f in found]
  console.finish(
    {
      'rows': len(found),
      'predicted': len(errors),
      'median_error': float(np.median(errors)),
      'largest_error': max(errors),
      'median_short_error': float(np.median(ratios)),
      'largest_short_error': max(ratios),
    }
  )


if __name__ == '__main__':
  command.run(main)
