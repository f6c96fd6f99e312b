"""LoRA experts: their start, their router in training, and their counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.config import ModelConfig
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.models import lm_head, transformer
from rrt.models.count import count_params
from rrt.models.relaxed import after_step, route_key
from rrt.ops import clusters
from rrt.relax import experts as experts_lib
from rrt.relax.base import Place
from rrt.relax.experts import Experts, uniform
from rrt.relax.lora import Lora
from rrt.relax.trees import own_leaves, relaxed_hosts, subtree
from tests import runs
from tests.models.configs import llama, perturbed, tokens

RANKS = dict(q=2, k=1, o=2, gate=3, up=3, down=2)


def config(**fields) -> ModelConfig:
  return llama(relax=(Experts(**fields),), prelude_layers=0, coda_layers=0)


def logits(c, params, scan=True, **kwargs):
  out = transformer.forward(c, params, tokens(c), scan=scan, **kwargs)
  return lm_head.logits(c, params, out.hidden_BxLxD), out.aux


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_the_start_is_lora_of_the_same_total_rank(score):
  """Bit for bit in the factors, and in the logits to rounding of another order of sums."""
  parent = runs.parent()
  words = ','.join(f'{name}={rank}' for name, rank in RANKS.items())
  both = {}
  for name, relax in (
    ('experts', f'experts:experts=4,score={score},{words}'),
    ('lora', 'lora:' + ','.join(f'{n}={2 * r}' for n, r in RANKS.items())),
  ):
    changes = dict(prelude=1, coda=1, init='average', relax_init='fit', relax=(relax,), rank=0)
    both[name], _ = to_recursive(parent, **changes)
  assert (
    both['experts']
    .config.relax[0]
    .taken(both['experts'].config.relax[0].hosts(both['experts'].config)[0])
    == 2
  )
  for relaxation, host, _ in relaxed_hosts(both['experts'].config):
    experts = own_leaves(subtree(both['experts'].params['block'], host), relaxation.kind)
    lora = own_leaves(subtree(both['lora'].params['block'], host), 'lora')
    for part in ('a', 'b'):
      np.testing.assert_array_equal(experts[f'experts_{part}'], lora[f'lora_{part}'])
    assert np.abs(lora['lora_b']).max() > 0
    np.testing.assert_array_equal(experts['experts_router'], 0.0)
  got, _ = logits(both['experts'].config, both['experts'].params)
  want, _ = logits(both['lora'].config, both['lora'].params)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_by_loop_is_lora():
  c = config(experts=6, by='loop', **RANKS)
  p = perturbed(c)
  lora = dataclasses.replace(c, relax=(Lora(**{n: 2 * r for n, r in RANKS.items()}),))
  q = jax.tree.map(lambda t: t, p)
  for relaxation, host, _ in relaxed_hosts(c):
    tree = subtree(q['block'], host)
    for name in own_leaves(tree, relaxation.kind):
      tree[name.replace('experts_', 'lora_')] = tree.pop(name)
  np.testing.assert_allclose(logits(c, p)[0], logits(lora, q)[0], atol=1e-5)


@pytest.mark.parametrize('topk', [2, -1])
def test_an_expert_layer_is_its_formula(topk):
  experts = Experts(6, topk=topk, normalise='all', up=2)
  c = llama(relax=(experts,))
  host = next(h for h in experts.hosts(c) if h.name == 'up')
  p = own_leaves(jax.tree.map(lambda x: x[1], subtree(perturbed(c)['block'], host)), 'experts')
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, host.d_in)).astype(np.float32)
  y = rng.normal(size=(2, 3, host.d_out)).astype(np.float32)
  for loop in range(c.loops):
    got, _ = experts.apply_at(p, jnp.asarray(x), jnp.asarray(y), Place(loop), host)
    for b, t in np.ndindex(2, 3):
      z = x[b, t] @ np.asarray(p['experts_router']) + np.asarray(p['experts_prior'])[loop]
      gate = np.exp(z - z.max())
      gate = 2 * gate / gate.sum()  # Two experts a loop.
      want = y[b, t].copy()
      for e in np.argsort(-z)[: 6 if topk < 0 else topk]:
        columns = slice(2 * (e % 2), 2 * (e % 2) + 2)
        a = np.asarray(p['experts_a'])[e // 2][:, columns]
        want += gate[e] * (x[b, t] @ a @ np.asarray(p['experts_b'])[e // 2][columns])
      np.testing.assert_allclose(got[b, t], want, atol=1e-4)


def test_balance_is_pooled_over_the_loops():
  """Loops that each keep to their own experts use all alike: no more than the least loss."""
  c = config(experts=6, q=2, aux_loss=0.5, z_loss=0.0, prior=30.0)
  p = perturbed(c)
  for _, host, _ in relaxed_hosts(c):
    tree = subtree(p['block'], host)
    tree['experts_router'] = jnp.zeros_like(tree['experts_router'])
    tree['experts_prior'] = jnp.broadcast_to(c.relax[0].start(host), tree['experts_prior'].shape)
  _, aux = logits(c, p, return_aux=True)
  np.testing.assert_allclose(aux.losses['experts/switch'], 0.5, rtol=1e-4)
  np.testing.assert_allclose(aux.stats['experts/usage'], np.full(6, 1 / 6), atol=1e-5)
  np.testing.assert_allclose(aux.stats['experts/largest_load'], 1.0, rtol=1e-4)
  np.testing.assert_allclose(aux.stats['experts/entropy'], np.log(6), rtol=1e-4)
  np.testing.assert_allclose(aux.stats['experts/loop_information'], np.log(3), rtol=1e-4)
  # All loops at the same two experts: the most.
  for _, host, _ in relaxed_hosts(c):
    tree = subtree(p['block'], host)
    tree['experts_prior'] = tree['experts_prior'][:, :1] + jnp.zeros_like(tree['experts_prior'])
  _, aux = logits(c, p, return_aux=True)
  np.testing.assert_allclose(aux.losses['experts/switch'], 0.5 * 3, rtol=1e-4)
  np.testing.assert_allclose(aux.stats['experts/loop_information'], 0.0, atol=1e-5)


def test_padding_changes_no_balance():
  c = config(experts=6, gate=2)
  p = perturbed(c)
  ids = tokens(c)
  filled = jnp.concatenate([ids, jnp.flip(ids, 1)], 1)
  segments = jnp.concatenate([jnp.ones_like(ids), jnp.zeros_like(ids)], 1)
  aux = lambda ids, s: transformer.forward(c, p, ids, segment_ids_BxL=s, return_aux=True).aux
  want, got = aux(ids, jnp.ones_like(ids)), aux(filled, segments)
  for name in want.stats:
    np.testing.assert_allclose(got.stats[name], want.stats[name], atol=1e-5)
  for name in want.losses:
    np.testing.assert_allclose(got.losses[name], want.losses[name], rtol=1e-4)
  assert not np.allclose(
    aux(filled, jnp.ones_like(filled)).stats['experts/usage'], want.stats['experts/usage']
  )


def test_states_move_after_a_step_alone():
  c = config(experts=6, anneal=4, balance_by='bias', bias_rate=0.25, q=2)
  p = perturbed(c)
  _, aux = logits(c, p, return_aux=True)
  experts, host, _ = next(relaxed_hosts(c))
  new = after_step(c, p, aux.routes)
  old_tree, tree = subtree(p['block'], host), subtree(new['block'], host)
  load_NxE = np.asarray(aux.routes[route_key(experts, host)]['load']).sum(1)
  moved = np.asarray(tree['experts_balance'] - old_tree['experts_balance'])
  np.testing.assert_allclose(moved, 0.25 * np.sign(1 / 6 - load_NxE), atol=1e-6)
  for _ in range(4):
    new = after_step(c, new, aux.routes)
  np.testing.assert_array_equal(subtree(new['block'], host)['experts_temperature'], 0.0)
  for name in ('experts_a', 'experts_router'):
    np.testing.assert_array_equal(tree[name], old_tree[name])


def test_noise_is_in_training_alone():
  c = config(experts=6, noise=True, balance_by='none', q=2, topk=-1)
  p = perturbed(c)
  plain, _ = logits(c, p)
  noisy, _ = logits(c, p, key=jax.random.key(1))
  assert not np.allclose(plain, noisy, atol=1e-5)
  other, _ = logits(c, p, key=jax.random.key(2))
  assert not np.allclose(other, noisy, atol=1e-5)
  unrolled, _ = logits(c, p, scan=False, key=jax.random.key(1))
  np.testing.assert_allclose(noisy, unrolled, atol=2e-5)


def test_merged_uniformly_all_loops_have_the_mean():
  c = config(experts=6, by='loop', q=2, up=2)
  p = jax.tree.map(np.asarray, perturbed(c))
  for experts, host, _ in relaxed_hosts(c):
    leaves = own_leaves(subtree(p['block'], host), 'experts')
    merged = uniform(experts, leaves, host)
    product = lambda t, n, r: t['experts_a'][n, r] @ t['experts_b'][n, r]
    for n in range(c.block_layers):
      mean = np.mean([product(leaves, n, r) for r in range(c.loops)], 0)
      left, s, right = np.linalg.svd(mean)
      best = (left[:, :4] * s[:4]) @ right[:4]
      for r in range(c.loops):
        np.testing.assert_allclose(product(merged, n, r), best, atol=1e-4)


def body(d, f, layers, heads, kv, size, loops, mlp, attention) -> float:
  """Millions of parameters of a block of layers // loops, norms aside."""
  c = ModelConfig(
    family='llama',
    vocab_size=8,
    d_model=d,
    d_ff=f,
    num_heads=heads,
    num_kv_heads=kv,
    head_dim=size,
    block_layers=layers // loops,
    loops=loops,
    max_context=8,
    tie_embeddings=True,
    relax=(
      Lora(**dict.fromkeys(('q', 'k', 'v', 'o'), attention)),
      Experts(4 * loops, **dict.fromkeys(('gate', 'up', 'down'), mlp)),
    ),
  )
  router = sum(x.count(h) for x, h, _ in relaxed_hosts(c) if x.kind == 'experts') - sum(
    x.lora(h).count(h) for x, h, _ in relaxed_hosts(c) if x.kind == 'experts'
  )
  norms = c.block_layers * 2 * d * (loops if c.loop_norms else 1) + d
  return (count_params(c).unique - router - norms - 8 * d) / 1e6


