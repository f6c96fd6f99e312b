"""From prompts to text: `complete`, and what it needs around decoding.

model = rrt.load('smollm2-135m')
print(rrt.complete(model, 'The sea is', max_new_tokens=40)[0].text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from rrt.errors import InputError
from rrt.infer import decode
from rrt.infer.detokenize import Completion, Text
from rrt.infer.sampling import Sampling

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer
  from rrt.model import LanguageModel

BATCH = 32  # prompts that are decoded together
_GLANCE = 8  # tokens between looks of the host, where text is watched


def complete(
  model: LanguageModel | Generator,
  prompts: str | Sequence[str] | Sequence[Sequence[int]],
  *,
  max_new_tokens: int = 128,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  seed: int | Sequence[int] = 0,
  stop: str | Sequence[str] = (),
  loops: int | None = None,
  dtype: str = 'float32',
  chat: bool = False,
  ignore_end: bool = False,
  stream: Callable[[int, str], None] | None = None,
) -> list[Completion]:
  """Continues each prompt.

  Args:
    model: what `rrt.load` gives, or a `Generator` over it, which keeps the
      prepared weights from call to call.
    prompts: a text, texts, or lists of token ids.
    max_new_tokens: tokens to write at most.
    temperature: 0 always takes the most likely token; above, logits are
      divided by it and tokens drawn.
    top_k: draw from the k most likely tokens only; 0 is all.
    top_p: of those, from the fewest that hold this much probability.
    min_p: of those, from the ones at least this times as likely as the most
      likely one.
    seed: of the first prompt, the others count up; or one for each.
    stop: texts that end a completion where they first appear.
    loops: how many loops of the block to run; None for all.
    dtype: 'float32' or 'bfloat16', of weights and computation.
    chat: prompts are messages of a user; put them in the chat template.
    ignore_end: write on through end tokens.
    stream: called with (index of the prompt, new text) as text comes.

  Returns:
    One completion a prompt, in order. Each is what the prompt would give
    alone.

  Raises:
    InputError: a setting or prompt that cannot work; nothing was run.
  """
  seed = int(seed) if isinstance(seed, Integral) else seed
  settings = Settings(
    max_new_tokens,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    (stop,) if isinstance(stop, str) else tuple(stop),
    chat,
    ignore_end,
  )
  settings.check()
  if not isinstance(model, Generator):
    model = Generator(model, loops=loops, dtype=dtype)
  return model.complete(prompts, settings, stream)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to write; the arguments of `complete`."""

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int | Sequence[int] = 0
  stop: tuple[str, ...] = ()
  chat: bool = False
  ignore_end: bool = False

  def check(self) -> None:
    """Raises InputError for the first setting that cannot work."""

    def need(ok: bool, field: str, why: str) -> None:
      if not ok:
        raise InputError(f'{field}={getattr(self, field)!r}: must be {why}.')

    def number(field, low, high) -> bool:
      value = getattr(self, field)
      return isinstance(value, Real) and low <= value <= high < math.inf

    def whole(field, low) -> bool:
      value = getattr(self, field)
      return isinstance(value, Integral) and low <= int(value) < 2**31

    need(whole('max_new_tokens', 1), 'max_new_tokens', '1 or more')
    need(number('temperature', 0, 1e30), 'temperature', 'a finite number, 0 (greedy) or above')
    need(whole('top_k', 0), 'top_k', '0 (all tokens) or more')
    need(number('top_p', 0, 1) and self.top_p > 0, 'top_p', 'above 0 and at most 1 (all tokens)')
    need(number('min_p', 0, 1), 'min_p', 'from 0 (all tokens) to 1')
    need(all(self.stop), 'stop', 'texts of at least one character')
    seeds = list(np.atleast_1d(self.seed))
    need(
      all(isinstance(s, Integral) and 0 <= int(s) < 2**32 for s in seeds),
      'seed',
      'whole, from 0 to 2**32 - 1',
    )

  def check_for(self, prompts: int, tokenizer: Tokenizer | None) -> None:
    """Raises InputError for what these prompts or this model cannot have."""
    if not isinstance(self.seed, int | np.integer) and len(self.seed) != prompts:
      raise InputError(
        f'seed has {len(self.seed)} values for {prompts} prompts; give one for each, or one in all.'
      )
    if self.stop and tokenizer is None:
      raise InputError('stop needs a model with a tokenizer.')

  def sampling(self, rows: range) -> Sampling | None:
    """The rules for some of the prompts; None is greedy."""
    if not self.temperature:
      return None
    n = len(rows)
    return Sampling(
      np.full(n, self.temperature, np.float32),
      np.full(n, self.top_k, np.int32),
      np.full(n, self.top_p, np.float32),
      np.full(n, self.min_p, np.float32),
      np.array(self.seeds(rows), np.uint32),
    )

  def seeds(self, rows: range) -> list[int]:
    """The seed of some of the prompts."""
    if isinstance(self.seed, int | np.integer):
      return [(int(self.seed) + i) % 2**32 for i in rows]
    return [self.seed[i] for i in rows]


