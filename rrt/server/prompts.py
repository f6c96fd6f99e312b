"""The prompts of a request: texts, token ids, chats."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rrt.errors import InputError
from rrt.server.fields import Fields, Refused


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt.

  Attributes:
    ids: its tokens.
    text: as text, for `echo`.
  """

  ids: list[int]
  text: str


def of_completion(f: Fields, tokenizer, vocab: int, most: int) -> list[Prompt]:
  """The prompts of a completion; raises Refused."""
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
    kept = _truncated(f, list(ids))
    whole = isinstance(one, str) and len(kept) == len(ids)
    text = one if whole else tokenizer.decode(kept, skip_special=False)
    found.append(Prompt(kept, text))
  return found


def _is_ids(value: Any) -> bool:
  return (
    isinstance(value, list)
    and bool(value)
    and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
  )


def template_of(f: Fields, tokenizer) -> str | None:
  """The chat template: the request's, or the model's."""
  template = f.get('chat_template', tokenizer.chat_template)
  if template is not None and not isinstance(template, str):
    raise Refused('chat_template must be a text.', param='chat_template')
  return template


def of_chat(f: Fields, tokenizer, tools: list[dict[str, Any]] | None) -> Prompt:
  """The prompt of a chat; raises Refused.

  `tools`: functions that the template is to offer.
  """
  messages = f.get('messages')
  if not isinstance(messages, list) or not messages:
    raise Refused('messages must be a list of messages.', param='messages')
  variables = dict(f.object('chat_template_kwargs'))
  documents = f.get('documents')
  if documents is not None:
    if not isinstance(documents, list) or not all(isinstance(d, dict) for d in documents):
      raise Refused('documents must be a list of objects.', param='documents')
    variables['documents'] = documents
  template = template_of(f, tokenizer)
  goes_on = f.flag('continue_final_message')
  prompted = f.flag('add_generation_prompt', not goes_on)
  if goes_on and prompted:
    raise Refused(
      'continue_final_message needs add_generation_prompt: false.', param='continue_final_message'
    )
  messages = [_message(m) for m in messages]
  try:
    text = tokenizer.apply_chat(messages, prompted, tools=tools, template=template, **variables)
    if goes_on:
      text = _open_end(text, messages[-1].get('content') or '')
    ids = tokenizer.encode(text, bos=False)
  except (InputError, ValueError, TypeError, UnicodeError) as e:
    raise Refused(f'messages: {e}', param='messages') from None
  if not ids:
    raise Refused('The messages make no token.', param='messages')
  return Prompt(_truncated(f, ids), text)


def _open_end(text: str, last: str) -> str:
  """A rendered chat up to the end of its last message, which is to be continued."""
  at = text.rfind(last.strip()) if last.strip() else -1
  if at < 0:
    raise InputError('the last message is not in what the template writes, and cannot go on')
  return text[: at + len(last.strip())]


def _truncated(f: Fields, ids: list[int]) -> list[int]:
  """The last `truncate_prompt_tokens` tokens."""
  most = f.get('truncate_prompt_tokens')
  if most is None:
    return ids
  return ids[-f.whole('truncate_prompt_tokens', 1, 1, 2**31) :]


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
