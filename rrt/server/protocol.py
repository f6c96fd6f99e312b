"""OpenAI requests as engine requests."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from rrt.infer.engine.request import Request
from rrt.infer.sampling import MOST_STOP_IDS
from rrt.server import prompts, structured, tools
from rrt.server.fields import Fields, Refused
from rrt.server.prompts import Prompt
from rrt.server.tools import Tools

MOST_CHOICES = 16
MOST_REQUESTS = 128  # of one call: prompts times choices
MOST_STOPS = 16
LONGEST_STOP = 256  # characters
MOST_BIASED = 1024  # tokens with a bias
# What is known and not done here; a default that asks for nothing is accepted.
NOT_DONE = (
  'audio',
  'beam_width',
  'early_stopping',
  'function_call',
  'functions',
  'length_penalty',
  'logits_processors',
  'prediction',
  'prompt_logprobs',
  'reasoning_effort',
  'suffix',
  'use_beam_search',
  'verbosity',
  'web_search_options',
)
# Fields of the one endpoint that the other one does not have.
OF_CHATS = (
  'add_generation_prompt',
  'chat_template',
  'chat_template_kwargs',
  'continue_final_message',
  'documents',
  'max_completion_tokens',
  'messages',
  'tool_choice',
  'tools',
  'top_logprobs',
)
OF_COMPLETIONS = ('echo', 'prompt')


@dataclasses.dataclass(frozen=True)
class Job:
  """A validated request.

  Attributes:
    requests: engine requests, `n` for each prompt.
    prompts: of each engine request.
    stream: whether to stream the response.
    usage: whether the last chunk has token counts (`include_usage`).
    chat: whether it came to the chat endpoint.
    pieces: whether to return each token's text and loops (the built-in page).
    choices: `n`, choices a prompt.
    echo: whether the text begins with the prompt.
    max_tokens: as asked; 0 with `echo` returns the prompt alone.
    tools: functions that the model may call.
    unknown: fields that no API knows.
  """

  requests: list[Request]
  prompts: list[Prompt]
  stream: bool
  usage: bool
  chat: bool
  pieces: bool
  choices: int
  echo: bool
  max_tokens: int
  tools: Tools
  unknown: list[str]


def parse(
  body: dict[str, Any],
  chat: bool,
  *,
  name: str,
  tokenizer,
  context: int,
  vocab: int,
  max_tokens: int,
  logprobs: int,
) -> Job:
  """Validates a body and builds its engine requests.

  Args:
    body: from `fields.read_body`.
    chat: whether it came to the chat endpoint.
    name: of the served model.
    tokenizer: of the model.
    context: maximum tokens of a sequence, prompt included.
    vocab: vocabulary size.
    max_tokens: limit of new tokens of one completion.
    logprobs: maximum `top_logprobs` that the engine returns.

  Raises:
    Refused: names the invalid field.
  """
  f = Fields(body)
  if f.get('model', name) != name:
    raise Refused(f'This server has one model, {name!r}.', 404, 'model', 'model_not_found')
  f.refuse(*NOT_DONE)
  for other in OF_COMPLETIONS if chat else OF_CHATS:
    if f.get(other) is not None:
      where = '/v1/completions' if chat else '/v1/chat/completions'
      raise Refused(f'{other} is a field of {where}.', param=other)
  if f.get('modalities', ['text']) != ['text']:
    raise Refused('modalities must be ["text"].', param='modalities')
  choices = f.whole('n', 1, 1, MOST_CHOICES)
  if f.whole('best_of', choices, 1, MOST_CHOICES) != choices:
    raise Refused('best_of must equal n.', param='best_of')
  stream = f.flag('stream')
  options = f.object('stream_options')
  form = structured.structured_outputs(f)
  offered = Tools()
  if chat:
    offered = tools.read(f, prompts.template_of(f, tokenizer))
    if offered.structured and form:
      raise Refused('Give either tool_choice or a form of the text.', param='tool_choice')
    given = [prompts.of_chat(f, tokenizer, offered.offered)]
  else:
    given = prompts.of_completion(f, tokenizer, vocab, MOST_REQUESTS // choices)
  echo = False if chat else f.flag('echo')
  asked = f.get('max_completion_tokens') if chat else None
  field = 'max_completion_tokens' if asked is not None else 'max_tokens'
  f.get('max_tokens')  # The newer name wins where both are given, as in OpenAI's API.
  # OpenAI's defaults: 16 for a completion, what there is room for in a chat.
  default = max_tokens if chat else min(16, max_tokens)
  wanted = f.whole(field, default, 0 if echo else 1, max_tokens)
  seed = f.whole('seed', secrets.randbits(32), -(2**63), 2**63) % 2**32
  common: dict[str, Any] = dict(
    temperature=f.number('temperature', 1.0, 0.0, 2.0),
    top_k=max(f.whole('top_k', 0, -1, vocab), 0),
    top_p=f.number('top_p', 1.0, 1e-6, 1.0),
    min_p=f.number('min_p', 0.0, 0.0, 1.0),
    presence_penalty=f.number('presence_penalty', 0.0, -2.0, 2.0),
    frequency_penalty=f.number('frequency_penalty', 0.0, -2.0, 2.0),
    repetition_penalty=f.number('repetition_penalty', 1.0, 0.01, 10.0),
    ignore_eos=f.flag('ignore_eos'),
    stop=f.texts('stop', MOST_STOPS, LONGEST_STOP),
    include_stop=f.flag('include_stop_str_in_output'),
    stop_token_ids=tuple(f.ids('stop_token_ids', vocab, MOST_STOP_IDS) or ()),
    logit_bias=_logit_bias(f, vocab),
    allowed_token_ids=f.ids('allowed_token_ids', vocab, vocab),
    bad_words=f.texts('bad_words', MOST_STOPS, LONGEST_STOP),
    structured_outputs=offered.structured or form,
    logprobs=_logprobs(f, chat, logprobs),
    threshold=(
      None if f.get('exit_threshold') is None else f.number('exit_threshold', 1.0, -2.0, 2.0)
    ),
    lossless=None if f.get('lossless') is None else f.flag('lossless'),
  )
  if common['lossless'] and common['threshold'] is not None:
    raise Refused('lossless runs all loops; leave exit_threshold out.', param='exit_threshold')
  requests: list[Request] = []
  of_requests: list[Prompt] = []
  for prompt in given:
    left = context - len(prompt.ids)
    if left < 1 or (wanted > left and f.get(field) is not None):
      raise _too_long(len(prompt.ids), wanted, context, 'messages' if chat else 'prompt', left < 1)
    allowed = max(min(wanted, left), 1)
    least = f.whole('min_tokens', 0, 0, allowed)
    for _ in range(choices):
      own = (seed + len(requests)) % 2**32
      request = Request.of(prompt.ids, allowed, seed=own, min_tokens=least, **common)
      request.scores_prompt = echo and request.params.logprobs is not None
      requests.append(request)
      of_requests.append(prompt)
  usage, pieces = options.get('include_usage') is True, f.flag('return_loops')
  return Job(
    requests, of_requests, stream, usage, chat, pieces, choices, echo, wanted, offered, f.unknown()
  )


def _too_long(tokens: int, wanted: int, context: int, field: str, alone: bool) -> Refused:
  """The refusal of a prompt for which there is no room, in the words that clients look for."""
  what = f'your messages resulted in {tokens} tokens'
  if field == 'prompt':
    what = f'your prompt has {tokens} tokens'
  if not alone:
    what = f'you requested {tokens + wanted} tokens ({tokens} in the {field}, {wanted} new)'
  return Refused(
    f"This model's maximum context length is {context} tokens. However, {what}. Please reduce "
    f'the length of the {field}.',
    param=field,
    code='context_length_exceeded',
  )


def _logit_bias(f: Fields, vocab: int) -> dict[int, float] | None:
  """OpenAI's biases, -100 to 100, by token id."""
  given = f.object('logit_bias')
  if len(given) > MOST_BIASED:
    raise Refused(f'logit_bias has more than {MOST_BIASED} tokens.', param='logit_bias')
  found: dict[int, float] = {}
  for token, bias in given.items():
    number = isinstance(bias, (int, float)) and not isinstance(bias, bool) and -100 <= bias <= 100
    if not number or not token.isdecimal() or int(token) >= vocab:
      raise Refused(
        f'logit_bias must be numbers from -100 to 100 by token ids of 0..{vocab - 1}.',
        param='logit_bias',
      )
    found[int(token)] = float(bias)
  return found or None


def _logprobs(f: Fields, chat: bool, most: int) -> int | None:
  if not chat:
    if f.get('logprobs') is None:
      return None
    return f.whole('logprobs', 0, 0, min(most, 5))
  if not f.flag('logprobs'):
    f.refuse('top_logprobs')
    return None
  return f.whole('top_logprobs', 0, 0, most)
