"""Adapter of `LanguageModel` to EleutherAI's lm-eval, registered as `rrt`."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from rrt import console
from rrt.checkpoints.load import load
from rrt.errors import InputError
from rrt.evals import early_endings, endings
from rrt.exits import gate as gate_lib
from rrt.infer import generate
from rrt.infer.sampling import SamplingParams
from rrt.models.params import cast

_NEW_TOKENS = 256  # lm-eval's default for tasks that name no limit
_ROW_TOKENS = 512  # what one row of lm-eval's batch_size stands for


@register_model('rrt')
class RrtLM(TemplateLM):
  """lm-eval's `LM` interface over a `LanguageModel`.

  Args of `--model_args`: `pretrained` (anything that `rrt.load` takes),
  `loops`, `dtype`, `max_length`, `batch_tokens`.

  Attributes:
    gate: early exits of the endings' tokens, with full `loops`; None runs all.
    mean_loops: of the endings' tokens in the last call.
  """

  def __init__(
    self,
    pretrained: Any = None,
    *,
    loops: int | None = None,
    dtype: str = 'float32',
    max_length: int | None = None,
    batch_tokens: int | None = None,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
    gate: gate_lib.Gate | None = None,
  ):
    super().__init__()
    del max_batch_size, device  # lm-eval passes them to every model.
    if pretrained is None:
      raise InputError('pretrained= is missing, such as smollm2-135m.')
    self.model = _loaded(pretrained)
    self.tokenizer = self.model.tokenizer
    if self.tokenizer is None:
      raise InputError('Tasks need a model with a tokenizer.')
    self.config = self.model.config
    if max_length is not None:
      if not 2 <= max_length <= self.config.max_context:
        raise InputError(
          f'max_length={max_length}: must lie between 2 and '
          f'{self.config.max_context}, the context of the model.'
        )
      self.config = dataclasses.replace(self.config, max_context=max_length)
    self.loops, self.dtype, self.gate = loops, dtype, gate
    self.mean_loops = 0.0
    if batch_tokens is None:
      rows = 8 if batch_size in (None, 'auto') else int(batch_size)
      batch_tokens = _ROW_TOKENS * rows
    self.batch_tokens = batch_tokens
    self._params = cast(self.model.params, dtype)
    self._writer: generate.Generator | None = None

  @property
  def max_length(self) -> int:
    """Maximum context in tokens."""
    return self.config.max_context

  @property
  def eot_token_id(self) -> int:
    """The end-of-text token."""
    if not self.tokenizer.eos_ids:
      raise InputError('The tokenizer has no end token.')
    return self.tokenizer.eos_ids[0]

  @property
  def prefix_token_id(self) -> int:
    """The token that precedes a text without a context."""
    bos = self.tokenizer.bos_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    """The tokenizer's key in lm-eval's request cache."""
    return f'rrt-{self.tokenizer.sha256[:16]}'

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The tokenizer's chat template."""
    del chat_template
    return self.tokenizer.chat_template

  def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
    """Renders a dialogue with the chat template."""
    return self.tokenizer.apply_chat(chat_history, add_generation_prompt)

  def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
    """Token ids, with a begin-of-sequence token if the tokenizer adds one."""
    del kwargs
    bos = add_special_tokens
    if bos is None and self.tokenizer.bos_id is not None:
      # A chat template has written it already.
      if string.startswith(self.tokenizer.token(self.tokenizer.bos_id)):
        bos = False
    return self.tokenizer.encode(string, bos=bos and self.tokenizer.bos_id is not None)

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
    del kwargs
    pairs = [(context, ending) for _, context, ending in requests]
    found = self._score(pairs, 'score', show=not disable_tqdm)
    for (text, _, _), answer in zip(requests, found, strict=True):
      if text is not None:
        self.cache_hook.add_partial('loglikelihood', text, answer)
    return found

  def _score(self, pairs, label, show=True):
    if not pairs:
      return []
    if self.gate is not None:
      with console.Progress(len(pairs), label, 'endings') as progress:
        found, self.mean_loops = early_endings.score_endings(
          self.config,
          self._params,
          pairs,
          self.gate,
          dtype=self.dtype,
          batch_tokens=self.batch_tokens,
          progress=progress.update,
        )
      return found
    arguments: dict[str, Any] = {
      'loops': self.loops,
      'dtype': self.dtype,
      'batch_tokens': self.batch_tokens,
    }
    if not show:
      return endings.score_endings(self.config, self._params, pairs, **arguments)
    with console.Progress(len(pairs), label, 'endings') as progress:
      return endings.score_endings(
        self.config, self._params, pairs, progress=progress.update, **arguments
      )

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    """Log-likelihoods of whole texts; long ones in disjoint windows."""
    pairs, counts = [], []
    for request in requests:
      windows = [
        utils.make_disjoint_window(w)
        for w in utils.get_rolling_token_windows(
          token_list=self.tok_encode(request.args[0], False),
          prefix_token=self.prefix_token_id,
          max_seq_len=self.max_length,
          context_len=1,
        )
      ]
      pairs += windows
      counts.append(len(windows))
    found = iter(self._score(pairs, 'score', show=not disable_tqdm))
    sums = []
    for request, count in zip(requests, counts, strict=True):
      sums.append(sum(next(found)[0] for _ in range(count)))
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, sums[-1])
    return sums

  def generate_until(self, requests, disable_tqdm=False):
    """The model's continuation of each context."""
    if self._writer is None:
      limited = dataclasses.replace(self.model, config=self.config)
      self._writer = generate.Generator(limited, loops=self.loops, dtype=self.dtype)
    by_settings: dict[SamplingParams, list[int]] = {}
    for i, request in enumerate(requests):
      by_settings.setdefault(_settings(request.args[1]), []).append(i)
    texts = [''] * len(requests)
    with console.Progress(len(requests), 'write', 'texts') as progress:
      for settings, indices in by_settings.items():
        settings.check()
        (first_seed,) = settings.seeds(range(1))
        room = self.max_length - settings.max_new_tokens
        if room < 1:
          raise InputError(
            f'max_gen_toks={settings.max_new_tokens}: leaves no room in '
            f'the context of {self.max_length}.'
          )
        prompts = {
          i: self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in indices
        }
        # Rows of like length share a batch and waste little padding.
        indices.sort(key=lambda i: -len(prompts[i]))
        for first in range(0, len(indices), generate.BATCH):
          part = indices[first : first + generate.BATCH]
          # A request's seed depends on its number alone, not on its batch.
          seeds = [(first_seed + i) % 2**32 for i in part]
          done = self._writer.complete([prompts[i] for i in part], settings.replace(seed=seeds))
          for i, completion in zip(part, done, strict=True):
            texts[i] = completion.text
            self.cache_hook.add_partial('generate_until', requests[i].args, completion.text)
          if not disable_tqdm:
            progress.update(len(part))
    return texts


