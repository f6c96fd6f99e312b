"""The contract of a relaxation: what a shared layer does differently by loop.

A relaxation is a frozen dataclass in `ModelConfig.relax`. It says where it
sits (its *hosts*), which parameters it adds there and how they change the
host's output. Training, decoding, the engine, conversion, export, counting,
sharding and metrics know relaxations through this class alone.

`docs/dev/add_relaxation.md` walks through adding one.

B batch, L length, D model, I inputs and O outputs of a host, N layers of the
block, R loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from rrt.relax.hosts import Host, hosts_of

# How the engine lays out per-loop factors for rows at several loops.
LAYOUTS = ('auto', 'wide', 'grouped')

Leaves = dict[str, Any]


class Place(NamedTuple):
  """Where in a forward pass a host is.

  Attributes:
    loop: int scalar, or int [B] with one loop a row. Both give a row the same result.
    layer: of the block; an int, or an int scalar where layers are scanned.
    real_BxL: bool, tokens that are no padding; None for all.
    key: for noise in training, the same in all hosts; None for none.
  """

  loop: Any = 0
  layer: Any = 0
  real_BxL: jax.Array | None = None
  key: jax.Array | None = None


class Leaf(NamedTuple):
  """One array of parameters of a relaxation, without the layers axis.

  Attributes:
    shape: with the loops axis first, where the array differs by loop.
    axes: logical axes, as many.
    init: (key, shape, dtype) to initial values. Those of all leaves together
      must leave the host's output as it is.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Callable[..., jax.Array]


class Aux(NamedTuple):
  """What `apply` returns besides the output.

  Attributes:
    losses: name -> float32 scalar, added to the training loss, summed over
      all positions; a coefficient is the relaxation's own to apply.
    stats: name -> array, for the metrics, averaged over all positions.
    routes: name -> array, averaged over the loops of each host and layer, for `balance` and
      `after_step`.
  """

  losses: Mapping[str, jax.Array] = {}
  stats: Mapping[str, jax.Array] = {}
  routes: Mapping[str, Any] = {}


NO_AUX = Aux()


class Fitted(NamedTuple):
  """The closed-form fit of a relaxation at one position.

  Attributes:
    leaves: values of the position, without layers and loops axes.
    merged_IxO: the host's weight with this relaxation merged in, float32.
  """

  leaves: Leaves
  merged_IxO: jax.Array


