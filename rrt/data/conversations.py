"""Chat and instruction data: what a row says, and which of its text is an answer.

A row is a conversation if it has one of these:

* `messages`: a list of {'role', 'content', ...}, as OpenAI, TRL and the hub write it;
* `conversations`: the same, or a list of {'from', 'value'} (ShareGPT);
* `prompt` and `completion`: texts, or lists of messages (TRL);
* `instruction`, optionally `input` or `context`, and `output` or `response` (Alpaca, Dolly);
* `question` and `answer`.

Beside them `system` is a system message, and `tools` are JSON schemas for the template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import itertools
import json
from typing import Any

from rrt.errors import InputError

Message = dict[str, Any]
Spans = list[tuple[int, int]]

# Fields that make a row a conversation, and those beside them.
NAMES = ('messages', 'conversations', 'prompt', 'instruction', 'question')
BESIDE = ('completion', 'input', 'context', 'output', 'response', 'answer', 'system', 'tools')
_ROLES = {'human': 'user', 'gpt': 'assistant', 'bot': 'assistant', 'model': 'assistant'}


def parse(row: dict[str, Any], where: str, field: str | None = None) -> str | None:
  """A row's conversation as JSON: {'messages': [...], 'tools': ...}.

  Args:
    row: the row's fields.
    where: of the row, for errors.
    field: the one that holds the messages; None for those above.

  Returns:
    The JSON, or None for a row that holds no conversation or no answer.

  Raises:
    InputError: a field of a wrong type.
  """
  found = _messages(row, where, field)
  answered = any(m['role'] == 'assistant' for m in found)
  if not answered:
    return None
  system = row.get('system')
  if isinstance(system, str) and system.strip() and found[0]['role'] != 'system':
    found = [{'role': 'system', 'content': system}, *found]
  tools = row.get('tools')
  if isinstance(tools, str):
    try:
      tools = json.loads(tools)
    except ValueError as e:
      raise InputError(f"{where}: the field 'tools' is not JSON") from e
  text = json.dumps({'messages': found, 'tools': tools or None}, ensure_ascii=False)
  # JSON can carry halves of surrogate pairs, which no tokenizer takes.
  return text.encode('utf-8', 'replace').decode('utf-8')


def _messages(row: dict[str, Any], where: str, field: str | None) -> list[Message]:
  for name in (field,) if field else NAMES[:2]:
    if row.get(name) is not None:
      return _turns(row[name], where, name)
  if field:
    return []
  for ask, answers in (
    ('prompt', ('completion', 'response')),
    ('instruction', ('output', 'response')),
    ('question', ('answer',)),
  ):
    answer = next((a for a in answers if row.get(a) is not None), None)
    if row.get(ask) is None or answer is None:
      continue
    asked, answered = row[ask], row[answer]
    if ask == 'instruction':
      more = next((row[n] for n in ('input', 'context') if row.get(n)), '')
      asked = f'{asked}\n\n{more}' if more else asked
    return [*_part(asked, 'user', where, ask), *_part(answered, 'assistant', where, answer)]
  return []


def _part(value: Any, role: str, where: str, name: str) -> list[Message]:
  if isinstance(value, str):
    return [{'role': role, 'content': value}]
  return _turns(value, where, name)


def _turns(value: Any, where: str, name: str) -> list[Message]:
  """A list of messages, with the names of OpenAI."""
  if isinstance(value, str):
    try:
      value = json.loads(value)
    except ValueError as e:
      raise InputError(f'{where}: the field {name!r} is a text, not a list of messages') from e
  if not isinstance(value, (list, tuple)):
    raise InputError(f'{where}: the field {name!r} is no list of messages')
  found = []
  for i, turn in enumerate(value):
    if isinstance(turn, dict) and 'from' in turn and 'value' in turn:
      turn = {'role': turn['from'], 'content': turn['value']}
    if not isinstance(turn, dict) or not isinstance(turn.get('role'), str):
      raise InputError(f'{where}: message {i} of {name!r} has no role')
    if not isinstance(turn.get('content'), (str, list, type(None))):
      raise InputError(f'{where}: message {i} of {name!r} has no text as its content')
    found.append({**turn, 'role': _ROLES.get(turn['role'], turn['role'])})
  return found


def render(
  conversation: str, apply: Callable[..., str], ends: Iterable[str] = ()
) -> tuple[str, Spans, bool]:
  """The text of a conversation and where its answers are.

  An answer begins where the template's generation prompt ends, and goes on to the end
  of the turn: what a model is to write. A template may render a turn in another way
  once others follow (Qwen3 drops earlier thoughts); then the last answer alone counts.

  Args:
    conversation: of `parse`.
    apply: renders messages: `Tokenizer.apply_chat`.
    ends: tokens that end a turn; white space that the template puts behind one does
      not count.

  Returns:
    (text, the answers as ranges of its characters, whether all answers are in them).

  Raises:
    InputError: the template refuses the messages.
  """
  row = json.loads(conversation)
  messages = row['messages']
  draw = lambda some, prompt: apply(some, add_generation_prompt=prompt, tools=row['tools'])
  while messages[-1]['role'] != 'assistant':  # What nobody answers teaches nothing.
    messages = messages[:-1]
  text = draw(messages, False)
  spans, count = [], 0
  for i, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    count += 1
    so_far = text if i == len(messages) - 1 else draw(messages[: i + 1], False)
    if not text.startswith(so_far):
      continue
    prompt = draw(messages[:i], True) if i else ''
    pairs = zip(prompt, so_far, strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    spans.append((start, _end(so_far, start, ends)))
  return text, spans, len(spans) == count


def _end(text: str, start: int, ends: Iterable[str]) -> int:
  stripped = text.rstrip()
  if len(stripped) > start and stripped.endswith(tuple(ends)):
    return len(stripped)
  return len(text)


def inside(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[bool]:
  """Whether each token, given by its range of characters, begins in one of the spans."""
  found, at = [], 0
  for begin, end in offsets:
    while at < len(spans) and spans[at][1] <= begin:
      at += 1
    found.append(at < len(spans) and spans[at][0] <= begin and end > begin)
  return found
