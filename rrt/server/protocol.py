"""Parses and validates OpenAI requests."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from typing import Any

from rrt.errors import InputError
from rrt.infer.engine.request import Request

MOST_CHOICES = 16
MOST_REQUESTS = 128  # of one call: prompts times choices
MOST_STOPS = 16
LONGEST_STOP = 256  # characters


class Refused(Exception):
  """A request that cannot be served: an HTTP status and a reason."""

  def __init__(self, message: str, status: int = 400, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param

  def body(self) -> dict[str, Any]:
    """The error object in OpenAI's format."""
    kind = 'invalid_request_error' if self.status < 500 else 'server_error'
    # A reason may quote the request, lone surrogates and all.
    message = str(self).encode('utf-8', 'backslashreplace').decode()
    error = {'message': message, 'type': kind, 'param': self.param, 'code': None}
    return {'error': error}


@dataclasses.dataclass(frozen=True)
class Job:
  """A validated request.

  Attributes:
    requests: engine requests, `n` for each prompt.
    stream: whether to stream the response.
    usage: whether the last chunk has token counts (`include_usage`).
    chat: whether it came to the chat endpoint.
    pieces: whether to return each token's text and loops (the built-in page).
    choices: `n`, choices a prompt.
  """

  requests: list[Request]
  stream: bool
  usage: bool
  chat: bool
  pieces: bool
  choices: int


def read_body(raw: bytes) -> dict[str, Any]:
  """The JSON object of a request.

  Raises:
    Refused: the body is not a JSON object.
  """
  try:
    body = json.loads(raw.decode('utf-8'), parse_constant=_no_constant)
  except UnicodeDecodeError:
    raise Refused('The body is not UTF-8.') from None
  except (ValueError, RecursionError) as e:
    raise Refused(f'The body is not JSON: {str(e)[:100]}') from None
  if not isinstance(body, dict):
    raise Refused('The body must be a JSON object.')
  return body


def _no_constant(name: str):
  raise ValueError(f'{name} is no JSON')


