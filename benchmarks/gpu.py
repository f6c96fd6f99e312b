r"""What an accelerator makes of our programs: one command, few minutes, random weights.

    python -m benchmarks.gpu --minutes=9 --out=benchmarks/results/gpu.json

Parts run one after the other, each in a process of its own, so that one that fails or runs
out of memory says so in its line and leaves the others alone. After each the figures are
written, and what the time does not allow is named. It needs the repository and its packages:
weights are random at the shapes of SmolLM2-135M (8 + 7 x 2 + 8, rank 64) and TinyLlama 1.1B
(11 x 2, rank 256). Peers are measured where they are installed: transformers with torch.compile
and SDPA, and vLLM. `--tiny` runs all parts at toy size, on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from absl import flags

from benchmarks.common import best
from rrt import command, console
from rrt.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_float('minutes', 9.0, 'For all parts together.')
flags.DEFINE_list('parts', None, 'Names of parts; all by default.')
flags.DEFINE_bool('tiny', False, 'Toy sizes: a rehearsal.')
flags.DEFINE_string('out', 'benchmarks/results/gpu.json', 'JSON file.')
flags.DEFINE_string('one', None, 'Runs this part here and prints its figures as the last line.')

# Name of a shape -> fields of the vanilla model, and of its arrangement.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, int], int]] = {
  '135M': (
    dict(vocab_size=49152, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3, head_dim=64)
    | dict(block_layers=30, tie_embeddings=True),
    dict(prelude=8, block=7, loops=2, coda=8),
    64,
  ),
  '1B': (
    dict(vocab_size=32000, d_model=2048, d_ff=5632, num_heads=32, num_kv_heads=4, head_dim=64)
    | dict(block_layers=22, tie_embeddings=False),
    dict(prelude=0, block=11, loops=2, coda=0),
    256,
  ),
}
TINY = dict(vocab_size=256, d_model=64, d_ff=128, num_heads=4, num_kv_heads=2, head_dim=16)


def model(name: str, recursive: bool = True):
  """A model of random bfloat16 weights at one of `SHAPES`."""
  import jax

  from rrt.config import ModelConfig
  from rrt.model import LanguageModel
  from rrt.models.init import init_params
  from rrt.relax.lora import Lora

  fields, shape, rank = SHAPES[name]
  if FLAGS.tiny:
    fields, rank = fields | TINY | {'block_layers': 4}, 4
    shape = dict(prelude=1, block=1, loops=2, coda=1)
  config = ModelConfig(family='llama', max_context=2048, **fields)
  if recursive:
    ranks = dict.fromkeys(('q', 'k', 'v', 'o', 'gate', 'up', 'down'), rank)
    config = config.with_recursion(**shape, loop_norms=True, relax=(Lora(**ranks),))
  params = init_params(config, jax.random.key(0), 'bfloat16')
  return LanguageModel(config, jax.device_get(params), None, {'name': name})


def dtype() -> str:
  """Of computations; CPUs are slow in bfloat16."""
  return 'float32' if FLAGS.tiny else 'bfloat16'


def roof() -> dict[str, Any]:
  """What the device does at most: products in bfloat16, bytes read."""
  import jax

  from benchmarks.roofline import Roof
  from rrt.train.metrics import peak_of

  found = Roof.measure(dtype())
  peak = peak_of(jax.devices()[0].device_kind)
  return {
    'tflops': found.flops / 1e12,
    'gigabytes_per_second': found.bandwidth / 1e9,
    'data_sheet_tflops': peak and peak / 1e12,
  }


def kernel(name: str) -> dict[str, Any]:
  """One of `benchmarks.kernels`."""
  from benchmarks import kernels

  return getattr(kernels, name)(FLAGS.tiny)


def train(name: str) -> dict[str, Any]:
  """A step of uptraining with its teacher; of the parent's shape, ours and torch's."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from rrt import sharding
  from rrt.train import optim, placement
  from rrt.train import step as step_lib
  from rrt.train.losses import Objective
  from rrt.train.metrics import memory_bytes, peak_flops, step_flops
  from rrt.train.teacher import with_teacher

  rows, length = (2, 128) if FLAGS.tiny else (8, 1024)
  parent, child = model(name, recursive=False), model(name)
  tokens = np.random.default_rng(0).integers(5, parent.config.vocab_size, (rows, length))
  batch = {
    'tokens': tokens.astype(np.int32),
    'targets': np.roll(tokens, -1, 1).astype(np.int32),
    'weights': np.ones((rows, length), np.float32),
    'segment_ids': np.ones((rows, length), np.int32),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }
  mesh = sharding.make_mesh({'data': 1} if jax.device_count() == 1 else None)
  figures: dict[str, Any] = {'rows': rows, 'length': length}
  for title, trained, teacher in (('uptraining', child, parent), ('parent', parent, None)):
    o = optim.Optimizer()
    paths = step_lib.trained_paths(optim.trainable(o, trained.params))
    weights, _ = step_lib.split(trained.params, paths)
    spec = step_lib.Step(
      trained.config,
      Objective(distillation=1.0 if teacher else 0.0, chunk_tokens=rows * length // 4),
      optim.make_optimizer(o, weights, 100),
      paths,
      dtype=jnp.dtype(dtype()),
      remat='dots',
    )
    spec, own = with_teacher(spec, teacher, trained, mesh)
    held = [step_lib.init_state(spec, trained.params, mesh)]
    where = jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(spec, mesh))
    step = step_lib.jit_step(spec, mesh, where)
    placed = placement.to_mesh(batch, mesh)

    def run(held=held, step=step, own=own, placed=placed):
      with jax.set_mesh(mesh):
        held[0], metrics = step(held[0], own, placed)
      return metrics['loss']

    begin = time.perf_counter()
    run().block_until_ready()
    first = time.perf_counter() - begin
    seconds = best(run)
    flops = step_flops(trained.config, spec.teacher_config, rows * length, length)
    peak = peak_flops()
    figures[title] = {
      'seconds': seconds,
      'tokens_per_second': rows * length / seconds,
      'tflops': flops / seconds / 1e12,
      'mfu': peak and flops / seconds / peak,
      'first_step_seconds': first,
      'peak_bytes': memory_bytes(),
    }
    del held[0]
  figures['torch'] = attempt(lambda: torch_step(parent.config, tokens))
  if 'seconds' in figures['torch']:
    figures['ratio'] = figures['torch']['seconds'] / figures['parent']['seconds']
  return figures


