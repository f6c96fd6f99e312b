"""The imports of the package: no circle, and none from a lower layer to a higher.

Imports under TYPE_CHECKING do not count; those inside functions do. What benchmarks and
experiments import is there.
"""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / 'rrt'
# From the lowest to the highest; a folder's files share its layer.
LAYERS = (
  ('errors',),
  ('files', 'pieces', 'tree', 'command', 'console', 'runtime'),
  ('ops',),
  ('relax',),
  ('config', 'config_checks'),
  ('sharding', 'data'),
  ('model',),
  ('models',),
  ('families',),
  ('checkpoints',),
  ('exits',),
  ('infer',),
  ('evals',),
  ('convert',),
  ('train', 'server'),
  ('planner',),
  ('cli',),
)
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, Path]:
  """Modules by dotted name; `__init__` and `__main__` files load others lazily."""
  found = {}
  for path in ROOT.rglob('*.py'):
    name = '.'.join(path.relative_to(ROOT.parent).with_suffix('').parts)
    if not name.endswith(('__init__', '__main__')):
      found[name] = path
  return found


class Imports(ast.NodeVisitor):
  """The modules of the package that a file imports."""

  def __init__(self, known):
    self.known, self.found = known, set()

  def visit_If(self, node):
    if 'TYPE_CHECKING' not in ast.unparse(node.test):
      self.generic_visit(node)

  def visit_Import(self, node):
    self.found |= {a.name for a in node.names if a.name in self.known}

  def visit_ImportFrom(self, node):
    for alias in node.names:
      for name in (f'{node.module}.{alias.name}', node.module):
        if name in self.known:
          self.found.add(name)
          break


def graph() -> dict[str, set[str]]:
  known = modules()
  edges = {}
  for name, path in known.items():
    visitor = Imports(known)
    visitor.visit(ast.parse(path.read_text(encoding='utf-8')))
    edges[name] = visitor.found - {name}
  return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
  """A path that comes back to its beginning; [] where there is none."""
  done: set[str] = set()

  def walk(node, path):
    if node in path:
      return path[path.index(node) :] + [node]
    if node in done:
      return []
    for other in sorted(edges.get(node, ())):
      found = walk(other, [*path, node])
      if found:
        return found
    done.add(node)
    return []

  for node in sorted(edges):
    found = walk(node, [])
    if found:
      return found
  return []


def room(name: str) -> str:
  """The folder, or file, directly in the package that holds a module."""
  return name.split('.')[1]


def test_circles_are_found():
  assert circle({'a': {'b'}, 'b': {'c'}, 'c': {'a'}}) == ['a', 'b', 'c', 'a']
  assert circle({'a': {'b'}, 'b': set()}) == []


def test_no_file_imports_itself_through_others():
  assert circle(graph()) == []


def test_no_folder_imports_itself_through_others():
  rooms: dict[str, set[str]] = {}
  for name, found in graph().items():
    rooms.setdefault(room(name), set()).update({room(f) for f in found} - {room(name)})
  assert circle(rooms) == []


def test_no_layer_imports_a_higher_one():
  up = [
    f'{name} -> {other}'
    for name, found in graph().items()
    for other in found
    if LAYER[room(other)] > LAYER[room(name)]
  ]
  assert up == []


def test_files_on_the_main_path_stay_readable():
  long = {n: p.read_text().count('\n') for n, p in modules().items()}
  assert {n: lines for n, lines in long.items() if lines > 400} == {}


class Missing(ast.NodeVisitor):
  """Names that a program imports from the package and that are not there."""

  def __init__(self):
    self.found = []

  def visit_Try(self, node):
    if not any(h.type is not None and 'ImportError' in ast.unparse(h.type) for h in node.handlers):
      self.generic_visit(node)

  def visit_ImportFrom(self, node):
    if node.module == 'rrt' or (node.module or '').startswith('rrt.'):
      package = importlib.import_module(node.module)
      for alias in node.names:
        if not hasattr(package, alias.name) and f'{node.module}.{alias.name}' not in modules():
          self.found.append(f'{node.module}.{alias.name}')


PROGRAMS = [
  p for d in ('benchmarks', 'experiments') for p in sorted((ROOT.parent / d).glob('*.py'))
]


@pytest.mark.parametrize('path', PROGRAMS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_programs_import_what_is_there(path):
  visitor = Missing()
  visitor.visit(ast.parse(path.read_text(encoding='utf-8')))
  assert visitor.found == []


def test_missing_names_are_found():
  visitor = Missing()
  visitor.visit(ast.parse('from rrt.relax.base import LINEAR_AXES, Relaxation'))
  assert visitor.found == ['rrt.relax.base.LINEAR_AXES']
