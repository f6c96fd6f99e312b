"""Functions that a model may call: offered by its template, read from its text.

A template's own words tell the form of its calls:

* Hermes, Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number;
* Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`;
* Llama 3: the whole text is `{"name": ..., "parameters": {...}}`.

With `tool_choice` "required" or a named function the text is constrained to a JSON list of
calls, or to the function's parameters (as vLLM does).
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from typing import Any

from rrt.server.fields import Fields, Refused

_HERMES = re.compile(r'<tool_call>\s*(\{.*?\})\s*</tool_call>', re.S)


@dataclasses.dataclass(frozen=True)
class Tools:
  """The functions of a request.

  Attributes:
    offered: for the template, as OpenAI's `tools`; None for none.
    form: 'hermes', 'mistral', 'llama', 'list' (required) or 'named'; '' reads no calls.
    name: of the function of the form 'named'.
    structured: what the text must be; None for any.
  """

  offered: list[dict[str, Any]] | None = None
  form: str = ''
  name: str = ''
  structured: dict[str, Any] | None = None


def read(f: Fields, template: str | None) -> Tools:
  """The tools of a request.

  Raises:
    Refused: a wrong form, or a template that knows no tools.
  """
  tools = f.get('tools', [])
  choice = f.get('tool_choice', 'auto')
  valid = isinstance(tools, list) and all(
    isinstance(t, dict)
    and t.get('type') == 'function'
    and isinstance(t.get('function'), dict)
    and isinstance(t['function'].get('name'), str)
    for t in tools
  )
  if not valid:
    raise Refused('tools must be a list of {"type": "function", "function": ...}.', param='tools')
  if choice == 'none' or not tools:
    if choice not in ('none', 'auto'):
      raise Refused('tool_choice needs tools.', param='tool_choice')
    return Tools()
  if template is None or 'tools' not in template:
    raise Refused("This model's chat template knows no tools.", param='tools')
  schemas = {t['function']['name']: t['function'].get('parameters') or {} for t in tools}
  if isinstance(choice, dict):
    function = choice.get('function') if choice.get('type') == 'function' else None
    name = function.get('name') if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in schemas:
      raise Refused('tool_choice names a function that is not in tools.', param='tool_choice')
    return Tools(tools, 'named', name, {'json': schemas[name] or {'type': 'object'}})
  if choice == 'required':
    calls = [
      {
        'type': 'object',
        'properties': {'name': {'const': name}, 'parameters': schema or {'type': 'object'}},
        'required': ['name', 'parameters'],
        'additionalProperties': False,
      }
      for name, schema in schemas.items()
    ]
    schema = {'type': 'array', 'minItems': 1, 'items': {'anyOf': calls}}
    return Tools(tools, 'list', structured={'json': schema})
  if choice != 'auto':
    raise Refused(
      'tool_choice must be "none", "auto", "required" or a function.', param='tool_choice'
    )
  return Tools(tools, _form(template))


def _form(template: str) -> str:
  if '<tool_call>' in template:
    return 'hermes'
  if '[TOOL_CALLS]' in template:
    return 'mistral'
  if '"parameters"' in template or "'parameters'" in template:
    return 'llama'
  return ''


def parse(tools: Tools, text: str) -> tuple[str | None, list[dict[str, Any]]]:
  """(content, calls in OpenAI's form) of a text; no calls where it holds none."""
  match tools.form:
    case 'named':
      return None, [_call(tools.name, text.strip())]
    case 'list':
      found, rest = _listed(text), ''
    case 'mistral':
      before, mark, behind = text.rpartition('[TOOL_CALLS]')
      found = _listed(behind)
      rest = before if mark else ''
    case 'llama':
      found, rest = _listed(text.replace('<|python_tag|>', '')), ''
    case 'hermes':
      parts = [_listed(part) for part in _HERMES.findall(text)]
      found = [call for part in parts for call in part] if all(parts) else []
      rest = _HERMES.sub('', text).strip()
    case _:
      found, rest = [], ''
  if not found:
    return text, []
  return rest or None, found


def _listed(text: str) -> list[dict[str, Any]]:
  """The calls of a JSON object or list; [] if it is none."""
  try:
    value = json.loads(text.strip())
  except ValueError:
    return []
  found = []
  for one in value if isinstance(value, list) else [value]:
    if not isinstance(one, dict) or not isinstance(one.get('name'), str):
      return []
    arguments = one.get('arguments', one.get('parameters', {}))
    found.append(_call(one['name'], json.dumps(arguments, ensure_ascii=False)))
  return found


def _call(name: str, arguments: str) -> dict[str, Any]:
  return {
    'id': f'call_{secrets.token_hex(12)}',
    'type': 'function',
    'function': {'name': name, 'arguments': arguments},
  }
