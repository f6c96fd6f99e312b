"""Exports with tied weights: their tensors, sizes and refusals (torch runs them in parity)."""

import json
from pathlib import Path

import numpy as np
import pytest

from rrt import relax
from rrt.checkpoints import remote, safetensors, sizes
from rrt.checkpoints.save_gguf import save_gguf
from rrt.checkpoints.save_hf import save_hf
from rrt.checkpoints.save_hf_tied import save_hf_tied
from rrt.checkpoints.save_peft import replication, save_peft
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.models.count import count_params
from tests.convert import tiny

CODE = Path(remote.__path__[0]) / 'modeling_rrt.py'
FAMILIES = ('llama', 'llama_biases', 'qwen2', 'gemma3', 'olmo2', 'gpt_neox', 'phi3')


def child_of(family, **options):
  heads = {'num_kv_heads': 4} if family == 'gpt_neox' else {}
  parent = tiny.parent(family, layers=6, **heads)
  options = {'rank': {'q': 2, 'v': 1, 'down': 3}, 'init': 'average'} | options
  return to_recursive(parent, prelude=1, loops=2, coda=1, **options)[0]


def stored(*files):
  """Bytes of the tensors of safetensors files."""
  return sum(
    int(np.prod(i.shape)) * safetensors.DTYPES[i.dtype].itemsize
    for file in files
    for i in safetensors.SafetensorsFile(file).infos.values()
  )


def test_the_modeling_file_is_short_and_needs_torch_and_transformers_alone():
  lines = CODE.read_text().splitlines()
  assert len(lines) < 250
  imports = {line.split()[1].split('.')[0] for line in lines if line.startswith(('import', 'from'))}
  assert imports == {'math', 'types', 'torch', 'transformers'}


@pytest.mark.parametrize('family', FAMILIES)
def test_sizes_are_those_of_the_files(family, tmp_path):
  child = child_of(family)
  found = {s.format: s.disk for s in sizes.sizes(child.config, 'float32')}
  save_hf(child, tmp_path / 'hf')
  assert found['hf'] == stored(tmp_path / 'hf/model.safetensors')
  save_hf_tied(child, tmp_path / 'tied')
  assert found['hf-tied'] == stored(tmp_path / 'tied/model.safetensors')
  assert found['hf-tied'] < found['hf']
  assert ('peft' in found) == (family in ('llama', 'llama_biases', 'olmo2'))
  if 'peft' in found:
    save_peft(child, tmp_path / 'peft')
    files = 'base/model.safetensors', 'adapter/adapter_model.safetensors'
    assert found['peft'] == stored(*(tmp_path / 'peft' / f for f in files))


@pytest.mark.parametrize('quantize', ['f32', 'f16', 'q8_0', 'q4_0'])
def test_sizes_of_gguf_files(quantize, tmp_path):
  gguf = pytest.importorskip('gguf')
  child = child_of('llama')
  out = save_gguf(child, tmp_path / 'child.gguf', quantize)
  tensors = gguf.GGUFReader(out).tensors
  found = {s.format: s.disk for s in sizes.sizes(child.config, 'float32', quantize)}
  assert found[f'gguf {quantize}'] == sum(int(t.n_bytes) for t in tensors)


def test_half_precision_halves_them():
  child = child_of('llama')
  whole, half = (sizes.sizes(child.config, d) for d in ('float32', 'bfloat16'))
  for a, b in zip(whole, half, strict=True):
    assert a.format.startswith('gguf') or a.disk == 2 * b.disk


def test_the_layers_that_an_adapter_repeats():
  child = child_of('llama')
  assert replication(child.config) == [(0, 3), (1, 4)]
  child = child_of('llama', order='sequence')
  assert replication(child.config) == [(0, 2), (1, 3), (2, 4)]


def test_tied_tensors_are_the_unique_parameters(tmp_path):
  child = child_of('llama', relax=(relax.Gain(),))
  save_hf_tied(child, tmp_path / 'out')
  assert stored(tmp_path / 'out/model.safetensors') == 4 * count_params(child.config).unique
  fields = json.loads((tmp_path / 'out/config.json').read_text())
  assert [kind for kind, _ in fields['terms']] == ['low_rank', 'gain']
  assert 'trust_remote_code=True' in (tmp_path / 'out/README.md').read_text()


@pytest.mark.parametrize(
  ('family', 'options', 'why'),
  [
    ('llama', {'relax': (relax.Gain(),)}, 'PEFT has no words for low_rank, gain'),
    ('gpt_neox', {}, 'fused'),
    ('phi3', {}, 'fused'),
    ('qwen2', {}, 'by its depth'),
  ],
)
def test_what_peft_cannot_say(family, options, why, tmp_path):
  child = child_of(family, **options)
  with pytest.raises(InputError, match=why):
    save_peft(child, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_exits_need_the_cycle_order(tmp_path):
  child = child_of('llama', order='sequence')
  with pytest.raises(InputError, match='exit_threshold'):
    save_hf_tied(child, tmp_path / 'out', exit_threshold=0.9)


def test_exports_replace_each_other_and_keep_a_card(tmp_path):
  child, out = child_of('llama'), tmp_path / 'out'
  save_peft(child, out)
  (out / 'README.md').write_text('mine')
  save_hf_tied(child, out)
  assert (out / 'README.md').read_text() == 'mine'
  assert not (out / 'base').exists()
  save_peft(child, out)
  assert (out / 'README.md').read_text() == 'mine'
  (out / 'base/notes.txt').write_text('mine too')
  with pytest.raises(InputError, match='left alone'):
    save_hf_tied(child, out)
