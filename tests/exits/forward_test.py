"""A masked forward pass equals decoding token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from rrt.exits import score as score_lib
from rrt.exits.forward import forward_early
from rrt.models.lm_head import greedy_token
from rrt.models.transformer import forward
from tests.infer.engine import oracle
from tests.models.configs import gemma3, llama, perturbed, tokens

MODELS = {'llama': llama(), 'gemma3': gemma3()}
each_model = pytest.mark.parametrize('name', MODELS)


def leaves_by(kind, arrays, threshold):
  def leaves(loops, before_BxLxD, after_BxLxD):
    score_BxL = score_lib.score_rows(kind, arrays, before_BxLxD, after_BxLxD, loops)
    return score_BxL >= threshold

  return leaves


@pytest.mark.slow
@each_model
def test_without_exits_it_is_the_forward_pass(name):
  config = MODELS[name]
  params, x = perturbed(config), tokens(config)
  stay = lambda loops, before, after: jnp.zeros(x.shape, bool)
  want = forward(config, params, x).hidden_BxLxD
  for kv in ('write_ahead', 'propagate', 'exact_fill'):
    got = forward_early(config, params, x, stay, kv)
    np.testing.assert_allclose(got.hidden_BxLxD, want, atol=2e-5)
    assert (np.asarray(got.depth_BxL) == config.loops).all()


@pytest.mark.slow
@each_model
@pytest.mark.parametrize('kv', ['write_ahead', 'propagate', 'exact_fill'])
def test_it_equals_decoding_token_by_token(name, kv):
  config = MODELS[name]
  params = perturbed(config)
  rng = np.random.default_rng(1)
  shape = (config.loops - 1, config.d_model)
  gate = {
    'kernel': rng.normal(0, 0.5, shape).astype(np.float32),
    'bias': np.zeros(config.loops - 1, np.float32),
  }
  drawn, depths = oracle.decode(
    config, params, [3], 24, kv=kv, gate='learned', arrays=gate, threshold=0.5
  )
  assert set(depths) == {1, 2, 3}
  text = jnp.asarray([[3, *drawn[:-1]]])
  got = forward_early(config, params, text, leaves_by('learned', gate, 0.5), kv)
  assert got.depth_BxL[0].tolist() == depths
  again = greedy_token(config, params, got.hidden_BxLxD[0])
  assert again.tolist() == drawn
