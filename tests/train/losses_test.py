"""The chunked losses equal the plain ones, and never hold the logits whole."""

import itertools

import jax
from jax.extend import core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.sharding import make_mesh
from rrt.train import losses as losses_lib

B, L, D, V = 2, 13, 8, 40
LOSSES = ('loss', 'cross_entropy', 'distillation', 'z_loss', 'hidden')


def inputs(batch=B, length=L, d_teacher=6, seed=0):
  k = jax.random.split(jax.random.key(seed), 6)
  hidden = jax.random.normal(k[0], (batch, length, D))
  head = jax.random.normal(k[1], (D, V))
  targets = jax.random.randint(k[2], (batch, length), 0, V)
  weights = jax.random.uniform(k[3], (batch, length))
  weights *= jax.random.bernoulli(k[3], 0.8, weights.shape)
  t_hidden = jax.random.normal(k[4], (batch, length, d_teacher))
  t_head = jax.random.normal(k[5], (d_teacher, V))
  return hidden, head, targets, weights, (t_hidden, t_head)


def plain(o, hidden, head, targets, weights, teacher, caps=(None, None)):
  """The same losses from whole logits, differentiated by jax."""
  s, t = hidden @ head, teacher[0] @ teacher[1]
  s, t = (z if cap is None else cap * jnp.tanh(z / cap) for z, cap in zip((s, t), caps))
  log_q = jax.nn.log_softmax(s)
  ce = -jnp.take_along_axis(log_q, targets[..., None], -1)[..., 0]
  z = jax.nn.logsumexp(s, -1) ** 2
  log_p = jax.nn.log_softmax(t / o.temperature)
  log_q = jax.nn.log_softmax(s / o.temperature)
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  m = (p + q) / 2
  kd = {
    'forward_kl': lambda: p * (log_p - log_q),
    'reverse_kl': lambda: q * (log_q - log_p),
    'jsd': lambda: p * (log_p - jnp.log(m)) / 2 + q * (log_q - jnp.log(m)) / 2,
    'tvd': lambda: jnp.abs(p - q) / 2,
  }[o.divergence]().sum(-1) * o.temperature**2
  ce, kd, z = ((x * weights).sum() for x in (ce, kd, z))
  loss = o.cross_entropy * ce + o.distillation * kd + o.z_loss * z
  hidden_gap = jnp.zeros(())
  if o.hidden:
    gap = jnp.sum((hidden - teacher[0]) ** 2, -1) / jnp.sum(teacher[0] ** 2, -1)
    hidden_gap = jnp.sum(gap * weights)
  return losses_lib.Losses(loss + o.hidden * hidden_gap, ce, kd, z, hidden_gap)


def value_and_grads(f, objective, hidden, head, *rest):
  def scalar(hidden, head):
    out = f(objective, hidden, head, *rest)
    return out.loss, out

  (_, out), grads = jax.value_and_grad(scalar, (0, 1), has_aux=True)(hidden, head)
  return out, grads


def assert_same(objective, args, atol=1e-5):
  got, got_grads = value_and_grads(losses_lib.losses, objective, *args)
  want, want_grads = value_and_grads(plain, objective, *args)
  for name in LOSSES:
    if name == 'distillation' and not objective.distillation:
      continue
    np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, err_msg=name)
  for g, w in zip(got_grads, want_grads):
    np.testing.assert_allclose(g, w, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
  'divergence,temperature', list(itertools.product(losses_lib.DIVERGENCES, (1.0, 2.5)))
)
def test_chunked_equals_plain(divergence, temperature):
  objective = losses_lib.Objective(
    cross_entropy=0.7,
    distillation=1.3,
    divergence=divergence,
    temperature=temperature,
    z_loss=1e-2,
    chunk_tokens=6,
  )
  assert_same(objective, inputs())


def test_hidden_states_are_matched():
  assert_same(losses_lib.Objective(hidden=0.7, chunk_tokens=6), inputs(d_teacher=D))


@pytest.mark.parametrize('fields', [{'top_k': 3}, {'distillation': 0.0}], ids=str)
def test_hidden_states_need_those_of_the_parent(fields):
  with pytest.raises(InputError, match='hidden'):
    losses_lib.Objective(hidden=1.0, **fields)


def test_the_most_likely_tokens_have_no_temperature():
  with pytest.raises(InputError, match='temperature'):
    losses_lib.Objective(top_k=4, temperature=2.0)


