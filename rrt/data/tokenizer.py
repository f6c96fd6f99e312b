"""The tokenizer: encoding, decoding and chat templates, over `tokenizers`.

A tokenizer is read from a model directory (tokenizer.json and the config files
beside it) or built from the metadata of a GGUF file: byte-level BPE ('gpt2') or
SentencePiece BPE ('llama').
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers

from rrt.data import chat, conversations, gguf_tokenizer, tokenizer_config
from rrt.errors import InputError

# What `Tokenizer.save` writes.
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json')


class Tokenizer:
  """Encodes text, decodes ids, renders chats.

  Attributes:
    bos_id: the begin-of-sequence token, or None.
    eos_ids: tokens that end a completion.
    add_bos: whether `encode` prepends `bos_id` by default.
    chat_template: a Jinja template, or None.
  """

  def __init__(
    self,
    core: tokenizers.Tokenizer,
    *,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    add_bos: bool = False,
    chat_template: str | None = None,
    extra: dict[str, Any] | None = None,
  ):
    self._core = core
    self.bos_id = bos_id
    self.eos_ids = tuple(eos_ids)
    self.add_bos = add_bos and bos_id is not None
    self.chat_template = chat_template
    self._extra = extra or {}

  @classmethod
  def from_directory(cls, directory: str | Path) -> Tokenizer:
    """Reads tokenizer.json, and special tokens and template from the configs.

    Raises:
      InputError: there is no tokenizer.json or it is damaged.
    """
    directory = Path(directory)
    path = directory / 'tokenizer.json'
    try:
      core = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
    except OSError as e:
      raise InputError(f'{path} cannot be read: {e.strerror or e}.') from e
    except Exception as e:  # The library raises bare Exception.
      raise InputError(f'{path} is not a tokenizer: {e}.') from e
    core.no_padding()
    core.no_truncation()
    return cls(core, **tokenizer_config.read(directory, core))

  @classmethod
  def from_gguf(cls, metadata: dict[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Raises:
      InputError: its kind is not supported or a part of it is missing.
    """
    kind = metadata.get('tokenizer.ggml.model')
    builders = {'gpt2': gguf_tokenizer.byte_level_bpe, 'llama': gguf_tokenizer.sentencepiece_bpe}
    if kind not in builders:
      raise InputError(
        f'The GGUF field tokenizer.ggml.model={kind!r} is not supported; '
        f'this version reads {", ".join(builders)}.'
      )
    try:
      core = builders[kind](metadata)
    except KeyError as e:
      raise InputError(f'The GGUF file lacks the field {e.args[0]}.') from e
    except InputError:
      raise
    except Exception as e:  # The library raises bare Exception.
      reason = str(e).replace('\n', ' ')
      raise InputError(f'The GGUF tokenizer is damaged: {reason}.') from e
    special = {}
    for name in ('bos', 'eos', 'eot', 'unknown', 'padding'):
      value = metadata.get(f'tokenizer.ggml.{name}_token_id')
      special[name] = None if value is None else int(value)
      if value is not None and core.id_to_token(int(value)) is None:
        raise InputError(
          f'The GGUF field tokenizer.ggml.{name}_token_id={value} lies outside the vocabulary.'
        )
    ends = tokenizer_config.known_ends(core, special['eos'], special['eot'])
    names = {'unknown': 'unk_token', 'padding': 'pad_token'}
    extra = {
      names.get(name, f'{name}_token'): core.id_to_token(value)
      for name, value in special.items()
      if value is not None and name != 'eot'
    }
    return cls(
      core,
      bos_id=special['bos'],
      eos_ids=ends,
      add_bos=bool(metadata.get('tokenizer.ggml.add_bos_token', gguf_tokenizer.adds_bos(metadata))),
      chat_template=metadata.get('tokenizer.chat_template'),
      extra=extra,
    )

  def encode(self, text: str, bos: bool | None = None) -> list[int]:
    """Token ids of a text.

    Args:
      text: special tokens in it (`<|im_end|>`) are encoded as special tokens.
      bos: whether to prepend `bos_id`; None uses `add_bos`.

    Raises:
      InputError: `bos=True` for a tokenizer without the token, or text that is
        not valid Unicode.
    """
    return self.encode_batch([text], bos)[0]

  def encode_batch(self, texts: Sequence[str], bos: bool | None = None) -> list[list[int]]:
    """Encodes many texts, on all cores."""
    bos = self.add_bos if bos is None else bos
    if bos and self.bos_id is None:
      raise InputError('bos=True, but this tokenizer has no such token.')
    prefix = [self.bos_id] if bos and self.bos_id is not None else []
    try:
      coded = self._core.encode_batch(list(texts), add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as e:
      raise InputError('The text cannot be encoded: it is not a string of valid Unicode.') from e
    return [prefix + code.ids for code in coded]

  def encode_marked(
    self, text: str, spans: Sequence[tuple[int, int]]
  ) -> tuple[list[int], list[bool]]:
    """Token ids of a text without `bos_id`, and which of them begin inside ranges.

    Args:
      text: as for `encode`.
      spans: ranges of its characters, in order.
    """
    try:
      code = self._core.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as e:
      raise InputError('The text cannot be encoded: it is not a string of valid Unicode.') from e
    return code.ids, conversations.inside(code.offsets, list(spans))

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of token ids."""
    return self._core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  @property
  def start_id(self) -> int | None:
    """The token prepended to every row of a text, or None.

    Models trained with a begin-of-sequence token attend to it at every step,
    and predict badly in rows that lack it.
    """
    return self.bos_id if self.add_bos else None

  def token(self, token_id: int) -> str | None:
    """A token's string in the vocabulary."""
    return self._core.id_to_token(int(token_id))

  def token_id(self, token: str) -> int | None:
    """The id of a token's string in the vocabulary."""
    return self._core.token_to_id(token)

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def text_vocab_size(self) -> int:
    """One more than the largest id that encoding text can yield."""
    ids = self._core.get_vocab(with_added_tokens=True).values()
    return max((i for i in ids if i not in self.special_ids), default=-1) + 1

  @functools.cached_property
  def added_ids(self) -> frozenset[int]:
    """Ids of special and other added tokens, whose strings are plain text."""
    return frozenset(self._core.get_added_tokens_decoder())

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """Ids of special tokens, which `decode` skips by default."""
    added = self._core.get_added_tokens_decoder().items()
    return frozenset(i for i, token in added if token.special)

  @functools.cached_property
  def byte_level(self) -> bool:
    """Whether the vocabulary writes each byte as one character."""
    # That of a space is U+0120. SentencePiece vocabularies may have it too, and
    # write a space as U+2581.
    spaces = self.token_id('\u0120'), self.token_id('\u2581')
    return spaces[0] is not None and spaces[1] is None

  def check_same_ids(self, other: Tokenizer) -> None:
    """Raises InputError unless both tokenizers have the same token at each id."""
    ours, theirs = self._core.get_vocab(), other._core.get_vocab()
    for token, i in ours.items():
      if theirs.get(token, i) != i:
        raise InputError(
          f'The token {token!r} has the id {i} in one tokenizer and '
          f'{theirs[token]} in the other: a child learns from a parent that '
          'reads text as it does.'
        )

  @functools.cached_property
  def sha256(self) -> str:
    """A digest of the tokenizer; equal digests encode text alike."""
    core = json.loads(self._core.to_str())
    del core['post_processor']  # `encode` does not use it.
    text = json.dumps(core, sort_keys=True)
    text += json.dumps([self.bos_id, self.add_bos])
    return hashlib.sha256(text.encode()).hexdigest()

  @property
  def special_tokens(self) -> dict[str, str]:
    """Special tokens by name ('bos_token', 'eos_token', 'pad_token', ...)."""
    tokens = {
      name: tokenizer_config.content(self._extra.get(name)) for name in tokenizer_config.NAMES
    }
    for name, ids in (('bos_token', [self.bos_id]), ('eos_token', self.eos_ids)):
      if tokens[name] is None and ids and ids[0] is not None:
        tokens[name] = self.token(ids[0])
    return {name: token for name, token in tokens.items() if token is not None}

  def apply_chat(
    self,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
    template: str | None = None,
    **variables: Any,
  ) -> str:
    """Renders messages with the chat template, as transformers does.

    The text includes the template's special tokens: encode it with bos=False
    if it begins with the begin-of-sequence token.

    Args:
      messages: dicts with 'role', 'content' and whatever else the template reads.
      add_generation_prompt: whether to end with the header of an assistant turn.
      tools: JSON schemas of functions, for templates that use them.
      template: Jinja source instead of `chat_template`.
      **variables: further variables of the template.

    Raises:
      InputError: there is no template, it raises an error, or jinja2 is
        missing.
    """
    template = self.chat_template if template is None else template
    if template is None:
      raise InputError('This tokenizer has no chat template; give a plain prompt instead.')
    return chat.render(
      template,
      messages,
      add_generation_prompt=add_generation_prompt,
      tools=tools,
      variables=self.special_tokens | variables,
    )

  def save(self, directory: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
    directory = Path(directory)
    fields: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    fields |= self._extra
    fields['add_bos_token'] = self.add_bos
    for name, token in self.special_tokens.items():
      if fields.get(name) is None:
        fields[name] = token
    fields.pop('chat_template', None)
    if self.chat_template is not None:
      fields['chat_template'] = self.chat_template
    generation: dict[str, Any] = {'eos_token_id': list(self.eos_ids)}
    if self.bos_id is not None:
      generation['bos_token_id'] = self.bos_id
    for name, text in (
      ('tokenizer.json', self.to_json()),
      ('tokenizer_config.json', _dump(fields)),
      ('generation_config.json', _dump(generation)),
    ):
      (directory / name).write_text(text, encoding='utf-8')

  def to_json(self) -> str:
    """tokenizer.json with a post-processor that prepends what `encode` does."""
    core = json.loads(self._core.to_str())
    if self.add_bos and not tokenizer_config.prefix_ids(self._core):
      bos = None if self.bos_id is None else self.token(self.bos_id)
      if bos is not None and self.bos_id is not None:
        core['post_processor'] = _bos_template(bos, self.bos_id)
    return json.dumps(core, ensure_ascii=False)


def _bos_template(token: str, token_id: int) -> dict[str, Any]:
  """A post-processor that puts a token before each sequence."""
  bos = {'SpecialToken': {'id': token, 'type_id': 0}}
  first = {'Sequence': {'id': 'A', 'type_id': 0}}
  second = {'Sequence': {'id': 'B', 'type_id': 1}}
  return {
    'type': 'TemplateProcessing',
    'single': [bos, first],
    'pair': [bos, first, bos, second],
    'special_tokens': {token: {'id': token, 'ids': [token_id], 'tokens': [token]}},
  }


def _dump(fields: dict[str, Any]) -> str:
  return json.dumps(fields, indent=2, ensure_ascii=False) + '\n'
