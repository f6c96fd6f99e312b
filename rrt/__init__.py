"""Relaxed Recursive Transformers: language models that reuse their layers.

    import rrt
    parent = rrt.load('smollm2-135m')
    child, report = rrt.to_recursive(parent, prelude=8, loops=2, coda=8,
                                     rank=64)
    print(rrt.complete(child, 'The sea is')[0].text)

Names load their modules on first use, so that `import rrt` stays quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rrt.checkpoints.adapter import save_adapter
  from rrt.checkpoints.hub import push_to_hub
  from rrt.checkpoints.load import load, save
  from rrt.checkpoints.save_gguf import save_gguf
  from rrt.checkpoints.save_hf import save_hf
  from rrt.checkpoints.save_hf_tied import save_hf_tied
  from rrt.checkpoints.save_peft import save_peft
  from rrt.config import ModelConfig
  from rrt.convert.recursive import to_recursive
  from rrt.errors import InputError
  from rrt.evals.perplexity import score
  from rrt.infer.engine.engine import Engine
  from rrt.infer.engine.request import Request
  from rrt.infer.generate import complete
  from rrt.model import LanguageModel
  from rrt.models.adapter import merge_adapter, with_adapter
  from rrt.models.count import count_params
  from rrt.models.quantized import dequantized, quantize
  from rrt.models.untie import to_untied
  from rrt.train.loop import uptrain

__version__ = '0.1.0'

_HOMES = {
  'Engine': 'rrt.infer.engine.engine',
  'InputError': 'rrt.errors',
  'LanguageModel': 'rrt.checkpoints.load',
  'ModelConfig': 'rrt.config',
  'Request': 'rrt.infer.engine.request',
  'complete': 'rrt.infer.generate',
  'count_params': 'rrt.models.count',
  'dequantized': 'rrt.models.quantized',
  'merge_adapter': 'rrt.models.adapter',
  'save_adapter': 'rrt.checkpoints.adapter',
  'with_adapter': 'rrt.models.adapter',
  'load': 'rrt.checkpoints.load',
  'push_to_hub': 'rrt.checkpoints.hub',
  'quantize': 'rrt.models.quantized',
  'save': 'rrt.checkpoints.load',
  'save_gguf': 'rrt.checkpoints.save_gguf',
  'save_hf': 'rrt.checkpoints.save_hf',
  'save_hf_tied': 'rrt.checkpoints.save_hf_tied',
  'save_peft': 'rrt.checkpoints.save_peft',
  'score': 'rrt.evals.perplexity',
  'to_recursive': 'rrt.convert.recursive',
  'to_untied': 'rrt.checkpoints.save_hf',
  'uptrain': 'rrt.train.loop',
}

__all__ = [
  'Engine',
  'InputError',
  'LanguageModel',
  'ModelConfig',
  'Request',
  'complete',
  'count_params',
  'dequantized',
  'load',
  'merge_adapter',
  'push_to_hub',
  'quantize',
  'save',
  'save_adapter',
  'save_gguf',
  'save_hf',
  'save_hf_tied',
  'save_peft',
  'score',
  'to_recursive',
  'to_untied',
  'uptrain',
  'with_adapter',
]


def __getattr__(name: str):
  if name == 'relax':
    return importlib.import_module('rrt.relax')
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
  return sorted([*globals(), *_HOMES])
