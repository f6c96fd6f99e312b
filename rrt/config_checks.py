"""Checks of a model's shape: every field, alone and against the others."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import TYPE_CHECKING, Any

from rrt.errors import InputError
from rrt.relax.hosts import MLP

if TYPE_CHECKING:
  from rrt.config import ModelConfig, Rope

ORDERS = ('cycle', 'sequence')
ACTIVATIONS = ('silu', 'gelu_tanh', 'gelu')
NORMS = ('rms', 'layer')
FAMILIES = (
  *('llama', 'gemma', 'gemma2', 'gemma3', 'qwen2', 'qwen3', 'smollm3'),
  *('phi3', 'olmo2', 'gpt_neox', 'ouro', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'grok1'),
)
SCALINGS = ('', 'linear', 'llama3', 'yarn', 'dynamic', 'longrope', 'none')
# Kinds whose frequencies depend on the length of the text.
BY_LENGTH = ('dynamic', 'longrope')
EXPERTS = ('num_experts', 'experts_per_token', 'shared_experts')
MAY_BE_ZERO = ('prelude_layers', 'coda_layers', *EXPERTS)
WEIGHTS = ('float', 'int8', 'int4', 'nf4')
COMPONENTS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


def is_whole(value: Any, least: int = 0) -> bool:
  """Whether a value is an integer of some size; a bool is none."""
  is_int = isinstance(value, int) and not isinstance(value, bool)
  return is_int and value >= least


def is_number(value: Any, least: float | None = None) -> bool:
  """Whether a value is finite and above 0, or at least `least` if given."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  # A bound, as an integer of JSON may be too large for a float.
  if not abs(value) < 1e300:
    return False
  return value > 0 if least is None else value >= least


def _check_rope(rope: Rope, where: str) -> None:
  """Raises InputError for the first invalid value of a table."""
  if rope.scaling not in SCALINGS:
    raise InputError(f'{where}.scaling={rope.scaling!r}: must be one of {SCALINGS}.')
  for f in dataclasses.fields(rope):
    value = getattr(rope, f.name)
    if f.type == 'float' and not is_number(value):
      raise InputError(f'{where}.{f.name}={value!r}: must be a finite number above 0.')
  if rope.scaling == 'llama3' and rope.high_freq_factor <= rope.low_freq_factor:
    raise InputError(
      f'{where}.high_freq_factor={rope.high_freq_factor!r}: must be above '
      f'low_freq_factor={rope.low_freq_factor!r}.'
    )
  for name in ('short_factors', 'long_factors'):
    factors = getattr(rope, name)
    if rope.scaling == 'longrope' and not (factors and all(map(is_number, factors))):
      raise InputError(f'{where}.{name}={factors!r}: must be finite numbers above 0.')
  if not is_whole(rope.length):
    raise InputError(f'{where}.length={rope.length!r}: must be a whole number of 0 or more.')
  if not is_whole(rope.original_context, 1):
    raise InputError(
      f'{where}.original_context={rope.original_context!r}: must be a whole number above 0.'
    )


