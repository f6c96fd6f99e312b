"""GGUF: llama.cpp's conventions undone, every quantization, clear errors."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rrt.checkpoints import gguf as rrt_gguf
from rrt.checkpoints import safetensors
from rrt.checkpoints.load import load, load_config
from rrt.data.tokenizer import Tokenizer
from rrt.errors import InputError
from rrt.families.base import wanted_rows
from rrt.families.registry import family_of

gguf = pytest.importorskip('gguf')
GOLDEN = Path(__file__).parents[1] / 'golden'
ARCH = {'llama3': 'llama', 'gemma': 'gemma', 'gemma3': 'gemma3'}


def permuted(weight, heads):
  """q or k rows as llama.cpp's converter writes them for Llama."""
  rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
  return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, name, *, quantize=None, only='', edit=None, metadata=None, **split):
  """A golden model as a GGUF file, with a byte-level tokenizer.

  Args:
    path: the file.
    name: the golden model.
    quantize: type of the matrices.
    only: a part of the names of those.
    edit: called with (name, weight), gives the weight to write.
    metadata: more fields.
    **split: how to split the file, for the writer.
  """
  config = json.loads((GOLDEN / name / 'config.json').read_text())
  arch = ARCH[name]
  writer = gguf.GGUFWriter(path, arch, **split)
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_key_length(config['head_dim'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  if arch != 'gemma3':
    writer.add_rope_freq_base(config['rope_parameters']['rope_theta'])
  else:
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config['sliding_window'])
    writer.add_array(
      'gemma3.attention.sliding_window_pattern',
      [t == 'sliding_attention' for t in config['layer_types']],
    )
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
  byte_tokens = [chr(0x100 + i) for i in range(59)]
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('gpt-2')
  writer.add_token_list(['<s>', *byte_tokens, '\u0100\u0101'])
  writer.add_token_types([3] + [1] * 60)
  writer.add_token_merges(['\u0100 \u0101'])
  writer.add_bos_token_id(0)
  for key, value in (metadata or {}).items():
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  model = load(GOLDEN / name)
  table = family_of(model.config)
  file = safetensors.SafetensorsFile(GOLDEN / name / 'model.safetensors')
  for row in wanted_rows(model.config, table):
    depths = range(model.config.depth) if '{}' in row.hf else [0]
    for depth in depths:
      chunks = [rows for _, rows in file.chunks(row.hf.format(depth))]
      weight = np.concatenate(chunks)
      if arch == 'llama' and row.kind in ('q', 'k'):
        part = 'attention' if row.kind == 'q' else 'key_value'
        weight = permuted(weight, config[f'num_{part}_heads'])
      if arch != 'llama' and row.kind == 'gain':
        weight = weight + np.float32(1)
      if edit:
        weight = edit(row.gguf.format(depth), weight)
      if weight is None:
        continue
      kind = None
      chosen = only in row.gguf.format(depth)
      if quantize is not None and weight.ndim == 2 and chosen:
        weight, kind = gguf.quants.quantize(weight, quantize), quantize
      writer.add_tensor(row.gguf.format(depth), weight, raw_dtype=kind)
  if name == 'llama3':
    writer.add_tensor('rope_freqs.weight', llama3_divisors(6, 500.0, 8.0))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def llama3_divisors(head_dim, base, factor, context=8192):
  """The table that GGUF files of Llama 3.1 carry, element by element."""
  out = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * np.pi * base ** (i / head_dim)
    if wavelength > context:
      out.append(factor)
    elif wavelength < context / 4:
      out.append(1.0)
    else:
      smooth = (context / wavelength - 1) / 3
      out.append(1 / ((1 - smooth) / factor + smooth))
  return np.asarray(out, np.float32)


@pytest.mark.parametrize('name', ARCH)
def test_reads_what_llama_cpp_writes(name, tmp_path):
  ours = load(write_gguf(tmp_path / 'm.gguf', name))
  wanted = load(GOLDEN / name)
  # Gains went through 1 + w in float32.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7, rtol=0), ours.params, wanted.params
  )
  a, b = ours.config.to_json(), wanted.config.to_json()
  if name == 'llama3':  # Its golden rule is not that of a released model.
    a.pop('ropes'), b.pop('ropes')
  if name == 'gemma3':  # GGUF has no query_pre_attn_scalar.
    a.pop('query_scale'), b.pop('query_scale')
  assert a == b


def test_llama3_rule_is_found_in_its_table():
  for factor in (8.0, 32.0):
    found = rrt_gguf._llama3_scaling(llama3_divisors(128, 5e5, factor), 5e5)
    assert found['factor'] == factor
  odd = np.linspace(1, 8, 64, dtype=np.float32)
  with pytest.raises(InputError, match='rope_freqs'):
    rrt_gguf._llama3_scaling(odd, 5e5)


def quantizable():
  kinds = []
  for kind in gguf.GGMLQuantizationType:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
      continue
    kinds.append((kind, block, size))
  return kinds


