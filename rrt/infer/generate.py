"""Generation from prompts to text: `complete` and `Generator`.

model = rrt.load('smollm2-135m')
print(rrt.complete(model, 'The sea is', max_new_tokens=40)[0].text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rrt.errors import InputError
from rrt.infer import decode
from rrt.infer.detokenize import Completion, Detokenizer
from rrt.infer.sampling import SamplingParams

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer
  from rrt.model import LanguageModel

BATCH = 32  # prompts that are decoded together
_GLANCE = 8  # tokens between looks of the host, where text is watched


def complete(
  model: LanguageModel | Generator,
  prompts: str | Sequence[str] | Sequence[Sequence[int]],
  params: SamplingParams | None = None,
  *,
  loops: int | None = None,
  dtype: str = 'float32',
  chat: bool = False,
  stream: Callable[[int, str], None] | None = None,
  **changes: Any,
) -> list[Completion]:
  """Continues each prompt.

  Args:
    model: what `rrt.load` gives, or a `Generator` over it, which keeps the
      prepared weights from call to call.
    prompts: a text, texts, or lists of token ids.
    params: sampling parameters; keyword arguments override single fields, such
      as `max_new_tokens=40` or `temperature=0.8`.
    loops: how many loops of the block to run; None for all.
    dtype: 'float32' or 'bfloat16', of weights and computation.
    chat: prompts are user messages; apply the chat template.
    stream: called with (index of the prompt, new text) during generation.
    **changes: fields of `SamplingParams`.

  Returns:
    One completion a prompt, in order. Each is independent of the other prompts.

  Raises:
    InputError: an invalid setting or prompt; nothing was run.

  Example:
    >>> rrt.complete(model, 'The sea is', max_new_tokens=20, temperature=0.8)[0].text
  """
  params = (params or SamplingParams()).replace(**changes)
  params.check()
  if not isinstance(model, Generator):
    model = Generator(model, loops=loops, dtype=dtype)
  return model.complete(prompts, params, stream, chat)


class Generator:
  """Keeps a model's prepared weights between calls of `complete`.

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
    self,
    prompts,
    params: SamplingParams,
    stream: Callable[[int, str], None] | None = None,
    chat: bool = False,
  ) -> list[Completion]:
    """As the function `complete`, which checks the parameters first."""
    if params.penalizes or params.restricts or params.logprobs is not None:
      raise InputError('Penalties, logprobs and restrictions of tokens need an Engine.')
    if params.stop_token_ids or params.include_stop:
      raise InputError('stop_token_ids and include_stop need an Engine.')
    ids = encode_prompts(self._tokenizer, prompts, chat)
    check_prompts(self._config, ids)
    params.check_for(len(ids), self._tokenizer)
    done: list[Completion] = []
    for first in range(0, len(ids), self._batch):
      rows = range(first, min(first + self._batch, len(ids)))
      done += self._batched([ids[i] for i in rows], rows, params, stream)
    return done

  def _batched(self, ids, rows, params, stream):
    """Completes the prompts of one batch."""
    end = () if params.ignore_eos or self._tokenizer is None else (self._tokenizer.eos_ids)
    context = self._config.max_context
    max_new = [min(params.max_new_tokens, context - len(p)) for p in ids]
    show = stream or (lambda i, text: None)
    texts = [
      Detokenizer(self._tokenizer, p, end, params.stop, i, show)
      for i, p in zip(rows, ids, strict=True)
    ]
    watched = stream is not None or bool(params.stop)
    run = self._decoder.run(
      ids, max_new, sampling=params.arrays(rows), eos=end, call=_GLANCE if watched else decode.CALL
    )
    for tokens in _drive(run, texts):
      for text, new in zip(texts, tokens, strict=True):
        text.extend(new)
    return [
      text.finish(len(p), 'length' if r == params.max_new_tokens else 'context')
      for text, p, r in zip(texts, ids, max_new, strict=True)
    ]


def _drive(run, texts: list[Detokenizer]) -> Iterator[list[list[int]]]:
  """Iterates a decoder's run, and stops rows that met a stop string."""
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
  """Raises InputError for the first prompt that is empty, too long or out of range."""
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
