"""The weights of a recursive child: taken from its parent, or fitted.

P prelude, N block, C coda layers, R loops, I inputs, O outputs, r rank.
"""

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.config import ModelConfig
from rrt.convert import calibrate as calibrate_lib
from rrt.convert import rank_budget
from rrt.convert.activations import Walk, part_of
from rrt.convert.plan import is_full_rank, source_layers
from rrt.model import LanguageModel
from rrt.ops import least_squares
from rrt.ops.matmul import float32_is_float32
from rrt.tree import flatten, set_path


def is_exact(config: ModelConfig, init: str, lora_init: str) -> bool:
  """Whether a child can only compute what its parent does."""
  if config.loops == 1:
    return init != 'random' or (lora_init == 'svd' and is_full_rank(config))
  return lora_init == 'svd' and config.loop_norms and is_full_rank(config)


def _counter(
  total: int, progress: Callable[[int, int], None] | None, parts: int = 1
) -> Callable[[int], None]:
  """Counts work in parts of a layer, and reports it in layers."""
  done = 0

  def count(n: int = 1) -> None:
    nonlocal done
    done += n
    if progress:
      progress(done // parts, total)

  return count


@contextlib.contextmanager
def one_blas_thread():
  """LAPACK on one thread, and products of float32 numbers in float32.

  OpenBLAS and XLA have threads of their own that get in each other's way:
  an eigendecomposition then takes 6 to 20 times as long.
  """
  limit: Any = contextlib.nullcontext()
  try:
    import scipy.linalg  # noqa: F401  (jax's LAPACK, which must be loaded)
    import threadpoolctl
  except ImportError:
    pass  # Without the extra `convert` it is only slower.
  else:
    limit = threadpoolctl.threadpool_limits(1, 'blas')
  with limit, float32_is_float32('float32'):
    yield


class Conversion:
  """Finds the weights of one child.

  Attributes:
    config: the child's; a budget replaces its ranks.
    shared: component -> [N, I, O].
    low_a: component -> [N, R, I, r], at a scale of 1.
    low_b: component -> [N, R, r, O].
    coda: the coda's layer trees, where they were refitted.
    kept: component -> share of the residual kept, [R, N].
    drift: see `Report`.
    fitted: whether any of it was fitted to the calibration text.
  """

  def __init__(
    self, parent: LanguageModel, config: ModelConfig, init: str, lora_init: str, seed: int
  ):
    self.parent, self.config = parent, config
    self.init, self.lora_init = init, lora_init
    self.random = np.random.default_rng(seed)
    self.layers = parent.params['block']['layers']
    self.shared: dict[str, np.ndarray] = {}
    self.low_a: dict[str, np.ndarray] = {}
    self.low_b: dict[str, np.ndarray] = {}
    self.kept: dict[str, np.ndarray] = {}
    self.coda: list[Any] = []
    self.drift: list[float] = []
    self.fitted = False
    self.norms = self._norms()

  def kernel(self, name: str, depth: int) -> np.ndarray:
    """A linear of the parent, float32 [I, O]."""
    stacked = self.layers[part_of(name)][name]['kernel']
    return np.asarray(stacked[depth], np.float32)

  # ---------------------------------------------------------------- the norms

  def _norms(self) -> dict[str, np.ndarray]:
    """Gains of the block by path: [N, R, D] per loop, else [N, D].

    Tied gains come from the layer that the weights come from, or are means.
    """
    depths_NxR = self.config.block_depths().T
    gains = {}
    for path, leaf in flatten(self.layers).items():
      if not path.endswith('scale'):
        continue
      leaf = np.asarray(leaf, np.float32)
      if self.config.loop_norms:
        gains[path] = leaf[depths_NxR]
      elif self.init in ('stepwise', 'lower', 'upper'):
        gains[path] = leaf[source_layers(self.config, self.init)]
      else:
        gains[path] = leaf[depths_NxR].mean(1)
    return gains

  def _norms_at(self, depth: int) -> dict[str, Any]:
    """The child's gains at a depth, as a tree."""
    places = {int(d): p for p, d in np.ndenumerate(self.config.block_depths())}
    tree: dict[str, Any] = {}
    for path, leaf in flatten(self.layers).items():
      if not path.endswith('scale'):
        continue
      gain = np.asarray(leaf[depth], np.float32)
      if depth in places:
        r, n = places[depth]
        gain = self.norms[path][n]
        gain = gain[r] if self.config.loop_norms else gain
      set_path(tree, path, jnp.asarray(gain))
    return tree

  # -------------------------------------------- weights taken from the parent

  def select(
    self,
    budget: int | None,
    alpha: float | None,
    progress: Callable[[int, int], None] | None = None,
  ) -> None:
    """Shared weights by the paper's rules, LoRA by a plain SVD."""
    c = self.config
    R, N = c.loops, c.block_layers
    total = N + R * N * (1 if budget is None else 2)
    count = _counter(total, progress, parts=len(c.shapes()))
    for name, (d_in, d_out) in c.shapes().items():
      shared_NxIxO = np.zeros((N, d_in, d_out), np.float32)
      for n in range(N):
        shared_NxIxO[n] = self._selected(name, n)
        count(1)
      self.shared[name] = shared_NxIxO
    if budget is not None:
      spectra = {name: self._spectra(name, count) for name in c.shapes()}
      self.config = rank_budget.spend(c, spectra, budget, alpha)
    for name in c.shapes():
      self._relax(name, count)

  def _selected(self, name: str, n: int) -> np.ndarray:
    """The shared weight of one linear of block layer n."""
    c = self.config
    if self.init == 'random':
      shape = c.shapes()[name]
      return self.random.normal(0, shape[0] ** -0.5, shape)
    if self.init in ('stepwise', 'lower', 'upper'):
      return self.kernel(name, int(source_layers(c, self.init)[n]))
    depths_R = c.block_depths()[:, n]
    return np.mean([self.kernel(name, int(d)) for d in depths_R], axis=0)

  def _residual(self, name: str, r: int, n: int) -> np.ndarray:
    depth = self.config.depth_of(r, n)
    return self.kernel(name, depth) - self.shared[name][n]

  def _spectra(self, name: str, count: Callable[[int], None]) -> np.ndarray:
    """Singular values of the residuals, relative to the weights' norms."""
    R, N = self.config.loops, self.config.block_layers
    values = np.zeros((R, N, min(self.config.shapes()[name])))
    for r, n in np.ndindex(R, N):
      sigma_K = jnp.linalg.svd(self._residual(name, r, n), compute_uv=False)
      weight_IxO = self.kernel(name, self.config.depth_of(r, n))
      size = np.linalg.norm(weight_IxO)
      values[r, n] = np.asarray(sigma_K) / (size if size > 0 else 1.0)
      count(1)
    return values

  def _relax(self, name: str, count: Callable[[int], None] = lambda n: None) -> None:
    """LoRA of one component (paper, eq. 4), or its zero init."""
    c = self.config
    R, N = c.loops, c.block_layers
    if c.lora is None or not c.lora.width(name):
      count(R * N)
      return
    width = c.lora.width(name)
    d_in, d_out = c.shapes()[name]
    ranks_RxN = c.lora.table(name, R, N)
    a_NxRxIxr = np.zeros((N, R, d_in, width), np.float32)
    b_NxRxrxO = np.zeros((N, R, width, d_out), np.float32)
    self.kept[name] = np.zeros((R, N))
    for r, n in np.ndindex(R, N):
      count(1)
      rank = int(ranks_RxN[r, n])
      rest_IxO = self._residual(name, r, n)
      if self.lora_init == 'zero' or not rest_IxO.any():
        # Nothing to make up for: the usual start, the product zero.
        a_NxRxIxr[n, r, :, :rank] = self.random.normal(0, d_in**-0.5, (d_in, rank))
        self.kept[name][r, n] = 0.0 if rest_IxO.any() else 1.0
        continue
      a_Ixr, b_rxO, self.kept[name][r, n] = least_squares.truncated_svd(rest_IxO, rank)
      a_NxRxIxr[n, r, :, :rank], b_NxRxrxO[n, r, :rank] = a_Ixr, b_rxO
    self.low_a[name], self.low_b[name] = a_NxRxIxr, b_NxRxrxO

  # ------------------------------------------------ weights fitted to the text

  def calibrate(
    self,
    tokens_BxL: np.ndarray,
    budget: int | None,
    alpha: float | None,
    steps: calibrate_lib.Steps,
    progress: Callable[[int, int], None] | None,
  ) -> None:
    """Shared weights, LoRA and coda by `rrt.convert.calibrate`."""
    c = self.config
    count = _counter(2 * c.depth - c.prelude_layers, progress)
    walk = Walk(
      self.parent.config,
      lambda depth: jax.tree.map(lambda t: jnp.asarray(t[depth]), self.layers),
      tokens_BxL,
    )
    streams = walk.run(self._embed(tokens_BxL), c.prelude_layers, count)
    if budget is not None:
      spectra = calibrate_lib.spectra(walk, c, streams, self._norms_at, steps)
      self.config = rank_budget.spend(c, spectra, budget, alpha)
      if is_exact(self.config, self.init, self.lora_init):
        self.select(None, alpha)  # Any shared weight will do.
        return
    self.fitted = True
    zero = self.lora_init == 'zero'
    fitted = calibrate_lib.calibrate(
      walk,
      dataclasses.replace(c, lora=None) if zero else self.config,
      streams,
      self._norms_at,
      steps=steps,
      progress=count,
    )
    self.shared, self.coda = fitted.shared, fitted.coda
    self.kept, self.drift = fitted.kept, fitted.drift
    if zero:
      for name in c.shapes():
        self._relax(name)
    else:
      self.low_a, self.low_b = fitted.low_a, fitted.low_b

  def _embed(self, tokens_BxL: np.ndarray) -> np.ndarray:
    """What the first layer reads."""
    c = self.config
    x_BxLxD = np.asarray(self.parent.params['embed']['table'])[tokens_BxL]
    scale = c.d_model**0.5 if c.scale_embeddings else 1.0
    return x_BxLxD.astype(np.float32) * np.float32(scale)

  # ------------------------------------------------------------------ the tree

  def params(self) -> dict[str, Any]:
    """The child's parameter tree, in the parent's dtype.

    Called once: what was found is given away, so that a large block is not
    in memory twice.
    """
    c, source = self.config, self.parent.params
    tree: dict[str, Any] = {
      part: source[part] for part in ('embed', 'final_norm', 'head') if part in source
    }
    dtype = np.asarray(source['embed']['table']).dtype
    block: dict[str, Any] = {}
    for path, gains in self.norms.items():
      set_path(block, path, gains.astype(dtype, copy=False))
    for name in list(self.shared):
      place = f'{part_of(name)}/{name}'
      leaves = {'kernel': self.shared.pop(name)}
      if c.lora is not None and name in self.low_a:
        leaves['lora_a'] = self.low_a.pop(name)
        leaves['lora_b'] = self.low_b.pop(name)
        for leaf in (leaves['lora_a'], leaves['lora_b']):
          # The forward pass multiplies the product by alpha / rank.
          leaf *= np.float32(c.lora.scale(name) ** -0.5)
      for leaf_name in list(leaves):
        leaf = leaves.pop(leaf_name).astype(dtype, copy=False)
        set_path(block, f'{place}/{leaf_name}', leaf)
    tree['block'] = {'layers': block}
    first, last = c.prelude_layers, c.depth - c.coda_layers
    take = lambda some: jax.tree.map(lambda t: np.asarray(t[some]), self.layers)
    if c.prelude_layers:
      tree['prelude'] = {'layers': take(slice(0, first))}
    if self.coda:
      stack = lambda *leaves: np.stack(leaves).astype(dtype, copy=False)
      tree['coda'] = {'layers': jax.tree.map(stack, *self.coda)}
    elif c.coda_layers:
      tree['coda'] = {'layers': take(slice(last, c.depth))}
    return tree
