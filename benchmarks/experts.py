"""What routing costs: LoRA experts beside LoRA, a bank of MLPs beside an MLP.

python -m benchmarks.experts --out=benchmarks/results/experts_speed.json

SmolLM2-135M as 8 + 7 x 2 + 8 with LoRA of rank 64 a loop, and with four LoRA experts of rank 32, of
which each token takes two: as many columns. They take turns at a training step of 1,024 tokens and
at decoding 32 sequences; a ratio above 1 is how much longer experts take. Then one MLP of 576 x
1,536 with a bank of the other loop's, of which each of 1,024 tokens takes one: its loop's own, as
at the start, and by a random router.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from benchmarks import common, turns
from rrt import command, console
from rrt.checkpoints.load import load
from rrt.config import ModelConfig
from rrt.convert.recursive import to_recursive
from rrt.models.init import init_params
from rrt.models.layers import Mlp
from rrt.relax.bank import Bank
from rrt.relax.base import Place
from rrt.relax.experts import Experts
from rrt.relax.hosts import LINEAR_AXES

FLAGS = flags.FLAGS
flags.DEFINE_integer('repeats', 5, 'Turns of each.')
flags.DEFINE_list('parts', ['train', 'decode', 'bank'], 'What to measure.')
flags.DEFINE_bool('tiny', False, 'Toy sizes: a rehearsal.')
flags.DEFINE_string('out', None, 'JSON file for the figures.')


def children() -> dict[str, Any]:
  """LoRA by loop, and experts of as many columns."""
  parent = load('smollm2-135m')
  arranged = dict(prelude=8, loops=2, coda=8, init='average')
  lora, _ = to_recursive(parent, rank=64, **arranged)
  mixed = Experts(4, **dict.fromkeys(LINEAR_AXES, 32))
  experts, _ = to_recursive(parent, relax=(mixed,), **arranged)
  return {'lora': lora, 'experts': experts}


def bank() -> dict[str, Any]:
  """Milliseconds of an MLP, and of one with a bank."""
  D, F, L = (32, 64, 256) if FLAGS.tiny else (576, 1536, 1024)
  shape = dict(vocab_size=8, d_model=D, d_ff=F, num_heads=2, num_kv_heads=1, head_dim=16)
  plain = ModelConfig('llama', block_layers=1, loops=2, **shape)
  mixed = ModelConfig('llama', block_layers=1, loops=2, relax=(Bank(positions=(0,)),), **shape)
  params = init_params(mixed, jax.random.key(0))['block']
  mlp = jax.tree.map(lambda leaf: leaf[0], params.pop('layers')['mlp'])
  params['bank_prior'] = jnp.asarray([[[10.0, 0.0], [0.0, 10.0]]])
  x = jax.random.normal(jax.random.key(1), (1, L, D))
  random = {
    'bank_router': jax.random.normal(jax.random.key(2), params['bank_router'].shape),
    'bank_prior': jnp.zeros_like(params['bank_prior']),
  }
  pools = {'own loop': {'bank': params}, 'random': {'bank': params | random}}

  @jax.jit
  def dense(x):
    return Mlp(plain, looped=True).apply({'params': mlp}, x, Place(1, 0))

  @jax.jit
  def chosen(x, pools):
    return Mlp(mixed, looped=True).apply({'params': mlp}, x, Place(1, 0), pools)

  one = 1e3 * common.best(lambda: dense(x))
  figures: dict[str, Any] = {'mlp_ms': one}
  for name, pool in pools.items():
    took = 1e3 * common.best(lambda pool=pool: chosen(x, pool))
    figures[name] = {'ms': took, 'ratio': took / one}
  return figures


def main(_) -> None:
  """Measures and prints."""
  compared = lambda make: turns.compare(make, children(), FLAGS.repeats)
  parts = {
    'train': lambda: compared(turns.train_step),
    'decode': lambda: compared(turns.decoding),
    'bank': bank,
  }
  figures = {}
  for name in FLAGS.parts:
    figures[name] = parts[name]()
    print(f'{name}: {json.dumps(figures[name])}', flush=True)
  figures |= common.machine(2)
  if FLAGS.out:
    Path(FLAGS.out).write_text(json.dumps(figures, indent=1) + '\n')
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
