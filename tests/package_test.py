"""Imports: quick, and the core without any optional library."""

import subprocess
import sys

OPTIONAL = (
  'grain',
  'array_record',
  'ml_collections',
  'tensorboardX',
  'pyarrow',
  'zstandard',
  'gguf',
  'huggingface_hub',
  'jinja2',
  'lm_eval',
  'datasets',
  'matplotlib',
  'gensim',
  'torch',
  'transformers',
  'threadpoolctl',
)
CORE = (
  'rrt.config',
  'rrt.models.transformer',
  'rrt.models.count',
  'rrt.train.losses',
  'rrt.train.step',
  'rrt.train.optim',
  'rrt.train.checkpoint',
  'rrt.sharding',
  'rrt.infer.generate',
  'rrt.convert.recursive',
  'rrt.checkpoints.save_hf',
  'rrt.evals.perplexity',
  'rrt.checkpoints.load',
)


def python(code: str) -> str:
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout.strip()


def test_core_imports_without_optional_libraries():
  block = f'import sys\nfor m in {OPTIONAL}: sys.modules[m] = None\n'
  python(block + '\n'.join(f'import {m}' for m in CORE))


def test_importing_rrt_loads_nothing_else():
  loaded = python(
    'import sys, rrt\n'
    'print([m for m in sys.modules if m.split(".")[0] in '
    f'{(*OPTIONAL, "jax", "flax", "orbax", "optax")}])'
  )
  assert loaded == '[]'


def test_every_public_name_exists():
  import rrt

  for name in rrt.__all__:
    assert getattr(rrt, name) is not None
