"""The shape of a model: its layers, their recursion and their relaxations.

One frozen dataclass describes a vanilla model (`loops=1`), its recursive child
and the reduced-size baseline. Depth is `L = P + N * R + C`: `P` prelude and
`C` coda layers of their own, `N` block layers looped `R` times. A *position*
is a pair (loop, layer) of the block; a *depth* counts layers in the order in
which they run, from 0 to L - 1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from rrt.config_checks import BY_LENGTH, check
from rrt.errors import InputError
from rrt.relax import registry
from rrt.relax.hosts import MLP

if TYPE_CHECKING:
  from rrt.relax.base import Relaxation


@dataclasses.dataclass(frozen=True)
class Rope:
  """One table of rotary frequencies.

  Attributes:
    base: the wavelength base (theta).
    scaling: '' for none, 'linear' (all frequencies divided by `factor`), 'llama3'
      (long wavelengths divided, short ones kept, a ramp between), 'yarn' (the
      same by rotations within the original context, arXiv 2309.00071), 'dynamic'
      (a base that grows with a text longer than the original context), 'longrope'
      (factors by dimension, one list for texts within the original context and one
      for longer ones, arXiv 2402.13753), or 'none' for layers without rotation (NoPE).
    factor: of the extended context over the original one.
    low_freq_factor: llama3: wavelengths above original_context / this are
      divided by `factor`.
    high_freq_factor: llama3: wavelengths below original_context / this stay.
    original_context: llama3, yarn, dynamic, longrope: the context length of
      pretraining, in tokens.
    beta_fast: yarn: frequencies of so many rotations or more stay.
    beta_slow: yarn: those of so few or fewer are divided by `factor`.
    attention_factor: yarn, longrope: queries and keys are multiplied by it.
    truncate: yarn: whether the ramp begins and ends at whole dimensions.
    short_factors, long_factors: longrope: divisors of the frequencies.
    length: dynamic, longrope: of the texts that frequencies are for, in tokens; 0
      for that of the batch.
  """

  base: float = 10_000.0
  scaling: str = ''
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_context: int = 8192
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 1.0
  truncate: bool = True
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()
  length: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture: everything that the model's function depends on but weights.

  Attributes:
    family: which checkpoint family it came from, one of `FAMILIES`.
    vocab_size: V.
    d_model: D, the width of the residual stream.
    d_ff: F, the hidden width of the gated MLP, or of one of its experts.
    num_heads: H, query heads.
    num_kv_heads: G, key and value heads; divides `num_heads`.
    head_dim: Dh, even.
    prelude_layers: P, unique layers before the block.
    block_layers: N, layers of the shared block.
    loops: R, times the block runs; 1 is a vanilla model.
    coda_layers: C, unique layers after the block.
    order: 'cycle' runs the whole block R times, 'sequence' repeats each of
      its layers R times in place.
    max_context: longest sequence in tokens that the model supports.
    norm_eps: added to the mean square in RMSNorm.
    unit_offset_norm: gains are stored as w and applied as 1 + w (Gemma).
    pre_norms: norms before attention and before the MLP; OLMo 2 has none.
    post_norms: norms after attention and after the MLP (Gemma 2 and 3, OLMo 2).
    qk_norm: RMSNorm over each head of q and k, before RoPE.
    qk_norm_all: with `qk_norm`, one norm over all heads together (OLMo 2).
    rotary_dim: how many of a head's dimensions are rotated, even; None for all.
    norm: 'rms', or 'layer' with a mean and a bias (Pythia).
    parallel: attention and MLP both read the layer's input (Pythia).
    gated: the MLP is down(act(gate) * up); otherwise down(act(up)).
    num_experts: E, MLPs of each layer, among which a router chooses for each token
      (Mixtral, Qwen2-MoE, Qwen3-MoE, Grok-1); 0 for one MLP without a router.
    experts_per_token: k, how many a token takes.
    shared_experts: m, further experts that every token takes, all with one gate, a sigmoid
      (Qwen2-MoE, whose shared expert is as wide as m of them).
    norm_topk: the chosen experts' gates sum to 1; otherwise softmax probabilities
      among all experts are left as they are (Grok-1).
    activation: 'silu', 'gelu' or its approximation 'gelu_tanh'.
    biases: the linears with a bias ('q' to 'down'); inside the block it differs by
      loop where norm gains do.
    attn_softcap, final_softcap: attention scores and logits z become
      cap tanh(z / cap) (Gemma 2); None leaves them.
    query_scale: q is multiplied by this; None means head_dim ** -0.5.
    scale_embeddings: multiply embeddings by sqrt(D), rounded to their dtype.
    tie_embeddings: the head is the embedding table.
    windows: sliding window in tokens by depth, itself included; 0 is global;
      () is all global.
    ropes: the distinct rotary tables.
    rope_index: which of `ropes` by depth; () is the first for all.
    loop_norms: the block's norm gains and biases have a leading loops axis.
    weights: how the linears are stored, 'float' or quantized ('int8', 'int4', 'nf4';
      `rrt.ops.quantize`); embeddings and head are int8 then.
    end_norm: the final norm ends every pass through the block instead, which is the
      whole model then (Ouro).
    exit_gate: the model has a gate of its own: D weights and a bias, from which
      the probability of leaving after a pass follows (Ouro).
    relax: the relaxations of the block, applied in this order; see
      `rrt.relax.base.Relaxation`.
  """

  family: str
  vocab_size: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  block_layers: int
  prelude_layers: int = 0
  loops: int = 1
  coda_layers: int = 0
  order: str = 'cycle'
  max_context: int = 2048
  norm_eps: float = 1e-5
  unit_offset_norm: bool = False
  pre_norms: bool = True
  post_norms: bool = False
  qk_norm: bool = False
  qk_norm_all: bool = False
  rotary_dim: int | None = None
  norm: str = 'rms'
  parallel: bool = False
  gated: bool = True
  num_experts: int = 0
  experts_per_token: int = 0
  shared_experts: int = 0
  norm_topk: bool = True
  activation: str = 'silu'
  biases: tuple[str, ...] = ()
  attn_softcap: float | None = None
  final_softcap: float | None = None
  query_scale: float | None = None
  scale_embeddings: bool = False
  tie_embeddings: bool = False
  windows: tuple[int, ...] = ()
  ropes: tuple[Rope, ...] = (Rope(),)
  rope_index: tuple[int, ...] = ()
  loop_norms: bool = False
  weights: str = 'float'
  end_norm: bool = False
  exit_gate: bool = False
  relax: tuple[Relaxation, ...] = ()

  def __post_init__(self):
    check(self)

  @property
  def depth(self) -> int:
    """L, the number of layers that a token passes through."""
    return self.prelude_layers + self.block_layers * self.loops + self.coda_layers

  @property
  def scale_q(self) -> float:
    """The factor of queries."""
    if self.query_scale is None:
      return self.head_dim**-0.5
    return self.query_scale

  def for_length(self, length: int) -> ModelConfig:
    """The same with rotary tables for texts of a length, where they depend on it.

    A cache holds rotated keys: tokens that are decoded take the frequencies of the
    length that their text may reach.
    """
    if not any(r.scaling in BY_LENGTH and r.length != length for r in self.ropes):
      return self
    ropes = (
      dataclasses.replace(r, length=length) if r.scaling in BY_LENGTH else r for r in self.ropes
    )
    return dataclasses.replace(self, ropes=tuple(ropes))

  def norm_sizes(self) -> dict[str, int]:
    """Sizes of a layer's norms by path."""
    found: dict[str, int] = {}
    for part in ('attn', 'mlp'):
      found |= {f'{part}_norm': self.d_model} if self.pre_norms else {}
      found |= {f'{part}_post_norm': self.d_model} if self.post_norms else {}
    if self.qk_norm:
      heads = (self.num_heads, self.num_kv_heads) if self.qk_norm_all else (1, 1)
      sizes = (h * self.head_dim for h in heads)
      found |= dict(zip(('attn/q_norm', 'attn/k_norm'), sizes, strict=True))
    return found

  def shapes(self) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's linears: seven, or six without a gate; of one expert each."""
    d, f = self.d_model, self.d_ff
    q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
    gate = {'gate': (d, f)} if self.gated else {}
    return {
      'q': (d, q),
      'k': (d, kv),
      'v': (d, kv),
      'o': (q, d),
      **gate,
      'up': (d, f),
      'down': (f, d),
    }

  def copies(self, name: str) -> int:
    """How many of a linear a layer has: one, or as many as experts."""
    return self.num_experts + self.shared_experts if self.num_experts and name in MLP else 1

  def depth_of(self, loop: int, layer: int) -> int:
    """The depth at which the block runs `layer` in `loop`."""
    if self.order == 'cycle':
      return self.prelude_layers + loop * self.block_layers + layer
    return self.prelude_layers + layer * self.loops + loop

  def block_depths(self) -> np.ndarray:
    """Depth by position, int [R, N]."""
    return np.array(
      [[self.depth_of(r, n) for n in range(self.block_layers)] for r in range(self.loops)]
    )

  def with_recursion(
    self,
    *,
    prelude: int,
    block: int,
    loops: int,
    coda: int,
    order: str = 'cycle',
    loop_norms: bool = False,
    weights: str = 'float',
    relax: tuple[Relaxation, ...] = (),
  ) -> ModelConfig:
    """The same model with its depth arranged as prelude, block x loops, coda.

    Raises:
      InputError: prelude + block * loops + coda is not this model's depth.
    """
    if prelude + block * loops + coda != self.depth:
      raise InputError(
        f'prelude {prelude} + block {block} x loops {loops} + coda {coda} '
        f'= {prelude + block * loops + coda} layers, but the parent has '
        f'{self.depth}; choose them to add up to {self.depth}.'
      )
    return dataclasses.replace(
      self,
      prelude_layers=prelude,
      block_layers=block,
      loops=loops,
      coda_layers=coda,
      order=order,
      loop_norms=loop_norms,
      weights=weights,
      relax=relax,
    )

  def to_json(self) -> dict[str, Any]:
    """Plain dicts, lists and numbers; `from_json` reverses it."""
    fields = dataclasses.asdict(dataclasses.replace(self, relax=()))
    return fields | {'relax': [registry.to_json(r) for r in self.relax]}

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
    """Reads what `to_json` wrote.

    Raises:
      InputError: a field is unknown, missing or of a wrong value.
    """
    fields = dict(fields)
    try:
      ropes = fields.get('ropes', [{}])
      fields['ropes'] = tuple(
        Rope(**{k: registry.as_tuple(v) for k, v in r.items()}) for r in ropes
      )
      relax = tuple(registry.from_json(r) for r in fields.pop('relax', ()))
      return cls(**{k: registry.as_tuple(v) for k, v in fields.items()}, relax=relax)
    except TypeError as e:
      raise InputError(f'The model configuration does not fit: {e}.') from e
