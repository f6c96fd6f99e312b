"""Cached decoding against the full forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rrt.errors import InputError
from rrt.infer import decode
from rrt.infer.sampling import SamplingArrays
from rrt.models import lm_head, transformer
from rrt.models.params import bucket
from tests.models import configs

PROMPTS = ([3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6])


@functools.cache
def params(name):
  return configs.perturbed(configs.CONFIGS[name])


def run(name, prompts, new=12, loops=None, **kwargs):
  decoder = decode.Decoder(configs.CONFIGS[name], params(name), loops=loops)
  rows = [[] for _ in prompts]
  for tokens in decoder.run(prompts, [new] * len(prompts), **kwargs):
    for row, drawn in zip(rows, tokens, strict=True):
      row.extend(drawn)
  return rows


@functools.partial(jax.jit, static_argnames=('config', 'loops'))
def best(params, tokens_BxL, *, config, loops):
  out = transformer.forward(config, params, tokens_BxL, loops=loops)
  return lm_head.logits(config, params, out.hidden_BxLxD).argmax(-1)


def full(name, prompt, new=12, loops=None):
  """Greedy tokens by the whole sequence at each step, without a cache."""
  config, tokens = configs.CONFIGS[name], list(prompt)
  for _ in range(new):
    row = np.zeros((1, 32), np.int32)
    row[0, : len(tokens)] = tokens
    found_BxL = best(params(name), row, config=config, loops=loops)
    tokens.append(int(found_BxL[0, len(tokens) - 1]))
  return tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(configs.CONFIGS))
def test_ragged_batch_equals_full_forward(name):
  got = run(name, PROMPTS)
  for prompt, tokens in zip(PROMPTS, got, strict=True):
    assert tokens == full(name, prompt)


@pytest.mark.slow
def test_every_loop_count():
  for loops in (1, 2):
    got = run('llama-cycle', PROMPTS[:2], loops=loops)
    want = [full('llama-cycle', p, loops=loops) for p in PROMPTS[:2]]
    assert got == want
    assert got != run('llama-cycle', PROMPTS[:2])


def test_a_row_does_not_depend_on_its_batch():
  whole = run('llama-cycle', PROMPTS)
  for prompt, tokens in zip(PROMPTS, whole, strict=True):
    assert run('llama-cycle', [prompt]) == [tokens]


@pytest.mark.slow
def test_sampled_rows_do_not_depend_on_their_batch():
  def sampling(*seeds):
    n = len(seeds)
    return SamplingArrays(
      np.full(n, 1.5, np.float32),
      np.full(n, 20, np.int32),
      np.full(n, 0.9, np.float32),
      np.full(n, 0.01, np.float32),
      np.array(seeds, np.uint32),
    )

  whole = run('llama-cycle', PROMPTS, sampling=sampling(7, 8, 9))
  for i, prompt in enumerate(PROMPTS):
    alone = run('llama-cycle', [prompt], sampling=sampling(7 + i))
    assert alone == [whole[i]]
  assert whole != run('llama-cycle', PROMPTS, sampling=sampling(1, 2, 3))


def test_end_tokens_end_their_row_alone():
  free = run('llama-cycle', PROMPTS)
  end = free[0][3]
  got = run('llama-cycle', PROMPTS, eos=[end])
  for tokens, longer in zip(got, free, strict=True):
    last = longer.index(end) + 1 if end in longer else len(longer)
    assert tokens == longer[:last]


def test_rows_have_room_of_their_own():
  free = run('llama-cycle', PROMPTS)
  decoder = decode.Decoder(configs.CONFIGS['llama-cycle'], params('llama-cycle'))
  rows = [[] for _ in PROMPTS]
  for tokens in decoder.run(PROMPTS, [1, 5, 12], call=4):
    for row, drawn in zip(rows, tokens, strict=True):
      row.extend(drawn)
  assert rows == [free[0][:1], free[1][:5], free[2]]


def test_whoever_iterates_can_end_a_row():
  free = run('llama-cycle', PROMPTS)
  decoder = decode.Decoder(configs.CONFIGS['llama-cycle'], params('llama-cycle'))
  steps = decoder.run(PROMPTS, [12] * 3, call=4)
  rows = next(steps)
  try:
    while True:
      for row, drawn in zip(rows, steps.send([0]), strict=True):
        row.extend(drawn)
  except StopIteration:
    pass
  assert rows == [free[0][:1], *free[1:]]


@pytest.mark.slow
def test_prompts_in_chunks_and_a_cache_that_grows(monkeypatch):
  want = run('llama-cycle', PROMPTS, new=40)
  monkeypatch.setattr(decode, 'CHUNK_TOKENS', 1)
  monkeypatch.setattr(decode, '_SOON', 4)
  monkeypatch.setattr(
    decode,
    'bucket',
    lambda n, most=None, least=8: min(
      -(-n // 8) * 8 if n < 17 else 16 if most is None else -(-n // 8) * 8, most or n + 8
    ),
  )
  assert run('llama-cycle', PROMPTS, new=40, call=8) == want


def test_the_context_can_be_filled_to_its_end():
  config = configs.CONFIGS['llama-cycle']
  tokens = run('llama-cycle', [[1, 2]], new=config.max_context - 2)
  assert len(tokens[0]) == config.max_context - 2


def test_decoding_holds_no_logits_of_the_prompt():
  decoder = decode.Decoder(configs.CONFIGS['llama-cycle'], params('llama-cycle'))
  config = decoder.static.config
  cache = decode.init_cache(config, 2, 32)
  text = decode.extend.lower(
    decoder.params,
    cache,
    jnp.zeros((2, config.d_model)),
    jnp.zeros((2, 16), jnp.int32),
    np.int32(0),
    np.ones(2, np.int32),
    static=decoder.static,
  ).as_text()
  assert f'16x{config.vocab_size}x' not in text


def test_clock_counts_tokens():
  decoder = decode.Decoder(configs.CONFIGS['llama-cycle'], params('llama-cycle'))
  list(decoder.run(PROMPTS, [6] * 3))
  assert decoder.clock.prefill_tokens == sum(map(len, PROMPTS))
  assert decoder.clock.decode_tokens == 3 * 5
  assert decoder.clock.decode_seconds > 0


def test_bfloat16_runs_and_bad_dtypes_do_not():
  config = configs.CONFIGS['llama-cycle']
  decoder = decode.Decoder(config, params('llama-cycle'), dtype='bfloat16')
  assert all(len(t) == 1 for t in next(decoder.run(PROMPTS, [4] * 3)))
  with pytest.raises(InputError, match='dtype'):
    decode.Decoder(config, params('llama-cycle'), dtype='int4')
  with pytest.raises(InputError, match='loops'):
    decode.Decoder(config, params('llama-cycle'), loops=4)


def test_buckets_are_few_and_hold_what_they_should():
  sizes = {bucket(n) for n in range(1, 2049)}
  assert len(sizes) == 15
  assert all(n <= bucket(n) <= max(16, 1.5 * n) for n in range(1, 2049))
  assert bucket(100, 110) == 110
  assert [bucket(n, least=1) for n in range(1, 8)] == [1, 2, 3, 4, 6, 6, 8]
