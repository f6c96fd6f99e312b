"""Prepares a run: loads models and text, and checks all that can be checked.

Errors that would surface later are raised here, before a conversion of minutes
or a training of days.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import os
from pathlib import Path
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from rrt import console, sharding
from rrt.checkpoints import native
from rrt.checkpoints.load import check_save, load, save
from rrt.config import ModelConfig
from rrt.convert.plan import plan, with_relaxations
from rrt.data import pipeline
from rrt.errors import InputError
from rrt.files import check_writable
from rrt.model import LanguageModel
from rrt.models.adapter import parse, with_adapter
from rrt.models.init import abstract_params
from rrt.train import checkpoint as checkpoint_lib
from rrt.train import metrics as metrics_lib
from rrt.train import optim, tensorboard, wandb
from rrt.train import step as step_lib
from rrt.train.heldout import read_heldout
from rrt.train.recipe import Recipe
from rrt.train.workdir import Workdir


def check(recipe: Recipe, parent: ModelConfig | None, child: ModelConfig, mesh) -> None:
  """Raises InputError for what cannot work, before any work is done."""
  if recipe.loss.distillation and parent is None:
    raise InputError(
      'loss.distillation is above 0, but there is no parent to learn from; '
      'give one, or set it to 0.'
    )
  if recipe.exits.coefficients != 'none' and (child.loops < 2 or child.order != 'cycle'):
    raise InputError(
      f'exits.coefficients={recipe.exits.coefficients!r}: the child has '
      f'loops={child.loops} in the {child.order} order; tokens can leave a '
      'block of two loops or more, in the cycle order.'
    )
  for name, config in (('child', child), ('parent', parent or child)):
    if recipe.length > config.max_context:
      raise InputError(
        f'length={recipe.length}: the {name} was made for at most '
        f'{config.max_context} tokens; give a length up to that.'
      )
    sharding.check_mesh(config, mesh, recipe.batch // recipe.accumulate)
    if config.vocab_size != child.vocab_size:
      raise InputError(
        f'The parent has vocab_size={config.vocab_size}, the child '
        f'{child.vocab_size}: a child learns from a parent with its own '
        'vocabulary.'
      )
  if recipe.teacher_cache:
    if jax.process_count() > 1:
      raise InputError(
        f'teacher_cache={recipe.teacher_cache!r}: is for runs in one process; leave it out in '
        f'{jax.process_count()} processes.'
      )
    try:
      check_writable(recipe.teacher_cache)
    except InputError as e:
      raise InputError(f'teacher_cache={recipe.teacher_cache!r}: {e}') from e
  if recipe.loss.top_k > child.vocab_size:
    raise InputError(
      f'loss.top_k={recipe.loss.top_k}: the vocabulary has {child.vocab_size} tokens.'
    )
  if recipe.loss.hidden and parent and parent.d_model != child.d_model:
    raise InputError(
      f'loss.hidden={recipe.loss.hidden}: the parent has d_model={parent.d_model}, the child '
      f'{child.d_model}: their hidden states cannot be compared.'
    )
  sharding.row_groups(mesh, recipe.batch)


def make_step(
  recipe: Recipe, config: ModelConfig, params, rows: Mapping[str, Any] | None = None
) -> step_lib.Step:
  """The train step of a recipe, without a teacher.

  Args:
    recipe: the settings.
    config: the child.
    params: its parameters, arrays or shapes.
    rows: see `optim.make_optimizer`.

  Raises:
    InputError: a pattern of the optimizer that is in no path.
  """
  o = recipe.optimizer
  trained = step_lib.trained_paths(optim.trainable(o, params))
  weights, _ = step_lib.split(params, trained)
  return step_lib.Step(
    config=config,
    objective=recipe.loss,
    optimizer=optim.make_optimizer(o, weights, recipe.steps, rows),
    trained=trained,
    clip=o.clip,
    accumulate=recipe.accumulate,
    dtype=jnp.dtype(recipe.dtype),
    remat=recipe.remat,
    exits=recipe.exits,
    gather=recipe.gather,
  )


def open_data(
  recipe: Recipe, tokenizer, vocab_size: int, mesh, rows: Any = None
) -> pipeline.Batches:
  """The training batches: of each, the rows of this process.

  Args:
    recipe: the settings.
    tokenizer: the child's.
    vocab_size: of the child.
    mesh: whose sharding says which rows are this process's.
    rows: texts or rows from Python, instead of `data.path`.

  Raises:
    InputError: the text cannot be read, or there is no tokenizer to read it.
  """
  if tokenizer is None:
    raise InputError('The model has no tokenizer, so no text can be read.')
  part, parts = sharding.row_groups(mesh, recipe.batch)
  return pipeline.batches(
    recipe.data.spec(rows),
    tokenizer,
    batch=recipe.batch // parts,
    length=recipe.length,
    seed=recipe.seed,
    process_index=part,
    process_count=parts,
    vocab_size=vocab_size,
  )


def next_batch(data: pipeline.Batches, recipe: Recipe) -> pipeline.Batch | None:
  """The next batch; None when the text is used up for all processes.

  A process whose rows end before the others' goes on with empty ones.
  """
  batch = next(data, None)
  if recipe.data.epochs and jax.process_count() > 1:
    ended = multihost_utils.process_allgather(np.array(batch is None))
    if batch is None and not ended.all():
      return data.empty()
  return batch


def check_all(recipe: Recipe, parent: LanguageModel, mesh) -> None:
  """Raises InputError for what would fail after a conversion of the parent."""
  shape = planned(recipe, parent.config)
  check(recipe, parent.config, shape, mesh)
  params = abstract_params(shape)
  trained = step_lib.trained_paths(optim.trainable(recipe.optimizer, params))
  weights, _ = step_lib.split(params, trained)
  optim.make_optimizer(recipe.optimizer, weights, recipe.steps)
  open_data(recipe, parent.tokenizer, shape.vocab_size, mesh).close()
  if recipe.heldout.path:
    read_heldout(recipe, shape, parent.tokenizer, mesh)
  if recipe.tensorboard:
    tensorboard.require()
  if recipe.wandb:
    wandb.require()


def prepare(recipe: Recipe, workdir: str | Path | Workdir) -> tuple[LanguageModel, LanguageModel]:
  """The parent, and the child that a run starts from.

  The child is kept in the work directory's child/: a run that continues must not depend
  on a conversion's last bits.

  Raises:
    InputError: anything that would fail later, as far as can be checked now.
  """
  mesh = sharding.make_mesh(recipe.mesh)
  recipe.data.spec()
  if recipe.local_checkpoints:  # Here, where all processes are: it takes part of each.
    checkpoint_lib.check_seen_by_all(Path(recipe.local_checkpoints))
  place = Workdir.of(workdir)
  workdir, checkpoints = place.files, place.checkpoints
  first = jax.process_index() == 0
  place.fetch('config.json', *(('metrics.jsonl', 'child') if first else ()))
  settings = workdir / 'config.json'
  begun = checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())
  origin = ('parent', 'child', 'convert', 'adapter')
  config, same = recipe.to_dict(), False
  if settings.is_file():
    saved = _read_settings(settings)
    if begun:
      checkpoint_lib.check_same(workdir, saved, config, Recipe.FREE)
    same = all(saved.get(k, '') == config[k] for k in (*origin, 'seed'))

  # One of several processes reads its own shards alone.
  lazy = jax.process_count() > 1
  parent = load(recipe.parent, lazy=lazy)
  kept = workdir / 'child'
  if first:
    if not (same and kept.is_dir()):
      if recipe.child:
        child = load(recipe.child, lazy=lazy)
      else:
        check_all(recipe, parent, mesh)
        child = convert(recipe, load(recipe.parent) if lazy else parent)
      if recipe.adapter:
        child = with_adapter(child, recipe.adapter, recipe.seed)
      check(recipe, parent.config, child.config, mesh)
      shutil.rmtree(kept, ignore_errors=True)
      save(child, kept)
      place.publish('child')
    # Also where the child is there: until a checkpoint is, the rest may change.
    _write_json(
      settings,
      {
        'config': config,
        'versions': checkpoint_lib.versions(),
        'revision': metrics_lib.revision(Path(__file__).parent),
        'devices': [str(d.device_kind) for d in jax.devices()],
      },
    )
    place.publish('config.json')
  if lazy:
    multihost_utils.sync_global_devices('child')
    if not first:
      place.fetch('child')
  return parent, load(kept, lazy=lazy)


def convert(recipe: Recipe, parent: LanguageModel) -> LanguageModel:
  """The parent as the recipe's recursive child, with a report on stdout."""
  # Here, so that training a converted child needs no converter.
  from rrt.convert.calibration_data import calibration_text
  from rrt.convert.recursive import to_recursive

  text = calibration_text(
    recipe.convert.calibration or 'builtin:train',
    recipe.convert.calibration_tokens,
    recipe.data.field,
  )
  bar = console.Progress(parent.config.depth, 'convert', 'layers')
  with bar:
    child, report = to_recursive(
      parent, recipe.convert, calibration=text, seed=recipe.seed, progress=bar.to
    )
  report.show()
  return child


