"""The demo's part about early exits: a gate, and the engine three ways."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from rrt import console
from rrt.evals import depth, every_loop, gating, perplexity
from rrt.exits import gate as gate_lib
from rrt.infer.engine.engine import Engine, Request
from rrt.model import LanguageModel


def leave_early(
  model: LanguageModel,
  rows: list[list[int]],
  heldout: str,
  *,
  loss: float,
  context: int,
  max_tokens: int,
):
  """Fits a gate and measures early exits on held-out text.

  Args:
    model: trained with losses after all loops.
    rows: of unseen text, to fit and calibrate the gate.
    heldout: other text, to evaluate on.
    loss: target of the gate, in nats a token.
    context: row length of the evaluation, in tokens.
    max_tokens: of the evaluation.
  """
  shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
  gate, _ = gating.fit_gate(model, rows, loss=loss, shares=shares)
  rows = perplexity.make_rows(model, heldout, context, max_tokens)
  static = every_loop.read_static(model, rows, gate.arrays)
  held = depth.measure(model, static, 'learned', gate.threshold, gate.arrays)
  first = depth.measure(model, static, 'change', -2.0)
  gated = dataclasses.replace(model, meta=gate_lib.store(model.meta, gate))
  return gated, {'held': held, 'first': first, 'exit_loss': loss, 'loops': model.config.loops}


def serve(model: LanguageModel, heldout: str, context: int, new: int) -> dict[str, dict]:
  """Decodes eight sequences in each mode of the engine, without compilation time."""
  size = max(min(context // 32, 16), 2)
  new = min(new, model.config.max_context - size)
  rows = perplexity.make_rows(model, heldout, 2 * size, 16 * size)
  prompts = [row[:size] for row in rows[:8]]
  ways: dict[str, dict[str, Any]] = {}
  each: dict[str, dict[str, Any]] = {
    'full depth': {},
    'exits': {'gate': 'stored'},
    'lossless': {'lossless': True},
  }
  for name, options in each.items():
    engine = Engine(model, slots=8, context=size + new, **options)

    def write(engine=engine):
      return engine.run([Request.of(p, new, ignore_eos=True) for p in prompts])

    write()
    began = time.monotonic()
    done = write()
    took = time.monotonic() - began
    tokens = [r.tokens for r in done]
    loops = [n for r in done for n in r.loops]
    full = ways.get('full depth', {'tokens': tokens})['tokens']
    say = lambda ids: model.tokenizer.decode(ids) if model.tokenizer else str(ids)
    ways[name] = {
      'tokens': tokens,
      'tokens_per_second': len(loops) / took,
      'loops': sum(loops) / len(loops),
      'same': sum(a == b for a, b in zip(tokens, full, strict=True)),
      'pieces': [[(say([t]), n) for t, n in zip(r.tokens, r.loops, strict=True)] for r in done],
      'prompts': [say(p) for p in prompts],
    }
  return ways


def show_exits(exits: dict, ways: dict) -> None:
  """Prints cost and speed of early exits."""
  held, first = exits['held'], exits['first']
  print(
    f'All tokens leave after loop 1: {first.lost_nats:+.3f} nats a token, '
    f'{100 * first.agreement:.0f} % as at full depth.\n'
    f'The gate: {held.mean_loops:.2f} loops a token, {held.lost_nats:+.3f} '
    f'nats, {100 * held.agreement:.0f} % as at full depth.\n'
  )
  console.table(
    [(name, w['tokens_per_second'], w['loops'], f'{w["same"]} of 8') for name, w in ways.items()],
    ('engine, 8 texts', 'tokens/s', 'loops a token', 'as full depth'),
  )
  print(
    'With eight texts every launch is bound by reading weights, and the layers outside of\n'
    'the block are read as often with exits as without: exits do not pay here. They do\n'
    'with one text, or many and a large block (docs/results/serving.md).\n'
  )


def figures_of_exits(exits: dict, ways: dict) -> dict[str, Any]:
  """The figures of early exits and engine for the last line."""
  return {
    'nats_first_loop': exits['first'].nll_nats,
    'exits': exits['held'].plain(),
    'engine': {
      name: {k: w[k] for k in ('tokens_per_second', 'loops', 'same')} for name, w in ways.items()
    },
  }