def test_counts():
  """E = 4 R experts of rank 64 on the MLP, LoRA of rank 64 on attention."""
  assert body(2048, 16384, 18, 8, 1, 256, 2, 64, 64) == pytest.approx(1261, abs=0.6)
  assert body(2048, 5632, 22, 32, 4, 64, 2, 64, 64) == pytest.approx(632, abs=0.6)
  assert body(576, 1536, 30, 9, 3, 64, 3, 64, 64) == pytest.approx(91, abs=0.6)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(experts=4, q=2), r'experts.experts=4: must be a multiple of the 3 loops'),
    (dict(experts=6, topk=7, q=2), r'topk=7: must lie in 1 to 6'),
    (dict(q=2, by='row'), r"by='row': must be one of both, token, loop"),
    (dict(q=2, normalise='none'), r'normalise.*score=sigmoid'),
    (dict(q=2, aux_loss=-1.0), r'aux_loss=-1.0: must be 0 or more'),
    (dict(), r'no linear has a rank'),
    (dict(q=500), r'experts.q=500.*the smaller side'),
    (dict(q=-1), r'experts.q=-1: must be a whole number'),
  ],
)
def test_refusals(fields, message):
  with pytest.raises(InputError, match=message):
    config(**fields)


@pytest.mark.slow
@pytest.mark.parametrize('helps', [False, True])
def test_clusters_fall_back_to_lora_of_an_experts_rank(helps, monkeypatch):
  """Position by position; with clusters a token takes one of its loop's experts, by its input."""
  monkeypatch.setattr(clusters, 'improves', lambda *_: helps)
  text = list(np.random.default_rng(0).integers(0, runs.PARENT.vocab_size, 4096))
  made = {}
  for name, relax in (
    ('clusters', 'experts:experts=4,topk=1,clusters=true,balance_by=none,z_loss=0,up=2,down=2,q=2'),
    ('lora', 'lora:up=2,down=2,q=2'),
  ):
    made[name], _ = to_recursive(
      runs.parent(), prelude=1, coda=1, init='calibrated', rank=0, relax=(relax,), calibration=text
    )
  got, aux = logits(made['clusters'].config, made['clusters'].params, return_aux=True)
  want, _ = logits(made['lora'].config, made['lora'].params)
  assert np.allclose(got, want, atol=1e-4) != helps
  # The first of a loop's experts alone, or both.
  used = np.asarray(aux.stats['experts/usage']) > 0
  assert list(used) == ([True] * 4 if helps else [True, False, True, False])


def test_clusters_are_for_one_expert_a_token():
  with pytest.raises(InputError, match=r'topk=1.*plain LoRA is the best start'):
    config(experts=6, q=2, clusters=True)


def test_sorting_tokens_by_expert_equals_the_dense_product(monkeypatch):
  c = config(experts=24, topk=2, normalise='all', prior=0.5, q=2, down=1)
  p = perturbed(c)

  def found():
    loss = lambda p: jnp.sum(logits(c, p)[0] ** 2)
    return logits(c, p)[0], jax.grad(loss)(p)

  host = c.relax[0].hosts(c)[0]
  assert not c.relax[0].is_grouped(host)
  want = found()
  monkeypatch.setattr(experts_lib, '_LARGE', 1)
  assert c.relax[0].is_grouped(host)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-4), found(), want)
