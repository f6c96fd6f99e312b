r"""Weights in 16, 8 and 4 bits: nats, bytes, tokens a second.

Three models of two sizes (the parent, a child with layers deleted, a recursive child
of about as many parameters), each with its weights as they are, rounded after the
conversion, and rounded while it is fitted.

COMMAND
  python -m experiments.quantized --calibration=wiki.jsonl.xz --text=other_wiki.jsonl.xz \
      --out=runs/quantized
  A run that is started again goes on where it was.

HARDWARE
  Two CPU cores, 10 GiB; about 3 minutes a fitted row.

RESULT
  docs/results/quantized.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags
import numpy as np

import experiments.equal_parameters  # noqa: F401  For its flags.
from experiments.measured import decode_speed
from rrt import command, console
from rrt.checkpoints.load import load
from rrt.convert.calibration_data import calibration_text
from rrt.convert.plan import ConvertConfig
from rrt.convert.recursive import to_recursive
from rrt.errors import InputError
from rrt.evals import perplexity
from rrt.model import LanguageModel
from rrt.models.count import count_params
from rrt.models.params import cast
from rrt.models.quantized import quantize
from rrt.tree import flatten

FLAGS = flags.FLAGS
_TOKENS = flags.DEFINE_integer('tokens', 16384, 'Of --text.')
_KINDS = flags.DEFINE_list('kinds', ['int8', 'int4', 'nf4'], 'Of weights.')

MODELS = {
  'parent': ConvertConfig(loops=1),
  'layers 15-18 deleted and refitted': ConvertConfig(loops=1, drop='15-18', refit='around'),
  '8 + 7 x 2 + 8, rank 64': ConvertConfig(prelude=8, loops=2, coda=8, rank=64),
}


def nats(model: LanguageModel) -> float:
  """Cross-entropy of --text, rows of 512."""
  text = perplexity.read_text(FLAGS.text, _TOKENS.value)
  return perplexity.score(model, text, context=512, batch=2, max_tokens=_TOKENS.value).nll_nats


def size(model: LanguageModel) -> int:
  """Bytes of the weights."""
  return sum(leaf.nbytes for leaf in flatten(model.params).values())


def in_bfloat16(model: LanguageModel) -> LanguageModel:
  """The same model with its matrices rounded to bfloat16."""
  params = cast(model.params, 'bfloat16')
  params = {k: _host(v) for k, v in params.items()}
  return LanguageModel(model.config, params, model.tokenizer, model.meta)


def _host(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {k: _host(v) for k, v in tree.items()}
  return np.asarray(tree)


def main(_) -> None:
  """Makes and measures the rows that table.json does not have yet."""
  for name in ('calibration', 'text', 'out'):
    if not FLAGS[name].value:
      raise InputError(f'--{name} is needed; see --help.')
  path = Path(FLAGS.out) / 'table.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  table: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
  parent = load(FLAGS.parent)
  text = calibration_text(FLAGS.calibration, ConvertConfig().calibration_tokens)

  def convert(name: str, weights: str) -> LanguageModel:
    settings = MODELS[name].replace(weights=weights)
    if name == 'parent' and weights == 'float':
      return parent
    return to_recursive(parent, settings, calibration=text)[0]

  for name in MODELS:
    whole = None
    for kind in ('float32', 'bfloat16', *_KINDS.value):
      for way in ('',) if 'float' in kind else ('rounded after', 'fitted to the rounded'):
        row = table.setdefault(f'{name} | {kind} | {way}', {})
        fitted = way.startswith('fitted')  # As fast as what is rounded after.
        timed = not FLAGS.speed or fitted or 'tokens_per_second_1' in row
        if 'nats' in row and timed:
          continue
        if whole is None:
          whole = convert(name, 'float')
        made = whole
        if kind == 'bfloat16':
          made = in_bfloat16(whole)
        elif way == 'rounded after':
          made = quantize(whole, kind)
        elif way:
          made = convert(name, kind)
        row |= {'parameters': count_params(made.config).unique, 'bytes': size(made)}
        if 'nats' not in row:
          row['nats'] = nats(made)
        if FLAGS.speed and not fitted:
          row['tokens_per_second_1'] = decode_speed(made, 1)
        path.write_text(json.dumps(table, indent=1) + '\n')
        print(name, kind, way, row, flush=True)
  console.table(
    [
      [*key.split(' | '), f'{r["bytes"] / 1e6:,.1f}', r['nats'], r.get('tokens_per_second_1')]
      for key, r in table.items()
    ],
    ['', 'weights', 'way', 'MB', 'nats', 'tokens/s'],
  )
  console.finish(table)


if __name__ == '__main__':
  command.run(main)
