"""Cross-entropy, perplexity and bits per byte of a text.

The text's tokens are cut into rows of `context`, which are scored independently:
the first token of a row is given, the others are predicted from those before
them in the row. So a row of 1,024 scores 1,023 tokens, and losses depend on
`context`: longer rows have lower ones. For a model that was trained with a
begin-of-sequence token, that token is the first of every row.

B batch, L length, D model, V vocabulary, N tokens, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from rrt.data.token_bytes import token_bytes
from rrt.errors import InputError
from rrt.models import lm_head, transformer
from rrt.models.params import cast

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer
  from rrt.model import LanguageModel

HEAD_CHUNK = 256  # tokens whose logits exist at a time
_CHARACTERS = 16  # more than the tokens of ordinary text have


@dataclasses.dataclass(frozen=True)
class Score:
  """Cross-entropy of a text under a model.

  Attributes:
    nll_nats: mean negative log-likelihood of a token.
    perplexity: its exponential.
    bits_per_byte: negative log-likelihood in bits over the bytes of the
      scored tokens; comparable between tokenizers. None without a tokenizer.
    tokens: number of scored tokens.
    bytes: their length in UTF-8; None without a tokenizer.
    loops: number of loops that the model ran.
  """

  nll_nats: float
  perplexity: float
  bits_per_byte: float | None
  tokens: int
  bytes: int | None
  loops: int


def score(
  model: LanguageModel,
  text: str | Sequence[int],
  *,
  context: int = 1024,
  loops: int | None = None,
  batch: int = 4,
  max_tokens: int | None = None,
  dtype: str = 'float32',
  progress: Callable[[int], None] | None = None,
) -> Score:
  """Scores a text, or tokens, in rows of `context`.

  Args:
    model: what `rrt.load` gives.
    text: text or token ids, of at least two tokens. Token ids are cut into rows
      without adding begin-of-sequence tokens.
    context: length of a row in tokens; the last row may be shorter.
    loops: how many loops of the block to run; None for all.
    batch: rows in one pass.
    max_tokens: use the first so many tokens; None for all.
    dtype: of the computation; losses are always float32.
    progress: called with the number of tokens after each pass.

  Raises:
    InputError: a text of under two tokens, a row longer than the model's
      context, tokens outside its vocabulary, a loop count it lacks.

  Example:
    >>> rrt.score(model, 'A text of some length.', context=512).bits_per_byte
  """
  config = model.config
  loops = config.loops if loops is None else loops
  transformer.check_loops(config, loops)
  rows = make_rows(model, text, context, max_tokens)
  if batch < 1:
    raise InputError(f'batch={batch}: must be 1 or more.')
  params = cast(model.params, dtype)
  total = 0.0
  for first in range(0, len(rows), batch):
    part = rows[first : first + batch]
    width = max(map(len, part))
    tokens_BxL = np.zeros((len(part), width), np.int32)
    scored_BxT = np.zeros((len(part), width - 1), bool)
    for i, row in enumerate(part):
      tokens_BxL[i, : len(row)] = row
      scored_BxT[i, : len(row) - 1] = True
    nll_BxT = _row_losses(params, tokens_BxL, config=config, loops=loops, dtype=dtype)
    total += float(np.asarray(nll_BxT, np.float64)[scored_BxT].sum())
    if progress:
      progress(sum(map(len, part)))
  count = sum(len(row) - 1 for row in rows)
  size = None
  if model.tokenizer is not None:
    size = sum(int(byte_lengths(model.tokenizer, r[1:]).sum()) for r in rows)
  return Score(
    nll_nats=total / count,
    perplexity=math.exp(min(total / count, 700.0)),
    bits_per_byte=total / math.log(2) / size if size else None,
    tokens=count,
    bytes=size,
    loops=loops,
  )


def make_rows(model: LanguageModel, text, context: int, max_tokens: int | None) -> list[list[int]]:
  """Cuts tokens into rows of `context`; a last row of one token is dropped.

  Raises:
    InputError: see `score`.
  """
  config = model.config
  if not 2 <= context <= config.max_context:
    raise InputError(
      f'context={context}: must lie between 2 and {config.max_context}, the context of the model.'
    )
  if max_tokens is not None and max_tokens < 2:
    raise InputError(f'max_tokens={max_tokens}: must be 2 or more.')
  tokens = encode(model.tokenizer, text, max_tokens)
  start: list[int] = []
  if isinstance(text, str) and model.tokenizer is not None:
    start_id = model.tokenizer.start_id
    start = [] if start_id is None else [start_id]
  if len(tokens) < 2:
    raise InputError(f'The text has {len(tokens)} tokens; at least 2 are needed.')
  if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
    raise InputError(
      f'The text has token ids outside 0..{config.vocab_size - 1}; is this '
      'the tokenizer of the model?'
    )
  step = context - len(start)
  rows = [start + tokens[i : i + step] for i in range(0, len(tokens), step)]
  return rows if len(rows[-1]) > 1 else rows[:-1]


def encode(
  tokenizer: Tokenizer | None, text: str | Sequence[int], max_tokens: int | None
) -> list[int]:
  """The first tokens of a text, without a begin-of-sequence token."""
  if not isinstance(text, str):
    return [int(t) for t in text][:max_tokens]
  if tokenizer is None:
    raise InputError('This model has no tokenizer; give token ids.')
  if not text.strip():
    raise InputError('The text is empty.')
  if max_tokens is not None:
    # No need to encode all of a long text: tokens have few characters.
    part = text[: _CHARACTERS * max_tokens]
    tokens = tokenizer.encode(part, bos=False)
    if len(tokens) > max_tokens + 64 or len(part) == len(text):
      return tokens[:max_tokens]
  return tokenizer.encode(text, bos=False)[:max_tokens]


def read_text(path: str | Path, max_tokens: int | None = None) -> str:
  """The documents of a path, joined by blank lines.

  Args:
    path: anything that `rrt.data.sources` reads.
    max_tokens: stop reading once the text holds at least so many; None reads
      all.

  Raises:
    InputError: there is no such file, it is damaged, binary, or empty.
  """
  from rrt.data import sources

  documents: list[str] = []
  size = 0
  for text in sources.stream(path, whole_files=True):
    documents.append(text)
    size += len(text) + 2
    if max_tokens is not None and size > _CHARACTERS * max_tokens:
      break
  return '\n\n'.join(documents)


@functools.partial(jax.jit, static_argnames=('config', 'loops', 'dtype'))
def _row_losses(params, tokens_BxL, *, config, loops, dtype):
  """Negative log-likelihood of each next token, float32 [B, L - 1]."""
  out = transformer.forward(config, params, tokens_BxL, loops=loops, dtype=dtype)
  B, L = tokens_BxL.shape
  hidden_NxD = out.hidden_BxLxD[:, :-1].reshape(B * (L - 1), -1)
  nll_N, _ = token_losses(config, params, hidden_NxD, tokens_BxL[:, 1:].reshape(-1), dtype)
  return nll_N.reshape(B, L - 1)


def token_losses(config, params, hidden_NxD, targets_N, dtype='float32', count=None):
  """Losses of next tokens from hidden states, with the head chunk by chunk.

  Args:
    config: the model's shape.
    params: the model's parameters; only the head is used.
    hidden_NxD: hidden states.
    targets_N: the token after each.
    dtype: of the product with the head.
    count: compute only the first so many; the others may be 0.

  Returns:
    nll_N: float32 negative log-likelihoods, in nats.
    greedy_N: bool, whether the token is the most likely one.
  """
  N, D = hidden_NxD.shape
  chunk = min(HEAD_CHUNK, N)
  pad = -N % chunk
  hidden_KxCxD = jnp.pad(hidden_NxD, ((0, pad), (0, 0))).reshape(-1, chunk, D)
  targets_KxC = jnp.pad(targets_N, (0, pad)).reshape(-1, chunk)

  def one(k, done):
    nll_KxC, greedy_KxC = done
    targets_C = targets_KxC[k]
    logits_CxV = lm_head.logits(config, params, hidden_KxCxD[k], dtype)
    target_C = jnp.take_along_axis(logits_CxV, targets_C[:, None], -1)[:, 0]
    nll_C = jax.nn.logsumexp(logits_CxV, -1) - target_C
    greedy_C = jnp.argmax(logits_CxV, -1) == targets_C
    return nll_KxC.at[k].set(nll_C), greedy_KxC.at[k].set(greedy_C)

  chunks = targets_KxC.shape[0] if count is None else -(-count // chunk)
  none = (jnp.zeros(targets_KxC.shape), jnp.zeros(targets_KxC.shape, bool))
  nll_KxC, greedy_KxC = jax.lax.fori_loop(0, chunks, one, none)
  return nll_KxC.reshape(-1)[:N], greedy_KxC.reshape(-1)[:N]


def byte_lengths(tokenizer: Tokenizer, ids: Sequence[int]) -> np.ndarray:
  """Number of UTF-8 bytes of each token, int [N]."""
  distinct, where = np.unique(np.asarray(ids, np.int64), return_inverse=True)
  lengths = [len(token_bytes(tokenizer, i) or b'') for i in distinct]
  return np.array(lengths, np.int64)[where]