def check(c: ModelConfig) -> None:
  """Raises InputError for the first field with an invalid value."""

  def need(ok: bool, field: str, why: str) -> None:
    if not ok:
      raise InputError(f'{field}={getattr(c, field)!r}: {why}.')

  for f in dataclasses.fields(c):  # Types are the words of the annotations.
    value = getattr(c, f.name)
    if f.type == 'int':
      least = int(f.name not in MAY_BE_ZERO)
      size = 'above 0' if least else 'of 0 or more'
      need(is_whole(value, least), f.name, f'must be a whole number {size}')
    elif f.type == 'bool':
      need(isinstance(value, bool), f.name, 'must be true or false')
  need(is_number(c.norm_eps, 0), 'norm_eps', 'must be a finite number, 0 or more')
  for field in ('query_scale', 'attn_softcap', 'final_softcap'):
    value = getattr(c, field)
    need(value is None or is_number(value), field, 'must be a finite number above 0, or none')
  need(c.family in FAMILIES, 'family', f'must be one of {FAMILIES}')
  need(c.order in ORDERS, 'order', f'must be one of {ORDERS}')
  need(c.norm in NORMS, 'norm', f'must be one of {NORMS}')
  need(c.norm == 'rms' or not c.unit_offset_norm, 'unit_offset_norm', 'is for norm=rms')
  need(c.pre_norms or not c.parallel, 'parallel', 'needs pre_norms')
  need(c.weights in WEIGHTS, 'weights', f'must be one of {WEIGHTS}')
  need(
    c.weights in ('float', 'int8') or not any(d_in % 2 for d_in, _ in c.shapes().values()),
    'weights',
    'two codes share a byte, for which d_model, d_ff and heads must be even',
  )
  _check_experts(c, need)
  need(c.activation in ACTIVATIONS, 'activation', f'must be one of {ACTIVATIONS}')
  need(
    set(c.biases) <= {*c.shapes()} and len({*c.biases}) == len(c.biases),
    'biases',
    f'must name linears, each once; they are {", ".join(c.shapes())}',
  )
  need(c.head_dim % 2 == 0, 'head_dim', 'must be even, for RoPE')
  need(
    c.rotary_dim is None
    or (is_whole(c.rotary_dim, 2) and c.rotary_dim % 2 == 0 and c.rotary_dim <= c.head_dim),
    'rotary_dim',
    f'must be even, from 2 to head_dim={c.head_dim}, or none',
  )
  need(
    not c.end_norm or (c.order == 'cycle' and not c.prelude_layers and not c.coda_layers),
    'end_norm',
    'is for a block in cycle order without prelude and coda',
  )
  need(c.pre_norms or c.post_norms, 'pre_norms', 'may be false with post_norms alone')
  need(c.qk_norm or not c.qk_norm_all, 'qk_norm_all', 'has no effect without qk_norm')
  need(c.num_heads % c.num_kv_heads == 0, 'num_kv_heads', f'must divide num_heads={c.num_heads}')
  for field in ('windows', 'rope_index'):
    value = getattr(c, field)
    need(
      len(value) in (0, c.depth),
      field,
      f'needs one entry for each of the {c.depth} layers, or none',
    )
    need(all(is_whole(v) for v in value), field, 'must hold whole numbers, 0 or more')
  need(bool(c.ropes), 'ropes', 'needs one rotary table at least')
  for i, rope in enumerate(c.ropes):
    _check_rope(rope, f'ropes[{i}]')
    sizes = {len(rope.short_factors), len(rope.long_factors)}
    half = (c.rotary_dim or c.head_dim) // 2
    need(
      rope.scaling != 'longrope' or sizes == {half},
      'ropes',
      f'longrope needs {half} short and long factors, one for each pair of dimensions',
    )
  need(
    all(i < len(c.ropes) for i in c.rope_index),
    'rope_index',
    f'must point into the {len(c.ropes)} tables of ropes',
  )
  _check_relax(c)


def _check_experts(c: ModelConfig, need: Callable[[bool, str, str], None]) -> None:
  E = c.num_experts
  need(E != 1, 'num_experts', 'must be 2 or more, or 0 for one MLP without a router')
  need(
    1 <= c.experts_per_token <= E if E else not c.experts_per_token,
    'experts_per_token',
    f'must lie in 1 to num_experts={E}' if E else 'has no effect without num_experts',
  )
  need(E > 0 or not c.shared_experts, 'shared_experts', 'has no effect without num_experts')
  need(E > 0 or c.norm_topk, 'norm_topk', 'has no effect without num_experts')
  need(not E or c.weights == 'float', 'weights', 'experts are not quantized by this version')
  need(not E or not c.parallel, 'parallel', 'no model with experts has it')
  need(not E or not {*c.biases} & {*MLP}, 'biases', 'experts have none')


def _check_relax(c: ModelConfig) -> None:
  """Raises InputError for relaxations that are invalid, alone or together."""
  kinds = [r.kind for r in c.relax]
  if len(set(kinds)) < len(kinds):
    raise InputError(f'relax={kinds}: each kind of relaxation can be given once.')
  for relaxation in c.relax:
    if relaxation.site == 'block' and c.order != 'cycle':
      raise InputError(
        f'relax: {relaxation.kind!r} relaxes a whole pass through the block, which '
        f'the {c.order} order does not have; take order=cycle.'
      )
    hosts = relaxation.hosts(c)
    relaxation.check(hosts)
    for host in hosts:
      if host.experts and not relaxation.of_experts and relaxation.leaves(host):
        raise InputError(
          f'relax: {relaxation.kind!r} on {host.name}, of which a layer has one an expert: give it '
          'linears of attention alone.'
        )
