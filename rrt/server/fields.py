"""Bodies of requests, their fields, and refusals with a reason."""

from __future__ import annotations

import json
import math
from typing import Any


class Refused(Exception):
  """A request that cannot be served: an HTTP status and a reason."""

  def __init__(
    self, message: str, status: int = 400, param: str | None = None, code: str | None = None
  ):
    super().__init__(message)
    self.status, self.param, self.code = status, param, code

  def body(self) -> dict[str, Any]:
    """The error object in OpenAI's format."""
    kind = 'invalid_request_error' if self.status < 500 else 'server_error'
    # A reason may quote the request, lone surrogates and all.
    message = str(self).encode('utf-8', 'backslashreplace').decode()
    error = {'message': message, 'type': kind, 'param': self.param, 'code': self.code}
    return {'error': error}


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


# Of the APIs of OpenAI and vLLM, and without an effect on what is written here.
WITHOUT_EFFECT = {
  'cache_salt',
  'metadata',
  'parallel_tool_calls',
  'priority',
  'prompt_cache_key',
  'request_id',
  'return_tokens_as_token_ids',
  'safety_identifier',
  'service_tier',
  'skip_special_tokens',
  'spaces_between_special_tokens',
  'store',
  'strict',
  'user',
}


class Fields:
  """Typed access to a body's fields; null counts as absent.

  Attributes:
    seen: names that were asked for.
  """

  def __init__(self, body: dict[str, Any]):
    self._body = body
    self.seen: set[str] = set()

  def unknown(self) -> list[str]:
    """Fields that nobody has asked for, and that are no part of the API."""
    return [
      n for n, v in self._body.items() if n not in self.seen | WITHOUT_EFFECT and v is not None
    ]

  def get(self, name: str, default: Any = None) -> Any:
    """The field's value, unchecked."""
    value = self._body.get(name)
    self.seen.add(name)
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

  def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
    """A text, or up to `most` texts, of 1 to `longest` characters."""
    value = self.get(name, [])
    value = [value] if isinstance(value, str) else value
    if (
      not isinstance(value, list)
      or len(value) > most
      or not all(isinstance(s, str) and 0 < len(s) <= longest for s in value)
    ):
      raise Refused(f'{name} must be up to {most} texts of 1 to {longest} characters.', param=name)
    return tuple(value)

  def ids(self, name: str, vocab: int, most: int) -> list[int] | None:
    """Up to `most` token ids; None if absent."""
    value = self.get(name)
    if value is None:
      return None
    whole = isinstance(value, list) and all(
      isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocab for v in value
    )
    if not whole or not 0 < len(value) <= most:
      raise Refused(f'{name} must be 1 to {most} token ids of 0..{vocab - 1}.', param=name)
    return value

  def object(self, name: str) -> dict[str, Any]:
    """A JSON object; {} if absent."""
    value = self.get(name, {})
    if not isinstance(value, dict):
      raise Refused(f'{name} must be an object.', param=name)
    return value

  def refuse(self, *names: str) -> None:
    """Raises Refused for fields that request an unsupported feature."""
    for name in names:
      if self.get(name) not in (None, False, 0, [], {}, ''):
        raise Refused(f'{name} is not supported.', param=name)