@pytest.mark.parametrize('divergence', losses_lib.DIVERGENCES)
@pytest.mark.parametrize('k', [1, 7, V])
def test_the_most_likely_tokens_and_all_others_as_one(divergence, k):
  """Against the divergence of the same k + 1 probabilities, by jax's own gradients."""
  hidden, head, targets, weights, (t_hidden, t_head) = inputs()
  found = losses_lib.top_k(t_hidden, t_head, k, 5.0, chunk_tokens=6)
  p = jax.nn.softmax(5.0 * jnp.tanh(t_hidden @ t_head / 5.0))
  np.testing.assert_array_equal(found.ids_BxLxK, jnp.argsort(-p, axis=-1)[..., :k])

  def plain_top_k(o, hidden, head, targets, weights, teacher):
    def few(x):
      x_k = jnp.take_along_axis(x, found.ids_BxLxK, -1)
      return x_k if k == V else jnp.append(x_k, 1 - x_k.sum(-1, keepdims=True), -1)

    q = jax.nn.softmax(hidden @ head)
    logs = jnp.log(few(p)), jnp.log(few(q))
    # Logits of so few tokens: their log-probabilities, through heads that change nothing.
    same = jnp.eye(logs[0].shape[-1])
    out = plain(o, logs[1], same, jnp.zeros_like(targets), weights, (logs[0], same))
    nll = -jnp.log(jnp.take_along_axis(q, targets[..., None], -1)[..., 0])
    ce = jnp.sum(nll * weights)
    return out._replace(loss=o.distillation * out.distillation + ce, cross_entropy=ce)

  objective = losses_lib.Objective(divergence=divergence, top_k=k, chunk_tokens=6)
  args = hidden, head, targets, weights, found
  got, got_grads = value_and_grads(losses_lib.losses, objective, *args)
  want, want_grads = value_and_grads(plain_top_k, objective, *args)
  for name in ('loss', 'cross_entropy', 'distillation'):
    np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=2e-5, err_msg=name)
  for g, w in zip(got_grads, want_grads):
    np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('chunk_tokens', [1, 5, 8, 26, 1000])
def test_any_chunk_size(chunk_tokens):
  assert_same(losses_lib.Objective(chunk_tokens=chunk_tokens, z_loss=1e-3), inputs())


@pytest.mark.parametrize('caps', [(3.0, None), (None, 2.0), (1.5, 4.0)])
def test_logits_are_capped(caps):
  objective = losses_lib.Objective(chunk_tokens=6, z_loss=1e-2, temperature=1.7)
  assert_same(objective, (*inputs(), caps))


def test_only_cross_entropy_or_only_distillation():
  assert_same(losses_lib.Objective(distillation=0.0, chunk_tokens=4), inputs())
  assert_same(losses_lib.Objective(cross_entropy=0.0, chunk_tokens=4), inputs())


def test_no_teacher_is_needed_without_distillation():
  hidden, head, targets, weights, _ = inputs()
  objective = losses_lib.Objective(distillation=0.0)
  out = losses_lib.losses(objective, hidden, head, targets, weights)
  assert float(out.distillation) == 0
  with pytest.raises(ValueError, match='teacher'):
    losses_lib.losses(losses_lib.Objective(), hidden, head, targets, weights)


def test_the_parent_distilled_into_itself_costs_nothing():
  hidden, head, targets, weights, _ = inputs()
  for divergence in losses_lib.DIVERGENCES:
    objective = losses_lib.Objective(cross_entropy=0.0, divergence=divergence, chunk_tokens=8)
    out, grads = value_and_grads(
      losses_lib.losses, objective, hidden, head, targets, weights, (hidden, head)
    )
    assert abs(float(out.distillation)) < 1e-5
    np.testing.assert_allclose(grads[0], 0, atol=1e-6)


def test_extreme_logits_stay_finite():
  hidden, head, targets, weights, teacher = inputs()
  for divergence in losses_lib.DIVERGENCES:
    out, grads = value_and_grads(
      losses_lib.losses,
      losses_lib.Objective(divergence=divergence, chunk_tokens=8),
      hidden * 1e3,
      head,
      targets,
      weights,
      (teacher[0] * 1e3, teacher[1]),
    )
    assert np.isfinite(float(out.loss)), divergence
    assert all(np.isfinite(g).all() for g in grads), divergence


