"""Log-likelihoods of endings: shared contexts equal whole rows."""

import functools

import jax
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.evals import endings
from rrt.models import lm_head, transformer
from tests.models import configs


@functools.cache
def params(name):
  return configs.perturbed(configs.CONFIGS[name])


@functools.partial(jax.jit, static_argnames=('config', 'loops'))
def log_probs(params, tokens_BxL, *, config, loops):
  out = transformer.forward(config, params, tokens_BxL, loops=loops)
  logits = lm_head.logits(config, params, out.hidden_BxLxD)
  return jax.nn.log_softmax(logits, -1)


def naive(name, context, ending, loops=None):
  tokens = [*context, *ending]
  row = np.zeros((1, 64), np.int32)
  row[0, : len(tokens) - 1] = tokens[:-1]  # The last is predicted only.
  config = configs.CONFIGS[name]
  logp = np.asarray(log_probs(params(name), row, config=config, loops=loops))
  at = range(len(context) - 1, len(tokens) - 1)
  picked = [logp[0, i, t] for i, t in zip(at, ending, strict=True)]
  greedy = all(logp[0, i].argmax() == t for i, t in zip(at, ending))
  return sum(picked), greedy


def requests():
  """Contexts with one to five endings of one to seven tokens, shuffled."""
  rng = np.random.default_rng(0)
  draw = lambda n: tuple(int(t) for t in rng.integers(0, 53, n))
  pairs = []
  for length in (1, 3, 20, 40, 3):
    context = draw(length)
    pairs += [(context, draw(rng.integers(1, 8))) for _ in range(length % 6)]
  pairs.append((draw(5), draw(1)))
  return [pairs[i] for i in rng.permutation(len(pairs))]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama-cycle', 'gemma3-sequence'])
def test_equals_whole_rows(name):
  pairs = requests()
  got = endings.score_endings(configs.CONFIGS[name], params(name), pairs, batch_tokens=100)
  for pair, (score, greedy) in zip(pairs, got, strict=True):
    want, want_greedy = naive(name, *pair)
    np.testing.assert_allclose(score, want, rtol=1e-4)
    assert greedy == want_greedy


@pytest.mark.slow
def test_greedy_endings_are_told():
  name, context, ending = 'llama-cycle', (3, 1, 4), []
  for _ in range(4):
    row = np.zeros((1, 64), np.int32)
    tokens = [*context, *ending]
    row[0, : len(tokens)] = tokens
    logp = log_probs(params(name), row, config=configs.CONFIGS[name], loops=2)
    ending.append(int(logp[0, len(tokens) - 1].argmax()))
  pairs = [(context, ending), (context, [*ending[:-1], ending[-1] ^ 1])]
  got = endings.score_endings(configs.CONFIGS[name], params(name), pairs, loops=2)
  assert [greedy for _, greedy in got] == [True, False]


def test_long_contexts_are_cut_from_the_left():
  name = 'llama-cycle'
  long = tuple(int(t) for t in np.random.default_rng(1).integers(0, 53, 90))
  ((got, _),) = endings.score_endings(configs.CONFIGS[name], params(name), [(long, (7, 8, 9))])
  want, _ = naive(name, long[-62:], (7, 8, 9))
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_few_shapes_compile():
  rng = np.random.default_rng(2)
  pairs = [
    ((int(i), *range(rng.integers(1, 50))), range(rng.integers(1, 9)))
    for i in rng.integers(0, 40, 200)
  ]
  pairs = [(tuple(map(int, c)), tuple(map(int, e))) for c, e in pairs]
  config = configs.CONFIGS['llama-cycle']
  batches = list(endings.plan(config, pairs, 512))
  asked = sorted(i for b in batches for g in b.groups for i in g)
  assert asked == list(range(200))
  assert len({b.shape for b in batches}) <= 8
  for batch in batches:
    Q, L, E, T = batch.shape
    assert len(batch.groups) <= Q
    for group in batch.groups:
      assert len(group) <= E and len({pairs[i][0] for i in group}) == 1
      assert all(len(pairs[i][0]) <= L and len(pairs[i][1]) <= T for i in group)


@pytest.mark.parametrize('pair', [((), (1,)), ((1,), ()), ((1,), (2,) * 65)])
def test_impossible_pairs_are_refused(pair):
  config = configs.CONFIGS['llama-cycle']
  with pytest.raises(InputError):
    endings.score_endings(config, params('llama-cycle'), [pair])