def planned(recipe: Recipe, parent: ModelConfig) -> ModelConfig:
  """The child's shape as the recipe asks for it.

  A budget's ranks are only known when it is spent: here they are all 1.

  Raises:
    InputError: no such child can be made of the parent.
  """
  config = plan(parent, recipe.convert)
  if recipe.convert.budget:
    config = with_relaxations(config, recipe.convert, 1)
  if recipe.adapter:
    config = dataclasses.replace(config, relax=(parse(recipe.adapter), *config.relax))
  return config


def check_workdir(workdir: Path) -> None:
  """Raises InputError for a directory that holds something else than a run."""
  try:
    foreign = 'model_type' in json.loads((workdir / 'config.json').read_text())
  except (OSError, ValueError, TypeError):
    foreign = False
  if foreign or native.is_native(workdir):
    raise InputError(
      f'--workdir={workdir}: holds a model; choose a new directory, and name '
      'the model in config.child or config.parent.'
    )
  check_save(workdir / 'model')


def _read_settings(path: Path) -> dict[str, Any]:
  """The configuration that a work directory was started with."""
  try:
    saved = json.loads(path.read_text())['config']
    if isinstance(saved, dict):
      return saved
  except (ValueError, KeyError, TypeError):
    pass
  raise InputError(
    f"{path} is damaged: it does not hold a run's settings; remove it, and "
    'the same command writes it anew, or give another --workdir.'
  )


def _write_json(path: Path, value: dict[str, Any]) -> None:
  new = path.with_suffix('.tmp')
  new.write_text(json.dumps(value, indent=1) + '\n')
  os.replace(new, path)
