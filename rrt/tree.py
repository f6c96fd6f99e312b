"""Nested dicts of arrays: leaves by '/'-joined path."""

from __future__ import annotations

from typing import Any


def set_path(tree: dict, path: str, leaf: Any) -> None:
  """Puts a leaf at a '/'-joined path of nested dicts."""
  *parents, last = path.split('/')
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = leaf


def flatten(tree: dict, prefix: str = '') -> dict[str, Any]:
  """Leaves of nested dicts by '/'-joined path, in a fixed order."""
  leaves: dict[str, Any] = {}
  for key in sorted(tree):
    path = f'{prefix}{key}'
    if isinstance(tree[key], dict):
      leaves |= flatten(tree[key], path + '/')
    else:
      leaves[path] = tree[key]
  return leaves
