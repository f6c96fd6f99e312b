"""Speed of training and decoding, for the tables of experiments."""

from __future__ import annotations

import dataclasses
import statistics
import time

from benchmarks import turns
from rrt.infer.generate import Generator
from rrt.infer.sampling import SamplingParams
from rrt.model import LanguageModel


def train_speed(model: LanguageModel, steps: int = 3) -> float:
  """Tokens a second of the median training step of 1,024 tokens, without a parent's pass."""
  step = turns.train_step(model)
  step()  # Compiles.
  took = []
  for _ in range(steps):
    begin = time.perf_counter()
    step()
    took.append(time.perf_counter() - begin)
  return 1024 / statistics.median(took)


def decode_speed(model: LanguageModel, rows: int) -> float:
  """Tokens a second of greedy decoding: `rows` sequences, 32 + 64 tokens."""
  generator = Generator(model)
  params = SamplingParams(max_new_tokens=64, ignore_eos=True)
  prompts = [list(range(5 + i, 37 + i)) for i in range(rows)]
  generator.complete(prompts, params)
  before = dataclasses.replace(generator.clock)
  generator.complete(prompts, params)
  seconds = generator.clock.decode_seconds - before.decode_seconds
  return (generator.clock.decode_tokens - before.decode_tokens) / seconds
