"""Exports with tied weights, loaded by transformers and by PEFT, against ours."""

import dataclasses
import json

import numpy as np
import pytest

import rrt
from rrt import relax
from tests.parity.hugging_face_test import (
  DENSE,
  WITH_EXPERTS,
  assert_same_greedy_tokens,
  assert_same_logits,
  make,
  parent_of,
  random_tokens,
)

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

RANK = {'q': 2, 'k': 1, 'v': 3, 'o': 2, 'down': 4, 'up': 1}


def child_of(name, tmp_path, **options):
  """A child whose norms, biases and terms all differ by loop."""
  _, parent = parent_of(name, tmp_path / 'parent')
  depth = parent.config.depth
  options = {'rank': RANK, 'alpha': 5.0, 'init': 'average'} | options
  child, _ = rrt.to_recursive(parent, prelude=depth % 2, loops=2, **options)
  assert child.config.loop_norms
  return child


def tied(model, folder, **options):
  """What transformers loads of a tied export."""
  rrt.save_hf_tied(model, folder, **options)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True
  )
  return theirs.eval()


def with_adapter(folder):
  """What PEFT loads of an export for it."""
  base = transformers.AutoModelForCausalLM.from_pretrained(
    folder / 'base', dtype=torch.float32, attn_implementation='eager'
  )
  return peft.PeftModel.from_pretrained(base, folder / 'adapter').eval()


@pytest.mark.parametrize('name', DENSE)
def test_tied_export_of_a_family(name, tmp_path):
  child = child_of(name, tmp_path)
  theirs = tied(child, tmp_path / 'out')
  assert_same_logits(child, theirs)
  assert_same_greedy_tokens(child, theirs)
  count = sum(p.numel() for p in theirs.parameters())
  assert count == rrt.count_params(child.config).unique


@pytest.mark.parametrize('name', WITH_EXPERTS)
def test_a_family_with_experts_is_refused(name, tmp_path):
  with pytest.raises(rrt.InputError, match=r'num_experts=\d+: .* --format=hf'):
    rrt.save_hf_tied(child_of(name, tmp_path), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('order', ['cycle', 'sequence'])
def test_tied_export_with_gains(order, tmp_path):
  child = child_of(
    'llama3', tmp_path, order=order, relax=(relax.Gain(components='all'),), init='average'
  )
  assert [r.kind for r in child.config.relax] == ['lora', 'gain']
  theirs = tied(child, tmp_path / 'out')
  assert_same_logits(child, theirs)
  assert_same_greedy_tokens(child, theirs)


def test_padding_changes_nothing(tmp_path):
  child = child_of('gemma3', tmp_path)
  theirs = tied(child, tmp_path / 'out')
  tokens = torch.from_numpy(random_tokens(child.config, rows=1))
  padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
  mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens)], 1)
  ids = (mask.cumsum(1) - 1).clamp(min=0)
  with torch.no_grad():
    alone = theirs(tokens).logits
    beside = theirs(padded, attention_mask=mask, position_ids=ids).logits[:, 3:]
  assert (alone - beside).abs().max() < 1e-5


@pytest.mark.parametrize('gate', ['change', 'learned'])
def test_early_exits_are_those_of_the_engine(gate, tmp_path):
  child = child_of('llama3', tmp_path)
  R, D = child.config.loops - 1, child.config.d_model
  rng = np.random.default_rng(5)
  arrays = None
  if gate == 'learned':
    arrays = {
      'kernel': rng.normal(size=(R, D)).astype(np.float32) * 0.3,
      'bias': np.zeros(R, np.float32),
    }
  prompt, steps = random_tokens(child.config, rows=1, length=1)[0].tolist(), 16
  full = rrt.complete(child, [prompt], max_new_tokens=steps, ignore_eos=True)[0].tokens
  for threshold in (0.2, 0.45, 0.6, 0.75, 0.9):
    engine = rrt.Engine(
      child, arrays=arrays, slots=1, page=8, steps=1, gate=gate, kv='propagate', threshold=threshold
    )
    found = engine.run([rrt.Request.of(prompt, steps, ignore_eos=True)])[0]
    if 1 < np.mean(found.loops) < child.config.loops and found.tokens != full:
      break
  else:
    pytest.fail('No threshold lets some tokens leave.')
  theirs = tied(child, tmp_path / 'out', exit_threshold=threshold, gate=arrays)
  with torch.no_grad():
    out = theirs.generate(
      torch.tensor([prompt]),
      max_new_tokens=steps,
      min_new_tokens=steps,
      do_sample=False,
      pad_token_id=0,
    )
  assert out[0, len(prompt) :].tolist() == found.tokens


@pytest.mark.parametrize('name', ['llama3', 'yarn', 'mistral', 'llama_biases', 'olmo2', 'gemma'])
@pytest.mark.parametrize('order', ['cycle', 'sequence'])
def test_adapter_for_peft(name, order, tmp_path):
  child = child_of(name, tmp_path, order=order)
  rrt.save_peft(child, tmp_path / 'out')
  theirs = with_adapter(tmp_path / 'out')
  assert_same_logits(child, theirs)
  assert_same_greedy_tokens(child, theirs)


def test_the_adapter_holds_weights_once(tmp_path):
  child = child_of('llama3', tmp_path)
  rrt.save_peft(child, tmp_path / 'out')
  theirs = with_adapter(tmp_path / 'out')
  tokens = random_tokens(child.config)
  wanted = make().logits_of(tied(child, tmp_path / 'tied'), tokens)
  assert np.abs(make().logits_of(theirs, tokens) - wanted).max() < 1e-6 * np.abs(wanted).max()
  held = {}
  for name, parameter in theirs.named_parameters():
    if 'modules_to_save' not in name and 'original_module' not in name:
      held[parameter.data_ptr()] = parameter.numel()
  norms = sum(p.numel() for n, p in theirs.named_parameters() if 'modules_to_save' in n)
  first = sum(p.numel() for n, p in theirs.named_parameters() if 'original_module' in n)
  assert norms == first * child.config.loops
  lora = sum(p.numel() for n, p in theirs.named_parameters() if '.lora_' in n)
  unique = rrt.count_params(child.config)
  block = dataclasses.replace(child.config, relax=())
  assert lora == unique.unique - rrt.count_params(block).unique
  assert sum(held.values()) + norms == unique.unique


@pytest.mark.parametrize(
  'name', ['qwen2', 'qwen3', 'smollm3', 'phi3', 'pythia', 'gemma2', 'gemma3']
)
def test_what_peft_cannot_say_is_refused(name, tmp_path):
  child = child_of(name, tmp_path)
  with pytest.raises(rrt.InputError, match='hf-tied'):
    rrt.save_peft(child, tmp_path / 'out')


def test_rank_zero_and_mixed_ranks(tmp_path):
  child = child_of('llama3', tmp_path, rank={'q': 2, 'down': (3, 1)})
  rrt.save_peft(child, tmp_path / 'out')
  fields = json.loads((tmp_path / 'out/adapter/adapter_config.json').read_text())
  assert {*fields['rank_pattern'].values()} == {1, 2, 3}
  assert_same_logits(child, with_adapter(tmp_path / 'out'))
