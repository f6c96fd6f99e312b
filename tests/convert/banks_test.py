"""Banks with fewer experts: merged where loops are alike, pruned where nobody chooses."""

import dataclasses

import jax
import numpy as np
import pytest

from rrt.convert import banks
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models import lm_head, transformer
from rrt.models.count import count_params
from rrt.relax.trees import own_leaves
from tests.models.configs import llama, perturbed, tokens

KINDS = {
  'bank': 'bank:positions=0+1',
  'pool': 'pool:positions=0+1,segments=4',
  'pool, some always': 'pool:positions=1,segments=4,always=1,balance_by=switch',
}


def parent(alike: bool) -> LanguageModel:
  """Four layers; the MLPs of the last two are the first two's, hidden units in another order."""
  c = llama(prelude_layers=0, coda_layers=0, block_layers=4, loops=1, relax=(), loop_norms=False)
  params = jax.tree.map(np.array, perturbed(c))
  mlp = params['block']['layers']['mlp']
  if alike:
    # Within segments of ten units.
    rng = np.random.default_rng(0)
    order = np.concatenate([10 * i + rng.permutation(10) for i in range(4)])
    for part, leaf in mlp.items():
      for n in (0, 1):
        kernel = leaf['kernel'][n]
        leaf['kernel'][n + 2] = kernel[order] if part == 'down' else kernel[:, order]
  return LanguageModel(c, params)


def child(alike: bool, kind: str) -> LanguageModel:
  full = 'lora:q=24,k=12,v=12,o=24'
  made, _ = to_recursive(parent(alike), loops=2, init='average', relax=(full, KINDS[kind]), rank=0)
  return made


def logits(model):
  c = model.config
  out = transformer.forward(c, model.params, tokens(c))
  return np.asarray(lm_head.logits(c, model.params, out.hidden_BxLxD))


@pytest.mark.parametrize('kind', ['bank', 'pool'])
def test_loops_with_equal_mlps_merge_without_loss(kind):
  whole = child(True, kind)
  bank, host = banks.bank_of(whole)
  small = banks.reduced(whole, bank.segments)
  assert small.config.relax[-1].experts == bank.segments
  np.testing.assert_allclose(logits(small), logits(whole), atol=1e-4)
  saved = count_params(whole.config).unique - count_params(small.config).unique
  columns = (bank.total(host) - bank.segments) * (24 + 2 + (bank.balance_by == 'bias'))
  assert saved == 2 * (3 * 24 * 40 + columns)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', banks.HOW)
def test_any_number_of_experts_runs(kind, how):
  whole = child(False, kind)
  bank, host = banks.bank_of(whole)
  text = np.asarray(tokens(whole.config, 2, 12))
  # Segments that are always taken merge with nothing.
  least = bank.segments + bank.always * (how == 'merge')
  for experts in range(least, bank.total(host) + 1):
    small = banks.reduced(whole, experts, text, how)
    for name, leaf in small.config.relax[-1].leaves(host).items():
      assert small.params['block'][name].shape == leaf.shape
    assert np.isfinite(logits(small)).all()
  np.testing.assert_array_equal(logits(small), logits(whole))


def test_what_nobody_chooses_is_pruned_without_loss():
  whole = child(False, 'bank')
  bank, _ = banks.bank_of(whole)
  block = whole.params['block']
  moved = dict(block)
  # Both loops at the shared MLP.
  prior = np.array(block['bank_prior'])
  prior[:, 1] = prior[:, 0]
  moved['bank_prior'] = prior
  model = dataclasses.replace(whole, params={**whole.params, 'block': moved})
  text = np.asarray(tokens(whole.config, 2, 12))
  used = banks.usage(model, text)
  np.testing.assert_allclose(used, [[1.0, 0.0]] * 2, atol=1e-6)
  small = banks.reduced(model, 1, text, 'prune')
  np.testing.assert_allclose(logits(small), logits(model), atol=1e-4)
  assert own_leaves(small.params['block'], 'bank')['bank_up'].shape[1] == 0


def test_usage_of_the_start_is_each_loops_own():
  np.testing.assert_allclose(
    banks.usage(child(False, 'pool'), np.asarray(tokens(parent(False).config, 2, 12))),
    np.full((2, 8), 1 / 8),
    atol=1e-6,
  )


def test_a_conversion_merges_to_the_experts_that_are_asked_for():
  small, report = to_recursive(
    parent(False), loops=2, init='average', relax=('pool:positions=0,segments=4,experts=6',), rank=2
  )
  assert small.config.relax[-1].experts == 6 and not report.exact
  assert report.params.unique == count_params(small.config).unique


@pytest.mark.parametrize('topk', [1, 2])
def test_copies_compute_what_the_shared_mlp_does(topk):
  few = dict(loops=2, init='average', rank=0, relax=('lora:q=2,o=2',))
  dense, _ = to_recursive(parent(False), **few)
  sparse = banks.upcycled(dense, (0, 1), 5, topk)
  np.testing.assert_allclose(logits(sparse), logits(dense), atol=1e-4)
  noisy = banks.upcycled(dense, (0, 1), 5, topk, noise=0.1)
  assert np.abs(logits(noisy) - logits(dense)).max() > 1e-3
  used = banks.usage(sparse, np.asarray(tokens(dense.config, 4, 12)))
  assert (used > 0).sum() > 2 * topk


def test_refusals():
  whole = child(False, 'pool')
  with pytest.raises(InputError, match=r'experts=3: must lie between 4.*and 8'):
    banks.reduced(whole, 3)
  with pytest.raises(InputError, match="how='drop': must be one of merge, prune"):
    banks.reduced(whole, 6, how='drop')
  whole, _ = to_recursive(parent(False), loops=2, init='average', rank=2)
  with pytest.raises(InputError, match="The MLPs have 'lora'"):
    banks.upcycled(whole, (0,), 4)
  with pytest.raises(InputError, match='has no bank'):
    banks.reduced(parent(False), 1)
