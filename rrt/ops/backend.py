"""Which backend a program is traced for: where it runs, or another one it is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import contextvars

import jax

_named: contextvars.ContextVar[str | None] = contextvars.ContextVar('backend', default=None)


def backend() -> str:
  """'cpu', 'gpu' or 'tpu': that of `compiling_for`, else jax's default."""
  return _named.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
  """Programs traced inside are those of another backend, as compiling ahead of time needs."""
  token = _named.set(name)
  try:
    yield
  finally:
    _named.reset(token)
