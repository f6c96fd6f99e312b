"""Which of several implementations of an op a program takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import os

from rrt.errors import InputError


class Choice:
  """The implementations of one op: named by `using`, by a variable of the environment, or chosen.

  Attributes:
    options: their names, 'auto' among them.
  """

  def __init__(self, op: str, variable: str, options: tuple[str, ...], auto: Callable[[], str]):
    """`auto` names the one that the backend takes where nobody asks for another."""
    self.options = options
    self._op, self._variable, self._auto = op, variable, auto
    self._named: contextvars.ContextVar[str | None] = contextvars.ContextVar(op, default=None)

  @contextlib.contextmanager
  def using(self, implementation: str) -> Iterator[None]:
    """Programs traced inside use this implementation.

    Raises:
      InputError: there is no such implementation.
    """
    token = self._named.set(self._checked(implementation))
    try:
      yield
    finally:
      self._named.reset(token)

  def chosen(self) -> str:
    """What `using` or the environment asks for, else the backend's own.

    Raises:
      InputError: the environment asks for one that does not exist.
    """
    asked = self._named.get() or self._checked(os.environ.get(self._variable, 'auto'))
    return self._auto() if asked == 'auto' else asked

  def _checked(self, implementation: str) -> str:
    if implementation not in self.options:
      raise InputError(f'{self._op}={implementation!r}: must be one of {", ".join(self.options)}.')
    return implementation
