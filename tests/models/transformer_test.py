"""The model: one function however it is run, causal, counted, cached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.models import cache as cache_lib
from rrt.models.count import count_params
from rrt.models.init import init_params
from rrt.models.lm_head import likeliest, logits
from rrt.models.passes import block_pass
from rrt.models.stack import unstack
from rrt.models.transformer import forward, make_context
from tests.models.configs import CONFIGS, gemma3, llama, perturbed, tokens

each_config = pytest.mark.parametrize('name', CONFIGS)


@functools.cache
def model(name):
  config = CONFIGS[name]
  return config, perturbed(config), tokens(config)


@functools.cache
def reference(name):
  config, params, t_BxL = model(name)
  return jax.jit(functools.partial(forward, config))(params, t_BxL)


def close(a, b, atol=2e-5):
  np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@each_config
def test_parameters_match_the_closed_form(name):
  config, params, _ = model(name)
  stored = sum(p.size for p in jax.tree.leaves(params))
  padding = 0
  for relaxation in config.relax:
    for component, (d_in, d_out) in config.shapes().items():
      ranks = relaxation.table(component, config.loops, config.block_layers)
      copies = config.copies(component)
      padding += copies * int((ranks.max() - ranks).sum()) * (d_in + d_out)
  assert stored - padding == count_params(config).unique


@each_config
def test_scan_equals_python_loop(name):
  config, params, t_BxL = model(name)
  unrolled = jax.jit(functools.partial(forward, config, scan=False))
  close(unrolled(params, t_BxL).hidden_BxLxD, reference(name).hidden_BxLxD)


@functools.cache
def gradient(name, remat):
  config, params, t_BxL = model(name)

  def loss(p):
    return (forward(config, p, t_BxL, remat=remat).hidden_BxLxD ** 2).mean()

  return jax.jit(jax.grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama-cycle', 'gemma3-sequence'])
@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_no_gradient(name, remat):
  jax.tree.map(close, gradient(name, remat), gradient(name, 'none'))


def test_dots_keeps_one_array_a_linear():
  """Its output with the relaxations: not their parts beside it."""
  config, params, t_BxL = model('llama-cycle')
  assert config.relax
  run = functools.partial(forward, config, remat='dots')
  text = str(jax.make_jaxpr(lambda p: run(p, t_BxL).hidden_BxLxD)(params))
  stacks = bool(config.prelude_layers) + 1 + bool(config.coda_layers)
  assert text.count('name=linear') == 7 * stacks


@each_config
def test_no_output_depends_on_later_tokens(name):
  config, params, t_BxL = model(name)
  run = jax.jit(functools.partial(forward, config))
  for cut in (1, 4, 8):
    changed = t_BxL.at[:, cut:].set((t_BxL[:, cut:] + 1) % config.vocab_size)
    h_BxLxD = run(params, changed).hidden_BxLxD
    close(h_BxLxD[:, :cut], reference(name).hidden_BxLxD[:, :cut], 1e-6)
    assert np.abs(h_BxLxD - reference(name).hidden_BxLxD)[:, cut:].max() > 1e-3


@each_config
@pytest.mark.parametrize('scan', [True, False])
def test_cached_decoding_equals_full_forward(name, scan):
  config, params, t_BxL = model(name)
  cache = cache_lib.init_cache(config, 2, 16, scan=scan)
  step = jax.jit(functools.partial(forward, config, scan=scan))
  out = step(params, t_BxL[:, :4], cache=cache)
  hidden = [out.hidden_BxLxD]
  for i in range(4, t_BxL.shape[1]):
    at_Bx1 = jnp.full((2, 1), i)
    out = step(params, t_BxL[:, i : i + 1], positions_BxL=at_Bx1, cache=out.cache)
    hidden.append(out.hidden_BxLxD)
  close(jnp.concatenate(hidden, 1), reference(name).hidden_BxLxD)


def test_cached_rows_may_have_different_lengths():
  config, params, t_BxL = model('gemma3-cycle')
  lengths = np.array([3, 6])
  cache = cache_lib.init_cache(config, 2, 16)
  step = jax.jit(functools.partial(forward, config, scan=False))
  out = step(params, t_BxL[:, :6], cache=cache)
  for i in range(3):
    at_Bx1 = jnp.asarray(lengths + i)[:, None]
    token_Bx1 = jnp.take_along_axis(t_BxL, at_Bx1, 1)
    out = step(params, token_Bx1, positions_BxL=at_Bx1, cache=out.cache)
    for row, length in enumerate(lengths):
      close(out.hidden_BxLxD[row, 0], reference('gemma3-cycle').hidden_BxLxD[row, length + i])


@pytest.mark.parametrize('name', ['llama-cycle', 'gemma3-cycle'])
@pytest.mark.parametrize('scan', [True, False])
def test_mixed_depth_rows_equal_single_depth_rows(name, scan):
  config, params, _ = model(name)
  loops_B = jnp.array([2, 0, 1, 1, 0, 2])
  t_BxL = tokens(config, batch=6)
  x_BxLxD = jax.random.normal(jax.random.key(3), (*t_BxL.shape, config.d_model))
  context = make_context(config, t_BxL)
  run = jax.jit(lambda x, loop, kvs: block_pass(config, params, x, loop, context, kvs, scan=scan))
  empty = cache_lib.init_cache(config, 6, 12, scan=scan, loops=1).block
  kvs = jax.tree.map(lambda t: t[0], empty) if scan else empty[0]
  for cached in (None, kvs):
    mixed, kv_mixed = run(x_BxLxD, loops_B, cached)
    for r in range(config.loops):
      own = np.asarray(loops_B == r)
      single, kv_single = run(x_BxLxD, jnp.int32(r), cached)
      close(mixed[own], single[own])
      if cached is not None:
        batch_axis = 1 if scan else 0
        pick = functools.partial(np.compress, own, axis=batch_axis)
        ours, theirs = ([pick(t) for t in jax.tree.leaves(kv)] for kv in (kv_mixed, kv_single))
        jax.tree.map(close, ours, theirs)
    shuffled, _ = run(x_BxLxD.at[1:].set(0.0), loops_B.at[1:].set(0), cached)
    close(shuffled[0], mixed[0])


@pytest.mark.parametrize('name', ['llama-cycle', 'gemma3-sequence'])
def test_packed_documents_do_not_see_each_other(name):
  config, params, t_BxL = model(name)
  run = jax.jit(functools.partial(forward, config))
  segments_BxL = jnp.broadcast_to(jnp.array([1] * 4 + [2] * 5)[None], (2, 9))
  positions_BxL = jnp.broadcast_to(jnp.array([*range(4), *range(5)])[None], (2, 9))
  packed = run(
    params, t_BxL, segment_ids_BxL=segments_BxL, positions_BxL=positions_BxL
  ).hidden_BxLxD
  close(packed[:, :4], run(params, t_BxL[:, :4]).hidden_BxLxD)
  close(packed[:, 4:], run(params, t_BxL[:, 4:]).hidden_BxLxD)


@pytest.mark.slow
def test_loop_states_end_in_the_last_loop():
  config, params, t_BxL = model('llama-cycle')
  config = llama(coda_layers=0)
  params = {k: v for k, v in params.items() if k != 'coda'}
  for scan in (True, False):
    out = forward(config, params, t_BxL, return_loops=True, scan=scan)
    assert out.loops_RxBxLxD.shape == (3, 2, 9, config.d_model)
    for loops in (1, 2, 3):
      fewer = forward(config, params, t_BxL, loops=loops, return_loops=True)
      close(fewer.loops_RxBxLxD[-1], out.loops_RxBxLxD[loops - 1])


def test_fewer_loops_equal_a_shallower_model():
  config, params, t_BxL = model('llama-vanilla')
  looped = llama(
    prelude_layers=1, block_layers=1, loops=2, coda_layers=1, relax=(), loop_norms=False
  )
  layers = params['block']['layers']
  take = lambda *i: {'layers': jax.tree.map(lambda p: p[np.array(i)], layers)}
  child = dict(params, prelude=take(0), block=take(2), coda=take(3))
  for loops, order in ((1, [0, 2, 3]), (2, [0, 2, 2, 3])):
    shallow = llama(
      prelude_layers=0, coda_layers=0, block_layers=len(order), loops=1, relax=(), loop_norms=False
    )
    expected = forward(shallow, dict(params, block=take(*order)), t_BxL)
    got = forward(looped, child, t_BxL, loops=loops)
    close(got.hidden_BxLxD, expected.hidden_BxLxD)


def test_random_relaxation_starts_at_zero():
  config = gemma3()
  params = init_params(config, jax.random.key(0))
  plain = gemma3(relax=())
  bare = jax.tree.map(lambda p: p, params)
  for part in ('attn', 'mlp'):
    for linear in bare['block']['layers'][part].values():
      linear.pop('lora_a', None)
      linear.pop('lora_b', None)
  t_BxL = tokens(config)
  a = forward(config, params, t_BxL).hidden_BxLxD
  b = forward(plain, bare, t_BxL).hidden_BxLxD
  close(a, b, 1e-6)


def test_loops_get_different_relaxations_at_initialisation():
  params = init_params(llama(), jax.random.key(0))
  a_NxRxDxr = params['block']['layers']['attn']['q']['lora_a']
  assert np.abs(a_NxRxDxr[:, 0] - a_NxRxDxr[:, 1]).min() > 0
  assert np.abs(a_NxRxDxr[0] - a_NxRxDxr[1]).min() > 0


def test_padding_of_rank_tables_gets_no_gradient():
  config = CONFIGS['llama-cycle']
  up = gradient('llama-cycle', 'none')['block']['layers']['mlp']['up']
  ranks_RxN = config.relax[0].table('up', 3, 2)
  for n in range(2):
    for r in range(3):
      k = ranks_RxN[r, n]
      assert not up['lora_a'][n, r, :, k:].any()
      assert not up['lora_b'][n, r, k:].any()
      assert k == 0 or np.abs(up['lora_a'][n, r, :, :k]).min() > 0


def test_tied_head_is_the_embedding_table():
  config, params, t_BxL = model('gemma3-cycle')
  hidden = reference('gemma3-cycle').hidden_BxLxD
  expected = hidden @ params['embed']['table'].T
  close(logits(config, params, hidden), expected, 1e-4)
  assert 'head' not in params


def test_unstack_keeps_every_array():
  config, params, _ = model('llama-cycle')
  flat = unstack(params)
  assert sorted(flat['block']) == ['layers_0', 'layers_1']
  total = lambda tree: sum(p.size for p in jax.tree.leaves(tree))
  assert total(flat) == total(params)


def test_unknown_loop_counts_are_refused():
  config, params, t_BxL = model('llama-cycle')
  with pytest.raises(InputError, match='from 1 to 3 loops'):
    forward(config, params, t_BxL, loops=4)
  with pytest.raises(InputError, match='cycle order'):
    forward(llama(order='sequence'), params, t_BxL, return_loops=True)
  with pytest.raises(InputError, match='max_context=64'):
    cache_lib.init_cache(config, 1, 65)


def test_the_likeliest_token_is_the_first_of_equals():
  logits_VxB = jnp.array([[0.0, 2.0, jnp.nan], [3.0, 2.0, 1.0], [3.0, -1.0, 0.0]])
  token_B = likeliest(logits_VxB)
  assert token_B.dtype == jnp.int32
  assert token_B[:2].tolist() == jnp.argmax(logits_VxB, 0)[:2].tolist() == [1, 0]
  assert 0 <= int(token_B[2]) < 3  # Of no number, a token all the same.
