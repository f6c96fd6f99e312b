"""Banks and pools: the parent at the start, their formula, counts and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.config import ModelConfig
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models import transformer
from rrt.models.count import count_params
from rrt.models.init import init_params
from rrt.ops.activation import activate
from rrt.relax.bank import Bank, Pool
from rrt.relax.base import Place
from rrt.relax.lora import Lora
from rrt.relax.trees import own_leaves
from tests import runs
from tests.models.configs import gemma3, llama, perturbed

KINDS = {
  'bank': 'bank:positions=0+1',
  'bank, top 1 of all': 'bank:positions=0+1,normalise=all,prior=30',
  'pool': 'pool:positions=0+1,segments=4',
  'pool, one segment always': 'pool:positions=0+1,segments=4,balance_by=switch',
  'pool, softmax': 'pool:positions=0+1,segments=2,score=softmax',
}


def parent(family: str) -> LanguageModel:
  """Untied, of odd sizes."""
  alone = dict(prelude_layers=0, coda_layers=0, block_layers=4, loops=1, relax=(), loop_norms=False)
  if family == 'llama':
    return LanguageModel(c := llama(**alone), jax.tree.map(np.asarray, perturbed(c)))
  c = gemma3(**alone, windows=(0, 3, 0, 3), rope_index=(0, 1, 0, 1))
  return LanguageModel(c, jax.tree.map(np.asarray, perturbed(c)))


@pytest.mark.parametrize('family', ['llama', 'gemma3'])
@pytest.mark.parametrize('name', KINDS)
def test_the_start_is_the_parent(name, family):
  """Full rank on attention, the parent's own MLPs in the bank."""
  full = 'lora:q=24,k=12,v=12,o=24'
  made, report = to_recursive(
    parent(family), loops=2, init='average', relax=(full, KINDS[name]), rank=0
  )
  assert report.exact and report.identity_error < 2e-5
  bank = made.config.relax[-1]
  leaves = own_leaves(made.params['block'], bank.kind)
  assert np.abs(leaves[f'{bank.kind}_down']).max() > 0


@pytest.mark.slow
def test_a_calibrated_child_is_nearer_to_its_parent_with_a_bank():
  text = list(np.random.default_rng(0).integers(0, 53, 2048))
  whole = parent('llama')
  ids = jnp.asarray(np.random.default_rng(1).integers(0, 53, (4, 16)))
  hidden = lambda m: transformer.forward(m.config, m.params, ids).hidden_BxLxD
  gap = {}
  for relax in ((), ('bank:positions=1',), ('bank:positions=0+1',)):
    child, _ = to_recursive(
      whole, loops=2, init='calibrated', rank=2, relax=relax, calibration=text
    )
    gap[relax] = float(jnp.sum((hidden(child) - hidden(whole)) ** 2))
  assert gap['bank:positions=0+1',] < gap['bank:positions=1',] < gap[()]


@pytest.mark.parametrize('cls', [Bank, Pool])
def test_a_bank_is_its_formula(cls):
  router = dict(topk=3, normalise='all', score='softmax', balance_by='switch')
  bank = cls(positions=(1,), segments=4, always=1, **router)
  c = llama(relax=(bank,))
  (host,) = bank.hosts(c)
  block = perturbed(c)['block']
  p = {k: np.asarray(v[0]) for k, v in own_leaves(block, bank.kind).items()}
  mlp = {k: np.asarray(v['kernel'][1]) for k, v in block['layers']['mlp'].items()}
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 24)).astype(np.float32)
  hidden = np.asarray(activate(x @ mlp['gate'], 'silu')) * (x @ mlp['up'])
  whole = {k: jnp.asarray(v[None]) for k, v in p.items()}
  for loop in range(c.loops):
    place = Place(loop, 1)
    h = bank.apply_hidden(whole, jnp.asarray(x), jnp.asarray(hidden), place, host)
    got, _ = bank.apply_at(whole, jnp.asarray(x), h @ mlp['down'], place, host)
    for b, t in np.ndindex(2, 3):
      z = x[b, t] @ p[f'{bank.kind}_router'] + p[f'{bank.kind}_prior'][loop]
      gate = np.zeros(12)
      chosen = np.argsort(-z)[:3]
      gate[1:][chosen] = 3 * np.exp(z - z.max())[chosen] / np.exp(z - z.max()).sum()
      gate[0] = 1.0
      want = np.zeros(24)
      for e in range(12):
        units = slice(10 * e, 10 * e + 10)
        w = {k: (v[units] if k == 'down' else v[:, units]) for k, v in mlp.items()}
        if e >= 4:
          w = {k: p[f'{bank.kind}_{k}'][e - 4] for k in mlp}
        out = (np.asarray(activate(x[b, t] @ w['gate'], 'silu')) * (x[b, t] @ w['up'])) @ w['down']
        want += gate[e] * out
      np.testing.assert_allclose(got[b, t], want, atol=2e-4)
    elsewhere, _ = bank.apply_at(whole, jnp.asarray(x), h, Place(loop, 0), host)
    np.testing.assert_array_equal(elsewhere, h)


