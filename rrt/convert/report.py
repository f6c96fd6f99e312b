"""The report of a conversion: parameters, quality, share kept, cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt import console
from rrt.config import ModelConfig
from rrt.convert.drop import in_words
from rrt.evals import perplexity
from rrt.model import LanguageModel
from rrt.model import count_arrays as count_leaves
from rrt.models import lm_head, transformer
from rrt.models.count import ParamCount, count_params
from rrt.relax.ranks import LOW_RANK, ranks_of
from rrt.relax.trees import padding


@dataclasses.dataclass
class Report:
  """Figures of one conversion.

  Attributes:
    shape: prelude + block x loops + coda, in words.
    dropped: the parent's layers that the child leaves out.
    init: how the shared weights were found.
    ranks: component -> rank of its low-rank term, 'a/b/...' by loop, or
      'smallest-largest'.
    relaxations: all of them, in words.
    parent_params: the parent's counts, closed form.
    params: the child's counts, closed form.
    params_counted: unique parameters in the child's arrays, without the
      padding of rank tables; equals `params.unique`.
    nll_parent_nats: cross-entropy of the parent on text held out from the
      calibration, nats a token; None without calibration text.
    nll_child_nats: the child's.
    held_out_tokens: how many tokens were scored.
    calibration_tokens: how many the weights were fitted on; 0 for none.
    kept: component -> share of the residual's energy that the ranks keep,
      [loops][layers]: of the weights, or with `calibrated` of what they do
      to their inputs.
    drift: `||child - parent||^2 / ||parent||^2` of the residual stream on
      the calibration text after each depth from the block on; only with
      `calibrated`.
    exact: whether the child can only compute what the parent does.
    considered: with `ConvertConfig.params`, the children that were considered, the
      nearest to the parent first: name, unique parameters, layers run, nats.
    identity_error: where the child must compute what the parent does: the
      largest difference of a logit.
    seconds: of the whole conversion.
    peak_memory_bytes: of the process on the host.
  """

  shape: str
  init: str
  ranks: dict[str, Any]
  relaxations: str
  parent_params: ParamCount
  params: ParamCount
  params_counted: int = 0
  nll_parent_nats: float | None = None
  nll_child_nats: float | None = None
  held_out_tokens: int = 0
  calibration_tokens: int = 0
  dropped: list[int] = dataclasses.field(default_factory=list)
  kept: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
  drift: list[float] = dataclasses.field(default_factory=list)
  exact: bool = False
  considered: list[list[Any]] = dataclasses.field(default_factory=list)
  identity_error: float | None = None
  seconds: float = 0.0
  peak_memory_bytes: int = 0

  def to_json(self) -> dict[str, Any]:
    """Plain dicts, lists and numbers."""
    fields = dataclasses.asdict(self)
    for name in ('parent_params', 'params'):
      fields[name] = getattr(self, name)._asdict()
    return fields

  def _without(self) -> str:
    return f' without the layers {in_words(self.dropped)}' if self.dropped else ''

  def show(self) -> None:
    """Prints the report as tables."""
    counts = [('parent', self.parent_params), ('child', self.params)]
    console.table(
      [
        [who, c.unique, c.unique_non_embedding, c.total, c.total_non_embedding] for who, c in counts
      ],
      ['', 'unique', 'without embeddings', 'total', 'without embeddings'],
    )
    equal = 'equals' if self.params_counted == self.params.unique else 'IS NOT'
    print(
      f'{self.shape}{self._without()}, {self.init}, {self.relaxations}\n'
      f'unique parameters counted: {self.params_counted:,}, which {equal} the '
      'closed form\n'
    )
    if self.considered:
      console.table(
        self.considered, ['considered', 'unique parameters', 'layers run', 'nats a token']
      )
    if self.kept:
      console.table(
        [
          [name, self.ranks[name], *(float(np.mean(row)) for row in table)]
          for name, table in self.kept.items()
        ],
        [
          'residual kept',
          'rank',
          *(f'loop {r + 1}' for r in range(len(next(iter(self.kept.values()))))),
        ],
      )
    rows = []
    if self.nll_parent_nats is not None:
      rows += [
        ['parent, nats a token', f'{self.nll_parent_nats:.4f}'],
        ['child, nats a token', f'{self.nll_child_nats:.4f}'],
        ['held-out tokens', f'{self.held_out_tokens:,}'],
      ]
    if self.calibration_tokens:
      rows.append(['calibration tokens', f'{self.calibration_tokens:,}'])
    if self.identity_error is not None:
      rows.append(['identity error, largest logit', f'{self.identity_error:.2e}'])
    rows += [
      ['seconds', f'{self.seconds:.1f}'],
      ['peak memory', f'{self.peak_memory_bytes / 2**30:.2f} GiB'],
    ]
    console.table(rows, ['', ''])


def start_report(parent: ModelConfig, child: ModelConfig, init: str) -> Report:
  """What is known before any weight is."""
  c = child
  shape = f'{c.block_layers} x {c.loops}'
  if c.prelude_layers or c.coda_layers:
    shape = f'{c.prelude_layers} + {shape} + {c.coda_layers}'
  return Report(
    shape=f'{shape} layers in {c.order} order',
    init=init,
    ranks=_ranks(child),
    relaxations=_in_words(child),
    parent_params=count_params(parent),
    params=count_params(child),
  )


def remade(
  report: Report, parent: ModelConfig, child: LanguageModel, init: str, **changes: Any
) -> Report:
  """The report of a child as that of another one that was made of it."""
  new = start_report(parent, child.config, init)
  return dataclasses.replace(
    report,
    shape=new.shape,
    ranks=new.ranks,
    relaxations=new.relaxations,
    params=new.params,
    params_counted=count_arrays(child.config, child.params),
    **changes,
  )


def _ranks(config: ModelConfig) -> dict[str, Any]:
  ranks: dict[str, Any] = {}
  for name, table_RxN in ranks_of(config).items():
    low, high = int(table_RxN.min()), int(table_RxN.max())
    if low == high:
      ranks[name] = low
    elif (table_RxN == table_RxN[:, :1]).all():
      ranks[name] = '/'.join(map(str, table_RxN[:, 0]))
    else:
      ranks[name] = f'{low}-{high}'
  return ranks


def _in_words(config: ModelConfig) -> str:
  """The relaxations of a child: 'low rank 64, gain' or 'no relaxation'."""
  ranks = _ranks(config)
  values, words = set(ranks.values()), []
  if len(values) > 1:
    words.append('low ranks ' + ', '.join(f'{k} {v}' for k, v in ranks.items()))
  elif values != {0}:
    words.append(f'low rank {values.pop()}')
  words += [r.kind for r in config.relax if not isinstance(r, LOW_RANK)]
  return ', '.join(words) or 'no relaxation'


def count_arrays(config: ModelConfig, params: Any) -> int:
  """Unique parameters in a tree, without the padding of relaxations."""
  return count_leaves(params) - padding(config)


def cross_entropy(model: LanguageModel, rows_BxL: np.ndarray) -> float:
  """Nats a token, each row read alone."""
  return perplexity.score(
    model, rows_BxL.reshape(-1).tolist(), context=rows_BxL.shape[1], batch=2
  ).nll_nats


def identity_error(parent: LanguageModel, child: LanguageModel, tokens_BxL: np.ndarray) -> float:
  """Largest absolute difference between two models' logits."""

  def run(model):
    params = jax.tree.map(jnp.asarray, model.params)
    hidden = transformer.forward(model.config, params, tokens_BxL).hidden_BxLxD
    return np.asarray(lm_head.logits(model.config, params, hidden))

  return float(np.abs(run(parent) - run(child)).max())
