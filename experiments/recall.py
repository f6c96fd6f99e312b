r"""A memory layer against a wider MLP of equal FLOPs: how many random pairs are learned.

Pairs of a key (two tokens) and a value (one token) are drawn at random: there is nothing to
generalise, the model has to store them. Both models see the same batches.

COMMAND
  python -m experiments.recall --pairs=4096 --steps=60 --every=5
  Each model is trained at every rate of --learning_rates; the table has its best.

HARDWARE
  Two CPU cores, minutes.

RESULT
  docs/results/memory.md
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from rrt import command, console, sharding
from rrt.config import ModelConfig
from rrt.models import lm_head, transformer
from rrt.models.count import count_params
from rrt.models.init import init_params
from rrt.relax.memory import Memory
from rrt.train import optim, placement
from rrt.train import step as step_lib
from rrt.train.losses import Objective

FLAGS = flags.FLAGS
_PAIRS = flags.DEFINE_integer('pairs', 4096, 'Pairs to learn.')
_STEPS = flags.DEFINE_integer('steps', 60, 'Training steps.')
_BATCH = flags.DEFINE_integer('batch', 512, 'Pairs of a step.')
_EVERY = flags.DEFINE_integer('every', 5, 'Steps between two measurements.')
_RATES = flags.DEFINE_list(
  'learning_rates', ['2e-3', '4e-3', '8e-3'], 'Of AdamW; values have ten times as much.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of pairs and weights.')
_OUT = flags.DEFINE_string('out', None, 'JSON file for the figures.')
_SYMBOLS = 256
_MEMORY = Memory((0,), 16384, heads=4, topk=8, key_dim=32)


def dense(d_ff: int = 512) -> ModelConfig:
  """Four layers, 128 wide."""
  return ModelConfig(
    family='llama',
    vocab_size=_SYMBOLS,
    d_model=128,
    d_ff=d_ff,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    block_layers=4,
    max_context=4,
    tie_embeddings=True,
  )


def memory_flops(memory: Memory, d_model: int) -> int:
  """Multiplications and additions of a memory layer, for one token."""
  K, H, n = memory.key_dim // 2, memory.heads, memory.half
  query, score = 2 * d_model * H * 2 * K, 2 * 2 * H * n * K
  values, gates = 2 * H * memory.topk * d_model, 2 * 2 * d_model * d_model
  return query + score + values + gates


def models() -> dict[str, ModelConfig]:
  """With a memory layer, and with MLPs as much wider as that costs."""
  base = dense()
  wider = memory_flops(_MEMORY, base.d_model) / (2 * 3 * base.d_model * base.block_layers)
  return {
    'memory': dataclasses.replace(base, relax=(_MEMORY,)),
    'wider MLPs': dense(base.d_ff + round(wider)),
  }


def pairs(count: int, seed: int) -> np.ndarray:
  """Distinct keys and random values, int32 [count, 3]."""
  rng = np.random.default_rng(seed)
  keys = rng.choice(_SYMBOLS**2, count, replace=False)
  values = rng.integers(0, _SYMBOLS, count)
  return np.stack([keys // _SYMBOLS, keys % _SYMBOLS, values], 1).astype(np.int32)


def train(config: ModelConfig, data_Nx3: np.ndarray, **settings: Any):
  """Shares of the pairs that are recalled, by step.

  Args:
    config: the model.
    data_Nx3: keys and values.
    **settings: steps, batch, every, learning_rate, seed.
  """
  s = settings
  params = init_params(config, jax.random.key(s['seed']))
  if config.relax:  # Zero is the start of a model that exists; this one begins at random.
    out_MxVxD = params['block']['memory_out']
    normal = jax.random.normal(jax.random.key(s['seed'] + 1), out_MxVxD.shape)
    params['block']['memory_out'] = normal * out_MxVxD.shape[1] ** -0.5
  o = optim.Optimizer(learning_rate=s['learning_rate'], warmup_steps=10)
  trained = step_lib.trained_paths(optim.trainable(o, params))
  spec = step_lib.Step(
    config=config,
    objective=Objective(cross_entropy=1.0, distillation=0.0),
    optimizer=optim.make_optimizer(o, step_lib.split(params, trained)[0], s['steps']),
    trained=trained,
  )
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  state = step_lib.init_state(spec, params, mesh)
  where = jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(spec, mesh))
  step = step_lib.jit_step(spec, mesh, where)

  @jax.jit
  def recalled(params, key_Nx2):
    hidden = transformer.forward(config, params, key_Nx2).hidden_BxLxD[:, -1:]
    return jnp.argmax(lm_head.logits(config, params, hidden)[:, 0], -1)

  rng, found = np.random.default_rng(s['seed']), {}
  with jax.set_mesh(mesh):
    for i in range(1, s['steps'] + 1):
      rows = data_Nx3[rng.choice(len(data_Nx3), s['batch'], replace=False)]
      zero = np.zeros((s['batch'], 2), np.int32)
      batch = {
        'tokens': rows[:, :2],
        'targets': rows[:, 1:],
        'segment_ids': zero,
        'positions': zero + np.arange(2, dtype=np.int32)[None],
        'weights': zero + np.array([[0.0, 1.0]], np.float32),
      }
      state, _ = step(state, {}, placement.to_mesh(batch, mesh))
      if i % s['every'] == 0 or i == s['steps']:
        got = recalled(state.params, data_Nx3[:, :2])
        found[i] = float(np.mean(np.asarray(got) == data_Nx3[:, 2]))
  return found


def main(_) -> None:
  """Trains both and prints what they recall."""
  data = pairs(_PAIRS.value, _SEED.value)
  found: dict[str, Any] = {}
  for name, config in models().items():
    found[name] = {'parameters': count_params(config).unique, 'recall': {}}
    for rate in _RATES.value:
      recall = train(
        config,
        data,
        steps=_STEPS.value,
        batch=min(_BATCH.value, len(data)),
        every=_EVERY.value,
        learning_rate=float(rate),
        seed=_SEED.value,
      )
      found[name]['recall'][rate] = recall
      print(f'{name}, {rate}: {recall}', flush=True)
  first = next(iter(found['memory']['recall'].values()))
  best = lambda model, i: max(recall[i] for recall in model['recall'].values())
  rows = [[i, *(best(model, i) for model in found.values())] for i in first]
  console.table(rows, ['step', *found])
  figures = {'pairs': len(data), 'seed': _SEED.value, 'models': found}
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps(figures, indent=1) + '\n')
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
