"""A plain decoder, one token and one layer stack at a time, in python.

What the engine must write, whatever shares its batch: one sequence alone, a
dense cache, each KV policy spelled out as its definition says.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rrt.exits import score as score_lib
from rrt.infer.sampling import sample
from rrt.models import passes
from rrt.models.attention import Attention
from rrt.models.cache import init_cache
from rrt.models.layers import Norm
from rrt.models.lm_head import greedy_token, logits
from rrt.models.stack import unstack
from rrt.models.transformer import forward, make_context
from rrt.relax.base import Place


def _jit(function, *static):
  return jax.jit(function, static_argnames=('config', *static))


_forward = _jit(forward, 'scan')
_enter, _leave = _jit(passes.run_prelude, 'dtype'), _jit(passes.run_coda)
_block = _jit(passes.block_pass, 'scan')


def decode(
  config,
  params,
  prompt,
  room,
  *,
  kv='full',
  gate='none',
  arrays=None,
  threshold=2.0,
  slot=0,
  sampling=None,
  penalties=(0.0, 0.0, 1.0),
  logprobs=None,
):
  """Tokens, and the loops after which each was drawn.

  Log-probabilities of all tokens before penalties are appended to `logprobs`.
  """
  params = unstack(params)
  cache = init_cache(config, 1, config.max_context)
  if len(prompt) > 1:
    cache = _forward(config, params, jnp.asarray([prompt[:-1]]), cache=cache, scan=False).cache
  prelude, block, coda = cache.prelude, list(cache.block), cache.coda
  token, position = prompt[-1], len(prompt) - 1
  tokens, depths = [], []
  for count in range(room):
    token_1x1 = jnp.asarray([[token]])
    context = make_context(config, token_1x1, jnp.asarray([[position]]))
    x, prelude = _enter(config, params, token_1x1, context, prelude, dtype='float32')
    for r in range(config.loops):
      before = x
      x, block[r] = _block(config, params, x, r, context, block[r], scan=False)
      one = lambda v: jnp.asarray([v])
      sure = score_lib.score(
        gate, arrays, before[:, 0], x[:, 0], one(r + 1), one(position), one(slot), one(count)
      )
      if float(sure[0]) >= threshold:
        break
    depths.append(r + 1)
    left = x
    for j in range(r + 1, config.loops):
      if kv == 'write_ahead':
        block[j] = _copied(block[r], block[j], position)
      elif kv == 'propagate':
        block[j] = _projected(config, params, left, j, context, block[j])
      elif kv == 'exact_fill':
        x, block[j] = _block(config, params, x, j, context, block[j], scan=False)
    if r + 1 < config.loops and arrays and 'lens_kernel' in arrays:
      kernel, bias = arrays['lens_kernel'][r], arrays['lens_bias'][r]
      beside = 0
      if 'lens_in' in arrays:
        unit = left / jnp.sqrt(jnp.mean(left**2, -1, keepdims=True))
        z = unit @ arrays['lens_in'][r]
        beside = (z / (1 + jnp.exp(-z))) @ arrays['lens_out'][r]
      left = left + left @ kernel + bias[None, None] + beside
    hidden, coda = _leave(config, params, left, context, coda)
    raw = np.asarray(logits(config, params, hidden[:, 0])[0], np.float64)
    if logprobs is not None:
      logprobs.append(raw - np.logaddexp.reduce(raw))
    if penalties != (0.0, 0.0, 1.0):
      token = int(np.argmax(_penalized(raw, prompt, tokens, *penalties)))
    elif sampling is None:
      token = int(greedy_token(config, params, hidden[:, 0])[0])
    else:
      token = int(sample(jnp.asarray(raw)[None], sampling, jnp.asarray([count]))[0])
    tokens.append(token)
    position += 1
  return tokens, depths


def _penalized(raw, prompt, tokens, presence, frequency, repetition):
  """Logits after penalties, one token at a time."""
  new = raw.copy()
  for v in range(len(raw)):
    if v in prompt or v in tokens:
      new[v] = raw[v] / repetition if raw[v] > 0 else raw[v] * repetition
    new[v] -= presence * (v in tokens) + frequency * tokens.count(v)
  return new


def _copied(source, target, position):
  """Target with source's keys and values at one position."""
  return tuple(
    t._replace(
      k_BxGxDhxS=t.k_BxGxDhxS.at[..., position].set(s.k_BxGxDhxS[..., position]),
      v_BxGxSxDh=t.v_BxGxSxDh.at[:, :, position].set(s.v_BxGxSxDh[:, :, position]),
    )
    for s, t in zip(source, target, strict=True)
  )


def _projected(config, params, x, loop, context, kvs):
  """KVs of a loop after its attentions have all read x itself."""
  window, rope = passes.block_attn_specs(config, loop)
  new = []
  for n, kv in enumerate(kvs):
    layer = params['block'][f'layers_{n}']
    y = Norm(config, config.d_model, looped=True).apply({'params': layer['attn_norm']}, x, loop)
    attn_spec = passes.AttnSpec(*(None if t is None else t[n] for t in (window, rope)))
    _, kv = Attention(config, looped=True).apply(
      {'params': layer['attn']}, y, kv, attn_spec, Place(loop, n), context
    )
    new.append(kv)
  return tuple(new)
