"""What a request asks of its text: `response_format`, `guided_*`, `structured_outputs`."""

from __future__ import annotations

from typing import Any

from rrt.server.fields import Fields, Refused


def structured_outputs(f: Fields) -> dict[str, Any] | None:
  """For `SamplingParams.structured_outputs`; None for any text.

  Raises:
    Refused: several are given, or one of a wrong form.
  """
  found: dict[str, dict[str, Any]] = {}
  names = {
    'guided_json': 'json',
    'guided_regex': 'regex',
    'guided_choice': 'choice',
    'guided_grammar': 'grammar',
  }
  for name, kind in names.items():
    if (value := f.get(name)) is not None:
      found[name] = {kind: value}
  if given := f.object('structured_outputs'):
    found['structured_outputs'] = given
  if (form := _response_format(f)) is not None:
    found['response_format'] = form
  if len(found) > 1:
    raise Refused(f'Give one of {" and ".join(found)}.', param=next(iter(found)))
  return next(iter(found.values()), None)


def _response_format(f: Fields) -> dict[str, Any] | None:
  form = f.object('response_format')
  kind = form.get('type')
  if not form or kind == 'text':
    return None
  if kind == 'json_object':
    return {'json_object': True}
  schema = form.get('json_schema')
  if kind == 'json_schema' and isinstance(schema, dict) and 'schema' in schema:
    return {'json': schema['schema']}
  raise Refused(
    'response_format must be {"type": "text"}, {"type": "json_object"} or '
    '{"type": "json_schema", "json_schema": {"schema": ...}}.',
    param='response_format',
  )
