"""Restricted requests in the engine: biases at their start, a mask before each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rrt.errors import InputError
from rrt.infer import constraints
from rrt.infer.engine.request import Request
from rrt.infer.engine.state import EngineShape, State, set_bias, set_bits
from rrt.infer.sampling import SamplingParams

if TYPE_CHECKING:
  from rrt.data.tokenizer import Tokenizer


class Restrictions:
  """What the slots of an engine may sample."""

  def __init__(self, shape: EngineShape, tokenizer: Tokenizer | None):
    self._shape, self._tokenizer = shape, tokenizer
    self._vocab = shape.config.vocab_size
    self._tokens: Any = None  # Of `constraints.token_table`.
    self._new_bits: dict[int, np.ndarray] = {}  # By slot: what may come next.
    self._biased: set[int] = set()  # Slots whose bias is not zero.

  def constraint(self, params: SamplingParams) -> constraints.Constraint:
    """What restricts a request's tokens.

    Raises:
      InputError: a form that is none, or no tokenizer.
    """
    if self._tokenizer is None:
      raise InputError('Structured outputs and bad words need a model with a tokenizer.')
    found: list[constraints.Constraint] = []
    if params.structured_outputs:
      if self._tokens is None:
        self._tokens = constraints.token_table(self._tokenizer, self._vocab)
      grammar = constraints.grammar_of(params.structured_outputs)
      found.append(constraints.Grammar(self._tokens, grammar, self._vocab))
    if params.bad_words:
      sequences = constraints.bad_sequences(self._tokenizer, params.bad_words)
      found.append(constraints.BadWords(sequences, self._vocab))
    return constraints.Both(*found) if len(found) > 1 else found[0]

  def enter(self, state: State, slot: int, request: Request) -> State:
    """Sets the bias and the first mask of a sequence."""
    params = request.params
    if not params.restricts:
      return state
    bias_V = np.zeros(self._vocab, np.float32)
    if params.allowed_token_ids is not None:
      bias_V[:] = -np.inf
      bias_V[list(params.allowed_token_ids)] = 0
    for token, bias in (params.logit_bias or {}).items():
      bias_V[token] += bias
    if bias_V.any() or slot in self._biased:
      state = _set_bias(state, jnp.int32(slot), bias_V)
      self._biased = self._biased | {slot} if bias_V.any() else self._biased - {slot}
    if request.constraint is not None:
      self._new_bits[slot] = request.constraint.allowed()
    return state

  def came(self, slot: int, request: Request, tokens: Sequence[int]) -> None:
    """Goes on with the new tokens of a slot's request."""
    if request.constraint is None or not tokens:
      return
    for token in tokens:
      request.constraint.accept(token)
    if not request.finish:
      self._new_bits[slot] = request.constraint.allowed()

  def send(self, state: State) -> State:
    """Sends new masks to the device."""
    if not self._new_bits:
      return state
    new_S = np.zeros(self._shape.slots, bool)
    bits_SxW = np.zeros((len(new_S), constraints.words(self._vocab)), np.uint32)
    for slot, bits_W in self._new_bits.items():
      new_S[slot], bits_SxW[slot] = True, bits_W
    self._new_bits = {}
    return _set_bits(state, new_S, bits_SxW)


_set_bias = jax.jit(set_bias, donate_argnames=('state',))
_set_bits = jax.jit(set_bits, donate_argnames=('state',))
