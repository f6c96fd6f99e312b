"""Renders chat messages into a prompt with the model's chat template (Jinja)."""

from __future__ import annotations

from collections.abc import Sequence
import time

from rrt.errors import InputError


def render(
  template: str,
  messages: Sequence[dict[str, str]],
  *,
  add_generation_prompt: bool,
  bos: str | None,
  eos: str | None,
) -> str:
  """Renders messages `{'role', 'content'}` with a Jinja template.

  Args:
    template: Jinja source; it is rendered in a sandbox.
    messages: the conversation, oldest first.
    add_generation_prompt: whether to end with the header of an assistant turn.
    bos: text of the begin-of-sequence token.
    eos: text of the end-of-sequence token.

  Raises:
    InputError: the template raises an error, or jinja2 is missing.
  """
  try:
    import jinja2
    import jinja2.sandbox
  except ImportError as e:
    raise InputError(
      'Chat templates need jinja2: pip install "relaxed-recursive-transformers[convert]".'
    ) from e

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = time.strftime
  try:
    return environment.from_string(template).render(
      messages=list(messages),
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      bos_token=bos,
      eos_token=eos,
    )
  except Exception as e:  # Templates are code of the model's author.
    raise InputError(f'The chat template refuses the messages: {e}') from e
