"""Where a run's time goes, the watchdog, the profiler's window."""

import threading
import time

import pytest

from rrt.errors import InputError
from rrt.train import checkpoint, loop, metrics
from rrt.train.goodput import NAMES, Goodput
from rrt.train.profile import parse
from rrt.train.recipe import Recipe
from rrt.train.watchdog import STATUS, Watchdog
from tests import runs


def test_the_parts_add_up():
  found = Goodput({})
  with found.spent('save'):
    time.sleep(0.02)
  row = found.row(0.5)
  assert row['goodput/save_seconds'] >= 0.02
  assert sum(row[f'goodput/{name}_seconds'] for name in (*NAMES, 'step')) == pytest.approx(0.5)
  assert row['goodput/share'] == pytest.approx(row['goodput/step_seconds'] / 0.5)


def test_the_first_call_compiles():
  found = Goodput({})
  call = found.compiling(lambda x: time.sleep(0.02) or x)
  assert call(3) == 3
  first = found.seconds['compile']
  assert first >= 0.02
  assert call(4) == 4
  assert found.seconds['compile'] == first


def test_a_run_goes_on_with_its_sums_and_counts_what_was_lost(tmp_path):
  recipe = runs.recipe(runs.write_text(tmp_path / 'text.jsonl'), checkpoint_every=2)
  workdir = tmp_path / 'run'

  class Kill(Exception):
    pass

  def kill(row):
    if row['step'] == 5:
      raise Kill

  with pytest.raises(Kill):
    loop.uptrain(runs.parent(), runs.child(), recipe, workdir, on_row=kill)
  before = metrics.read(workdir / 'metrics.jsonl')
  at = {row['step']: row for row in before}
  run = loop.uptrain(runs.parent(), runs.child(), recipe, workdir)
  last = run.history[-1]
  assert [row['step'] for row in run.history] == [1, 2, 3, 4, 5, 6]
  lost = at[5]['throughput/wall_time'] - at[4]['throughput/wall_time']
  assert last['goodput/lost_seconds'] == pytest.approx(lost)
  assert last['goodput/compile_seconds'] > at[4]['goodput/compile_seconds'] > 0
  total = last['throughput/wall_time'] + lost
  parts = sum(last[f'goodput/{name}_seconds'] for name in (*NAMES, 'step'))
  assert parts == pytest.approx(total, rel=1e-6)
  assert 0 < last['goodput/share'] < 1


def test_the_watchdog_names_what_hangs(capfd):
  ended, status = threading.Event(), []
  with Watchdog(0.2, lambda code: (status.append(code), ended.set())) as watchdog:
    watchdog.at('step 12')
    assert ended.wait(10)
  assert status == [STATUS]
  err = capfd.readouterr().err
  assert 'error: step 12 has not ended' in err
  assert 'goodput_test.py' in err  # The stacks.


def test_the_watchdog_lets_a_run_go_on():
  with Watchdog(0.4, lambda code: pytest.fail('it ended')) as watchdog:
    for step in range(8):
      watchdog.at(f'step {step}')
      time.sleep(0.1)


@pytest.mark.parametrize('window', ['3', '0:2', '5:4', 'a:b'])
def test_a_wrong_window_is_refused(window):
  with pytest.raises(InputError, match='profile='):
    Recipe(profile=window)


def test_the_window():
  assert parse('10:15') == (10, 15)
  assert parse('') == (0, 0)


def test_the_steps_of_the_window_are_traced(tmp_path):
  recipe = runs.recipe(runs.write_text(tmp_path / 'text.jsonl'), steps=3, profile='2:2')
  loop.uptrain(runs.parent(), runs.child(), recipe, tmp_path / 'run')
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))


def test_a_field_that_is_new_does_not_keep_a_run_from_going_on(tmp_path):
  now = Recipe().to_dict()
  saved = {k: v for k, v in now.items() if k != 'adapter'}
  saved['loss'] = {k: v for k, v in now['loss'].items() if k != 'top_k'}
  checkpoint.check_same(tmp_path, saved, now, Recipe.FREE)
  now['loss']['top_k'] = 4
  with pytest.raises(InputError, match=r'loss\.top_k=4'):
    checkpoint.check_same(tmp_path, saved, now, Recipe.FREE)
