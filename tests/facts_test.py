"""The made-up world, and the tables of equal size; each program has flags of its own."""

import subprocess
import sys

import pytest

from experiments import facts_world
from rrt.errors import InputError
from tests.command import environment


def test_worlds_have_other_people_and_hold_a_wording_back():
  one, two = facts_world.facts(100, 0), facts_world.facts(100, 1)
  assert len({(f.subject, f.relation) for f in one}) == 100
  assert not {f.subject for f in one} & {f.subject for f in two}
  assert one == facts_world.facts(100, 0)
  told = facts_world.sentences(one, 4)
  assert len(set(told)) == 400
  for fact in one:
    before, answer = fact.question()
    assert before + answer + '.' == fact.sentence(-1)
    assert before + answer + '.' not in told
    assert answer == f' {fact.obj}' and fact.subject in before
  assert 0 < facts_world.chance(one) < 0.5


def test_more_facts_than_names():
  with pytest.raises(InputError, match='there are names for 60000 facts'):
    facts_world.facts(60_001, 0)


def test_wordings_and_objects():
  for relation, wordings in facts_world.WORDINGS.items():
    assert len(set(wordings)) == 5
    assert all('{s}' in w and w.endswith('{o}') for w in wordings)
    objects = facts_world.OBJECTS[relation].split()
    assert len(objects) == len(set(objects))


SIZES = """
from absl import flags
from experiments import facts
flags.FLAGS(['test'])
from tests.experiments_test import PARENTS
from rrt.convert.plan import plan, ConvertConfig

config = plan(PARENTS['smollm2-135m'], ConvertConfig(prelude=8, loops=2, coda=8, rank=64))
for table, size, least in (
  ('parameters', facts.added_params, 0.98), ('flops', facts.added_flops, 0.8)
):
  flags.FLAGS.table = table
  most = 10_000_000
  found = facts.rows(config)
  if table == 'flops':
    most = size(config, found['memory in all loops'])
  for name, added in found.items():
    assert least * most < size(config, added) <= most, (name, size(config, added))
print('done')
"""
TRAINED = """
from absl import flags
import jax, numpy as np
from experiments import facts, facts_world
flags.FLAGS(['test', '--epochs=1', '--batch=2'])
from rrt.models.adapter import with_relaxation
from rrt.relax.memory import Memory
from rrt.tree import flatten
from tests import runs
import dataclasses

config = dataclasses.replace(runs.CHILD, max_context=128)
child = runs.model(config, 0)
for added in (Memory((0,), 16, 1, 4), facts.Wider(4)):
  more = with_relaxation(child, added)
  run = facts.train(more, added.kind, facts_world.facts(6, 0), 0)
  for path, leaf in flatten(run.model.params).items():
    same = np.array_equal(leaf, flatten(more.params)[path])
    assert same == (added.kind not in path), path
  assert 0 <= facts.recall(run.model, facts_world.facts(6, 0)) <= 1
print('done')
"""
EXPERTS = """
from absl import flags
from types import SimpleNamespace
from experiments import experts_table
flags.FLAGS(['test'])
from rrt.convert.plan import plan
from rrt.models.count import count_params
from tests.experiments_test import PARENTS

parent = SimpleNamespace(config=PARENTS['smollm2-135m'])
for name, convert in experts_table.children(parent).items():
  if name == experts_table.ONE:
    continue
  count = count_params(plan(parent.config, convert)).unique
  assert 0.995 * 118_860_096 < count <= 118_860_096, (name, count)
print('done')
"""


@pytest.mark.slow
@pytest.mark.parametrize('code', [SIZES, TRAINED, EXPERTS], ids=['sizes', 'trained', 'experts'])
def test_programs(code):
  found = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False, env=environment()
  )
  assert found.stdout.endswith('done\n'), found.stderr[-3000:]
