"""Cross-entropy on held-out text during a run, on the run's mesh."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np

from rrt.config import ModelConfig
from rrt.data import pipeline
from rrt.data.sources import Source
from rrt.data.stream import DataSpec
from rrt.errors import InputError
from rrt.ops.mesh_axes import row_count
from rrt.sharding import row_groups
from rrt.train.exit_losses import ExitObjective
from rrt.train.losses import Objective
from rrt.train.placement import to_mesh
from rrt.train.recipe import Heldout, Recipe
from rrt.train.step import Step, batch_losses


def open_heldout(recipe: Recipe, spec: Step, tokenizer, mesh) -> Callable[[Any], float] | None:
  """Reads the text and returns a function of the parameters.

  Returns:
    A function of the parameters, in nats a token; None without a text.

  Raises:
    InputError: see `read_heldout`.
  """
  if not recipe.heldout.path:
    return None
  batches = read_heldout(recipe, spec.config, tokenizer, mesh)
  count = float(sum(b['weights'].sum() for b in batches))
  plain = dataclasses.replace(
    spec,
    teacher_config=None,
    exits=ExitObjective(),
    objective=Objective(distillation=0.0, chunk_tokens=recipe.loss.chunk_tokens),
  )
  nats = jax.jit(lambda p, b: batch_losses(plain, p, {}, b, 1.0).sums.cross_entropy)

  def mean(params) -> float:
    total = sum(float(nats(params, to_mesh(_own(b, mesh), mesh))) for b in batches)
    return total / count

  return mean


def read_heldout(recipe: Recipe, config: ModelConfig, tokenizer, mesh) -> list[pipeline.Batch]:
  """The held-out text as batches of all processes' rows; see `pipeline.batches`.

  A text is cut into rows of `context` tokens; the first token of a row (the
  begin-of-sequence token, if the model has one) is not predicted, and a last
  partial row is dropped. Conversations are packed as in training.

  Raises:
    InputError: the text is unreadable or too short, or its rows do not fit
      the model or the mesh.
  """
  h = recipe.heldout
  longest = config.max_context
  context = h.context
  if context == Heldout.context:
    # The default is as much of it as the model can take.
    context = min(context, longest)
  if not 1 < context <= longest:
    raise InputError(
      f'heldout.context={context}: must lie in 2 to {longest}, the longest '
      'that the model was made for.'
    )
  B = h.batch or recipe.batch
  split = row_count(mesh.shape)
  if B % split:
    raise InputError(
      f'heldout.batch={B}: must be a multiple of {split}, the devices on the axes data, fsdp and expert.'
    )
  if h.format == 'chat':
    return _conversations(recipe, config, tokenizer, B, context)
  tokens = pipeline.read_tokens(h.path, tokenizer, h.max_tokens)
  if len(tokens) and max(tokens) >= config.vocab_size:
    raise InputError(
      f'heldout.path={h.path!r}: has the token {max(tokens)}, outside the '
      f'vocabulary of {config.vocab_size}; take special tokens out of it.'
    )
  if len(tokens) < 2:
    raise InputError(f'heldout.path={h.path!r}: holds less than two tokens.')
  start = getattr(tokenizer, 'start_id', None)
  tokens_NxL = pipeline.rows(tokens, context, start)
  return [_batch(tokens_NxL[i : i + B], B) for i in range(0, len(tokens_NxL), B)]


def _conversations(
  recipe: Recipe, config: ModelConfig, tokenizer, B: int, context: int
) -> list[pipeline.Batch]:
  """Batches of conversations, until `max_tokens` tokens of answers are in them."""
  source = Source(recipe.heldout.path, field=recipe.data.field, format='chat')
  spec = DataSpec((source,), epochs=1, shuffle=False)
  found, count = [], 0.0
  reader = pipeline.batches(
    spec, tokenizer, batch=B, length=context, prefetch=0, vocab_size=config.vocab_size
  )
  for batch in reader:
    found.append(batch)
    count += batch['weights'].sum()
    if count >= recipe.heldout.max_tokens:
      break
  if not count:
    raise InputError(f'heldout.path={source.path!r}: no answer of it has a token to predict.')
  return found


def _batch(tokens_BxL: np.ndarray, rows: int) -> dict[str, np.ndarray]:
  """A batch, padded with rows of weight 0."""
  B, L = tokens_BxL.shape
  tokens_BxL = np.pad(tokens_BxL, ((0, rows - B), (0, 0))).astype(np.int32)
  weights_BxL = np.zeros((rows, L), np.float32)
  weights_BxL[:B, :-1] = 1
  return {
    'tokens': tokens_BxL,
    'targets': np.roll(tokens_BxL, -1, 1),
    'weights': weights_BxL,
    'segment_ids': np.ones((rows, L), np.int32),
    'positions': np.tile(np.arange(L, dtype=np.int32), (rows, 1)),
  }


def _own(batch: pipeline.Batch, mesh) -> pipeline.Batch:
  """The rows of this process."""
  rows = len(batch['tokens'])
  part, parts = row_groups(mesh, rows)
  own = slice(part * rows // parts, (part + 1) * rows // parts)
  return {k: v[own] for k, v in batch.items()}