class Generator:
  """A model whose weights stay prepared between calls of `complete`.

  Attributes:
    clock: tokens and seconds of all calls; see `rrt.infer.decode.Clock`.
    loops: how many loops of the block run.
  """

  def __init__(
    self,
    model: LanguageModel,
    *,
    loops: int | None = None,
    dtype: str = 'float32',
    batch: int = BATCH,
  ):
    self._config = model.config
    self._tokenizer = model.tokenizer
    self._batch = batch
    self._decoder = decode.Decoder(model.config, model.params, loops=loops, dtype=dtype)
    self.clock = self._decoder.clock
    self.loops = self._decoder.static.loops

  def complete(
    self, prompts, settings: Settings, stream: Callable[[int, str], None] | None = None
  ) -> list[Completion]:
    """As the function `complete`, which checks the settings first."""
    ids = encode_prompts(self._tokenizer, prompts, settings.chat)
    check_prompts(self._config, ids)
    settings.check_for(len(ids), self._tokenizer)
    done: list[Completion] = []
    for first in range(0, len(ids), self._batch):
      rows = range(first, min(first + self._batch, len(ids)))
      done += self._batched([ids[i] for i in rows], rows, settings, stream)
    return done

  def _batched(self, ids, rows, settings, stream):
    """Completes the prompts of one batch."""
    end = () if settings.ignore_end or self._tokenizer is None else (self._tokenizer.eos_ids)
    context = self._config.max_context
    room = [min(settings.max_new_tokens, context - len(p)) for p in ids]
    show = stream or (lambda i, text: None)
    texts = [
      Text(self._tokenizer, p, end, settings.stop, i, show) for i, p in zip(rows, ids, strict=True)
    ]
    watched = stream is not None or bool(settings.stop)
    run = self._decoder.run(
      ids, room, sampling=settings.sampling(rows), eos=end, call=_GLANCE if watched else decode.CALL
    )
    for tokens in _drive(run, texts):
      for text, new in zip(texts, tokens, strict=True):
        text.extend(new)
    return [
      text.finish(len(p), 'length' if r == settings.max_new_tokens else 'context')
      for text, p, r in zip(texts, ids, room, strict=True)
    ]


def _drive(run, texts: list[Text]) -> Iterator[list[list[int]]]:
  """Iterates a decoder's run, telling it which rows met a stop string."""
  try:
    tokens = next(run)
    while True:
      yield tokens
      tokens = run.send([i for i, t in enumerate(texts) if t.stopped])
  except StopIteration:
    return


def encode_prompts(tokenizer: Tokenizer | None, prompts, chat: bool = False) -> list[list[int]]:
  """Token ids of prompts given as one text, texts, or token ids."""
  if isinstance(prompts, str):
    prompts = [prompts]
  prompts = list(prompts)
  if not prompts:
    raise InputError('There is no prompt; give at least one.')
  if not all(isinstance(p, str) for p in prompts):
    if any(isinstance(p, str) for p in prompts) or chat:
      raise InputError('Give prompts all as texts, or all as token ids.')
    return [[int(t) for t in p] for p in prompts]
  if tokenizer is None:
    raise InputError('This model has no tokenizer; give prompts as lists of token ids.')
  check_texts(prompts)
  if not chat:
    return tokenizer.encode_batch(prompts)
  # A template writes its own begin token, where it wants one.
  return tokenizer.encode_batch(
    [tokenizer.apply_chat([{'role': 'user', 'content': p}]) for p in prompts], bos=False
  )


def check_texts(prompts: Sequence[str]) -> None:
  """Raises InputError for the first prompt without a character."""
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise InputError(f'Prompt {i} is empty; give at least one character.')


def check_prompts(config, ids: Sequence[Sequence[int]]) -> None:
  """Raises InputError for the first prompt that the model cannot take."""
  for i, prompt in enumerate(ids):
    if not prompt:
      raise InputError(f'Prompt {i} has no tokens; give at least one.')
    if len(prompt) >= config.max_context:
      raise InputError(
        f'Prompt {i} has {len(prompt)} tokens and leaves no room in the '
        f'context of {config.max_context}; shorten it to '
        f'{config.max_context - 1} or fewer.'
      )
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
      raise InputError(f'Prompt {i} has token ids outside 0..{config.vocab_size - 1}.')
