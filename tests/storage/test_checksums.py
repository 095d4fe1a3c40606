"""Checksums of pages: any change, any wrong place, and what lay there before are noticed."""

import numpy as np
import pytest

from alaya_jax.storage import checksums
from alaya_jax.storage.interface import DTYPES

HEADS, PAGES, SIZE, DIM = 3, 4, 5, 7
SLOTS, BIRTHS = (4, 5, 6, 9), (7, 7, 8, 8)


@pytest.fixture(params=DTYPES)
def data(request, rng):
    return rng.standard_normal((HEADS, PAGES, SIZE, DIM)).astype(DTYPES[request.param])


def of(data, slots=SLOTS, births=BIRTHS, layer=1, kind=0):
    return checksums.of_pages(data, np.array(slots, np.int32), np.array(births), layer, kind)


def test_one_number_a_page_and_head_whatever_is_beside_it(data):
    all = of(data)
    assert all.shape == (PAGES, HEADS)
    assert all.dtype == np.uint32
    for page in range(PAGES):
        some = slice(page, page + 1)
        alone = of(np.ascontiguousarray(data[:, some]), SLOTS[some], BIRTHS[some])
        assert (alone == all[page]).all()
    for head in range(HEADS):
        where = np.array(SLOTS, np.int32), np.array(BIRTHS), 1, 0, head
        assert (checksums.of_pages(data[head : head + 1], *where)[:, 0] == all[:, head]).all()


def test_every_bit_counts(data, rng):
    before = of(data)
    for _ in range(200):
        changed = data.copy()
        flat = changed.reshape(-1).view(np.uint8)
        at = rng.integers(flat.size)
        flat[at] ^= 1 << rng.integers(8)
        head, page = divmod(at // (flat.size // HEADS // PAGES), PAGES)
        differ = of(changed) != before
        assert differ[page, head]
        assert differ.sum() == 1


def test_heads_and_pages_that_change_places_are_noticed(data):
    before = of(data)
    middle = HEADS // 2  # of an odd number of heads it stays where it was
    differ = of(np.ascontiguousarray(data[::-1])) != before
    assert (differ == (np.arange(HEADS) != middle)).all()
    assert (of(np.ascontiguousarray(data[:, ::-1])) != before).all()


@pytest.mark.parametrize(
    "place",
    [
        {"slots": (5, 6, 7, 10)},
        {"births": (8, 8, 7, 7)},
        {"layer": 2},
        {"layer": 0},
        {"kind": 1},
    ],
    ids=str,
)
def test_the_same_bytes_elsewhere_are_noticed(data, place):
    assert (of(data, **place) != of(data)).all()


def test_zeros_of_a_hole_are_no_page():
    empty = np.zeros((HEADS, 1, SIZE, DIM), np.float32)
    found = [
        checksums.of_pages(empty, np.array([s], np.int32), np.array([1]), 0, 0) for s in range(99)
    ]
    assert 0 not in np.concatenate(found)


def test_no_pages():
    assert of(np.zeros((HEADS, 0, SIZE, DIM)), (), np.zeros(0, np.int64)).shape == (0, HEADS)
