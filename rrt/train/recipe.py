"""The configuration of a training run: typed, documented and checked.

`config()` is the same as an ml_collections config, all fields at their
defaults. A file of `experiments/` changes some, the command line overrides
others, and `Recipe.from_dict` turns them into these frozen dataclasses, so that
no untyped value is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import math
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rrt.convert.plan import ConvertConfig
from rrt.data.pipeline import DataSpec
from rrt.data.sources import FORMATS, Source
from rrt.errors import InputError
from rrt.models.adapter import parse as parse_adapter
from rrt.train.exit_losses import ExitObjective
from rrt.train.losses import Objective
from rrt.train.optim import Optimizer
from rrt.train.profile import parse as parse_profile
from rrt.train.recipe_fields import unknown_field
from rrt.train.slots import SlotChoice

DTYPES = ('float32', 'bfloat16')
REMAT = ('none', 'dots', 'full')
GATHER = ('once', 'loop')


@dataclasses.dataclass(frozen=True)
class Data:
  """What is read.

  Attributes:
    path: files, directories, globs, 'builtin:train' or hf:// names, separated
      by commas.
    weights: each path's share of the text; () for as they come.
    field: of JSON lines and parquet: which holds the text, or in chats the messages.
    format: 'text', or 'chat': conversations through the tokenizer's template, with the
      loss on the answers alone.
    epochs: passes over the text; None repeats it for ever.
    shuffle: documents in random order.
  """

  path: str = 'builtin:train'
  weights: tuple[float, ...] = ()
  field: str = 'text'
  format: str = 'text'
  epochs: int | None = None
  shuffle: bool = True

  def __post_init__(self):
    if self.format not in FORMATS:
      raise InputError(f'data.format={self.format!r}: must be one of {FORMATS}.')

  def spec(self, rows: Any = None) -> DataSpec:
    """The same for `rrt.data.pipeline`; `rows` from Python take the place of `path`."""
    if rows is not None:
      source = Source('data', None, self.field, format=self.format, rows=rows)
      return DataSpec((source,), self.epochs, self.shuffle)
    for weight in self.weights:
      if not isinstance(weight, (int, float)) or isinstance(weight, bool):
        raise InputError(f'data.weights={self.weights!r}: must be numbers, one a path.')
    paths = [p.strip() for p in self.path.split(',') if p.strip()]
    weights = self.weights or (None,) * len(paths)
    if len(weights) != len(paths):
      raise InputError(
        f'data.weights={self.weights}: needs one number for each of the {len(paths)} paths.'
      )
    return DataSpec(
      tuple(
        Source(p, w, self.field, format=self.format) for p, w in zip(paths, weights, strict=True)
      ),
      self.epochs,
      self.shuffle,
    )


@dataclasses.dataclass(frozen=True)
class Heldout:
  """Cross-entropy on text that is not trained on, while training.

  Attributes:
    path: the text; '' for none.
    format: 'text', or 'chat': see `data.format`.
    every: steps between evaluations; 0 for the first and last step only.
    max_tokens: how much of it, from its start.
    context: tokens of a row; the default shrinks to what the model can take.
    batch: rows at a time; 0 for as many as a train step has.
  """

  path: str = ''
  format: str = 'text'
  every: int = 0
  max_tokens: int = 8192
  context: int = 1024
  batch: int = 0

  def __post_init__(self):
    for field, least in (('every', 0), ('max_tokens', 2), ('context', 2), ('batch', 0)):
      if getattr(self, field) < least:
        raise InputError(f'heldout.{field}={getattr(self, field)}: must be {least} or more.')
    if self.format not in FORMATS:
      raise InputError(f'heldout.format={self.format!r}: must be one of {FORMATS}.')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A training run.

  Attributes:
    parent: what `rrt.load` takes: the model to convert and to distil from.
    child: a converted model to train; '' converts the parent.
    convert: how.
    adapter: words of a task adapter that the child gets, such as 'rank=8,by_loop=true'
      (`rrt.relax.Adapter`): it alone is trained. '' for none.
    steps: batches.
    batch: rows of a step, over all devices.
    length: tokens of a row.
    accumulate: microbatches that a step is cut into.
    dtype: of the computation, 'float32' or 'bfloat16'; weights and moments
      are float32.
    remat: what the backward pass recomputes: 'none', 'dots' (all but matrix
      products) or 'full'.
    loss: the losses.
    teacher_cache: directory that keeps the parent's predictions for later runs on the
      same rows (`rrt.train.teacher_cache`); '' runs the parent in every step.
    exits: losses of the loops before the last, so that tokens can leave.
    optimizer: the optimizer.
    train_only: 'memory' for sparse memory fine-tuning: of memory layers the slots of `slots`
      alone are trained; '' for what the optimizer's `train` says.
    slots: which these are.
    data: training text.
    heldout: text to measure on.
    mesh: devices on the axes data, fsdp, expert (of banks of MLPs) and tensor; -1 once for the
      rest.
    gather: over fsdp the block's weights are gathered 'once' a step, and every device holds
      the whole block (of its tensor shard) in `dtype` meanwhile; or in every 'loop', layer
      by layer, as the layers outside the block are.
    seed: of everything random.
    log_every: steps between rows of metrics.
    checkpoint_every: steps between checkpoints.
    keep: newest checkpoints that are kept.
    local_checkpoints: a second directory, on a faster disk, for one checkpoint that is saved
      more often; a run resumes from the newer of both. '' for none.
    local_every: steps between those.
    max_skipped: so many non-finite steps in a row end the run.
    watchdog: seconds after which a step, evaluation or checkpoint that has not ended is named
      and the process ends with status 75; 0 waits for ever.
    profile: first and last step of a window for jax's profiler, '10:15'; '' for none.
    tensorboard: write event files besides metrics.jsonl.
    wandb: the Weights & Biases project to log to; '' for none.
  """

  parent: str = 'smollm2-135m'
  child: str = ''
  convert: ConvertConfig = dataclasses.field(default_factory=ConvertConfig)
  adapter: str = ''
  steps: int = 100
  batch: int = 2
  length: int = 512
  accumulate: int = 1
  dtype: str = 'float32'
  remat: str = 'dots'
  loss: Objective = dataclasses.field(default_factory=Objective)
  teacher_cache: str = ''
  exits: ExitObjective = dataclasses.field(default_factory=ExitObjective)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  train_only: str = ''
  slots: SlotChoice = dataclasses.field(default_factory=SlotChoice)
  data: Data = dataclasses.field(default_factory=Data)
  heldout: Heldout = dataclasses.field(default_factory=Heldout)
  mesh: Mapping[str, int] = dataclasses.field(
    default_factory=lambda: {'data': -1, 'fsdp': 1, 'expert': 1, 'tensor': 1}
  )
  gather: str = 'once'
  seed: int = 0
  log_every: int = 1
  checkpoint_every: int = 100
  keep: int = 2
  local_checkpoints: str = ''
  local_every: int = 10
  max_skipped: int = 10
  watchdog: float = 0.0
  profile: str = ''
  tensorboard: bool = False
  wandb: str = ''

  # A run may go on with other values of these; all others make it another.
  FREE = (
    'mesh',
    'gather',
    'log_every',
    'checkpoint_every',
    'keep',
    'local_checkpoints',
    'local_every',
    'max_skipped',
    'watchdog',
    'profile',
    'tensorboard',
    'wandb',
    'heldout',
    'teacher_cache',
  )

  def __post_init__(self):
    def need(ok, field, why):
      if not ok:
        raise InputError(f'{field}={getattr(self, field)!r}: {why}.')

    if self.adapter:
      parse_adapter(self.adapter)
      if self.optimizer.train == 'all':
        only = dataclasses.replace(self.optimizer, train='adapter')
        object.__setattr__(self, 'optimizer', only)
    need(self.train_only in ('', 'memory'), 'train_only', "must be 'memory', or ''")
    if self.train_only and self.optimizer.train == 'all':
      only = dataclasses.replace(self.optimizer, train='tables')
      object.__setattr__(self, 'optimizer', only)
    for field in (
      'steps',
      'batch',
      'length',
      'accumulate',
      'log_every',
      'checkpoint_every',
      'keep',
      'local_every',
      'max_skipped',
    ):
      need(getattr(self, field) > 0, field, 'must be above 0')
    need(0 <= self.seed < 2**32, 'seed', 'must lie in 0 to 2^32 - 1')
    need(self.dtype in DTYPES, 'dtype', f'must be one of {DTYPES}')
    need(self.remat in REMAT, 'remat', f'must be one of {REMAT}')
    need(self.gather in GATHER, 'gather', f'must be one of {GATHER}')
    need(self.batch % self.accumulate == 0, 'accumulate', f'must divide batch={self.batch}')
    need(0 <= self.watchdog < math.inf, 'watchdog', 'must be 0 or more seconds')
    parse_profile(self.profile)
    sizes = list(self.mesh.values())
    if not all(isinstance(n, int) for n in sizes):
      raise InputError(f'mesh={dict(self.mesh)!r}: must be numbers of devices by axis.')
    if self.optimizer.warmup_steps > self.steps:
      raise InputError(
        f'optimizer.warmup_steps={self.optimizer.warmup_steps}: is longer '
        f'than the run, steps={self.steps}; give a smaller one too.'
      )

  def is_due(self, step: int, every: int) -> bool:
    """Whether something done every so many steps (0: at the end) is due."""
    return step == self.steps or bool(every and step % every == 0)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
    """A recipe from nested dicts; absent fields take their defaults.

    Raises:
      InputError: a field is unknown or of a wrong type or value.
    """
    return _build(cls, fields, '')

  def to_dict(self) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers, for json."""
    return json.loads(json.dumps(dataclasses.asdict(self)))


def config():
  """All fields at their defaults, as a locked ml_collections.ConfigDict.

  Raises:
    InputError: ml_collections is not installed.
  """
  config_dict, _ = require_ml_collections()

  def of(cls):
    fields = {}
    for field in dataclasses.fields(cls):
      kind = get_type_hints(cls)[field.name]
      if dataclasses.is_dataclass(kind):
        fields[field.name] = of(kind)
      elif field.default is None:
        base = next(t for t in get_args(kind) if t is not type(None))
        fields[field.name] = config_dict.placeholder(base)
      elif callable(field.default_factory):
        fields[field.name] = config_dict.create(**field.default_factory())
      else:
        fields[field.name] = field.default
    return config_dict.create(**fields)

  return of(Recipe).lock()


def require_ml_collections():
  """(config_dict, config_flags).

  Raises:
    InputError: ml_collections is not installed.
  """
  try:
    from ml_collections import config_dict, config_flags
  except ImportError as e:
    raise InputError(
      'configs need ml_collections: pip install "relaxed-recursive-transformers[train]"'
    ) from e
  return config_dict, config_flags


def _build(cls, fields: Mapping[str, Any], prefix: str):
  types = get_type_hints(cls)
  known = [f.name for f in dataclasses.fields(cls)]
  values = {}
  for name, value in fields.items():
    if name not in known:
      raise InputError(f'config.{prefix}{name}: {unknown_field(Recipe, prefix + name)}')
    if dataclasses.is_dataclass(types[name]):
      if not isinstance(value, Mapping):
        raise InputError(f'config.{prefix}{name}={value!r}: must be a dict.')
      values[name] = _build(types[name], value, f'{prefix}{name}.')
    else:
      values[name] = _cast(types[name], value, f'{prefix}{name}')
  return cls(**values)


def _cast(kind, value, name: str):
  """The value as its field's type; whole floats pass for ints.

  Of a union the first type that fits is taken.
  """
  kinds = [k for k in get_args(kind) if k is not type(None)] if _is_union(kind) else [kind]
  if value is None and len(kinds) < len(get_args(kind)):
    return None
  for one in kinds:
    fits, found = _as(get_origin(one) or one, value)
    if fits:
      return found
  words = ' or '.join(_WORDS.get(get_origin(k) or k, str(k)) for k in kinds)
  raise InputError(f'config.{name}={value!r}: must be {words}.')


_WORDS = {int: 'int', float: 'float', str: 'str', bool: 'bool', tuple: 'a tuple', Mapping: 'a dict'}


def _is_union(kind) -> bool:
  return get_origin(kind) in (UnionType, Union)


def _as(kind, value) -> tuple[bool, Any]:
  """Whether a value is of a type, and the value as that type."""
  if kind is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  if kind in (int, float):
    number = Integral if kind is int else Real
    fits = isinstance(value, number) and not isinstance(value, bool)
    return fits, kind(value) if fits else None
  if kind in (str, bool):
    return isinstance(value, kind), value
  if kind is tuple:
    fits = hasattr(value, '__iter__') and not isinstance(value, (str, bytes, Mapping))
    return fits, tuple(tuple(v) if isinstance(v, list) else v for v in value) if fits else None
  return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else None
