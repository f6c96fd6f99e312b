"""Speed of decoding, for the tables of experiments."""

from __future__ import annotations

import dataclasses

from rrt.infer.generate import Generator
from rrt.infer.sampling import SamplingParams
from rrt.model import LanguageModel


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
