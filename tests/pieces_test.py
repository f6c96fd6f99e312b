"""Arrays in pieces: what they hold, and how models are read, placed and written through them."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest

from rrt import sharding
from rrt.checkpoints.load import load, save
from rrt.checkpoints.save_hf import save_hf
from rrt.errors import InputError
from rrt.models.untie import to_untied
from rrt.pieces import Pieces, pieces, same
from rrt.relax.lora import Lora
from rrt.train.placement import param_shardings, place
from rrt.tree import flatten
from tests import runs

X = np.arange(60, dtype=np.float32).reshape(5, 3, 4)


def lazily(x, step=2):
  reads = []

  def read(start, stop):
    reads.append((start, stop))
    return x[start:stop]

  return Pieces(x.shape, x.dtype, read, step), reads


def test_pieces_are_the_array():
  array, reads = lazily(X)
  assert (array.shape, array.ndim, array.size, array.nbytes, len(array)) == (
    (5, 3, 4),
    3,
    60,
    240,
    5,
  )
  assert [start for start, _ in pieces(array)] == [0, 2, 4]
  assert reads == [(0, 2), (2, 4), (4, 5)]
  np.testing.assert_array_equal(np.asarray(array), X)
  np.testing.assert_array_equal(array[-1], X[-1])
  np.testing.assert_array_equal(np.asarray(array[1:4]), X[1:4])
  np.testing.assert_array_equal(array[:, 1], X[:, 1])
  assert np.asarray(array.astype(np.int32)).dtype == np.int32
  with pytest.raises(IndexError):
    array[5]


def test_equality_is_found_piece_by_piece():
  array, reads = lazily(X)
  other = X.copy()
  assert same(array, other) and same(other, array) and same(array, lazily(X, 3)[0])
  other[0, 0, 0] = -1
  reads.clear()
  assert not same(array, other) and len(reads) == 1
  assert not same(array, X[:4])


@pytest.mark.parametrize('kind', ['native', 'hf'])
def test_a_model_read_lazily_is_the_model(kind, tmp_path, monkeypatch):
  monkeypatch.setattr('rrt.checkpoints.native.SMALL', 16)
  write = save if kind == 'native' else save_hf
  write(runs.parent(), tmp_path / 'model')
  whole, lazy = (load(tmp_path / 'model', lazy=x) for x in (False, True))
  found, wanted = flatten(lazy.params), flatten(whole.params)
  assert found.keys() == wanted.keys()
  assert isinstance(found['block/layers/mlp/up/kernel'], Pieces)
  for name, leaf in found.items():
    assert (leaf.shape, leaf.dtype) == (wanted[name].shape, wanted[name].dtype)
    np.testing.assert_array_equal(np.asarray(leaf), wanted[name])
  save(lazy, tmp_path / 'copy')
  again = flatten(load(tmp_path / 'copy').params)
  assert all(np.array_equal(again[name], wanted[name]) for name in wanted)


def test_damage_is_found_in_a_model_read_lazily(tmp_path, monkeypatch):
  monkeypatch.setattr('rrt.checkpoints.native.SMALL', 16)
  save(runs.parent(), tmp_path / 'model')
  file = tmp_path / 'model' / 'model.safetensors'
  data = bytearray(file.read_bytes())
  data[-9] ^= 1
  file.write_bytes(data)
  with pytest.raises(InputError, match='damaged'):
    load(tmp_path / 'model', lazy=True)


def test_a_lazy_model_is_exported_a_layer_at_a_time(tmp_path):
  shape = dict(d_model=128, d_ff=512, block_layers=24)
  parent = runs.model(dataclasses.replace(runs.PARENT, **shape), 0)
  config = parent.config.with_recursion(
    prelude=1, block=11, loops=2, coda=1, loop_norms=True, relax=(Lora(q=2, up=2),)
  )
  child = runs.model(config, 1)
  save(child, tmp_path / 'child')
  save_hf(child, tmp_path / 'whole')
  whole = sum(leaf.nbytes for leaf in flatten(to_untied(child).params).values())
  lazy = load(tmp_path / 'child', lazy=True)
  tracemalloc.start()
  save_hf(lazy, tmp_path / 'lazy')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < whole / 4  # A layer is a 24th.
  files = [(tmp_path / x / 'model.safetensors').read_bytes() for x in ('whole', 'lazy')]
  assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_placed_in_pieces_as_whole(sizes):
  mesh = sharding.make_mesh(sizes)
  model = runs.child()
  where = param_shardings(model.config, mesh)
  in_pieces = jax.tree.map(lambda x: lazily(x)[0] if x.ndim else x, model.params)
  whole, found = place(model.params, where), place(in_pieces, where)
  for a, b, c in zip(*map(jax.tree.leaves, (whole, found, model.params)), strict=True):
    assert a.sharding == b.sharding
    np.testing.assert_array_equal(np.asarray(a), c)
    np.testing.assert_array_equal(np.asarray(b), c)


def test_placed_arrays_are_copies():
  """The train state is donated: it must not write into the caller's arrays."""
  mesh = sharding.make_mesh({'data': -1})
  x = np.zeros((512, 512), np.float32)
  placed = place({'x': x}, {'x': jax.NamedSharding(mesh, jax.P())})['x']
  x[...] = 1
  assert not np.asarray(placed).any()
