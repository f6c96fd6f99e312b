"""Tokenizers of GGUF files: from their metadata, and the metadata of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import json
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from rrt.errors import InputError

# llama.cpp's token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = '\u2581'  # What SentencePiece writes for a space.

# Splitting rules of byte-level BPE by llama.cpp's name; None is GPT-2's own,
# which the library has built in.
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r'\p{N}{1,3}', r'\p{N}')
_SPLITS = {
  'gpt-2': None,
  'smollm': None,
  'starcoder': None,
  'llama-bpe': _LLAMA3_SPLIT,
  'llama3': _LLAMA3_SPLIT,
  'smaug-bpe': _LLAMA3_SPLIT,
  'qwen2': _QWEN2_SPLIT,
}
_SINGLE_DIGITS = ('smollm', 'starcoder')
_WHOLE_WORDS_FIRST = ('llama-bpe', 'llama3', 'smaug-bpe')
# Kinds to which llama.cpp adds the begin token if the file does not say.
_ADD_BOS = ('llama-bpe', 'llama3')


def adds_bos(metadata: dict[str, Any]) -> bool:
  """Whether llama.cpp adds a begin token, for files without add_bos_token."""
  if metadata.get('tokenizer.ggml.model') == 'llama':
    return True
  return metadata.get('tokenizer.ggml.pre') in _ADD_BOS


def byte_level_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
  """Byte-level BPE (GPT-2): text is split by a regular expression, then merged."""
  pre = metadata.get('tokenizer.ggml.pre', 'gpt-2')
  if pre not in _SPLITS:
    raise InputError(
      f'The GGUF field tokenizer.ggml.pre={pre!r} is not supported; this '
      f'version reads {", ".join(_SPLITS)}.'
    )
  tokens = metadata['tokenizer.ggml.tokens']
  merges = [tuple(m.split(' ', 1)) for m in metadata['tokenizer.ggml.merges']]
  core = tokenizers.Tokenizer(
    models.BPE(
      {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST
    )
  )
  split = _SPLITS[pre]
  steps: list[Any] = []
  if pre in _SINGLE_DIGITS:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if split:
    steps.append(pre_tokenizers.Split(Regex(split), 'isolated'))
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
  core.pre_tokenizer = pre_tokenizers.Sequence(steps)
  core.decoder = decoders.ByteLevel()
  if pre == 'qwen2':
    core.normalizer = normalizers.NFC()
  _add_special(core, tokens, metadata['tokenizer.ggml.token_type'])
  return core


def sentencepiece_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
  """SentencePiece BPE: the pair whose union has the highest score merges first.

  The file lists scores, not merges, so every split of a piece into two other
  pieces becomes a merge with the piece's rank.
  """
  tokens = list(metadata['tokenizer.ggml.tokens'])
  kinds = [int(kind) for kind in metadata['tokenizer.ggml.token_type']]
  scores = metadata['tokenizer.ggml.scores']
  for i, kind in enumerate(kinds):
    if kind == _USER_DEFINED:  # llama.cpp writes their spaces out.
      tokens[i] = tokens[i].replace(' ', _SPACE)
  vocab = {token: i for i, token in enumerate(tokens)}
  best_first = np.argsort(-np.asarray(scores), kind='stable').tolist()
  ordinary = [tokens[i] for i in best_first if kinds[i] == 1]
  known = set(ordinary)
  merges = []
  for token in ordinary:
    for cut in range(len(token) - 1, 0, -1):
      left, right = token[:cut], token[cut:]
      if left in known and right in known:
        merges.append((left, right))
  unknown = metadata.get('tokenizer.ggml.unknown_token_id', 0)
  core = tokenizers.Tokenizer(
    models.BPE(vocab, merges, unk_token=tokens[int(unknown)], fuse_unk=True, byte_fallback=True)
  )
  prefix = bool(metadata.get('tokenizer.ggml.add_space_prefix', True))
  steps: list[Any] = [normalizers.Replace(' ', _SPACE)]
  back: list[Any] = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  if prefix:
    steps.insert(0, normalizers.Prepend(_SPACE))
    back.append(decoders.Strip(' ', 1, 0))
  core.normalizer = normalizers.Sequence(steps)
  core.decoder = decoders.Sequence(back)
  _add_special(core, tokens, kinds)
  return core


def _add_special(core, tokens: Sequence[str], kinds: Iterable[int]) -> None:
  """Adds control tokens as special and user-defined tokens as unsplittable."""
  special, plain = [], []
  for token, kind in zip(tokens, kinds, strict=True):
    if kind == _CONTROL:
      special.append(tokenizers.AddedToken(token, special=True, normalized=False))
    elif kind == _USER_DEFINED:
      plain.append(tokenizers.AddedToken(token, normalized=True))
  core.add_special_tokens(special)
  core.add_tokens(plain)


def metadata_of(tokenizer: Any, size: int) -> dict[str, Any]:
  """The fields of a GGUF file that describe a tokenizer.

  Args:
    tokenizer: a `rrt.data.tokenizer.Tokenizer`.
    size: of the model's vocabulary; ids that the tokenizer lacks are filled up.

  Raises:
    InputError: llama.cpp has no name for how it splits text.
  """
  parts = json.loads(tokenizer.to_json())
  model, added = parts['model'], parts.get('added_tokens') or []
  if model.get('type') != 'BPE':
    raise InputError(
      f'The tokenizer is of type {model.get("type")!r}; GGUF files are written of BPE.'
    )
  names = {i: token for token, i in model['vocab'].items()}
  kinds = dict.fromkeys(names, _NORMAL)
  for token in added:
    names[token['id']] = token['content']
    kinds[token['id']] = _CONTROL if token['special'] else _USER_DEFINED
  merges = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
  fields: dict[str, Any]
  if model.get('byte_fallback'):
    fields = _sentencepiece_fields(parts, names, kinds, merges, size)
  else:
    fields = {
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.pre': _pre_of(parts),
      'tokenizer.ggml.merges': merges,
    }
  fields |= {
    'tokenizer.ggml.tokens': [names.get(i, f'[PAD{i}]') for i in range(size)],
    'tokenizer.ggml.token_type': [kinds.get(i, _USER_DEFINED) for i in range(size)],
    'tokenizer.ggml.add_bos_token': bool(tokenizer.add_bos),
  }
  ids = {'bos': tokenizer.bos_id, 'eos': next(iter(tokenizer.eos_ids), None)}
  fields |= {f'tokenizer.ggml.{k}_token_id': int(v) for k, v in ids.items() if v is not None}
  if tokenizer.chat_template:
    fields['tokenizer.chat_template'] = tokenizer.chat_template
  return fields


def _pre_of(parts: dict[str, Any]) -> str:
  """llama.cpp's name of how a byte-level tokenizer splits text."""
  pre = parts.get('pre_tokenizer') or {}
  steps = pre.get('pretokenizers', [pre])
  splits = [s['pattern'].get('Regex') for s in steps if s.get('type') == 'Split']
  digits = any(s.get('type') == 'Digits' and s.get('individual_digits') for s in steps)
  if splits == [_LLAMA3_SPLIT]:
    return 'llama-bpe'
  if splits == [_QWEN2_SPLIT]:
    return 'qwen2'
  if not splits and any(s.get('type') == 'ByteLevel' for s in steps):
    return 'smollm' if digits else 'gpt-2'
  raise InputError(
    'The tokenizer splits text by a rule that this version has no llama.cpp name for: '
    f'{str(splits or steps)[:80]}.'
  )


def _sentencepiece_fields(parts, names, kinds, merges, size: int) -> dict[str, Any]:
  """Of SentencePiece BPE: a score for each piece instead of a list of merges."""
  rank: dict[str, int] = {}
  for i, merge in enumerate(merges):
    rank.setdefault(merge.replace(' ', '', 1), i)
  last = float(len(merges))
  scores = [-float(rank.get(names.get(i, ''), last)) for i in range(size)]
  unknown = parts['model'].get('unk_token')
  for i, name in names.items():
    if len(name) == 6 and name.startswith('<0x') and name.endswith('>'):
      kinds[i] = _BYTE
    if name == unknown:
      kinds[i] = _UNKNOWN
  normalizer = parts.get('normalizer') or {}
  steps = normalizer.get('normalizers', [normalizer])
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.scores': scores,
    'tokenizer.ggml.add_space_prefix': any(s.get('type') == 'Prepend' for s in steps),
  }
