"""Training with experts: on meshes as on one device, with the metrics of the router."""

import dataclasses
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt import sharding
from rrt.checkpoints.load import load, save
from rrt.checkpoints.save_hf import save_hf
from rrt.errors import InputError
from rrt.evals import perplexity
from rrt.infer.engine.engine import Engine
from rrt.infer.generate import complete
from rrt.models import lm_head, transformer
from rrt.models.init import init_params
from rrt.relax.bank import Bank, Pool
from rrt.relax.experts import Experts
from rrt.relax.gain import Gain
from rrt.relax.lora import Lora
from rrt.train import optim, placement
from rrt.train import step as step_lib
from rrt.train.loop import uptrain
from rrt.train.losses import Objective
from tests import runs
from tests.command import environment
from tests.models.configs import llama, perturbed

LIBTPU = os.environ.get('RRT_TEST_LIBTPU', '')
POOL = Pool(positions=(0, 1), segments=4, topk=6, prior=1.0)
RELAX = {
  'experts': (Experts(6, topk=3, prior=1.0, q=2, gate=2, down=2),),
  'pool': (Lora(q=2, o=2), POOL),
  'parent': (Lora(q=2, gate=2, down=2), Gain()),
}


def config(relax):
  parent = dict(num_experts=4, experts_per_token=2) if relax is RELAX['parent'] else {}
  return llama(
    relax=relax, **parent, num_heads=4, num_kv_heads=4, head_dim=8, vocab_size=64, d_model=32, d_ff=64,
    prelude_layers=0, coda_layers=0,
  )  # fmt: skip


def trained(c, sizes, steps=2):
  """(losses, parameters) after some steps of SGD-like updates on one batch."""
  params = init_params(c, jax.random.key(0))
  o = optim.Optimizer(learning_rate=1e-3, clip=0.0, eps=1e-3)
  paths = step_lib.trained_paths(optim.trainable(o, params))
  spec = step_lib.Step(
    config=c,
    objective=Objective(cross_entropy=1.0, distillation=0.0),
    optimizer=optim.make_optimizer(o, step_lib.split(params, paths)[0], 10),
    trained=paths,
    clip=0.0,
  )
  count = int(np.prod([n for n in sizes.values()])) if sizes else 1
  mesh = sharding.make_mesh(sizes or {'data': 1}, jax.devices()[:count])
  sharding.check_mesh(c, mesh, 8)
  state = step_lib.init_state(spec, params, mesh)
  where = jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(spec, mesh))
  step = step_lib.jit_step(spec, mesh, where)
  ids = np.random.default_rng(0).integers(0, 64, (8, 8)).astype(np.int32)
  batch = {
    'tokens': ids,
    'targets': np.roll(ids, -1, 1),
    'segment_ids': np.ones_like(ids),
    'positions': np.zeros_like(ids) + np.arange(8, dtype=np.int32)[None],
    'weights': np.ones(ids.shape, np.float32),
  }
  losses = []
  with jax.set_mesh(mesh):
    for _ in range(steps):
      state, metrics = step(state, {}, placement.to_mesh(batch, mesh))
      losses.append({k: float(v) for k, v in metrics.items()})
  return losses, jax.tree.map(np.asarray, state.params)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('pool', {'data': 2, 'fsdp': 2, 'expert': 2}),
    ('pool', {'expert': 4, 'tensor': 2}),
    ('pool', {'data': 2, 'fsdp': 4}),
    ('parent', {'data': 2, 'fsdp': 2, 'expert': 2}),
    ('parent', {'fsdp': 2, 'tensor': 2}),
    ('experts', {'data': 2, 'fsdp': 2, 'tensor': 2}),
  ],
  ids=str,
)
def test_a_mesh_trains_as_one_device(name, sizes):
  c = config(RELAX[name])
  want, params = trained(c, {})
  got, sharded = trained(c, sizes)
  for a, b in zip(got, want, strict=True):
    for key in b:
      np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-5, err_msg=key)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), sharded, params)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('pool', {'data': 2, 'expert': 4}),
    ('experts', {'data': 4, 'fsdp': 2}),
    ('parent', {'fsdp': 2, 'expert': 4}),
  ],
  ids=str,
)
def test_losses_and_gradients_equal_one_devices(name, sizes):
  c = config(RELAX[name])
  params = perturbed(c)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 8)))

  def loss(params):
    out = transformer.forward(c, params, ids, return_aux=True)
    logits = lm_head.logits(c, params, out.hidden_BxLxD)
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)
    return sum(out.aux.losses.values()) - jnp.mean(own)

  want, grads = jax.jit(jax.value_and_grad(loss))(params)
  mesh = sharding.make_mesh(sizes)
  placed = jax.device_put(params, placement.param_shardings(c, mesh))
  with jax.set_mesh(mesh):
    got, sharded = jax.jit(jax.value_and_grad(loss))(placed)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 0.01
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sharded, grads)


RUNS = {
  'experts': (*runs.CHILD.relax, Experts(4, balance_by='bias', anneal=4, noise=True, q=2)),
  'bank': (*runs.CHILD.relax, Bank(positions=(1,), balance_by='bias')),
  'parent': runs.CHILD.relax,
}


