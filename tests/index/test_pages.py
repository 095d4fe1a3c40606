"""Which index knows which page: built once, for every sequence that shares it, and again when the
page is written anew.
"""

import pytest

import alaya_jax as aj
from alaya_jax.cache.pool import PagePool, Sequence
from alaya_jax.index.pages import PageIndexes

BLOCK = aj.Block()


@pytest.fixture
def pool(tiny_model):
    return PagePool(tiny_model.config, tiny_model.dtype, 65, 16, "Budget()")


@pytest.fixture
def built(monkeypatch):
    """Pages of each build, in order."""
    calls = []
    build = PageIndexes._build

    def counted(self, state, layer, missing):
        calls.append((layer, missing.tolist()))
        build(self, state, layer, missing)

    monkeypatch.setattr(PageIndexes, "_build", counted)
    return calls


def of(pool, tokens):
    sequence = Sequence()
    pool.reserve(sequence, tokens)
    sequence.length = tokens
    return sequence


def test_only_full_pages_are_known_and_only_once(pool, built):
    indexes, sequence = PageIndexes(pool), of(pool, 40)
    found = indexes.cover([BLOCK, aj.Flat()], [sequence])
    assert found.covered.tolist() == [32]
    assert found.layers[1] is None, "a flat index holds nothing"
    assert built == [(0, sorted(sequence.pages[:2].tolist()))]
    indexes.cover([BLOCK, aj.Flat()], [sequence])
    assert len(built) == 1


def test_a_shared_page_is_built_for_all_and_a_new_one_beside_it(pool, built):
    indexes, first = PageIndexes(pool), of(pool, 32)
    indexes.cover([BLOCK, aj.Flat()], [first])
    second = pool.share(first, 32)
    pool.reserve(second, 16)
    second.length = 48
    found = indexes.cover([BLOCK, aj.Flat()], [first, second])
    assert found.covered.tolist() == [32, 48]
    assert built[1:] == [(0, [int(second.pages[2])])]


def test_a_page_that_another_sequence_writes_is_built_again(pool, built):
    indexes, sequence = PageIndexes(pool), of(pool, 16)
    indexes.cover([BLOCK, aj.Flat()], [sequence])
    page = int(sequence.pages[0])
    pool.release(sequence)
    again = of(pool, 63 * 16)
    assert page in again.pages.tolist()
    indexes.cover([BLOCK, aj.Flat()], [again])
    assert page in built[1][1]


def test_bytes_by_index_over_all_layers(pool):
    indexes = PageIndexes(pool)
    assert indexes.nbytes() == {}
    indexes.cover([BLOCK, BLOCK], [of(pool, 16)])
    both = indexes.nbytes()
    assert list(both) == [repr(BLOCK)]
    single = PageIndexes(pool)
    single.cover([BLOCK, aj.Flat()], [of(pool, 16)])
    assert both[repr(BLOCK)] == 2 * single.nbytes()[repr(BLOCK)]