def torch_model(config):
  """transformers' Llama at a config's shape, random weights in bfloat16, on the device."""
  import torch
  import transformers

  shape = transformers.LlamaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.d_model,
    intermediate_size=config.d_ff,
    num_hidden_layers=config.depth,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    tie_word_embeddings=config.tie_embeddings,
    max_position_embeddings=config.max_context,
  )
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  made = transformers.AutoModelForCausalLM.from_config(
    shape, dtype=torch.bfloat16, attn_implementation='sdpa'
  )
  return made.to(device), device


def torch_step(config, tokens) -> dict[str, Any]:
  """A step of torch.compile and SDPA: bfloat16 computation, float32 weights, fused AdamW."""
  import torch

  peer, device = torch_model(config)
  peer = peer.float().train()
  forward = peer if FLAGS.tiny else torch.compile(peer)
  optimizer = torch.optim.AdamW(peer.parameters(), lr=3e-4, fused=True)
  ids = torch.tensor(tokens, device=device)

  def run():
    with torch.autocast(device, torch.bfloat16):
      loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())

  return {'seconds': best(run), 'device': device}


def generate(name: str) -> dict[str, Any]:
  """Prefill and decoding of the recursive model, and of its parent's shape by the peers."""
  import numpy as np

  from rrt.infer.decode import Decoder

  prompt, new = (16, 8) if FLAGS.tiny else (512, 128)
  child = model(name)
  decoder = Decoder(child.config, child.params, dtype=dtype())
  figures: dict[str, Any] = {'prompt_tokens': prompt, 'new_tokens': new}
  for rows in (1, 2) if FLAGS.tiny else (1, 32):
    ids = np.random.default_rng(0).integers(5, child.config.vocab_size, (rows, prompt))
    for _ in range(2):  # The first compiles.
      before = dataclasses.replace(decoder.clock)
      list(decoder.run(ids.tolist(), [new] * rows))
    spent = lambda field, b=before: getattr(decoder.clock, field) - getattr(b, field)
    figures[f'{rows} rows'] = {
      'prefill_tokens_per_second': spent('prefill_tokens') / spent('prefill_seconds'),
      'decode_tokens_per_second': spent('decode_tokens') / spent('decode_seconds'),
      'transformers': attempt(lambda ids=ids: torch_generate(child.config, ids, new)),
    }
  figures['vllm'] = attempt(lambda: vllm_generate(name, prompt, new))
  return figures


def torch_generate(config, ids, new: int) -> dict[str, Any]:
  """`generate` with a static cache, compiled, of a vanilla model as deep as ours."""
  import torch

  peer, device = torch_model(config)
  peer.generation_config.eos_token_id = None
  peer.generation_config.pad_token_id = 0
  tokens = torch.tensor(ids, device=device)
  settings = dict(do_sample=False, cache_implementation='static', disable_compile=FLAGS.tiny)

  def run(count: int):
    with torch.inference_mode():
      out = peer.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, **settings
      )
    return int(out[0, -1])

  first, whole = best(lambda: run(1), 2), best(lambda: run(new), 2)
  return {
    'prefill_tokens_per_second': tokens.numel() / first,
    'decode_tokens_per_second': len(ids) * (new - 1) / (whole - first) if whole > first else None,
    'device': device,
  }


