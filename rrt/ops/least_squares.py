"""Least squares on covariances: the algebra of a calibrated conversion.

A linear layer is judged by what it does to the inputs that it really gets.
With C = E[x^T x] / T of its inputs, the error of a weight V against W is
`||x (V - W)||^2 = tr((V - W)^T C (V - W))`, so everything here needs the
covariance and never the inputs.

I inputs of a linear, O its outputs, r rank, R loops.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

RIDGES = (0.1, 1.0, 10.0)  # What `refit` chooses from.
# Least variance of an input, for inputs that are all zero: far below that of
# any real one, and its inverse, too, is an ordinary float32.
FLOOR = 1e-20


def damp(c_IxI, ridge: float):
  """A covariance that is safe to invert, from however few tokens.

  Shrinks it towards its own diagonal, and lifts directions in which the
  text never moved.
  """
  diagonal_I = jnp.diag(c_IxI)
  floor = 1e-5 * jnp.mean(diagonal_I) + FLOOR
  return c_IxI + jnp.diag(ridge * diagonal_I + floor)


def solve(c_IxI, b_IxO):
  """C^-1 B of a positive definite C."""
  return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(c_IxI), b_IxO)


def weighted_mean(cs_RxIxI, ws_RxIxO):
  """Argmin over W of sum_b ||x_b (W - W_b)||^2."""
  chex.assert_equal_shape_prefix([cs_RxIxI, ws_RxIxO], 2)
  total_IxO = jnp.einsum('rij,rjo->io', cs_RxIxI, ws_RxIxO)
  return solve(cs_RxIxI.sum(0), total_IxO)


def spectrum(c_IxI, m_IxO):
  """The whitened SVD of M: singular values of S M, where C = S^T S.

  Returns:
    (sigma_K, left_IxK, right_KxO), K = min(I, O), the largest first, with
    `left @ right = M` and `||x M||^2 = sum sigma^2`: cutting it after r is
    the best matrix of rank r in that norm (Eckart, Young).
  """
  s_IxI = jnp.linalg.cholesky(c_IxI).T
  sm_IxO = s_IxI @ m_IxO
  if m_IxO.shape[0] >= m_IxO.shape[1]:
    power_K, v_OxK = jnp.linalg.eigh(sm_IxO.T @ sm_IxO)
    v_OxK = v_OxK[:, ::-1]
    left_IxK, right_KxO = m_IxO @ v_OxK, v_OxK.T
  else:
    power_K, u_IxK = jnp.linalg.eigh(sm_IxO @ sm_IxO.T)
    u_IxK = u_IxK[:, ::-1]
    left_IxK = jax.scipy.linalg.solve_triangular(s_IxI, u_IxK)
    right_KxO = u_IxK.T @ sm_IxO
  sigma_K = jnp.sqrt(jnp.maximum(power_K[::-1], 0.0))
  return sigma_K, left_IxK, right_KxO


def balance(left_IxK, right_KxO):
  """The same product with each pair of factors equally long."""
  a_K = jnp.linalg.norm(left_IxK, axis=0)
  b_K = jnp.linalg.norm(right_KxO, axis=1)
  scale_K = jnp.sqrt(jnp.maximum(b_K, 1e-30) / jnp.maximum(a_K, 1e-30))
  live_K = (a_K > 0) & (b_K > 0)
  scale_K = jnp.where(live_K, scale_K, 0.0)
  inverse_K = jnp.where(live_K, 1 / jnp.where(live_K, scale_K, 1.0), 0.0)
  return left_IxK * scale_K[None, :], right_KxO * inverse_K[:, None]


@functools.partial(jax.jit, static_argnames='width')
def low_rank(c_IxI, m_IxO, rank, width: int):
  """Factors of the best matrix of a rank, in the norm of the inputs.

  Args:
    c_IxI: covariance of the inputs, positive definite.
    m_IxO: what to approximate.
    rank: how many directions to keep; traced.
    width: columns of the factors, at least `rank`; the rest are zeros.

  Returns:
    (a_Ixw, b_wxO, kept), `kept` the share of `||x M||^2` that is kept.
  """
  chex.assert_equal_shape_prefix([c_IxI, m_IxO], 1)
  sigma_K, left_IxK, right_KxO = spectrum(c_IxI, m_IxO)
  own_K = (jnp.arange(sigma_K.shape[0]) < rank).astype(m_IxO.dtype)
  energy_K = sigma_K**2
  total = energy_K.sum()
  kept = jnp.where(total > 0, (energy_K * own_K).sum() / total, 1.0)
  left_IxK, right_KxO = left_IxK * own_K[None, :], right_KxO * own_K[:, None]
  a_IxK, b_KxO = balance(left_IxK, right_KxO)
  return a_IxK[:, :width], b_KxO[:width], kept


@jax.jit
def tie(cs_RxIxI, ws_RxIxO, ranks_R):
  """The shared weight that serves all loops best, given the ranks of their terms.

  Minimises `sum_b ||x_b (W_b - W' - A_b B_b)||^2` over W' and the low-rank
  terms. What the loops' low-rank terms take up need not lie on opposite
  sides of one mean: each may take other directions, so that R loops of rank
  r can tell their weights apart by up to R r directions instead of r. For
  two loops this is solved in closed form: with W' free, only the difference
  D = W_1 - W_0 counts, in the norm of the parallel sum
  (C_0^-1 + C_1^-1)^-1, and its best approximation of rank r_0 + r_1 is a
  truncated SVD whose directions are dealt to the loops in turn. For more
  loops the terms grow a quarter at a time, loop by loop, the mean refitted
  after each.

  Args:
    cs_RxIxI: covariances of each loop's inputs, positive definite.
    ws_RxIxO: the weights to stand for.
    ranks_R: rank of each loop's low-rank term, 0 for none.

  Returns:
    The shared weight [I, O]; the low-rank terms are what `low_rank` then
    finds for `ws - W'`.
  """
  if ws_RxIxO.shape[0] == 2:
    return _tie_two(cs_RxIxI, ws_RxIxO, ranks_R)
  return _tie_many(cs_RxIxI, ws_RxIxO, ranks_R)


def _tie_two(cs_RxIxI, ws_RxIxO, ranks_R):
  c0_IxI, c1_IxI = cs_RxIxI
  parallel_IxI = c0_IxI @ solve(c0_IxI + c1_IxI, c1_IxI)
  parallel_IxI = damp((parallel_IxI + parallel_IxI.T) / 2, 1e-5)
  _, left_IxK, right_KxO = spectrum(parallel_IxI, ws_RxIxO[1] - ws_RxIxO[0])
  # Dealt in turn while both have room, then to whoever has some left.
  k = jnp.arange(right_KxO.shape[0])
  least = jnp.min(ranks_R)
  to_first = jnp.where(k < 2 * least, k % 2 == 1, ranks_R[0] > ranks_R[1])
  used = k < ranks_R.sum()
  first_K = (used & to_first).astype(left_IxK.dtype)
  second_K = (used & ~to_first).astype(left_IxK.dtype)
  low_RxIxO = jnp.stack(
    [-(left_IxK * first_K[None, :]) @ right_KxO, (left_IxK * second_K[None, :]) @ right_KxO]
  )
  return weighted_mean(cs_RxIxI, ws_RxIxO - low_RxIxO)


def _tie_many(cs_RxIxI, ws_RxIxO, ranks_R, stages: int = 4, rounds: int = 2):
  R = ws_RxIxO.shape[0]
  shared_IxO = weighted_mean(cs_RxIxI, ws_RxIxO)
  low_RxIxO = jnp.zeros_like(ws_RxIxO)

  def improve(step, state):
    low_RxIxO, shared_IxO = state
    stage, b = step // R + 1, step % R
    rank = jnp.minimum(ranks_R[b], -(-ranks_R[b] * stage // stages))
    _, left_IxK, right_KxO = spectrum(cs_RxIxI[b], ws_RxIxO[b] - shared_IxO)
    own_K = (jnp.arange(right_KxO.shape[0]) < rank).astype(left_IxK.dtype)
    low_IxO = (left_IxK * own_K[None, :]) @ right_KxO
    low_RxIxO = low_RxIxO.at[b].set(low_IxO)
    return low_RxIxO, weighted_mean(cs_RxIxI, ws_RxIxO - low_RxIxO)

  steps = R * (stages + rounds)
  _, shared_IxO = jax.lax.fori_loop(0, steps, improve, (low_RxIxO, shared_IxO))
  return shared_IxO


@jax.jit
def refit(c_IxI, cross_IxO, checked_c_IxI, checked_cross_IxO, center_IxO):
  """A weight whose outputs come nearer to targets y than a center's do.

  Ridge regression of what the center misses, `y - x center`. How far the
  evidence is trusted is found out, not assumed: a part of the tokens is left
  out of a first fit, and the ridge that serves these best is used for all
  tokens, or the center is kept if none helps.

  Args:
    c_IxI: E[x^T x] over all tokens.
    cross_IxO: E[x^T (y - x center)] over all tokens.
    checked_c_IxI: the share of c_IxI of the tokens to check on.
    checked_cross_IxO: the share of cross_IxO of these.
    center_IxO: what to improve on.
  """

  def change(c_IxI, cross_IxO, ridge):
    return solve(damp(c_IxI, ridge), cross_IxO)

  def loss(ridge):
    d_IxO = change(c_IxI - checked_c_IxI, cross_IxO - checked_cross_IxO, ridge)
    gain = 2 * jnp.sum(d_IxO * checked_cross_IxO)
    return jnp.sum(d_IxO * (checked_c_IxI @ d_IxO)) - gain

  ridges_K = jnp.asarray(RIDGES)
  losses_K = jax.lax.map(loss, ridges_K)
  best = jnp.argmin(losses_K)
  change_IxO = change(c_IxI, cross_IxO, ridges_K[best])
  return center_IxO + jnp.where(losses_K[best] < 0, change_IxO, 0.0)


def truncated_svd(m_IxO, rank: int):
  """The best matrix of a rank, as balanced factors (paper, eq. 4).

  In float64 on the host. Of a cut SVD only the longer side's projections on
  the shorter side's directions are needed, which an eigendecomposition of
  the small Gram matrix gives much faster; at full rank, where the small
  directions count as well, it is the whole SVD.

  Returns:
    (a_Ixr, b_rxO, kept), `kept` the share of `||M||^2` that is kept.
  """
  m_IxO = np.asarray(m_IxO, np.float64)
  if m_IxO.shape[0] < m_IxO.shape[1]:
    b_Oxr, a_rxI, kept = truncated_svd(m_IxO.T, rank)
    return a_rxI.T, b_Oxr.T, kept
  if 2 * rank > min(m_IxO.shape):
    u_IxK, sigma_K, v_KxO = np.linalg.svd(m_IxO, full_matrices=False)
    u_Ixr, sigma_r, v_rxO = u_IxK[:, :rank], sigma_K[:rank], v_KxO[:rank]
  else:
    _, v_OxK = np.linalg.eigh(m_IxO.T @ m_IxO)
    v_rxO = v_OxK[:, ::-1][:, :rank].T
    u_Ixr = m_IxO @ v_rxO.T
    sigma_r = np.linalg.norm(u_Ixr, axis=0)
    u_Ixr = u_Ixr / np.maximum(sigma_r, 1e-300)[None, :]
  kept = np.sum(sigma_r**2) / max(np.sum(m_IxO**2), 1e-300)
  root_r = np.sqrt(sigma_r)
  return u_Ixr * root_r[None, :], v_rxO * root_r[:, None], kept