def test_one_gradient_alone():
  args = inputs()
  objective = losses_lib.Objective(chunk_tokens=8)
  _, (d_hidden, d_head) = value_and_grads(losses_lib.losses, objective, *args)
  hidden, head, *rest = args
  f = lambda h, w: losses_lib.losses(objective, h, w, *rest).loss
  np.testing.assert_allclose(jax.grad(f, 0)(hidden, head), d_hidden, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(f, 1)(hidden, head), d_head, rtol=1e-6)


def test_bfloat16_gradients_have_their_own_dtypes():
  hidden, head, targets, weights, teacher = inputs()
  objective = losses_lib.Objective(chunk_tokens=8)
  out, (d_hidden, d_head) = value_and_grads(
    losses_lib.losses, objective, hidden.astype(jnp.bfloat16), head, targets, weights, teacher
  )
  assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
  want = plain(objective, hidden, head, targets, weights, teacher)
  np.testing.assert_allclose(out.loss, want.loss, rtol=2e-2)


def avals(jaxpr):
  """Every intermediate of a jaxpr, those of inner jaxprs included."""
  for eqn in jaxpr.eqns:
    yield from (v.aval for v in eqn.outvars)
    for value in jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda x: isinstance(x, (jex_core.Jaxpr, jex_core.ClosedJaxpr)),
    ):
      if isinstance(value, jex_core.ClosedJaxpr):
        value = value.jaxpr
      if isinstance(value, jex_core.Jaxpr):
        yield from avals(value)


def test_the_gradient_of_a_float32_head_is_float32():
  """Though the computation is in bfloat16: it is summed over devices."""
  rng = np.random.default_rng(0)
  hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 16), (16, 32)))
  targets = jnp.asarray(rng.integers(0, 32, (2, 8)))
  objective = losses_lib.Objective(distillation=0.0)
  loss = lambda head: (
    losses_lib.losses(
      objective, jnp.asarray(hidden, jnp.bfloat16), head, targets, jnp.ones((2, 8)) / 16
    ).loss
  )
  got = jax.grad(loss)(jnp.asarray(head))
  assert got.dtype == jnp.float32
  assert np.any(np.asarray(got) != np.asarray(got.astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize('chunk_tokens', [4, 512])
def test_no_array_holds_all_logits(chunk_tokens):
  hidden, head, *rest = inputs()
  objective = losses_lib.Objective(chunk_tokens=chunk_tokens)
  jaxpr = jax.make_jaxpr(
    jax.grad(lambda h, w: losses_lib.losses(objective, h, w, *rest).loss, (0, 1))
  )(hidden, head)
  shapes = {a.shape for a in avals(jaxpr.jaxpr) if hasattr(a, 'shape')}
  with_vocab = [s for s in shapes if V in s and s != (D, V)]
  assert any(len(s) == 3 for s in with_vocab)  # The walk sees the chunks.
  assert max(np.prod(s) for s in with_vocab) <= B * -(-L // 2) * V


@pytest.mark.parametrize('sizes', [{'data': 8}, {'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_sharded_equals_one_device(sizes):
  args = inputs(batch=8)
  objective = losses_lib.Objective(chunk_tokens=16)
  want, want_grads = value_and_grads(losses_lib.losses, objective, *args)
  mesh = make_mesh(sizes)
  place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
  rows = lambda x: place(x, ('data', 'fsdp'))
  hidden, head, targets, weights, (t_hidden, t_head) = args
  with jax.set_mesh(mesh):
    got, got_grads = jax.jit(lambda *a: value_and_grads(losses_lib.losses, objective, *a))(
      rows(hidden),
      place(head, 'fsdp', 'tensor'),
      rows(targets),
      rows(weights),
      (rows(t_hidden), place(t_head, None, 'tensor')),
    )
  np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
  for g, w in zip(got_grads, want_grads):
    np.testing.assert_allclose(g, w, atol=1e-5)


@pytest.mark.parametrize(
  'field,value',
  [
    ('divergence', 'kl'),
    ('temperature', 0.0),
    ('cross_entropy', -1.0),
    ('chunk_tokens', 0),
    ('top_k', -1),
    ('hidden', -0.5),
    ('z_loss', float('nan')),
  ],
)
def test_wrong_values_are_named(field, value):
  with pytest.raises(InputError, match=field):
    losses_lib.Objective(**{field: value})


def test_nothing_to_learn_from():
  with pytest.raises(InputError, match='nothing'):
    losses_lib.Objective(cross_entropy=0, distillation=0)