class Killed(BaseException):
  """Stands for whatever ends a process."""


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_resumed_equals_uninterrupted_and_the_model_serves(name, tmp_path):
  text = runs.write_text(tmp_path / 'text.jsonl')
  settings = runs.recipe(text, loss={'cross_entropy': 1.0, 'distillation': 0.0})
  mixture = dict(family='mixtral', num_experts=4, experts_per_token=2) if name == 'parent' else {}
  c = runs.model(dataclasses.replace(runs.CHILD, relax=RUNS[name], **mixture), 1)

  def killed(row):
    if row['step'] == 5:
      raise Killed

  whole = uptrain(None, c, settings)
  with pytest.raises(Killed):
    uptrain(None, c, settings, tmp_path / 'run', on_row=killed)
  run = uptrain(None, c, settings, tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, run.model.params, whole.model.params)
  assert run.history[-1]['train/loss'] == whole.history[-1]['train/loss']
  kept = load(save(run.model, tmp_path / 'model'))
  prompts = [[3, 1, 4], [1], [5, 9, 2, 6]]
  want = complete(kept, prompts, max_new_tokens=8)
  got = Engine(kept, slots=2, context=24, page=8, steps=4).generate(prompts, max_new_tokens=8)
  assert [r.tokens for r in got] == [r.tokens for r in want]
  score = lambda model: perplexity.score(model, 'the old ship sails on', context=16).nll_nats
  assert 0 < score(kept) < 8
  if name == 'parent':
    np.testing.assert_allclose(score(load(save_hf(kept, tmp_path / 'hf'))), score(kept), rtol=1e-5)
  else:
    with pytest.raises(InputError, match='cannot be merged into untied weights'):
      save_hf(kept, tmp_path / 'hf')


def test_metrics_of_the_router():
  found, params = trained(config(RELAX['pool']), {}, steps=1)
  names = {k.removeprefix('relax/pool/') for k in found[0] if k.startswith('relax/pool/')}
  usage = {f'usage/{e}' for e in range(12)}
  shown = {'z', 'largest_load', 'entropy', 'loop_information', 'dropped'}
  assert names == usage | shown
  np.testing.assert_allclose(sum(found[0][f'relax/pool/{u}'] for u in usage), 1.0, rtol=1e-5)
  assert found[0]['relax/pool/dropped'] == 0.0
  # The bias moved by its rate, the optimizer has no moments for it.
  np.testing.assert_allclose(np.abs(params['block']['pool_balance']).max(), 0.001, rtol=1e-4)


def test_a_capacity_drops_in_training_and_counts():
  capped = Pool(positions=(0, 1), segments=4, topk=6, prior=1.0, capacity=0.5)
  found, _ = trained(config((Lora(q=2, o=2), capped)), {}, steps=1)
  assert found[0]['relax/pool/dropped'] > 0.05


def test_meshes_that_experts_do_not_split_over():
  mesh = sharding.make_mesh({'expert': 8})
  with pytest.raises(InputError, match=r'expert=8 does not divide the 2 experts of a layer'):
    sharding.check_mesh(config((Bank(positions=(0,)),)), mesh, 8)
  with pytest.raises(InputError, match=r'mesh.expert=8: the model has no experts to split'):
    sharding.check_mesh(config((Lora(q=2),)), mesh, 8)


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason='no libtpu; make test installs it')
def test_steps_with_experts_compile_for_tpus():
  """In a process of its own: libtpu is loaded once, by its path."""
  code = """
import dataclasses
import jax
from rrt import sharding
from rrt.ops import expert_parallel
from rrt.planner import topology
from rrt.planner.program import train_program
from rrt.relax.bank import Bank
from rrt.relax.lora import Lora
from rrt.train.recipe import Recipe
from tests.models.configs import llama

child = llama(
  relax=(Lora(q=8, o=8), Bank(positions=(0, 1), capacity=1.5, topk=2, experts=3)),
  prelude_layers=0, coda_layers=0, d_model=256, d_ff=512, num_heads=4, num_kv_heads=4,
  head_dim=64, vocab_size=512, max_context=512,
)
recipe = Recipe.from_dict({
  'batch': 8, 'length': 256, 'dtype': 'bfloat16', 'remat': 'full',
  'loss': {'cross_entropy': 1.0, 'distillation': 0.0},
})
mixture = {'num_experts': 4, 'experts_per_token': 2}
for sizes, exchange, relax, words, parent in (
  ({'expert': 2, 'fsdp': 2}, 'padded', child.relax, 'all-to-all', {}),
  ({'expert': 4}, 'ragged', (Lora(q=8, o=8), Bank(positions=(0, 1), topk=2, experts=5)), 'ragged-all-to-all', {}),
  ({'fsdp': 4}, 'padded', (Lora(q=8, o=8), Bank(positions=(0, 1))), 'tpu_custom_call', {}),
  ({'fsdp': 2, 'expert': 2}, 'ragged', (Lora(q=8, up=8, down=8),), 'ragged-all-to-all', mixture),
  ({'fsdp': 4}, 'padded', (Lora(q=8, up=8, down=8),), 'tpu_custom_call', mixture),
):
  config = dataclasses.replace(child, relax=relax, **parent)
  mesh = sharding.make_mesh(sizes, topology.devices(topology.parse('v5e:2x2')))
  program = train_program(recipe, None, config, mesh)
  with jax.set_mesh(mesh), expert_parallel.using(exchange):
    compiled = program.lower('tpu').compile()
  assert words in compiled.as_text(), sizes
print('compiled')
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=Path(__file__).parent.parent.parent,
    env=environment() | {'TPU_LIBRARY_PATH': os.path.abspath(LIBTPU)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.endswith('compiled\n'), done.stderr[-3000:]
