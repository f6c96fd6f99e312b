"""What the benchmarks share: both models, clocks, huge pages, results.

Ours and Hugging Face's run the same weights in one process, taking turns, so
that both see the same machine; each repeat times every contender once.
"""

from collections.abc import Callable
import contextlib
import importlib
import json
import os
from pathlib import Path
import platform
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from rrt.checkpoints import load as checkpoints
from rrt.checkpoints.save_hf import save_hf
from rrt.models.untie import to_untied


def load(source: str, threads: int):
  """Our model, and Hugging Face's of the same weights: loader by dtype."""
  import torch
  import transformers

  torch.set_num_threads(threads)
  transformers.logging.set_verbosity_error()
  model = checkpoints.load(source)
  directory = tempfile.TemporaryDirectory()
  with contextlib.redirect_stdout(None):
    save_hf(to_untied(model), Path(directory.name) / 'hf')

  def peer(dtype: str, attention: str = 'sdpa'):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
      Path(directory.name) / 'hf', dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    loaded.generation_config.eos_token_id = None  # Write on to the end.
    loaded.generation_config.pad_token_id = 0
    return loaded

  peer.directory = directory  # Lives as long as the loader.
  return model, peer


def prompts(vocab: int, batch: int, length: int) -> np.ndarray:
  """Random ids: time does not depend on them."""
  ids = np.random.default_rng(0).integers(5, vocab, (batch, length))
  return ids.astype(np.int32)


def take_turns(contenders: dict, repeats: int, settle: bool = False) -> dict[str, list[float]]:
  """Seconds of each contender in each repeat, after one untimed round.

  Every second round goes backwards, so that a machine that grows slower or
  faster favours none. With `settle` each turn begins with a run that is not
  timed: it finds the memory again that the one before gave back to the system.
  """
  for run in contenders.values():
    run()
  seconds: dict[str, list[float]] = {name: [] for name in contenders}
  for repeat in range(repeats):
    turns = list(contenders.items())
    for name, run in turns[::-1] if repeat % 2 else turns:
      if settle:
        run()
      began = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - began)
  return seconds


def summary(seconds: list[float], tokens: int) -> dict[str, float]:
  """Median and quartiles of the seconds, all of them, and tokens a second."""
  low, middle, high = statistics.quantiles(seconds, n=4, method='inclusive')
  return {
    'seconds': middle,
    'seconds_iqr': high - low,
    'seconds_best': min(seconds),
    'seconds_each': seconds,
    'tokens_per_second': tokens / middle,
  }


def machine(threads: int) -> dict:
  """What the figures were measured on, and with which versions."""
  import jax

  peers = {}
  for package in ('torch', 'transformers'):
    with contextlib.suppress(ImportError):
      peers[package] = importlib.import_module(package).__version__
  name, told = platform.processor() or platform.machine(), ''
  with contextlib.suppress(OSError):
    told = Path('/proc/cpuinfo').read_text()
    for line in told.splitlines():
      if line.startswith('model name'):
        name = line.split(':', 1)[1].strip()
        break
  return {
    'device': str(jax.devices()[0].device_kind),
    'cpu': name,
    'avx512': 'avx512f' in told,
    'amx': 'amx_bf16' in told,
    'cores': os.cpu_count(),
    'threads': threads,
    'load_before': os.getloadavg()[0],
    'jax': jax.__version__,
    **peers,
    'python': platform.python_version(),
  }


def save(out: str, figures: dict) -> None:
  """Writes the figures as JSON."""
  path = Path(out)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(figures, indent=1, default=float) + '\n')


def best(run: Callable[[], Any], repeats: int = 5) -> float:
  """The least seconds of some runs, after one that is not timed."""
  import jax

  jax.block_until_ready(run())
  found = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(run())
    found.append(time.perf_counter() - begin)
  return min(found)