def vllm_generate(name: str, prompt: int, new: int) -> dict[str, Any]:
  """vLLM on the vanilla model, 64 sequences; where it is installed."""
  import tempfile

  import numpy as np
  import vllm

  from rrt.checkpoints.save_hf import save_hf

  with tempfile.TemporaryDirectory() as directory:
    parent = model(name, recursive=False)
    save_hf(parent, f'{directory}/hf')
    engine = vllm.LLM(f'{directory}/hf', skip_tokenizer_init=True, gpu_memory_utilization=0.5)
    ids = np.random.default_rng(0).integers(5, parent.config.vocab_size, (64, prompt)).tolist()
    settings = vllm.SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False)
    run = lambda: len(engine.generate([{'prompt_token_ids': row} for row in ids], settings))
    return {'tokens_per_second': 64 * new / best(run, 2)}


def engine(name: str) -> dict[str, Any]:
  """Depth-wise batching by slots: tokens a second, the bound, the host's gap a call."""
  import jax
  import numpy as np

  from benchmarks.roofline import Costs, Roof
  from rrt.infer.engine.engine import Engine, Request

  child = model(name)
  prompt, new = (8, 8) if FLAGS.tiny else (64, 64)
  found, costs = Roof.measure(dtype()), Costs.of(child.config)
  figures: dict[str, Any] = {'prompt_tokens': prompt, 'new_tokens': new}
  for slots in (2,) if FLAGS.tiny else (8, 64, 256):
    work = np.random.default_rng(0).integers(5, child.config.vocab_size, (2 * slots, prompt))
    row = {}
    for steps in (8, 32):
      ours = Engine(child, slots=slots, context=prompt + new, dtype=dtype(), steps=steps)
      ask = lambda ours=ours, work=work: len(
        ours.run(Request.of(ids, new, ignore_eos=True) for ids in work.tolist())
      )
      row[steps] = best(ask, 2)
      del ours
      jax.clear_caches()
    tokens = work.shape[0] * new
    bound = found.seconds(costs, child.config.loops, slots)
    # Calls of four times the steps: what a call costs beside them falls to a quarter.
    calls = tokens / slots * child.config.loops / 8
    figures[f'{slots} slots'] = {
      'tokens_per_second': tokens / min(row.values()),
      'tokens_per_second_by_steps': {steps: tokens / s for steps, s in row.items()},
      'share_of_bound': bound * tokens / slots / min(row.values()),
      'gap_milliseconds': 1e3 * max(row[8] - row[32], 0.0) / (0.75 * calls),
    }
  return figures


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
  'roof': roof,
  'attention': lambda: kernel('attention'),
  'train 135M': lambda: train('135M'),
  'train 1B': lambda: train('1B'),
  'engine 135M': lambda: engine('135M'),
  'generate 135M': lambda: generate('135M'),
  'paged attention': lambda: kernel('paged'),
  'grouped': lambda: kernel('grouped'),
  'engine 1B': lambda: engine('1B'),
  'generate 1B': lambda: generate('1B'),
}


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """A peer's figures, or why there are none."""
  try:
    return run()
  except Exception as e:  # Whatever a peer raises, our figures stand.
    return {'not_measured': f'{type(e).__name__}: {e}'.splitlines()[0][:200]}


def process(name: str, seconds: float) -> dict[str, Any]:
  """A part in a process of its own, which may fail or take too long."""
  arguments = [sys.executable, '-m', 'benchmarks.gpu', f'--one={name}', f'--tiny={FLAGS.tiny}']
  # torch takes its share of the memory in the same process.
  env = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  begin = time.monotonic()
  try:
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=seconds)
  except subprocess.TimeoutExpired:
    return {'not_measured': f'took more than its {seconds:.0f} s'}
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {'not_measured': lines[-1][:300] if lines else f'status {done.returncode}'}
  return json.loads(done.stdout.splitlines()[-1]) | {'part_seconds': time.monotonic() - begin}


def main(_) -> None:
  """Runs the parts that the time allows, and writes as it goes."""
  from benchmarks import common

  names = FLAGS.parts or list(PARTS)
  if FLAGS.one:
    print(json.dumps(PARTS[FLAGS.one](), default=float))
    return
  for name in names:
    if name not in PARTS:
      raise InputError(f'--parts names {name!r}; the parts are {", ".join(PARTS)}.')
  end = time.monotonic() + 60 * FLAGS.minutes
  figures: dict[str, Any] = {'tiny': FLAGS.tiny}
  for name in names:
    # No part takes more than a third of the time from the others.
    left = min(end - time.monotonic(), 20 * FLAGS.minutes)
    found = process(name, left) if left > 5 else {'not_measured': 'no time was left'}
    figures[name] = found
    print(f'{name}: {json.dumps(found, default=float)}', flush=True)
    common.save(FLAGS.out, figures)
  figures['machine'] = common.machine(os.cpu_count() or 1)
  common.save(FLAGS.out, figures)
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
