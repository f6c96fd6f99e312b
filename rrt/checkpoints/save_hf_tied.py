"""Exports recursive models as they are for transformers, with a modeling file.

The directory holds `remote/modeling_rrt.py` beside the weights, which computes all that
a recursive model does: shared layers held once, low-rank terms, gains, norms and biases
by loop, a cache by loop, early exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
import shutil
from typing import Any

import numpy as np

from rrt.checkpoints import card, save_hf
from rrt.config import ModelConfig
from rrt.config_checks import BY_LENGTH
from rrt.errors import InputError
from rrt.files import write_directory
from rrt.model import LanguageModel
from rrt.models.adapter import merge_adapter
from rrt.models.layers import rope_frequencies
from rrt.models.quantized import dequantized
from rrt.models.untie import check_mergeable
from rrt.relax import registry
from rrt.relax.trees import own_leaves, relaxed_hosts, subtree
from rrt.tree import flatten

_CODE = Path(__file__).parent / 'remote' / save_hf.MODELING
_LOAD_TIED = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('{0}', trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained('{0}')
"""


def save_hf_tied(
  model: LanguageModel,
  directory: str | Path,
  exit_threshold: float | None = None,
  gate: Mapping[str, np.ndarray] | None = None,
) -> Path:
  """Writes a recursive model for transformers, shared weights held once.

  The directory has its own code (`modeling_rrt.py`, PyTorch and transformers alone):
  loading takes `trust_remote_code=True`.

  Args:
    model: vanilla or recursive.
    directory: new or empty, or an earlier export, which is replaced once the new
      one is complete.
    exit_threshold: a token that is decoded leaves the block when its score reaches
      this; None never. It can be changed later in config.json.
    gate: `kernel` [R - 1, D] and `bias` [R - 1] of a learned gate, which scores; None
      for the cosine of the residual stream before and after a loop.

  Returns:
    The directory.

  Raises:
    InputError: the directory holds something else, or cannot be written; or the
      modeling file has no words for a relaxation.

  Example:
    >>> rrt.save_hf_tied(child, 'child_tied')
  """
  model = merge_adapter(dequantized(model))
  check_tied(model.config)
  c, name = model.config, Path(directory).name
  if exit_threshold is not None and c.order != 'cycle':
    raise InputError('exit_threshold: only the cycle order has an output after each loop.')
  tensors = dict(_tied_tensors(model))
  fields = _tied_config(model, exit_threshold, gate)

  def write(folder: Path) -> None:
    save_hf.write_tensors(folder, tensors)
    save_hf.write_tokenizer(folder, model)
    shutil.copyfile(_CODE, folder / save_hf.MODELING)
    (folder / card.NAME).write_text(card.write(model, _LOAD_TIED.format(name)), encoding='utf-8')
    save_hf.write_json(folder / 'config.json', fields)

  keep = card.kept(Path(directory))
  return write_directory(directory, write, save_hf.is_export, 'an rrt export', keep)


def check_tied(config: ModelConfig) -> None:
  """Raises InputError for a relaxation that `save_hf_tied` has no words for."""
  check_mergeable(config)
  if config.num_experts:
    raise InputError(
      f'num_experts={config.num_experts}: {save_hf.MODELING} has one MLP a layer; take --format=hf.'
    )
  if any(r.scaling in BY_LENGTH for r in config.ropes):
    raise InputError(
      f'ropes: {save_hf.MODELING} has no frequencies that depend on the length of a text; take '
      '--format=hf.'
    )
  terms_of(config)


def terms_of(config: ModelConfig) -> list[tuple[str, dict[str, int]]]:
  """(kind, {linear: rank}) of every relaxation, in order.

  Raises:
    InputError: a relaxation is neither low-rank nor a gain.
  """
  found: dict[str, tuple[str, dict[str, int]]] = {}
  for relaxation, host, leaves in relaxed_hosts(config):
    zeros = {k: np.zeros(leaf.shape, np.float32) for k, leaf in leaves.items()}
    term = relaxation.term(zeros, host) if host.site == 'linear' else None
    if term is None:
      raise InputError(
        f'relax: {relaxation.kind!r} is not known to {save_hf.MODELING}; take --format=hf.'
      )
    kind, arrays = term
    rank = arrays['a'].shape[-1] if kind == 'low_rank' else 0
    found.setdefault(relaxation.kind, (kind, {}))[1][host.name] = rank
  return [*found.values()]


