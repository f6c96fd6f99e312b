"""Nothing large is whole on every device: parameters, moments, of any model on any mesh."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType
import pytest

from rrt import sharding
from rrt.config import ModelConfig
from rrt.models.init import init_params
from rrt.relax.adapter import Adapter
from rrt.relax.gain import Gain
from rrt.relax.lora import Lora
from rrt.train import optim
from rrt.train import step as step_lib
from rrt.train.losses import Objective

MOST = 1 << 20  # Bytes that may be on every device of fsdp.
RANKS = lambda r: Lora(**dict.fromkeys(('q', 'k', 'v', 'o', 'gate', 'up', 'down'), r))


def shape(heads, groups, size, **fields):
  return ModelConfig(
    num_heads=heads, num_kv_heads=groups, head_dim=size, max_context=4096, **fields
  )


TINYLLAMA = shape(
  *(32, 4, 64), family='llama', vocab_size=32000, d_model=2048, d_ff=5632, block_layers=22
)
GEMMA_2B = shape(
  *(8, 1, 256), family='gemma', vocab_size=256000, d_model=2048, d_ff=16384, block_layers=18
)
LLAMA_8B = shape(
  *(32, 8, 128), family='llama', vocab_size=128256, d_model=4096, d_ff=14336, block_layers=32
)
BIASES = dataclasses.replace(LLAMA_8B, biases=('q', 'k', 'v', 'o', 'gate', 'up', 'down'))
GEMMA3_27B = shape(
  *(32, 16, 128),
  family='gemma3',
  vocab_size=262144,
  d_model=5376,
  d_ff=21504,
  block_layers=62,
  qk_norm=True,
  post_norms=True,
)
CONFIGS = {
  'tinyllama 11x2, rank 256': (TINYLLAMA, 11, 2, (RANKS(256),)),
  'gemma 9x2, rank 64': (GEMMA_2B, 9, 2, (RANKS(64),)),
  '8B 16x2, rank 512': (LLAMA_8B, 16, 2, (RANKS(512),)),
  '8B 16x2, gains': (LLAMA_8B, 16, 2, (Gain('all', 0.0), RANKS(8))),
  '8B 16x2, biases, adapter': (BIASES, 16, 2, (Adapter(64, components='all'),)),
  '27B 31x2, rank 128': (GEMMA3_27B, 31, 2, (RANKS(128), Gain())),
}
MESHES = [
  {'fsdp': 16},
  {'data': 2, 'fsdp': 8},
  {'fsdp': 8, 'tensor': 2},
  {'data': 2, 'fsdp': 4, 'tensor': 4},
]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', MESHES, ids=str)
@pytest.mark.parametrize('name', CONFIGS)
def test_what_is_whole_on_every_device_of_fsdp(name, sizes):
  parent, block, loops, relax = CONFIGS[name]
  config = parent.with_recursion(
    prelude=0, block=block, loops=loops, coda=0, loop_norms=True, relax=relax
  )
  if config.num_kv_heads % sizes.get('tensor', 1):
    pytest.skip('a tensor axis that no group can be split over')
  axes = sharding.AXES
  shape = tuple(sizes.get(axis, 1) for axis in axes)
  mesh = AbstractMesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  o = optim.Optimizer()
  trained = step_lib.trained_paths(optim.trainable(o, params))
  weights, _ = step_lib.split(params, trained)
  spec = step_lib.Step(config, Objective(), optim.make_optimizer(o, weights, 10), trained)
  state = step_lib.abstract_state(spec, mesh)
  whole = []
  for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
    on_fsdp = any(axis == 'fsdp' for part in x.sharding.spec for axis in _axes(part))
    size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    if size > MOST and not on_fsdp:
      whole.append((jax.tree_util.keystr(path), x.shape, size))
  assert not whole
  # Moments are two, beside the parameters.
  sizes_of = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  assert sizes_of(state.opt_state) >= 2 * sizes_of(state.params)


def _axes(part):
  return part if isinstance(part, tuple) else (part,)