@pytest.mark.parametrize('kind, block, size', quantizable(), ids=lambda v: getattr(v, 'name', ''))
def test_every_type_that_the_package_decodes(kind, block, size, tmp_path):
  rng = np.random.default_rng(0)
  width, rows = max(block, 32), 6
  raw = rng.integers(0, 60, (rows, width // block * size), np.uint8)
  raw[:, ::2] = 0  # Scales stay small and finite.
  if kind == gguf.GGMLQuantizationType.F32:
    raw = rng.normal(size=(rows, width)).astype(np.float32)
    wanted = raw
  elif kind == gguf.GGMLQuantizationType.F16:
    raw = rng.normal(size=(rows, width)).astype(np.float16)
    wanted = raw.astype(np.float32)
  else:
    wanted = gguf.quants.dequantize(raw, kind)
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
  writer.add_tensor('x', raw, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  _, file = rrt_gguf.open_gguf([tmp_path / 'm.gguf'])
  assert file.infos['x'] == ((rows, width), kind.name)
  assert kind.name in file.dtypes
  found = np.concatenate([part for _, part in file.chunks('x')])
  np.testing.assert_array_equal(found.astype(np.float32), wanted)


def test_quantized_rows_of_a_model(tmp_path):
  kind = gguf.GGMLQuantizationType.F16
  path = write_gguf(tmp_path / 'm.gguf', 'gemma3', quantize=kind)
  ours = load(path).params['block']['layers']['mlp']['up']
  wanted = load(GOLDEN / 'gemma3').params
  wanted = wanted['block']['layers']['mlp']['up']
  np.testing.assert_allclose(ours['kernel'], wanted['kernel'], rtol=1e-3)


def test_pieces_in_any_form(tmp_path):
  whole = write_gguf(tmp_path / 'm.gguf', 'llama3')
  wanted = load(whole).params
  data = whole.read_bytes()
  for form in ('m.gguf.part{:02}', 'm.gguf-{:05}', 'm.gguf.{}'):
    folder = tmp_path / form.format(0)
    folder.mkdir()
    cuts = [0, 1001, 1002, 50_000, len(data)]
    paths = []
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
      paths.append(folder / form.format(i))
      paths[-1].write_bytes(data[a:b])
    for source in (folder, paths):
      params = load(source).params
      jax.tree.map(np.testing.assert_array_equal, params, wanted)
    with pytest.raises(InputError, match='not a whole GGUF file'):
      load(paths[:3])


def cut(data, folder, form, count):
  """Pieces of a file, of about the same size, numbered from 1."""
  folder.mkdir(exist_ok=True)
  edges = np.linspace(0, len(data), count + 1).astype(int)
  paths = [folder / form.format(i + 1, count) for i in range(count)]
  for path, (a, b) in zip(paths, itertools.pairwise(edges)):
    path.write_bytes(data[a:b])
  return paths


@pytest.mark.parametrize('form', ['m.gguf.part{}', 'm.gguf-part{}-of-{}', 'm.gguf.part{}of{}'])
def test_pieces_go_by_number(form, tmp_path):
  whole = write_gguf(tmp_path / 'm.gguf', 'llama3')
  wanted = load(whole).params
  paths = cut(whole.read_bytes(), tmp_path / 'pieces', form, 12)
  for source in (tmp_path / 'pieces', paths[0], paths[7], sorted(paths)):
    params = load(source).params
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
  paths[4].unlink()
  for source in (tmp_path / 'pieces', paths[0]):
    with pytest.raises(InputError, match=r'11 of the 12 .* 5 are missing'):
      load(source)


def test_parts_of_two_models_are_kept_apart(tmp_path):
  whole = write_gguf(tmp_path / 'm.gguf', 'llama3')
  wanted = load(whole).params
  both, data = tmp_path / 'both', whole.read_bytes()
  pieces = cut(data, both, 'm.gguf.part{}', 2)
  others = cut(data, both, 'n.gguf.part{}', 2)
  with pytest.raises(InputError, match=r'2 GGUF models.*m\.gguf.*n\.gguf'):
    load(both)
  params = load(pieces[0]).params
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  for paths in ([pieces[0], others[1]], [pieces[0], pieces[0]], [whole, *pieces]):
    with pytest.raises(InputError, match='not parts of one GGUF model'):
      load(paths)
  for letter in 'ab':
    (tmp_path / f'{letter}-0000{"ab".find(letter) + 1}-of-00002.gguf').touch()
  whole.unlink()
  with pytest.raises(InputError, match='2 GGUF models'):
    load(tmp_path)


def test_gguf_beside_a_config(tmp_path):
  write_gguf(tmp_path / 'm.gguf', 'gemma')
  wanted = load(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "gemma"}')
  found = load(tmp_path)
  assert found.config == wanted.config == load_config(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


def test_no_file_stays_open(tmp_path):
  write_gguf(tmp_path / 'm.gguf', 'gemma')
  _, tensors = rrt_gguf.open_gguf([tmp_path / 'm.gguf'])
  links = [path.resolve() for path in Path('/dev/fd').glob('*')]
  assert tensors.infos and tmp_path / 'm.gguf' not in links


def test_split_files(tmp_path):
  write_gguf(tmp_path / 'm.gguf', 'llama3', split_max_tensors=15)
  files = sorted(tmp_path.glob('m-*-of-*.gguf'))
  assert len(files) > 1
  wanted = load(write_gguf(tmp_path / 'one.gguf', 'llama3')).params
  (tmp_path / 'one.gguf').unlink()
  for source in (tmp_path, files[0], list(files)):
    params = load(source).params
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
  for path in files[:2]:
    path.rename(path.with_suffix('.kept'))
    path.write_bytes(b'damaged')
  with pytest.raises(InputError, match=r'm-00001.* not .*m-00002.* not '):
    load(files[0])
  for path in files[:2]:
    path.with_suffix('.kept').rename(path)
  files[1].unlink()
  with pytest.raises(InputError, match='are missing'):
    load(files[0])


def test_split_files_of_mixed_types(tmp_path):
  kind = gguf.GGMLQuantizationType.F16
  write_gguf(tmp_path / 'm.gguf', 'llama3', quantize=kind, only='ffn_down', split_max_tensors=15)
  files = sorted(tmp_path.glob('m-*-of-*.gguf'))
  types = [rrt_gguf.GgufFile([file]).dtypes for file in files]
  assert 'F16' not in types[0] and 'F16' in set().union(*types)
  ours = load(files[0]).params['block']['layers']['mlp']['down']
  wanted = load(GOLDEN / 'llama3').params
  wanted = wanted['block']['layers']['mlp']['down']
  np.testing.assert_allclose(ours['kernel'], wanted['kernel'], rtol=1e-3)


@pytest.mark.parametrize('align', [0, -32, 'wide', 32.0, True])
def test_alignment_must_be_a_number_above_zero(align, tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
  kind = gguf.GGUFValueType.get_type(align)
  writer.add_key_value('general.alignment', align, kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(InputError, match='alignment'):
    rrt_gguf.open_gguf([tmp_path / 'm.gguf'])


def test_damaged_files(tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', 'gemma')
  data = path.read_bytes()
  for size in (0, 3, 20, 1000, len(data) // 2, len(data) - 40):
    path.write_bytes(data[:size])
    with pytest.raises(InputError) as error:
      load(path)
    assert 'not a whole GGUF file' in str(error.value), size
  path.write_bytes(b'PK\x03\x04' + data)
  with pytest.raises(InputError, match='letters GGUF'):
    load(path)
  path.write_bytes(data[:4] + b'\x01\x00\x00\x00' + data[8:])
  with pytest.raises(InputError, match='version is 1'):
    load(path)


def test_what_is_not_supported(tmp_path):
  def fails(says, **options):
    with pytest.raises(InputError, match=says):
      load(write_gguf(tmp_path / 'm.gguf', 'llama3', **options))

  fails('expert', metadata={'llama.expert_count': 8})
  fails('partial RoPE', metadata={'llama.rope.dimension_count': 4})
  fails('yarn', metadata={'llama.rope.scaling.type': 'yarn'})

  def drop(name, weight):
    return None if name == 'blk.1.ffn_up.weight' else weight

  fails(r'1 missing \(blk.1.ffn_up.weight\)', edit=drop)

  def spoil(name, weight):
    return weight * np.float32(np.nan) if name == 'output.weight' else weight

  fails('NaN or Inf', edit=spoil)
  info = {'token_embd.weight': safetensors.TensorInfo((61, 24), 'F32')}
  tensors = safetensors.ShardedTensors([])
  tensors.infos = info
  shape = {
    'general.architecture': 'llama',
    'llama.block_count': 2,
    'llama.embedding_length': 24,
    'llama.feed_forward_length': 38,
    'llama.attention.head_count': 4,
  }
  for key, value, says in (
    ('attention.layer_norm_rms_epsilon', float('nan'), 'rms_norm_eps=nan'),
    ('rope.freq_base', -1.0, 'rope_theta=-1.0'),
    ('attention.sliding_window', -1, 'sliding_window=-1'),
  ):
    with pytest.raises(InputError, match=f'^The GGUF fields .*{says}'):
      rrt_gguf.config_from_gguf(shape | {f'llama.{key}': value}, tensors)
  for fields, says in (
    ({'llama.logit_scale': 0.5}, 'llama.logit_scale=0.5 is not known'),
    (
      {'llama.attention.key_length': 6, 'llama.attention.value_length': 8},
      'key_length=6 and value_length=8 differ',
    ),
  ):
    with pytest.raises(InputError, match=says):
      rrt_gguf.config_from_gguf(shape | fields, tensors)
  assert rrt_gguf.config_from_gguf(shape | {'llama.logit_scale': 0.0}, tensors).d_model == 24
  with pytest.raises(InputError, match="architecture='mamba'"):
    rrt_gguf.config_from_gguf({'general.architecture': 'mamba'}, None)
  with pytest.raises(InputError, match="model='bert'"):
    Tokenizer.from_gguf({'tokenizer.ggml.model': 'bert'})
  with pytest.raises(InputError, match="pre='odd'"):
    Tokenizer.from_gguf({'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'odd'})