def _loaded(source):
  return source if hasattr(source, 'params') else load(source)


# Generation arguments that are read, and values of others that have no effect.
_READ = (
  *('until', 'max_gen_toks', 'max_new_tokens', 'do_sample', 'seed'),
  *('temperature', 'top_k', 'top_p', 'min_p'),
)
_NEUTRAL = {
  'repetition_penalty': 1,
  'presence_penalty': 0,
  'frequency_penalty': 0,
  'length_penalty': 1,
  'no_repeat_ngram_size': 0,
  'num_beams': 1,
  'num_return_sequences': 1,
  'typical_p': 1,
  'use_cache': True,
}


def _settings(arguments: dict[str, Any]) -> SamplingParams:
  """`SamplingParams` from lm-eval's generation arguments.

  Raises:
    InputError: an argument that is not supported.
  """
  for name, value in arguments.items():
    if name not in _READ and value is not None and _NEUTRAL.get(name) != value:
      raise InputError(
        f'generation_kwargs: {name}={value!r} is not supported; supported are {", ".join(_READ)}.'
      )
  until = arguments.get('until') or ()
  temperature = float(arguments.get('temperature') or 0.0)
  if not arguments.get('do_sample', temperature > 0):
    temperature = 0.0
  return SamplingParams(
    max_new_tokens=int(
      arguments.get('max_gen_toks') or arguments.get('max_new_tokens') or _NEW_TOKENS
    ),
    temperature=temperature,
    top_k=int(arguments.get('top_k') or 0),
    top_p=float(arguments.get('top_p') or 1.0),
    min_p=float(arguments.get('min_p') or 0.0),
    seed=int(arguments.get('seed') or 0),
    stop=(until,) if isinstance(until, str) else tuple(filter(None, until)),
  )
