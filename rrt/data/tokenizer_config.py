"""Reads the special tokens and the chat template of a model directory.

They are spread over tokenizer.json, tokenizer_config.json, generation_config.json,
config.json, special_tokens_map.json and chat_template.jinja.
"""

from __future__ import annotations

from collections.abc import Iterable
import json
from pathlib import Path
from typing import Any

from rrt.errors import InputError
from rrt.files import read_json

# Tokens that end a turn or a document in the supported families, for files
# that do not list their own.
_ENDS = (
  '</s>',
  '<eos>',
  '<|endoftext|>',
  '<|im_end|>',
  '<end_of_turn>',
  '<|end_of_text|>',
  '<|eot_id|>',
  '<|eom_id|>',
)

# Special tokens that chat templates may use.
NAMES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')


def read(directory: Path, core) -> dict[str, Any]:
  """The keyword arguments of `Tokenizer` from the files of a directory.

  Args:
    directory: of the model.
    core: the `tokenizers.Tokenizer` of its tokenizer.json.

  Raises:
    InputError: a file is not JSON, or a field has a wrong type or value.
  """
  where = directory / 'tokenizer_config.json'
  fields = _special_tokens_map(directory) | read_json(where, optional=True)
  model = read_json(directory / 'config.json', optional=True)
  text = model.get('text_config')
  model = (text if isinstance(text, dict) else {}) | model
  generation = read_json(directory / 'generation_config.json', optional=True)

  names = {name: _content(fields, name, where) for name in NAMES}
  size = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
  if isinstance(model.get('vocab_size'), int):
    size = max(size, model['vocab_size'])

  prefix = prefix_ids(core)
  add_bos = fields.get('add_bos_token')
  begins = list(prefix)
  bos = core.token_to_id(names['bos_token']) if names['bos_token'] is not None else None
  if bos is not None:
    begins.append(bos)
  begins += token_ids(model, 'bos_token_id', size, directory / 'config.json')

  ends = token_ids(generation, 'eos_token_id', size, directory / 'generation_config.json')
  ends += token_ids(model, 'eos_token_id', size, directory / 'config.json')
  named = core.token_to_id(names['eos_token']) if names['eos_token'] is not None else None
  if not ends:
    ends = known_ends(core, named)
  elif named is not None:
    ends.append(named)
  return {
    'bos_id': begins[0] if begins else None,
    'eos_ids': list(dict.fromkeys(ends)),
    'add_bos': add_bos if isinstance(add_bos, bool) else bool(prefix),
    'chat_template': _chat_template(directory, fields, where),
    'extra': fields,
  }


def token_ids(fields: dict[str, Any], name: str, size: int, where: Any) -> list[int]:
  """A field that holds a token id or a list of them; [] if absent or null.

  Raises:
    InputError: another type, or an id outside 0..size - 1.
  """
  value = fields.get(name)
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise InputError(f'{where}: {name}={value!r} must be a token id or a list of them.')
  if not all(0 <= i < size for i in ids):
    raise InputError(f'{where}: {name}={value!r} lies outside the vocabulary of {size}.')
  return list(ids)


def known_ends(core, *given: int | None) -> list[int]:
  """The given end tokens, then well-known ones that the vocabulary has."""
  ends = [i for i in given if i is not None]
  added = {
    token.content: i for i, token in core.get_added_tokens_decoder().items() if token.special
  }
  ends += [added[token] for token in _ENDS if token in added]
  return list(dict.fromkeys(ends))


def prefix_ids(core) -> list[int]:
  """Special tokens that a tokenizer's post-processor puts before a text."""
  if core.post_processor is None:
    return []
  return list(_prefix(json.loads(core.post_processor.__getstate__())))


def _prefix(processor: dict[str, Any]) -> Iterable[int]:
  kind = processor.get('type')
  if kind == 'Sequence':  # The last one is the outermost.
    for one in reversed(processor['processors']):
      yield from _prefix(one)
  elif kind == 'TemplateProcessing':
    for item in processor['single']:
      if 'SpecialToken' not in item:
        break
      yield from processor['special_tokens'][item['SpecialToken']['id']]['ids']
  elif kind in ('BertProcessing', 'RobertaProcessing'):
    yield processor['cls'][1]


def content(token: Any) -> str | None:
  """A token's text; files write it plain or as an object."""
  return token.get('content') if isinstance(token, dict) else token


def _content(fields: dict[str, Any], name: str, where: Path) -> str | None:
  value = fields.get(name)
  text = content(value)
  if text is not None and not isinstance(text, str):
    raise InputError(f'{where}: {name}={value!r} must be the text of a token.')
  return text


def _special_tokens_map(directory: Path) -> dict[str, Any]:
  fields = read_json(directory / 'special_tokens_map.json', optional=True)
  return {name: fields[name] for name in NAMES if name in fields}


def _chat_template(directory: Path, fields: dict[str, Any], where: Path) -> str | None:
  """chat_template.jinja if it exists, else the field, of several the default."""
  beside = directory / 'chat_template.jinja'
  if beside.is_file():
    try:
      return beside.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
      raise InputError(f'{beside} cannot be read: {e}.') from e
  template = fields.get('chat_template')
  if isinstance(template, list):
    try:
      template = {one['name']: one['template'] for one in template}
    except (KeyError, TypeError):
      raise InputError(
        f'{where}: chat_template must be a text, or a list of objects with name and template.'
      ) from None
  if isinstance(template, dict):
    template = template.get('default')
  if template is not None and not isinstance(template, str):
    raise InputError(f'{where}: chat_template must be a text, not {type(template).__name__}.')
  return template
