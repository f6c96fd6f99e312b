"""Renders chat messages into a prompt with the model's chat template (Jinja)."""

from __future__ import annotations

from collections.abc import Sequence
import datetime
import json
from typing import Any

from rrt.errors import InputError


def render(
  template: str,
  messages: Sequence[dict[str, Any]],
  *,
  add_generation_prompt: bool,
  tools: Sequence[dict[str, Any]] | None = None,
  variables: dict[str, Any] | None = None,
) -> str:
  """Renders messages with a Jinja template, in the environment of transformers.

  Args:
    template: Jinja source; it is rendered in a sandbox.
    messages: the conversation, oldest first, with all fields.
    add_generation_prompt: whether to end with the header of an assistant turn.
    tools: JSON schemas of functions.
    variables: special tokens ('eos_token', ...) and further variables.

  Raises:
    InputError: the template raises an error, or jinja2 is missing.
  """
  try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
  except ImportError as e:
    raise InputError(
      'Chat templates need jinja2: pip install "relaxed-recursive-transformers[convert]".'
    ) from e

  def refuse(message):
    raise jinja2.TemplateError(message)

  class Generation(jinja2.ext.Extension):
    """{% generation %} marks assistant text for training masks; it is rendered."""

    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      call = self.call_method('_body')
      return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller):
      return caller()

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols']
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  try:
    return environment.from_string(template).render(
      **{'documents': None} | (variables or {}),
      messages=[_message(m) for m in messages],
      tools=tools,
      add_generation_prompt=add_generation_prompt,
    )
  except Exception as e:  # Templates are code of the model's author.
    raise InputError(f'The chat template refuses the messages: {e}') from e


def _message(message: dict[str, Any]) -> dict[str, Any]:
  """A message as transformers gives it to templates.

  Fields of value None are absent, as templates test for them (`content` beside tool
  calls), and a reasoning text has all names that templates use for it.
  """
  message = {name: value for name, value in message.items() if value is not None}
  for name in ('reasoning_content', 'thinking', 'reasoning'):
    if name in message:
      return {'thinking': message[name]} | message | {'reasoning_content': message[name]}
  return message


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  """The filter `tojson`; Jinja's own escapes HTML and sorts keys."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
