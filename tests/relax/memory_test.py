"""Memory layers and PEER: what they compute, what they refuse, how they are trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.checkpoints.load import save
from rrt.checkpoints.save_hf import save_hf
from rrt.config import ModelConfig
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models import transformer
from rrt.models.count import count_params
from rrt.models.init import abstract_params, init_params
from rrt.ops.activation import activate
from rrt.relax.base import Place
from rrt.relax.memory import Memory
from rrt.relax.peer import Peer, upcycled
from rrt.relax.trees import own_leaves
from tests.models.configs import gemma3, llama, perturbed, tokens

MODELS = {'llama': llama, 'gemma3': gemma3}
each_model = pytest.mark.parametrize('name', MODELS)


def hidden(config, params, scan=True, aux=False):
  out = transformer.forward(config, params, tokens(config), scan=scan, return_aux=aux)
  return out.hidden_BxLxD, out.aux


def host_of(relaxation, config):
  return relaxation.hosts(config)[0]


@each_model
@pytest.mark.parametrize('value_norm', [False, True])
def test_a_memory_layer_is_its_formula(name, value_norm):
  """Queries, softmax of each head, gated sum of values: written down once more with loops."""
  memory = Memory((1,), 16, heads=2, topk=3, key_dim=6, dim=5, value_norm=value_norm)
  c = MODELS[name](relax=(memory,))
  p = own_leaves(perturbed(c)['block'], 'memory')
  host = host_of(memory, c)
  rng = np.random.default_rng(0)
  x, y = (rng.normal(size=(2, 4, c.d_model)).astype(np.float32) for _ in range(2))
  for loop in range(c.loops):
    got, _ = memory.apply_at(p, jnp.asarray(x), jnp.asarray(y), Place(loop, 1), host)
    for b, t in np.ndindex(2, 4):
      q = (x[b, t] @ p['memory_query'][0] + p['memory_bias'][0, loop]).reshape(2, 2, 3)
      value = np.zeros(5)
      for h in range(2):
        halves = [np.asarray(p['memory_keys'][0, s, h]) @ q[h, s] for s in range(2)]
        score = (halves[0][:, None] + halves[1][None]).reshape(-1)
        best = np.argsort(-score)[:3]
        weight = np.exp(score[best] - score[best].max())
        value += (weight / weight.sum()) @ np.asarray(p['memory_values'])[best]
      value /= np.sqrt((value**2).mean() + 1e-6) if value_norm else 1.0
      value *= np.asarray(jax.nn.silu(x[b, t] @ p['memory_gate'][0]))
      want = y[b, t] + value @ p['memory_out'][0]
      np.testing.assert_allclose(got[b, t], want, atol=1e-5)
    elsewhere, _ = memory.apply_at(p, jnp.asarray(x), jnp.asarray(y), Place(loop, 0), host)
    np.testing.assert_array_equal(elsewhere, y)


@each_model
def test_peer_with_all_units_is_the_mlp(name):
  """Upcycled: in the MLP's place the model stays what it is, whatever the loops share."""
  base = MODELS[name](relax=())
  gated = 'gate' in base.shapes()
  # Product keys need a square.
  c = dataclasses.replace(base, d_ff=25)
  peer = Peer((1,), 25, heads=1, topk=25, activation=c.activation, gated=gated, instead=True)
  with_peer = dataclasses.replace(c, relax=(peer,))
  p = perturbed(c)
  mlp = jax.tree.map(lambda x: np.asarray(x[1]), p['block']['layers']['mlp'])
  kernels = {k: v['kernel'] for k, v in mlp.items()}
  start = own_leaves(init_params(with_peer, jax.random.key(0))['block'], 'peer')
  own = upcycled(peer, start, kernels)
  q = {**p, 'block': {**p['block'], **own}}
  want, _ = hidden(c, p)
  for scan in (True, False):
    np.testing.assert_allclose(hidden(with_peer, q, scan)[0], want, atol=2e-5)
  with pytest.raises(InputError, match='the MLP has 25 hidden units'):
    upcycled(dataclasses.replace(peer, slots=36), start, kernels)
  one = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, c.d_model)), jnp.float32)
  moved = dict(own) | {'peer_experts_down': 2 * own['peer_experts_down']}
  host = host_of(peer, with_peer)
  double, _ = peer.apply_at(moved, one, one, Place(0, 1), host)
  first = activate(one[0, 0] @ kernels['gate' if gated else 'up'], c.activation)
  hidden_F = first * (one[0, 0] @ kernels['up']) if gated else first
  np.testing.assert_allclose(double[0, 0], 2 * hidden_F @ kernels['down'], atol=1e-4)


def test_instead_leaves_the_mlp_out():
  memory = Memory((0, 1), 16, 2, 3, instead=True)
  c = llama(relax=(memory,))
  p = init_params(c, jax.random.key(0))  # W2 is zero: these layers are attention alone.
  changed = jax.tree.map(lambda x: x, p)
  layers = changed['block']['layers']['mlp']
  layers['up']['kernel'] = layers['up']['kernel'] + 1.0
  np.testing.assert_array_equal(hidden(c, p)[0], hidden(c, changed)[0])


