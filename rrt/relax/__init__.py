"""Relaxations: what a shared layer does differently in each loop.

`base.py` holds the contract that every relaxation keeps, `registry.py` their
names; each further file is a relaxation, as `rrt.relax.Lora` or
`rrt.relax.Gain`.
"""

import importlib

_HOMES = {
  'Adapter': 'rrt.relax.adapter',
  'Bank': 'rrt.relax.bank',
  'Experts': 'rrt.relax.experts',
  'Gain': 'rrt.relax.gain',
  'Lora': 'rrt.relax.lora',
  'Memory': 'rrt.relax.memory',
  'Peer': 'rrt.relax.peer',
  'Pool': 'rrt.relax.bank',
  'Relaxation': 'rrt.relax.base',
  'register': 'rrt.relax.registry',
}


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_HOMES[name]), name)
