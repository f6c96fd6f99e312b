"""Compares this checkout with another one, side by side in one run.

python -m benchmarks.compare --other=../old --repeats=5

Two processes, one a checkout, take turns at the same work: a training step,
prefill, decoding, and the engine at full depth and with replayed exits. Each
converts SmolLM2-135M itself (means and plain SVD, which is the same in both), so
that no file format has to be shared. The ratio of medians is what counts; above 1
this checkout is faster.
"""

import json
from pathlib import Path
import statistics
import subprocess
import sys

from absl import flags

from benchmarks import common
from rrt import command, console
from rrt.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string('other', None, 'Directory of the other checkout.')
flags.DEFINE_integer('repeats', 5, 'Turns of each.')
flags.DEFINE_string('out', None, 'JSON file for the figures.')

WORK = ('train', 'prefill', 'decode', 'tied', 'exits')
WORKER = Path(__file__).parent / 'compare_worker.py'


class Worker:
  """A checkout in a process of its own."""

  def __init__(self, directory: Path):
    self._process = subprocess.Popen(
      [sys.executable, str(WORKER), str(directory)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=directory,
    )

  def seconds(self, work: str) -> float:
    """Runs one piece of work; its seconds."""
    assert self._process.stdin and self._process.stdout
    print(work, file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise InputError('A checkout ended; its message stands above.')
    return json.loads(line)

  def end(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.wait()


def main(_) -> None:
  """Measures and prints."""
  if not FLAGS.other:
    raise InputError('--other is missing: the directory of another checkout.')
  here = Path(__file__).parent.parent
  workers = {'this': Worker(here), 'other': Worker(Path(FLAGS.other).absolute())}
  rows, figures = [], {}
  for work in WORK:
    took: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(FLAGS.repeats + 1):
      for name in sorted(workers, reverse=bool(turn % 2)):
        seconds = workers[name].seconds(work)
        if turn:  # The first compiles.
          took[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in took.items()}
    ratio = medians['other'] / medians['this']
    rows.append([work, medians['this'], medians['other'], ratio])
    figures[work] = {'seconds': took, 'ratio': ratio}
    print(f'{work}: {ratio:.3f}', flush=True)
  for worker in workers.values():
    worker.end()
  console.table(rows, ['', 'this, s', 'other, s', 'times'])
  figures |= common.machine(2)
  if FLAGS.out:
    Path(FLAGS.out).write_text(json.dumps(figures, indent=1) + '\n')
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
