"""Exports recursive models for PEFT: a stock model and a LoRA adapter.

`base/` is a model of the family, of prelude, block and coda, each layer once;
`adapter/` repeats the block's layers (`layer_replication`) and holds what differs by
loop: low-rank terms, norms, biases. Both load without code of ours.

I inputs, O outputs, R loops, r rank, L depth.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rrt.checkpoints import card, safetensors, save_hf
from rrt.checkpoints.save_hf_tied import check_tied, term_arrays, terms_of
from rrt.config import ModelConfig
from rrt.errors import InputError
from rrt.families.base import wanted_rows
from rrt.families.registry import family_of
from rrt.files import write_directory
from rrt.model import LanguageModel
from rrt.models.adapter import merge_adapter
from rrt.models.quantized import dequantized
from rrt.models.untie import has_loops, untied_config
from rrt.relax import registry
from rrt.relax.hosts import hosts_of
from rrt.relax.trees import own_leaves, relaxed_hosts, subtree
from rrt.tree import flatten, set_path

# Families whose transformers code reads `layer_types` by depth: a layer that PEFT repeats
# lies past its end.
_BY_DEPTH = ('qwen2', 'qwen3', 'smollm3', 'gemma2', 'gemma3')
_LOAD_PEFT = """
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained('{0}/base')
model = PeftModel.from_pretrained(base, '{0}/adapter')
tokenizer = AutoTokenizer.from_pretrained('{0}/base')
"""


def check_peft(config: ModelConfig) -> None:
  """Raises InputError for a model that a stock model and a LoRA adapter cannot say."""
  c, other = config, 'take --format=hf-tied'
  check_tied(c)
  kinds = [kind for kind, _ in terms_of(c)]
  if kinds != ['low_rank'] * len(kinds) or len(kinds) > 1:
    raise InputError(f'relax: PEFT has no words for {", ".join(kinds)}; {other}.')
  rows = list(wanted_rows(c, family_of(c)))
  if any(row.fused for row in rows):
    raise InputError(
      f'family={c.family!r}: its projections are fused, where PEFT has one term for all; {other}.'
    )
  if c.family in _BY_DEPTH:
    raise InputError(
      f"family={c.family!r}: transformers looks up a layer's kind by its depth, which repeated "
      f'layers do not have; {other}.'
    )
  for values in (c.windows, c.rope_index):
    if values and len({*values}) > 1:
      raise InputError(
        f'windows: layers differ in theirs, or in rotary tables, and a repeated layer is at '
        f'several depths; {other}.'
      )


def unique_layers(config: ModelConfig) -> np.ndarray:
  """Which of the P + N + C layers with weights of their own runs at each depth, int [L]."""
  c = config
  index_L = np.arange(c.depth)
  index_L[c.block_depths()] = c.prelude_layers + np.arange(c.block_layers)[None, :]
  after = c.depth - c.coda_layers
  index_L[after:] = c.prelude_layers + c.block_layers + np.arange(c.coda_layers)
  return index_L


def replication(config: ModelConfig) -> list[tuple[int, int]]:
  """Ranges [first, last) of unique layers, one after the other the layers that run."""
  runs: list[tuple[int, int]] = []
  for layer in unique_layers(config).tolist():
    if runs and runs[-1][1] == layer:
      runs[-1] = (runs[-1][0], layer + 1)
    else:
      runs.append((layer, layer + 1))
  return runs


def save_peft(model: LanguageModel, directory: str | Path) -> Path:
  """Writes a stock model with each shared layer once, and a LoRA adapter for the loops.

  `base/` is a model of the family, of prelude, block and coda; `adapter/` repeats its
  layers (`layer_replication`) and holds low-rank terms, norms and biases by loop. Both
  load without code of ours, and the repeated layers share their weights.

  Args:
    model: recursive, with one low-rank relaxation or none.
    directory: new or empty, or an earlier export, which is replaced once the new
      one is complete.

  Returns:
    The directory.

  Raises:
    InputError: the directory holds something else, or cannot be written; or PEFT
      cannot say what the model computes.

  Example:
    >>> rrt.save_peft(child, 'child_peft')
  """
  model = merge_adapter(dequantized(model))
  check_peft(model.config)
  name = Path(directory).name
  base = _first_loop(model)
  tensors, fields = save_hf.hf_tensors(base), save_hf.hf_config(base)
  adapter, adapter_fields = _adapter(model)

  def write(folder: Path) -> None:
    for part in (save_hf.BASE, save_hf.ADAPTER):
      (folder / part).mkdir()
    save_hf.write_tensors(folder / save_hf.BASE, tensors)
    save_hf.write_tokenizer(folder / save_hf.BASE, model)
    save_hf.write_json(folder / save_hf.BASE / 'config.json', fields)
    file = folder / save_hf.ADAPTER / 'adapter_model.safetensors'
    safetensors.write(file, adapter, {'format': 'pt'})
    save_hf.write_json(folder / save_hf.ADAPTER / 'adapter_config.json', adapter_fields)
    (folder / card.NAME).write_text(card.write(model, _LOAD_PEFT.format(name)), encoding='utf-8')

  keep = card.kept(Path(directory))
  return write_directory(directory, write, save_hf.is_export, 'an rrt export', keep)


def _first_loop(model: LanguageModel) -> LanguageModel:
  """The P + N + C layers with weights of their own, as they are in the first loop."""
  c = model.config
  first = [int(np.flatnonzero(unique_layers(c) == i)[0]) for i in range(_own(c))]
  pick = lambda values: tuple(values[d] for d in first) if values else ()
  config = dataclasses.replace(
    untied_config(c), block_layers=_own(c), windows=pick(c.windows), rope_index=pick(c.rope_index)
  )
  params = {k: v for k, v in model.params.items() if k not in ('prelude', 'block', 'coda')}
  layers: dict[str, Any] = {}
  parts = [flatten(model.params[p]['layers']) for p in ('prelude', 'coda') if p in model.params]
  for path, leaf in flatten(model.params['block']['layers']).items():
    if registry.kind_of_path(path):
      continue
    value = np.asarray(leaf)[:, 0] if has_loops(c, path) else np.asarray(leaf)
    around = [np.asarray(part[path]) for part in parts]
    before = around[:1] if c.prelude_layers else []
    after = around[len(before) :]
    set_path(layers, path, np.concatenate([*before, value, *after]))
  params['block'] = {'layers': layers}
  return LanguageModel(config, params, model.tokenizer, dict(model.meta))


def _own(config: ModelConfig) -> int:
  return config.prelude_layers + config.block_layers + config.coda_layers


def _adapter(model: LanguageModel) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Tensors and adapter_config.json."""
  c = model.config
  dtype = model.params['embed']['table'].dtype
  rows = {row.path: row.hf for row in wanted_rows(c, family_of(c))}
  block = model.params['block']
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  saved: list[str] = []
  biased = c.loop_norms and bool(c.biases)

  def put(module: str, end: str, value) -> None:
    value = np.ascontiguousarray(value).astype(dtype)
    tensors[f'base_model.model.{module}.{end}'] = value

  terms = {host.name: relaxation for relaxation, host, _ in relaxed_hosts(c)}
  for host in hosts_of(c, 'linear'):
    tree = subtree(block, host)
    for layer in range(c.block_layers):
      empty_RxIx1 = np.zeros((c.loops, host.d_in, 1), np.float32)
      arrays = {'a': empty_RxIx1, 'b': np.zeros((c.loops, 1, host.d_out), np.float32)}
      if host.name in terms:
        relaxation = terms[host.name]
        arrays = term_arrays(relaxation, own_leaves(tree, relaxation.kind), layer, host)
      for loop in range(c.loops):
        a_Ixr, b_rxO = arrays['a'][loop], arrays['b'][loop]
        used = np.flatnonzero(a_Ixr.any(0) & b_rxO.any(1))
        rank = int(used[-1]) + 1 if used.size else 0
        if not rank and not (biased and host.name in c.biases):
          continue
        rank = max(rank, 1)
        depth = c.depth_of(loop, layer)
        module = rows[f'{host.path}/kernel'].format(depth).removesuffix('.weight')
        ranks[module] = rank
        put(module, 'lora_A.weight', a_Ixr[:, :rank].T)
        put(module, 'lora_B.weight', b_rxO[:rank].T)
        if biased:
          own = np.zeros(host.d_out, np.float32)
          if host.name in c.biases:
            bias_RxO = np.asarray(tree['bias'], np.float32)[layer]
            own = bias_RxO[loop] - bias_RxO[0]
          put(module, 'lora_B.bias', own)
  for path, leaf in flatten(block['layers']).items():
    of_norm = path.split('/')[-2].endswith('_norm')
    if of_norm and has_loops(c, path) and not registry.kind_of_path(path):
      for (loop, layer), depth in np.ndenumerate(c.block_depths()):
        module, _, end = rows[path].format(depth).rpartition('.')
        put(module, end, np.asarray(leaf)[layer, loop])
        saved.append(module)
  width = max(ranks.values(), default=1)
  fields = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': save_hf.BASE,
    'inference_mode': True,
    'r': width,
    'lora_alpha': width,
    'rank_pattern': ranks,
    'alpha_pattern': ranks,
    'target_modules': sorted(ranks),
    'modules_to_save': sorted({*saved}) or None,
    'layer_replication': replication(c),
    'bias': 'none',
    'lora_bias': biased,
    'lora_dropout': 0.0,
    save_hf.MARK: 'rrt',
  }
  return tensors, fields