class Fields:
  """Typed access to a body's fields; null counts as absent."""

  def __init__(self, body: dict[str, Any]):
    self._body = body

  def get(self, name: str, default: Any = None) -> Any:
    """The field's value, unchecked."""
    value = self._body.get(name)
    return default if value is None else value

  def number(self, name, default, low, high) -> float:
    """A finite number in [low, high]."""
    value = self.get(name, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not (low <= value <= high) or not math.isfinite(value):
      raise Refused(f'{name} must be a number from {low} to {high}.', param=name)
    return float(value)

  def whole(self, name, default, low, high) -> int:
    """An integer in [low, high]."""
    value = self.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
      raise Refused(f'{name} must be a whole number.', param=name)
    if not low <= value <= high:
      raise Refused(f'{name} must lie in {low} to {high}.', param=name)
    return value

  def flag(self, name, default=False) -> bool:
    """True or false."""
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise Refused(f'{name} must be true or false.', param=name)
    return value

  def refuse(self, *names: str) -> None:
    """Raises Refused for fields that request an unsupported feature."""
    for name in names:
      if self.get(name) not in (None, False, 0, [], {}, ''):
        raise Refused(f'{name} is not supported.', param=name)


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
    body: from `read_body`.
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
    raise Refused(f'This server has one model, {name!r}.', 404, 'model')
  f.refuse('logit_bias', 'suffix', 'echo', 'tools', 'functions')
  if f.get('response_format', {}) not in ({}, {'type': 'text'}):
    raise Refused('response_format must be text.', param='response_format')
  choices = f.whole('n', 1, 1, MOST_CHOICES)
  if f.whole('best_of', choices, 1, MOST_CHOICES) != choices:
    raise Refused('best_of must equal n.', param='best_of')
  stream = f.flag('stream')
  options = f.get('stream_options', {})
  if not isinstance(options, dict):
    raise Refused('stream_options must be an object.', param='stream_options')
  if chat:
    prompts = [_chat_prompt(f, tokenizer)]
  else:
    prompts = _prompts(f, tokenizer, vocab, MOST_REQUESTS // choices)
  asked = f.get('max_completion_tokens') if chat else None
  field = 'max_completion_tokens' if asked is not None else 'max_tokens'
  # OpenAI's defaults: 16 for a completion, what there is room for in a chat.
  default = max_tokens if chat else min(16, max_tokens)
  wanted = f.whole(field, default, 1, max_tokens)
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
    stop=_stops(f),
    logprobs=_logprobs(f, chat, logprobs),
    threshold=(
      None if f.get('exit_threshold') is None else f.number('exit_threshold', 1.0, -2.0, 2.0)
    ),
    lossless=None if f.get('lossless') is None else f.flag('lossless'),
  )
  requests: list[Request] = []
  for prompt in prompts:
    left = context - len(prompt)
    if left < 1:
      raise Refused(
        f'The prompt has {len(prompt)} tokens and leaves no room in the context of {context}.',
        param='messages' if chat else 'prompt',
      )
    if asked is None and f.get('max_tokens') is None:
      allowed = min(wanted, left)
    elif wanted > left:
      raise Refused(
        f'The prompt has {len(prompt)} tokens, and {wanted} new ones exceed the '
        f'context of {context}.',
        param=field,
      )
    else:
      allowed = wanted
    for _ in range(choices):
      requests.append(Request.of(prompt, allowed, seed=(seed + len(requests)) % 2**32, **common))
  return Job(
    requests, stream, options.get('include_usage') is True, chat, f.flag('return_loops'), choices
  )


def _prompts(f: Fields, tokenizer, vocab: int, most: int) -> list[list[int]]:
  prompt = f.get('prompt')
  if isinstance(prompt, str) or _is_ids(prompt):
    prompt = [prompt]
  if not isinstance(prompt, list) or not prompt:
    raise Refused('prompt must be a text, texts, or lists of token ids.', param='prompt')
  if len(prompt) > most:
    raise Refused(f'prompt has more than {most} prompts.', param='prompt')
  found = []
  for one in prompt:
    if isinstance(one, str) and one:
      try:
        ids = tokenizer.encode(one)
      except (InputError, ValueError, UnicodeError) as e:
        raise Refused(f'prompt: {e}', param='prompt') from None
    elif _is_ids(one):
      ids = one
    else:
      raise Refused(
        'prompt must hold texts of at least one character, or lists of at least one token id.',
        param='prompt',
      )
    if not ids:
      raise Refused('prompt makes no token.', param='prompt')
    if not 0 <= min(ids) <= max(ids) < vocab:
      raise Refused(f'Token ids must lie in 0..{vocab - 1}.', param='prompt')
    found.append(list(ids))
  return found


def _is_ids(value: Any) -> bool:
  return (
    isinstance(value, list)
    and bool(value)
    and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
  )


def _chat_prompt(f: Fields, tokenizer) -> list[int]:
  messages = f.get('messages')
  if not isinstance(messages, list) or not messages:
    raise Refused('messages must be a list of messages.', param='messages')
  variables = f.get('chat_template_kwargs', {})
  if not isinstance(variables, dict):
    raise Refused('chat_template_kwargs must be an object.', param='chat_template_kwargs')
  try:
    text = tokenizer.apply_chat([_message(m) for m in messages], **variables)
    ids = tokenizer.encode(text, bos=False)
  except (InputError, ValueError, TypeError, UnicodeError) as e:
    raise Refused(f'messages: {e}', param='messages') from None
  if not ids:
    raise Refused('The messages make no token.', param='messages')
  return ids


def _message(message: Any) -> dict[str, Any]:
  """A message for the template: all its fields, content as text, arguments as objects."""
  role = message.get('role') if isinstance(message, dict) else None
  content = message.get('content') if isinstance(message, dict) else None
  if isinstance(content, list) and all(
    isinstance(p, dict) and p.get('type') == 'text' and isinstance(p.get('text'), str)
    for p in content
  ):
    content = ''.join(p['text'] for p in content)
  if not isinstance(role, str):
    raise Refused('Each message needs a role.', param='messages')
  if content is None and role == 'assistant':
    # Templates tell calls from text by it; a turn without calls is an empty text.
    content = None if message.get('tool_calls') else ''
  elif not isinstance(content, str):
    raise Refused('Each message needs a text as content.', param='messages')
  calls = message.get('tool_calls')
  if calls is None:
    return message | {'content': content}
  if not isinstance(calls, list) or not all(
    isinstance(c, dict) and isinstance(c.get('function'), dict) for c in calls
  ):
    raise Refused('tool_calls must be a list of calls with a function.', param='messages')
  return message | {'content': content, 'tool_calls': [_tool_call(c) for c in calls]}


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
  """A call whose arguments, a JSON text in OpenAI's form, are an object."""
  function = call['function']
  arguments = function.get('arguments')
  if isinstance(arguments, str):
    try:
      arguments = json.loads(arguments or '{}')
    except ValueError:
      raise Refused('The arguments of a tool call are not JSON.', param='messages') from None
  return call | {'function': function | {'arguments': arguments}}


def _stops(f: Fields) -> tuple[str, ...]:
  stop = f.get('stop', [])
  stop = [stop] if isinstance(stop, str) else stop
  if (
    not isinstance(stop, list)
    or len(stop) > MOST_STOPS
    or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stop)
  ):
    raise Refused(
      f'stop must be up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters.', param='stop'
    )
  return tuple(stop)


def _logprobs(f: Fields, chat: bool, most: int) -> int | None:
  if not chat:
    if f.get('logprobs') is None:
      return None
    return f.whole('logprobs', 0, 0, min(most, 5))
  if not f.flag('logprobs'):
    f.refuse('top_logprobs')
    return None
  return f.whole('top_logprobs', 0, 0, most)
