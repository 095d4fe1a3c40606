"""Indexes of a pool's pages: each page is looked at once, and anew when it is written again."""

import jax
import numpy as np
import pytest

from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.index import Block, Flat, Sketch, pages
from alaya_jax.index.pages import PageIndexes


@pytest.fixture
def pool(tiny_model):
    return PagePool(tiny_model.config, tiny_model.dtype, 33, 16, "Budget()")


@pytest.fixture
def built(monkeypatch):
    """(ids) of each build."""
    calls, build = [], pages._build_index

    def counted(index, k, v, ids, filled, basis, **static):
        calls.append(np.asarray(ids)[np.asarray(filled) > 0].tolist())
        return build(index, k, v, ids, filled, basis, **static)

    monkeypatch.setattr(pages, "_build_index", counted)
    return calls


def fill(pool, sequence, count, rng):
    """More tokens, of numbers at random, in all layers; `count` is whole pages."""
    start = sequence.length // 16 * 16
    pool.reserve(sequence, count)
    sequence.length += count
    shape = pool.config.num_key_value_heads, sequence.length - start, pool.config.head_dim
    for layer in range(pool.config.num_hidden_layers):
        k, v = rng.normal(size=(2, *shape)).astype(np.float32)
        pool.write(sequence, layer, k, v, start)


def test_a_page_is_built_once_and_again_when_it_may_have_changed(pool, built, rng):
    indexes, wanted, first = PageIndexes(pool), [Flat(), Sketch()], PagedSequence()
    fill(pool, first, 48, rng)
    known = indexes.cover(wanted, [first])
    assert known.layers[0] is None
    assert known.covered.tolist() == [48]
    assert built == [first.pages.tolist()]
    second = pool.share(first, 40)
    indexes.cover(wanted, [first, second])
    assert len(built) == 1, "shared pages are known"
    last = int(first.pages[2])
    pool.release(first)
    assert second.pages[2] == last
    fill(pool, second, 8, rng)  # it holds its third page alone, and writes there
    indexes.cover(wanted, [second])
    assert built[1:] == [[last]]
    fresh = PageIndexes(pool).cover(wanted, [second]).layers[1]
    mine = indexes.cover(wanted, [second]).layers[1]
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(fresh), strict=True):
        at = second.pages
        np.testing.assert_array_equal(np.asarray(one)[:, at], np.asarray(other)[:, at])


def test_generations_grow_where_room_is_made(pool, rng):
    sequence = PagedSequence()
    before = pool.generations(np.arange(33))
    assert (before >= 1).all()
    fill(pool, sequence, 32, rng)
    after = pool.generations(np.arange(33))
    grown = np.flatnonzero(after > before)
    assert sorted(grown) == sorted(sequence.pages)


def test_bytes_of_each_index(pool, rng):
    indexes, sequence = PageIndexes(pool), PagedSequence()
    fill(pool, sequence, 16, rng)
    found = indexes.cover([Block("bounds"), Sketch()], [sequence])
    sizes = indexes.nbytes()
    assert set(sizes) == {repr(Block("bounds")), repr(Sketch())}
    assert sum(sizes.values()) == sum(x.nbytes for x in jax.tree.leaves(found.layers))
