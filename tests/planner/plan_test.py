"""The planner: topologies, bytes in closed form and compiled, meshes."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from benchmarks import plan as benchmark
from rrt import sharding
from rrt.config import ModelConfig
from rrt.convert.plan import plan
from rrt.errors import InputError
from rrt.models.cache import init_cache
from rrt.models.count import count_params
from rrt.models.init import abstract_params
from rrt.planner import memory as memory_lib
from rrt.planner import search as search_lib
from rrt.planner import topology as topology_lib
from rrt.planner.program import local_bytes, train_program
from rrt.train.recipe import Recipe
from tests import runs
from tests.train.sharded_state_test import LLAMA_8B, TINYLLAMA

ROOT = Path(__file__).parent.parent.parent
RECIPE = {
  'batch': 16,
  'length': 2048,
  'dtype': 'bfloat16',
  'remat': 'full',
  'loss': {'chunk_tokens': 16384},
  'convert': {'block': 11, 'loops': 2, 'rank': 256, 'loop_norms': False},
}


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('v5e', 'give one such as'),
    ('v9:4x4', 'the chips known are v5e'),
    ('v5e:4', 'counted as v5e:AxB'),
    ('v5p:2x2', 'counted as v5p:AxBxC'),
    ('h100:2x2', 'counted as h100:COUNT'),
    ('v5e:0x4', 'no chips'),
    ('v5e:3x5', 'hosts of 2x2 chips'),
    ('v5p:4x1x1', 'hosts of 2x2 chips'),
  ],
)
def test_what_is_no_topology(text, words):
  with pytest.raises(InputError, match=words):
    topology_lib.parse(text)


def test_topologies():
  found = topology_lib.parse('2xv6e:8x8')
  assert (found.count, found.slices, found.kind.name, str(found)) == (128, 2, 'v6e', '2xv6e:8x8')
  assert topology_lib.parse('v5p:2x2x4').count == 16
  assert topology_lib.parse('h100:8').room < 80e9
  with pytest.raises(InputError, match='TPUs alone'):
    topology_lib.devices(topology_lib.parse('h100:8'))


@pytest.mark.parametrize(
  ('shape', 'share'),
  [
    ((49152, 576), 1.0),
    ((7, 2, 576, 64), 10 / 9),
    ((7, 1536, 576), 1.0),
    ((576,), 16 / 9),
    ((2048, 36), 10 / 9),
  ],
)
def test_tiles_of_a_tpu(shape, share):
  """Shares that XLA reports for these arrays (v5e, libtpu 0.0.42)."""
  mesh = search_lib.abstract_mesh({})
  x = jax.ShapeDtypeStruct(shape, 'float32', sharding=jax.NamedSharding(mesh, jax.P()))
  assert memory_lib.padded_bytes(x) == pytest.approx(share * local_bytes(x))


def test_rules_of_thumb():
  assert memory_lib.rules_of_thumb(15 * 10**9)['weights in bfloat16 (2)'] == 30 * 10**9
  assert list(memory_lib.rules_of_thumb(1).values()) == [4, 2, 8, 16]


def test_what_a_step_is_given_is_exact():
  """As XLA counts the arguments of the compiled step."""
  sizes = {'data': 2, 'fsdp': 2, 'tensor': 2}
  mesh = sharding.make_mesh(sizes)
  recipe = Recipe.from_dict({'batch': 8, 'length': 16, 'loss': {'chunk_tokens': 64}})
  program = train_program(recipe, runs.PARENT, runs.CHILD, mesh)
  with jax.set_mesh(mesh):
    compiled = program.lower('cpu').compile()
  memory = memory_lib.train_memory(program, tiles=False)
  given = sum(memory.parts[k] for k in ('parameters', 'moments', 'parent', 'batch'))
  assert given == compiled.memory_analysis().argument_size_in_bytes


def test_more_of_everything_takes_more():
  child = plan(TINYLLAMA, Recipe.from_dict(RECIPE).convert)
  of = lambda sizes={'fsdp': 16}, **changes: (
    search_lib.analytic(Recipe.from_dict(RECIPE | changes), TINYLLAMA, child, sizes, True).peak
  )
  base = of()
  assert of(batch=32) > base and of(length=4096) > base and of(remat='dots') > base
  assert of({'fsdp': 8, 'data': 2}) > base
  assert of(gather='loop') < base
  assert of(loss={'chunk_tokens': 4096}) < base
  assert of(loss={'chunk_tokens': 16384, 'distillation': 0.0, 'cross_entropy': 1.0}) < base
  assert of(optimizer={'train': 'relaxations'}) < base


def test_a_search_finds_what_fits():
  topology = topology_lib.parse('v5e:4x4')
  recipe = Recipe.from_dict(RECIPE)
  child = plan(TINYLLAMA, recipe.convert)
  found = search_lib.search(recipe, TINYLLAMA, child, topology)
  total = [f.rows * f.mesh['data'] * f.mesh['fsdp'] for f in found]
  assert total == sorted(total, reverse=True) and total[0] > 0
  assert all(f.memory.peak <= topology.room for f in found if f.rows)
  # Twice as many rows do not fit.
  best = found[0]
  chips = best.mesh['data'] * best.mesh['fsdp']
  more = Recipe.from_dict(RECIPE | {'batch': 2 * best.rows * chips})
  assert search_lib.analytic(more, TINYLLAMA, child, best.mesh, True).peak > topology.room
  assert len(list(search_lib.meshes(16))) == 5 + 4 + 3 + 2


def test_serving_counts_weights_and_cache():
  config = plan(TINYLLAMA, Recipe.from_dict(RECIPE).convert)
  memory = memory_lib.serve_memory(
    config, abstract_params(config), 4, 1024, 128, 'bfloat16', 'bfloat16'
  )
  assert memory.parts['weights'] == 2 * count_params(config).unique
  cache = jax.eval_shape(lambda: init_cache(config, 4, 1024, 'bfloat16'))
  assert memory.parts['cache'] == sum(x.size * 2 for x in jax.tree.leaves(cache) if x.ndim > 2)


def test_closed_form_and_compiler_agree():
  """On the programs of the benchmark, against the recorded figures of XLA."""
  rows = json.loads((ROOT / 'benchmarks/results/plan.json').read_text())['programs']
  assert len(rows) >= 40
  for row in rows[::8]:  # One takes a second where its model is new.
    found = benchmark.analytic(benchmark.PROGRAMS[row['name']])
    assert found.peak == row['analytic_bytes'], row['name']


def write_config(folder: Path, config: ModelConfig) -> Path:
  folder.mkdir()
  fields = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_size': config.d_model,
    'intermediate_size': config.d_ff,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'num_hidden_layers': config.depth,
    'vocab_size': config.vocab_size,
    'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-5,
    'tie_word_embeddings': config.tie_embeddings,
    'hidden_act': 'silu',
  }
  (folder / 'config.json').write_text(json.dumps(fields))
  return folder


def run_plan(*flags: str, **environment: str):
  return subprocess.run(
    [sys.executable, '-m', 'rrt', 'plan', *flags],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', **environment},
    capture_output=True,
    text=True,
  )


def last_line(found) -> dict:
  return json.loads(found.stdout.splitlines()[-1])


FLAGS = (
  '--config=experiments/tinyllama_11x2.py',
  '--config.batch=16',
  '--config.accumulate=1',
  '--config.remat=full',
  '--topology=v5e:4x4',
)


@pytest.mark.slow
def test_the_command(tmp_path):
  parent = f'--config.parent={write_config(tmp_path / "parent", TINYLLAMA)}'
  found = run_plan(*FLAGS, parent, '--mesh=fsdp=16')
  assert found.returncode == 0, found.stderr
  assert 'fits: ' in found.stdout and 'kept for the backward pass' in found.stdout
  assert 'close: ' not in found.stdout
  near = run_plan(*FLAGS, parent, '--mesh=fsdp=16', '--config.batch=432')
  assert near.returncode == 0 and 'close: ' in near.stdout and '--compile tells' in near.stdout
  assert last_line(found)['mesh'] == {'data': 1, 'fsdp': 16, 'expert': 1, 'tensor': 1}
  large = f'--config.parent={write_config(tmp_path / "large", LLAMA_8B)}'
  shape = ('--config.convert.block=16', '--topology=v5e:2x2', '--mesh=fsdp=4')
  found = run_plan(*FLAGS, large, *shape)
  assert found.returncode == 1 and 'does not fit: ' in found.stdout
  found = run_plan(f'--model={tmp_path / "parent"}', '--topology=h100:1', '--slots=8')
  assert found.returncode == 0 and last_line(found)['parts']['cache'] > 0
  for flags, words in (
    ((*FLAGS, parent, '--mesh=fsdp=5'), 'takes 5 devices, but there are 16'),
    ((*FLAGS, parent, '--mesh=tensor=16'), 'does not divide num_kv_heads=4'),
    ((*FLAGS, parent, '--mesh=rows=16'), 'unknown axis'),
    ((*FLAGS, parent, '--mesh=16'), 'write axes as'),
    ((*FLAGS, parent, '--slots=3'), 'no effect without --model'),
    ((FLAGS[0], parent), '--topology'),
    ((*FLAGS[:-1], parent, '--topology=h100:8', '--mesh=fsdp=8', '--compile'), 'for TPUs alone'),
  ):
    found = run_plan(*flags)
    assert found.returncode == 2, flags
    assert words in found.stderr and len(found.stderr.splitlines()) == 1, found.stderr


LIBTPU = os.environ.get('RRT_TEST_LIBTPU', '')


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason='no libtpu; make test installs it')
@pytest.mark.parametrize(
  ('config', 'block', 'rank', 'topology', 'relax'),
  [
    pytest.param(TINYLLAMA, 11, 256, 'v5e:4x4', (), marks=pytest.mark.manual),
    (LLAMA_8B, 16, 512, 'v5p:2x2x4', ()),
    # A pool of 2^20 values of 2,048.
    (TINYLLAMA, 11, 64, 'v5e:4x4', ('memory:positions=5,slots=1048576,heads=4,topk=32',)),
  ],
  ids=['tinyllama 11x2', '8B 16x2', 'memory'],
)
def test_a_step_compiled_for_tpus(config, block, rank, topology, relax, tmp_path):
  """One row of 2,048 tokens a chip fits, as the closed form says, and nothing is made whole."""
  found = run_plan(
    *FLAGS[:-1],
    f'--config.parent={write_config(tmp_path / "parent", config)}',
    f'--config.convert.block={block}',
    f'--config.convert.rank={rank}',
    f'--config.convert.relax={relax!r}',
    f'--topology={topology}',
    '--mesh=fsdp=16',
    '--compile',
    TPU_LIBRARY_PATH=str(ROOT / LIBTPU),
  )
  assert found.returncode == 0, found.stderr
  line = last_line(found)
  assert line['compiled_bytes'] == pytest.approx(line['analytic_bytes'], rel=0.08)
  assert 'rematerialization' not in found.stderr
