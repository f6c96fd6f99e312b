"""Sparse memory fine-tuning: which slots of a memory layer a new text is written into.

A slot's score is how much of the new text's reads it has, times how rare it is in other text
(TF-IDF; Lin et al., arXiv 2510.15103). The slots of highest score are trained; all else stays as
it is, bit for bit.

N slots.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from rrt import console
from rrt.config import ModelConfig
from rrt.convert.calibration_data import calibration_text, split_rows
from rrt.errors import InputError
from rrt.model import LanguageModel
from rrt.models.relaxed import AUX
from rrt.models.transformer import Transformer
from rrt.relax.base import Aux


@dataclasses.dataclass(frozen=True)
class SlotChoice:
  """Which slots `train_only='memory'` trains.

  Attributes:
    top: so many of each pool.
    tokens: of the new text, from its start, whose reads are counted; and as many of the
      background.
    background: text in which the slots are to be rare; '' for the text of the installation.
  """

  top: int = 500
  tokens: int = 16384
  background: str = ''

  def __post_init__(self):
    for name in ('top', 'tokens'):
      if getattr(self, name) < 1:
        raise InputError(f'slots.{name}={getattr(self, name)}: must be 1 or more.')


def usage(config: ModelConfig, params: Any, tokens_BxL) -> dict[str, np.ndarray]:
  """Reads of each slot, by kind and row of tokens: float32 [B, N]."""

  @jax.jit
  def one(tokens_1xL):
    model: Any = Transformer(config)
    _, sown = model.apply({'params': params}, tokens_1xL, mutable=[AUX])
    found: dict[str, Any] = {}
    is_aux = lambda x: isinstance(x, Aux)
    for path, aux in jax.tree_util.tree_flatten_with_path(sown[AUX], is_leaf=is_aux)[0]:
      kind = [k.key for k in path if hasattr(k, 'key')][-1]
      if 'usage' in aux.stats:
        reads = aux.stats['usage'].reshape(-1, aux.stats['usage'].shape[-1]).sum(0)
        found[kind] = found.get(kind, 0.0) + reads
    return found

  rows = [jax.device_get(one(row[None])) for row in tokens_BxL]
  return {kind: np.stack([row[kind] for row in rows]) for kind in rows[0]}


def tf_idf(new_BxN: np.ndarray, background_BxN: np.ndarray) -> np.ndarray:
  """The score of each slot, float64 [N].

  Args:
    new_BxN: reads by rows of the new text.
    background_BxN: by rows of the background, which are its documents.
  """
  reads_N = new_BxN.sum(0, dtype=np.float64)
  rows = len(background_BxN)
  with_N = (background_BxN > 0).sum(0)
  return reads_N / max(reads_N.sum(), 1e-30) * np.log((rows + 1) / (with_N + 1))


def choose(child: LanguageModel, choice: SlotChoice, new_BxL, background_BxL):
  """The trained slots by kind of relaxation: bool [N] each.

  Slots that the new text does not read are not chosen: fewer than `top` are if it reads fewer.

  Raises:
    InputError: the model has no memory layer.
  """
  if not any(r.pooled for r in child.config.relax):
    raise InputError(
      "train_only='memory': the model has no memory layer; convert one with --memory."
    )
  on_device = jax.tree.map(jnp.asarray, child.params)
  new = usage(child.config, on_device, new_BxL)
  background = usage(child.config, on_device, background_BxL)
  found = {}
  for kind, new_BxN in new.items():
    score_N = tf_idf(new_BxN, background[kind])
    best = np.argsort(-score_N, kind='stable')[: choice.top]
    found[kind] = np.zeros(score_N.shape, bool)
    found[kind][best[new_BxN.sum(0)[best] > 0]] = True
  return found


def stored(path: Path | None, compute) -> dict[str, np.ndarray]:
  """The slots that a run has chosen: read from its directory, or computed and written there."""
  if path is not None and path.is_file():
    with np.load(path) as kept:
      return dict(kept)
  found = compute()
  for kind, chosen_N in found.items():
    console.note(f'{kind}: {int(chosen_N.sum())} of {len(chosen_N)} slots are trained')
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix('.tmp')
    with open(new, 'wb') as file:
      np.savez(file, **found)
    os.replace(new, path)
  return found


def row_masks(config: ModelConfig, chosen: dict[str, np.ndarray], params: Any):
  """The trained rows of each table, by its path: bool [N, 1]."""
  flat = traverse_util.flatten_dict(params, sep='/')
  masks: dict[str, np.ndarray] = {}
  for kind, chosen_N in chosen.items():
    relaxation = next(r for r in config.relax if r.kind == kind)
    masks |= {f'block/{name}': chosen_N[:, None] for name in relaxation.rates}
  return {path: mask for path, mask in masks.items() if path in flat}


def trained_rows(recipe: Any, child: LanguageModel, batches: Any, place: Any):
  """`row_masks` of a run that trains memory alone; `batches` are left where they were.

  Args:
    recipe: with its `slots`.
    child: the model.
    batches: the training text.
    place: the run's `Workdir`, or None.

  Raises:
    InputError: the model has no memory layer, the background cannot be read, or there are
      several processes.
  """
  choice = recipe.slots
  if jax.process_count() > 1:
    raise InputError(
      f"train_only='memory': is for runs in one process, and there are {jax.process_count()}."
    )

  def compute():
    start, rows, tokens = batches.get_state(), [], 0
    while tokens < choice.tokens and (batch := next(batches, None)) is not None:
      rows.append(batch['tokens'])
      tokens += batch['tokens'].size
    batches.set_state(start)
    text = calibration_text(choice.background or None, choice.tokens, recipe.data.field)
    background_BxL, _ = split_rows(
      text,
      child.tokenizer,
      tokens=choice.tokens,
      length=recipe.length,
      vocab_size=child.config.vocab_size,
    )
    return choose(child, choice, np.concatenate(rows), background_BxL)

  if place is None:
    return row_masks(child.config, stored(None, compute), child.params)
  place.fetch('slots.npz')
  kept = place.files / 'slots.npz'
  begun = place.checkpoints.is_dir() and any(p.name.isdigit() for p in place.checkpoints.iterdir())
  if not begun:  # Until a checkpoint is there, the settings may change.
    kept.unlink(missing_ok=True)
  chosen = stored(kept, compute)
  place.publish('slots.npz')
  return row_masks(child.config, chosen, child.params)