def _tied_config(model: LanguageModel, exit_threshold, gate) -> dict[str, Any]:
  """config.json of a tied export."""
  c = model.config
  shape = c.to_json()
  for name in ('relax', 'ropes'):
    del shape[name]
  norms = {name.replace('/', '_'): size for name, size in c.norm_sizes().items()}
  size = c.rotary_dim or c.head_dim
  ropes = [
    {'frequencies': rope_frequencies(r, size).tolist(), 'factor': r.attention_factor}
    for r in c.ropes
  ]
  dtype = np.dtype(model.params['embed']['table'].dtype).name
  module = Path(save_hf.MODELING).stem
  if gate is not None:
    gate = {name: np.asarray(gate[name], np.float32).tolist() for name in ('kernel', 'bias')}
  return {
    'architectures': ['RrtForCausalLM'],
    'model_type': 'rrt',
    'auto_map': {
      'AutoConfig': f'{module}.RrtConfig',
      'AutoModelForCausalLM': f'{module}.RrtForCausalLM',
    },
    'shape': shape | {'sizes': c.shapes(), 'norm_sizes': norms},
    'ropes': ropes,
    'terms': terms_of(c),
    'exit_threshold': exit_threshold,
    'gate': gate,
    'vocab_size': c.vocab_size,
    'hidden_size': c.d_model,
    'num_hidden_layers': c.depth,
    'num_attention_heads': c.num_heads,
    'num_key_value_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'max_position_embeddings': c.max_context,
    **save_hf.token_ids(model),
    'torch_dtype': dtype,
    'dtype': dtype,
    save_hf.MARK: 'rrt',
  }


def _tied_tensors(model: LanguageModel) -> Iterator[tuple[str, np.ndarray]]:
  """(name in the modeling file, tensor)."""
  c, dtype = model.config, model.params['embed']['table'].dtype
  top = {'embed/table': 'embed.weight', 'head/kernel': 'lm_head.weight'}
  for path, leaf in flatten({k: v for k, v in model.params.items() if k != 'block'}).items():
    value = np.asarray(leaf)
    if path in top:
      yield top[path], value.T if path == 'head/kernel' else value
    elif path.startswith('final_norm'):
      yield f'final_norm.{_leaf_name(path)}', value
    else:
      part, _, inner = path.split('/', 2)
      for i, one in enumerate(value):
        yield f'{part}.{i}.{_module(inner)}', _turned(inner, one)
  for path, leaf in flatten(model.params['block']['layers']).items():
    if not registry.kind_of_path(path):
      for i, one in enumerate(np.asarray(leaf)):
        yield f'block.{i}.{_module(path)}', _turned(path, one)
  for relaxation, host, _ in relaxed_hosts(c):
    leaves = own_leaves(subtree(model.params['block'], host), relaxation.kind)
    for i in range(c.block_layers):
      for name, value in term_arrays(relaxation, leaves, i, host).items():
        yield f'block.{i}.linears.{host.name}.{name}', value.astype(dtype)


def term_arrays(relaxation, leaves, layer: int, host) -> dict[str, np.ndarray]:
  """The arrays of a relaxation's term on one layer."""
  term = relaxation.term({k: np.asarray(v)[layer] for k, v in leaves.items()}, host)
  return term[1]


def _leaf_name(path: str) -> str:
  return 'bias' if path.endswith('bias') else 'weight'


def _module(path: str) -> str:
  """'attn/q/kernel' as 'linears.q.weight', 'attn/q_norm/scale' as 'norms.attn_q_norm.weight'."""
  *parents, leaf = path.split('/')
  if parents[-1].endswith('_norm'):
    return f'norms.{"_".join(parents)}.{_leaf_name(path)}'
  return f'linears.{parents[-1]}.{"added" if leaf == "bias" else "weight"}'


def _turned(path: str, value: np.ndarray) -> np.ndarray:
  return value.T if path.endswith('kernel') else value
