"""Losses after every loop against their definitions on whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt import sharding
from rrt.errors import InputError
from rrt.models import lm_head
from rrt.models.transformer import forward
from rrt.train import optim, setup
from rrt.train import step as step_lib
from rrt.train.exit_losses import ExitObjective, exit_losses
from rrt.train.losses import Objective
from rrt.train.recipe import Recipe
from tests.models.configs import CONFIGS, gemma3, llama, perturbed, tokens


def test_coefficients_are_the_papers():
  assert ExitObjective('weighted').of_loops(3) == (1 / 6, 2 / 6, 3 / 6)
  assert ExitObjective('aggressive', 0.1).of_loops(3) == (0.1, 0.1, 1.0)
  assert ExitObjective().of_loops(3) == (0.0, 0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize('scan', [True, False])
def test_exits_are_the_outputs_of_models_with_fewer_loops(scan):
  config = gemma3()
  params, x = perturbed(config), tokens(config)
  segments = jnp.asarray([[1] * 5 + [2] * 4, [1] * 9])
  where = dict(segment_ids_BxL=segments, scan=scan)
  out = forward(config, params, x, return_exits=True, **where)
  np.testing.assert_array_equal(out.exits_RxBxLxD[-1], out.hidden_BxLxD)
  for r in range(config.loops):
    want = forward(config, params, x, loops=r + 1, **where).hidden_BxLxD
    np.testing.assert_allclose(out.exits_RxBxLxD[r], want, atol=2e-5)


@pytest.mark.parametrize('coefficients', ['weighted', 'aggressive'])
def test_losses_and_gradients_equal_those_of_whole_logits(coefficients):
  exits = ExitObjective(coefficients, 0.3, cross_entropy=0.7, distillation=0.4, temperature=2.0)
  R, B, L, D, V = 3, 2, 7, 5, 11
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (R, B, L, D))
  head = jax.random.normal(keys[1], (D, V))
  targets = jax.random.randint(keys[2], (B, L), 0, V)
  weights = jax.random.uniform(keys[3], (B, L))

  def plain(hidden, head):
    log_p = jax.nn.log_softmax(hidden @ head)
    hot = jax.nn.log_softmax(hidden @ head / 2)
    last = jax.lax.stop_gradient(hot[-1])
    total, entropies = 0.0, []
    for r, a in enumerate(exits.of_loops(R)[:-1]):
      ce = -jnp.take_along_axis(log_p[r], targets[..., None], -1)[..., 0]
      kd = 4 * jnp.sum(jnp.exp(last) * (last - hot[r]), -1)
      total += a * jnp.sum(weights * (0.7 * ce + 0.4 * kd))
      entropies.append(jnp.sum(weights * ce))
    return total, jnp.stack(entropies)

  def chunked(hidden, head):
    return exit_losses(exits, Objective(chunk_tokens=4), hidden, head, targets, weights)

  grad = lambda f: jax.value_and_grad(f, (0, 1), has_aux=True)(hidden, head)
  got, want = grad(chunked), grad(plain)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)
  # The last loop learns nothing from its pupils.
  np.testing.assert_array_equal(got[1][0][-1], 0)


def batch_of(config):
  x = tokens(config)
  return {
    'tokens': x,
    'targets': jnp.roll(x, -1, 1),
    'weights': jnp.ones(x.shape),
    'segment_ids': jnp.ones_like(x),
    'positions': jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape),
  }


@pytest.mark.slow
def test_a_step_sums_the_losses_of_all_loops():
  config = llama()
  params, batch = perturbed(config), batch_of(config)
  exits = ExitObjective('weighted', distillation=0.0)
  trained = frozenset(step_lib.trained_paths(optim.trainable(optim.Optimizer(), params)))
  spec = step_lib.Step(config, Objective(distillation=0.0), None, trained, exits=exits)
  scale = 1 / batch['weights'].sum()
  sums, _, exits_R, _ = step_lib.batch_losses(spec, params, {}, batch, scale)

  def entropy(loops):
    hidden = forward(config, params, batch['tokens'], loops=loops).hidden_BxLxD
    log_p = jax.nn.log_softmax(hidden @ lm_head.kernel(config, params))
    hit = jnp.take_along_axis(log_p, batch['targets'][..., None], -1)
    return -float(hit.mean())

  want = [entropy(r) for r in (1, 2, 3)]
  np.testing.assert_allclose(exits_R, want[:2], rtol=1e-5)
  np.testing.assert_allclose(
    sums.loss, sum(a * w for a, w in zip((1 / 6, 2 / 6, 3 / 6), want)), rtol=1e-5
  )


@pytest.mark.parametrize('name', ['llama-vanilla', 'llama-sequence'])
def test_models_without_exits_are_refused(name):
  config = CONFIGS[name]
  recipe = Recipe(
    loss=Objective(distillation=0.0), exits=ExitObjective('weighted'), length=16, batch=8
  )
  with pytest.raises(InputError, match='two loops or more'):
    setup.check(recipe, None, config, sharding.make_mesh(recipe.mesh))


@pytest.mark.parametrize(
  'fields',
  [
    dict(coefficients='half'),
    dict(weight=-1),
    dict(cross_entropy=0, distillation=0),
    dict(temperature=0),
  ],
)
def test_settings_that_cannot_work_are_refused(fields):
  with pytest.raises(InputError, match='exits'):
    ExitObjective(**fields)