def test_parameters_in_closed_form():
  """3.377 B of the paper's 1.3B model: values, less the MLPs that give way to three layers."""
  D, F, layers, slots = 2048, 8192, 16, 1 << 20
  c = ModelConfig(
    family='llama',
    vocab_size=128256,
    d_model=D,
    d_ff=F,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_context=64,
    block_layers=layers,
    tie_embeddings=True,
  )
  memory = Memory((4, 8, 12), slots, heads=4, topk=32)
  with_memory = dataclasses.replace(c, relax=(memory,))
  added = count_params(with_memory).unique - count_params(c).unique
  K = D // 4
  layer = D * 4 * 2 * K + 4 * 2 * K + 2 * 4 * 1024 * K + 2 * D * D
  assert added == slots * D + 3 * layer
  stored = sum(x.size for x in jax.tree.leaves(abstract_params(with_memory)))
  assert stored == count_params(with_memory).unique
  # The paper's count: those of values, and a model of 1.3 B without three of its MLPs.
  paper = slots * D + 1_300_000_000 - 3 * 3 * D * F + 3 * layer
  assert paper == pytest.approx(3.377e9, rel=0.01)


def test_usage_is_summarised_over_loops_and_positions():
  memory = Memory((1,), 16, heads=2, topk=3, key_dim=6)
  c = llama(relax=(memory,))
  p = perturbed(c)
  _, aux = hidden(c, p, aux=True)
  assert set(aux.stats) == {'memory/used', 'memory/dead', 'memory/kl'}
  np.testing.assert_allclose(aux.stats['memory/used'] + aux.stats['memory/dead'], 1.0, rtol=1e-6)
  assert 0 < float(aux.stats['memory/used']) <= 1 and float(aux.stats['memory/kl']) > 0
  even = memory.summarize({'usage': jnp.ones((16,))})
  np.testing.assert_allclose([even['used'], even['kl']], [1.0, 0.0], atol=1e-6)
  one = memory.summarize({'usage': jnp.zeros((16,)).at[3].set(7.0)})
  np.testing.assert_allclose([one['used'], one['kl']], [1 / 16, np.log(16)], rtol=1e-6)


def test_padding_reads_no_slot():
  memory = Memory((1,), 16, heads=1, topk=2, key_dim=6)
  c = llama(relax=(memory,))
  p, host = own_leaves(perturbed(c)['block'], 'memory'), host_of(memory, c)
  x = jax.random.normal(jax.random.key(0), (2, 3, c.d_model))
  reads = lambda x, real: memory.apply_at(p, x, x, Place(0, 1, real), host)[1].stats['usage']
  real = jnp.array([[True, True, False], [True, False, False]])
  want = reads(x[:1, :2], None) + reads(x[1:, :1], None)
  np.testing.assert_array_equal(reads(x, real), want)
  assert want.sum() == 3 * 2 * host.layers


@pytest.mark.parametrize(
  ('fields', 'sentence'),
  [
    (dict(slots=60), 'memory.slots=60: product keys need a square; 49 and 64 are the nearest'),
    (dict(topk=65), 'memory.topk=65: there are only slots=64 keys'),
    (dict(topk=0), 'memory.topk=0: must be a whole number, 1 or more'),
    (dict(positions=(2,)), r'memory.positions=\(2,\): must be layers of the block'),
    (dict(positions=()), r'memory.positions=\(\)'),
    (dict(positions=(1, 1)), r'memory.positions=\(1, 1\)'),
    (dict(key_dim=5), 'memory.key_dim=5: must be even'),
    (dict(dim=7, gated=False), 'without gates values are added to the stream'),
    (dict(dim=-1), 'memory.dim=-1'),
  ],
)
def test_bad_fields_are_refused(fields, sentence):
  with pytest.raises(InputError, match=sentence):
    llama(relax=(Memory(**{'positions': (1,), 'slots': 64, 'topk': 4} | fields),))
  with pytest.raises(InputError, match=r"peer\.activation='relu'"):
    llama(relax=(Peer((1,), 64, 1, 4, activation='relu'),))


def test_an_export_to_hugging_face_is_refused_with_the_reason(tmp_path):
  c = llama(relax=(Memory((1,), 16, 2, 3),))
  model = LanguageModel(c, jax.tree.map(np.asarray, perturbed(c)))
  with pytest.raises(InputError, match='no untied family has memory layers'):
    save_hf(model, tmp_path / 'out')
  assert save(model, tmp_path / 'native')


@each_model
def test_a_conversion_starts_as_it_does_without_memory(name):
  layers = dict(prelude_layers=0, block_layers=4, coda_layers=0, loops=1, loop_norms=False)
  by_depth = dict(windows=(3, 0, 3, 0), rope_index=(1, 0, 1, 0)) if name == 'gemma3' else {}
  parent_config = MODELS[name](relax=(), **layers, **by_depth)
  parent = LanguageModel(parent_config, jax.tree.map(np.asarray, perturbed(parent_config)))
  arranged = dict(loops=2, rank=2, init='average')
  plain, _ = to_recursive(parent, **arranged)
  child, _ = to_recursive(parent, relax=('memory:positions=1,slots=16,heads=2,topk=3',), **arranged)
  assert child.config.relax[-1] == Memory((1,), 16, 2, 3)
  assert child.params['block']['memory_values'].shape == (16, parent_config.d_model)
  np.testing.assert_allclose(
    hidden(child.config, child.params)[0], hidden(plain.config, plain.params)[0], atol=1e-6
  )