@dataclasses.dataclass(frozen=True)
class Relaxation:
  """Base class; a subclass is a frozen dataclass of JSON values.

  Class attributes:
    kind: its name in configurations. Names of its leaves are `kind` or begin
      with `kind` and an underscore.
    site: 'linear' (a linear's output), 'mlp' (the MLP's output), 'kv' (keys
      and values before RoPE) or 'block' (the output of a pass through the
      block, CYCLE order only).
    row_independent: whether a row's result does not depend on the other rows
      of its batch. If not, the engine refuses the model.
    unmergeable: why an untied model cannot hold what this computes; '' where
      it can. `to_untied` and `rrt export` refuse with this reason.
    decay: whether weight decay applies; not where zero is not neutral.
    matrices: whether its leaves are matrices in their last two axes, which Muon may
      orthogonalise.
    pooled: whether its leaves are stored once beside the block's layers, for all of
      them; of the site 'mlp' alone.
    of_experts: whether it relaxes linears that a layer has once an expert, by `apply_experts`.
    states: leaves without gradients, which `after_step` changes.
    rates: multipliers of the learning rate for some leaves, where no rule of the
      optimizer's names them.
  """

  kind: ClassVar[str]
  site: ClassVar[str]
  row_independent: ClassVar[bool] = True
  unmergeable: ClassVar[str] = ''
  decay: ClassVar[bool] = True
  matrices: ClassVar[bool] = False
  pooled: ClassVar[bool] = False
  of_experts: ClassVar[bool] = False
  states: ClassVar[tuple[str, ...]] = ()
  rates: ClassVar[Mapping[str, float]] = {}

  @property
  def fits_inputs(self) -> bool:
    """Whether `fit_inputs` does anything."""
    return False

  @property
  def leads(self) -> bool:
    """Whether a conversion puts it in front of the low-rank term."""
    return False

  def closes(self, host: Host) -> bool:
    """Whether the shared weight starts without effect in the loops after the first."""
    return False

  def check(self, hosts: tuple[Host, ...]) -> None:
    """Raises InputError for a field that cannot work on these hosts."""

  def hosts(self, config) -> tuple[Host, ...]:
    """All hosts of its site in a `ModelConfig`."""
    found = hosts_of(config, self.site)
    return tuple(host._replace(path='') for host in found) if self.pooled else found

  def leaves(self, host: Host) -> dict[str, Leaf]:
    """The parameters on a host; {} leaves the host alone."""
    raise NotImplementedError

  def apply(self, params: Leaves, x, y, loop, host: Host):
    """The host's output, relaxed.

    Args:
      params: the leaves of one layer, all loops; laid out by `prepare` or as
        `leaves` describes them.
      x: the host's input, [B, L, I].
      y: its output so far, [B, L, O]; for 'kv' the pair (keys, values), each
        [B, L, G, Dh].
      loop: int scalar, or int [B] with one loop a row. Both give a row the
        same result.
      host: where.

    Returns:
      (y, Aux), y of the same shape and dtype.
    """
    raise NotImplementedError

  def apply_at(self, params: Leaves, x, y, place: Place, host: Host):
    """`apply` with all that is known of the place, for those that need more than the loop.

    Args:
      params: the leaves; of a pooled relaxation, of all layers.
      x, y, host: as for `apply`.
      place: loop, layer, real tokens, a key for noise.
    """
    return self.apply(params, x, y, place.loop, host)

  def apply_experts(self, params: Leaves, x, y, loop, product, host: Host):
    """The outputs of one linear of several experts, relaxed.

    Args:
      params: the leaves of one layer, [E, ...].
      x, y: rows of inputs and of outputs so far, [..., I] and [..., O].
      loop: int scalar, or each row's as one-hot, [..., R].
      product: (rows [..., I], w [E, I, O]) -> each row times the matrix of its own expert.
      host: where.
    """
    raise NotImplementedError

  def apply_hidden(self, params: Leaves, x, h, place: Place, host: Host):
    """The MLP's hidden units h, [B, L, F], relaxed before its down projection; site 'mlp' alone.

    Args:
      params, x, place, host: as for `apply_at`.
      h: of the shared MLP.
    """
    return h

  def replaces_mlp(self, config, tokens: int) -> bool:
    """Whether `apply_mlp` stands for the MLP and this relaxation of it together; site 'mlp' alone.

    Args:
      config: the model's.
      tokens: of the forward pass.
    """
    return False

  def apply_mlp(self, params: Leaves, x, kernels: Leaves, dense, place: Place, host: Host):
    """The relaxed output of the MLP, which need not be computed itself.

    Args:
      params, x, place, host: as for `apply_at`.
      kernels: of the shared MLP, 'gate', 'up' and 'down'.
      dense: (x, place) -> what the MLP with its other relaxations gives.

    Returns:
      (y, Aux), as `apply_at`.
    """
    raise NotImplementedError

  def is_absent(self, host: Host, layer: int) -> bool:
    """Whether it leaves the linears of a block layer alone, in all loops."""
    return not self.leaves(host)

  def adopts(self, name: str, layer: int) -> bool:
    """Whether a conversion leaves the parent's weights of a linear to it, by `adopt`."""
    return False

  def adopt(self, params: Leaves, name: str, position, target_IxO) -> None:
    """Takes over the parent's weight for a loop after the first; the shared one is the first's.

    Args:
      params: the leaves as numpy arrays, which are written to.
      name: of the linear.
      position: (loop, layer).
      target_IxO: the weight.
    """

  def balance(self, routes: Mapping[str, jax.Array], host: Host) -> Aux:
    """Losses and statistics of a host that depend on all loops together.

    Args:
      routes: what `apply_at` returned as such, averaged over the loops, [N, ...].
      host: where.
    """
    return NO_AUX

  def after_step(self, params: Leaves, routes: Mapping[str, jax.Array], host: Host) -> Leaves:
    """New values of the leaves in `states`, after a training step.

    Args:
      params: the leaves of all layers, [N, ...].
      routes: as for `balance`, of the step's batch.
      host: where.
    """
    return {}

  def summarize(self, stats: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """What the metrics show of the statistics, averaged over all positions."""
    return stats

  def mask(self, params: Leaves, host: Host) -> Leaves:
    """The leaves of all layers with padding set to zero; [N, ...] each.

    Padded entries must get zero gradients and are not counted.
    """
    return params

  def prepare(self, params: Leaves, host: Host, layout: str) -> Leaves:
    """The leaves of one layer as the engine keeps them.

    Args:
      params: as `leaves` describes them.
      host: where.
      layout: one of `LAYOUTS`.
    """
    return params

  def merge(self, base_IxO: np.ndarray, params: Leaves, position, host: Host):
    """The weight of one position with the relaxation merged in.

    Args:
      base_IxO: a linear's weight, with earlier relaxations merged.
      params: the leaves of all layers, [N, ...], numpy.
      position: (loop, layer).
      host: where.

    Returns:
      [I, O]; None where it cannot be merged, and `unmergeable` says why.
    """
    return None

  def term(self, params: Leaves, host: Host) -> tuple[str, dict[str, np.ndarray]] | None:
    """What it adds to a linear, for exports that keep the shared weights tied.

    Args:
      params: the leaves of one layer, all loops, numpy.
      host: where.

    Returns:
      ('low_rank', {'a': [R, I, r], 'b': [R, r, O]}): x a b is added to the output;
      ('gain', {'gain': [R, O]}): the output so far is multiplied; None for what is
      neither.
    """
    return None

  def count(self, host: Host) -> int:
    """Unique parameters on a host, in all layers, padding left out."""
    copies = 1 if self.pooled else host.layers
    return copies * sum(int(np.prod(leaf.shape)) for leaf in self.leaves(host).values())

  def tie(self, cs_RxIxI, ws_RxIxO, layer: int, host: Host):
    """The shared weight that goes best with this relaxation, or None.

    None leaves the choice to the conversion, which takes the weighted mean.

    Args:
      cs_RxIxI: covariances of each loop's inputs.
      ws_RxIxO: the weights that the loops stand for.
      layer: of the block.
      host: where.
    """
    return None

  def fit(self, base_IxO, target_IxO, c_IxI, position, host: Host) -> Fitted | None:
    """Fits one position in closed form; None starts it without effect.

    Minimises `||x (merged - target)||^2` over the relaxation's parameters.

    Args:
      base_IxO: the shared weight, with earlier relaxations merged.
      target_IxO: the weight to stand for.
      c_IxI: covariance of the inputs x, positive definite; None for the
        identity (no calibration text).
      position: (loop, layer).
      host: where.
    """
    return None

  def fit_inputs(self, params: Leaves, inputs, base_IxO, target_IxO, position, host: Host) -> None:
    """Fits what needs the inputs themselves, not their covariance alone; called after `fit`.

    Args:
      params: the leaves of all layers as numpy arrays, which are written to.
      inputs: (those to fit on, others on which it must beat `fit`), [T, I] each.
      base_IxO, target_IxO, position, host: as for `fit`.
    """

  def is_exact(self, host: Host) -> bool:
    """Whether `fit` reaches any target at every position."""
    return False

  def square_norm(self, params: Leaves, host: Host) -> jax.Array | None:
    """Size of the change by loop, float32 [R], for the metrics; or None.

    Args:
      params: the leaves of all layers, [N, ...].
      host: where.
    """
    return None
