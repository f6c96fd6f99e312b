"""A tiny parent, its child, a tokenizer and a text, for runs of seconds."""

import dataclasses
import functools
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rrt.checkpoints.load import save
from rrt.config import ModelConfig
from rrt.data.tokenizer import Tokenizer
from rrt.model import LanguageModel
from rrt.models.init import init_params
from rrt.relax.lora import Lora
from rrt.relax.trees import mask_all

PARENT = ModelConfig(
  family='llama',
  vocab_size=264,
  d_model=16,
  d_ff=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  block_layers=6,
  max_context=32,
  tie_embeddings=True,
)
CHILD = PARENT.with_recursion(
  prelude=1,
  block=2,
  loops=2,
  coda=1,
  loop_norms=True,
  # One rank table: its padding must stay zero.
  relax=(Lora(q=2, k=2, v=2, o=2, gate=((1, 3), (2, 0)), up=2, down=2),),
)


@functools.cache
def tokenizer(add_bos: bool = False) -> Tokenizer:
  """One token a byte, and an end of text, which may begin texts as well."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {'<|endoftext|>': 0}
  vocab |= {letter: i + 1 for i, letter in enumerate(alphabet)}
  core = tokenizers.Tokenizer(models.BPE(vocab, []))
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens(['<|endoftext|>'])
  return Tokenizer(core, eos_ids=[0], bos_id=0, add_bos=add_bos)


def other_tokenizer() -> Tokenizer:
  """One with as many tokens, which have other ids."""
  core = json.loads(tokenizer()._core.to_str())
  vocab = core['model']['vocab']
  vocab['a'], vocab['b'] = vocab['b'], vocab['a']
  return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(core)), eos_ids=[0])


def model(config: ModelConfig, seed: int) -> LanguageModel:
  """Random weights, the norms and LoRA too."""
  params = init_params(config, jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  leaves = [np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
  params = mask_all(config, jax.tree.unflatten(tree, leaves))
  params = jax.tree.map(np.asarray, params)
  return LanguageModel(config, params, tokenizer(), {'name': 'tiny'})


@functools.cache
def parent() -> LanguageModel:
  return model(PARENT, 0)


@functools.cache
def child() -> LanguageModel:
  """The child, its embedding and outer layers the parent's own."""
  random, old = model(CHILD, 1), parent().params
  block = lambda a, b: jax.tree.map(lambda x: x[a:b], old['block'])
  params = random.params | {
    'embed': old['embed'],
    'prelude': block(0, 1),
    'coda': block(5, 6),
    'final_norm': old['final_norm'],
  }
  return dataclasses.replace(random, params=params)


def write_text(path, documents: int = 60) -> str:
  """Numbered sentences, a document a line of JSON; the path as a string."""
  words = 'the sea is wide and the old ship sails on to a far green shore'
  words = words.split()
  rng = np.random.default_rng(0)
  with open(path, 'w') as f:
    for i in range(documents):
      text = ' '.join(rng.choice(words, size=rng.integers(3, 20)))
      f.write(json.dumps({'text': f'{i} {text}.'}) + '\n')
  return str(path)


def recipe(text: str, **fields):
  """Six short steps."""
  return {
    'steps': 6,
    'batch': 8,
    'length': 16,
    'data': {'path': text},
    'loss': {'chunk_tokens': 32},
    'optimizer': {'learning_rate': 3e-3, 'warmup_steps': 2},
    'mesh': {'data': -1},
    'checkpoint_every': 2,
    **fields,
  }


CONFIG = """
from rrt.train.recipe import config

def get_config():
  c = config()
  c.parent, c.child = {parent!r}, {child!r}
  c.steps, c.batch, c.length = 12, 8, 16
  c.data.path = {text!r}
  c.loss.chunk_tokens = 64
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-3, 2
  c.checkpoint_every = 3
  return c
"""


def write_experiment(folder: Path) -> Path:
  """A config file, and the models and the text that it names."""
  save(parent(), folder / 'parent')
  save(child(), folder / 'child')
  text = write_text(folder / 'text.jsonl')
  file = folder / 'experiment.py'
  file.write_text(
    CONFIG.format(parent=str(folder / 'parent'), child=str(folder / 'child'), text=text)
  )
  return file


def start(file: Path, workdir: Path, *flags: str, devices: int = 1):
  """The command line as a process of its own."""
  return subprocess.Popen(
    [sys.executable, '-m', 'rrt.train', f'--config={file}', f'--workdir={workdir}', *flags],
    cwd=Path(__file__).parent.parent,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, status: int = 0) -> tuple[str, str]:
  """Waits; (stdout, stderr) of a process that must end with `status`."""
  out, err = process.communicate(timeout=600)
  assert process.returncode == status, out[-1000:] + err[-3000:]
  return out, err


def losses(workdir: Path) -> list[tuple[int, float]]:
  """(step, loss) of a run's metrics."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [(r['step'], r['train/loss']) for r in rows if 'train/loss' in r]