@pytest.mark.parametrize('topk', [1, 2])
def test_many_tokens_go_through_their_own_mlps_alone(topk, monkeypatch):
  """The shared MLP among the experts, as beside them: outputs, gradients and what is counted."""
  bank = Bank(positions=(0,), topk=topk, normalise='all', score='softmax')
  c = llama(relax=(Lora(q=2, down=((0, 2),) * 3), bank), prelude_layers=0, coda_layers=0)
  p, ids = perturbed(c), jnp.asarray(np.random.default_rng(0).integers(0, 53, (2, 130)))
  # Low-rank terms on its MLP would be passed by.
  low_rank = dataclasses.replace(c, relax=(Lora(down=2), bank))
  assert bank.replaces_mlp(c, 260) and not bank.replaces_mlp(low_rank, 260)
  assert not bank.replaces_mlp(c, 8)
  used = []
  apply_mlp = Bank.apply_mlp
  monkeypatch.setattr(Bank, 'apply_mlp', lambda *args: used.append(1) or apply_mlp(*args))

  def run():
    @jax.jit
    def both(p):
      out = transformer.forward(c, p, ids, return_aux=True)
      return jnp.sum(jnp.sin(out.hidden_BxLxD)), (out.hidden_BxLxD, out.aux)

    return jax.value_and_grad(both, has_aux=True)(p)

  (_, (got, aux)), grads = run()
  assert used
  used.clear()
  monkeypatch.setattr('rrt.relax.bank._MANY', 10_000)
  (_, (want, other)), wanted = run()
  assert not used
  np.testing.assert_allclose(got, want, atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), aux, other)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3), grads, wanted)


def body(d, f, layers, heads, kv, size, loops, relax) -> float:
  """Millions of parameters of the block, norms and routers aside."""
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
    relax=(Lora(q=64, k=64, v=64, o=64), relax),
  )
  norms = c.block_layers * 2 * d * (loops if c.loop_norms else 1) + d
  (host,) = relax.hosts(c)
  router = len(relax.positions) * sum(
    int(np.prod(leaf.shape)) for leaf in relax.router_leaves(host).values()
  )
  return (count_params(c).unique - router - norms - 8 * d) / 1e6


GEMMA, TINY = (2048, 16384, 18, 8, 1, 256, 2), (2048, 5632, 22, 32, 4, 64, 2)


@pytest.mark.parametrize(
  ('shape', 'relax', 'want'),
  [
    (GEMMA, Bank(positions=tuple(range(9))), 1912),
    (GEMMA, Bank(positions=(0, 4, 8)), 1308),
    (TINY, Bank(positions=tuple(range(11))), 883),
    (TINY, Bank(positions=(0, 4, 8)), 606),
    (GEMMA, Pool(positions=tuple(range(9)), experts=8), 1006),
    (GEMMA, Pool(positions=tuple(range(9)), experts=10), 1232),
    (GEMMA, Pool(positions=tuple(range(9)), experts=12), 1459),
    (TINY, Pool(positions=tuple(range(11)), experts=8), 503),
    (TINY, Pool(positions=tuple(range(11)), experts=10), 598),
  ],
)
def test_counts(shape, relax, want):
  assert body(*shape, relax) == pytest.approx(want, abs=0.6)


@pytest.mark.parametrize(
  ('relax', 'message'),
  [
    (Bank(positions=(2,)), r'bank.positions=\(2,\): must be layers of the block'),
    (Pool(segments=7), r'pool.segments=7: must divide the 40 hidden units'),
    (Pool(segments=4, always=4), r'pool.always=4: must be 0 or more, below segments=4'),
    (Pool(segments=4, experts=3), r'pool.experts=3: must be 4 or more'),
    (Bank(by='loop'), r"bank.by='loop': tokens choose here"),
    (Bank(capacity=-1.0), r'bank.capacity=-1.0: must be above 0, or none'),
    (Bank(capacity=0), r'bank.capacity=0: must be above 0, or none'),
    (Pool(segments=4, topk=13), r'pool.topk=13: must lie in 1 to 12'),
  ],
)
def test_refusals(relax, message):
  with pytest.raises(InputError, match=message):
    llama(relax=(relax,))


def test_models_that_it_does_not_go_with():
  with pytest.raises(InputError, match=r"bank: a bank of MLPs does not go with weights='int8'"):
    llama(relax=(Bank(),), weights='int8')
  with pytest.raises(InputError, match='does not go with biases in MLPs'):
    llama(relax=(Bank(),), biases=('up', 'down'))


def test_experts_that_nobody_chose_get_no_gradient():
  """Two loops at their own experts: the third's are not touched."""
  bank = Bank(positions=(0,), prior=30.0)
  c = dataclasses.replace(runs.CHILD, relax=(bank,))
  p = init_params(c, jax.random.key(0))
  (host,) = bank.hosts(c)
  leaves = own_leaves(p['block'], 'bank')
  x = jax.random.normal(jax.random.key(1), (1, 4, 16))

  def size(leaves, loop):
    place = Place(loop, 0)
    y, _ = bank.apply_at(leaves, x, jnp.zeros_like(x), place, host)
    return jnp.sum(y**2)

  moved = dict(leaves)
  moved['bank_prior'] = jnp.asarray([[[30.0, 0.0], [0.0, 30.0]]])
  first = jax.grad(size)(moved, 0)
  assert not np.asarray(first['bank_down']).any()
  second = jax.grad(size)(moved, 1)
  assert np.asarray(second['bank_down']).any()
