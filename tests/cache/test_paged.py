"""Pages against plain lists of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.cache import (
    NO_PAGE,
    UNUSED,
    PagedKV,
    PageTable,
    append,
    append_layer,
    copy_pages,
    read_tokens,
    write_pages,
)

HEADS, PAGES, PAGE, DIM, LAYERS, WIDTH = 2, 14, 4, 3, 2, 6
append = jax.jit(append, static_argnames="layer")


def filled(value: float) -> PagedKV:
    shape = (HEADS, PAGES, PAGE, DIM)
    return PagedKV(*((jnp.full(shape, value),) * LAYERS for _ in "kv"))


def table_of(pages: list[list[int]], lengths: list[int]) -> PageTable:
    """Entries past a sequence's last page are pages of others: nothing may be written there."""
    others = [[p for p in range(1, PAGES) if p not in own] for own in pages]
    rows = [(own + other)[:WIDTH] for own, other in zip(pages, others, strict=True)]
    return PageTable(jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32))


@pytest.mark.smoke
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    t=st.sampled_from([1, 3, 9]),
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_append_writes_the_new_tokens_and_nothing_else(lengths, t, counts, seed):
    rng = np.random.default_rng(seed)
    counts = [min(c, t) for c in counts]
    needed = [-(-(n + c) // PAGE) for n, c in zip(lengths, counts, strict=True)]
    if sum(needed) >= PAGES:
        lengths = [n // 3 for n in lengths]
        needed = [-(-(n + c) // PAGE) for n, c in zip(lengths, counts, strict=True)]
    ids = iter(rng.permutation(np.arange(1, PAGES)).tolist())
    pages = [[next(ids) for _ in range(n)] for n in needed]
    k, v = rng.standard_normal((2, 3, t, HEADS, DIM)).astype(np.float32)

    before = filled(-1.0)
    after = append(before, 1, k, v, table_of(pages, lengths), jnp.asarray(counts))

    for pool, new in ((after.k[1], k), (after.v[1], v)):
        expected = np.full((HEADS, PAGES, PAGE, DIM), -1, np.float32)
        for b, (start, count) in enumerate(zip(lengths, counts, strict=True)):
            for i in range(count):
                page, slot = divmod(start + i, PAGE)
                expected[:, pages[b][page], slot] = new[b, i]
        owned = [p for p in range(PAGES) if p != NO_PAGE]
        np.testing.assert_array_equal(np.asarray(pool)[:, owned], expected[:, owned])
    np.testing.assert_array_equal(after.k[0], before.k[0])
    np.testing.assert_array_equal(after.v[0], before.v[0])


@jax.jit
def append_in_parts(pool, k, table, count):
    """What two devices do, with half of the pool and of the table's columns each."""
    parts = []
    for part, ids, start in zip(
        jnp.split(pool, 2, axis=1),
        jnp.split(table.pages, 2, axis=1),
        jnp.split(table.start, 2, axis=1),
        strict=True,
    ):
        own = PageTable(ids, table.length, start)
        parts.append(append_layer(part, part, k, k, own, count)[0])
    return jnp.concatenate(parts, axis=1)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    t=st.sampled_from([1, 6]),
    counts=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_append_where_each_device_holds_some_of_the_pages(lengths, t, counts, seed):
    """Pages of each sequence on two devices, in any order; no other page is touched."""
    rng = np.random.default_rng(seed)
    counts = [min(c, t) for c in counts]
    half = PAGES // 2
    free = rng.permutation(np.setdiff1d(np.arange(PAGES), [NO_PAGE, half])).tolist()
    pages = [
        [free.pop() for _ in range(-(-(n + c) // PAGE))]
        for n, c in zip(lengths, counts, strict=True)
    ]
    ids = rng.integers(0, half, (3, 2, WIDTH))  # past the last page anything may be there
    start = np.full((3, 2, WIDTH), UNUSED)
    for b, own in enumerate(pages):
        used = [0, 0]
        for i, page in enumerate(own):
            shard, local = divmod(page, half)
            ids[b, shard, used[shard]], start[b, shard, used[shard]] = local, i * PAGE
            used[shard] += 1
    table = PageTable(
        *(jnp.asarray(x, jnp.int32) for x in (ids.reshape(3, -1), lengths, start.reshape(3, -1)))
    )
    k = rng.standard_normal((3, t, HEADS, DIM)).astype(np.float32)
    expected = np.full((HEADS, PAGES, PAGE, DIM), -1, np.float32)
    after = append_in_parts(jnp.asarray(expected), k, table, jnp.asarray(counts))
    for b, (first, count) in enumerate(zip(lengths, counts, strict=True)):
        for i in range(count):
            page, slot = divmod(first + i, PAGE)
            expected[:, pages[b][page], slot] = k[b, i]
    owned = [p for p in range(PAGES) if p not in (NO_PAGE, half)]
    np.testing.assert_array_equal(np.asarray(after)[:, owned], expected[:, owned])


@pytest.mark.parametrize("t", [1, 5])
def test_append_at_the_end_of_a_full_table_for_a_sequence_without_new_tokens(t, rng):
    """The page behind the table's end does not exist: it is asked for, and nothing is written."""
    full = list(range(1, 1 + WIDTH))
    k = rng.standard_normal((2, t, HEADS, DIM)).astype(np.float32)
    table = PageTable(jnp.asarray([full, [8, 9, 10, 11, 12, 13]]), jnp.asarray([WIDTH * PAGE, 3]))
    after = append(filled(-1.0), 0, k, k, table, jnp.asarray([0, 1]))
    expected = np.full((HEADS, PAGES, PAGE, DIM), -1, np.float32)
    expected[:, 8, 3] = k[1, 0]
    np.testing.assert_array_equal(np.asarray(after.k[0])[:, 1:], expected[:, 1:])


def test_append_rounds_to_the_type_of_the_pages():
    kv = jax.tree.map(lambda x: x.astype(jnp.bfloat16), filled(0.0))
    k = jnp.full((1, 1, HEADS, DIM), 1.00390625)  # 1 + 2**-8: half of bfloat16's step above 1
    after = append(kv, 0, k, 3 * k, table_of([[5]], [0]), jnp.asarray([1]))
    assert after.k[0].dtype == jnp.bfloat16
    assert np.all(np.asarray(after.k[0][:, 5, 0], np.float32) == 1.0)


def test_copy_write_read(rng):
    kv = filled(0.0)
    new = rng.standard_normal((HEADS, 3, PAGE, DIM)).astype(np.float32)
    pool = write_pages(kv.k[0], jnp.asarray([7, NO_PAGE, 2]), new)
    kv = kv.replace_layer(0, pool, pool + 1)
    kv = copy_pages(kv, jnp.asarray([7, 2]), jnp.asarray([4, 9]))
    for pool, offset in ((kv.k[0], 0), (kv.v[0], 1)):
        got = np.asarray(read_tokens(pool, jnp.asarray([9, 4, 7])))
        pages = [new[:, 2], new[:, 0], new[:, 0]]
        np.testing.assert_array_equal(got, np.concatenate(pages, axis=1) + offset)
    untouched = [p for p in range(PAGES) if p not in (NO_PAGE, 7, 2, 4, 9)]
    assert np.all(np.asarray(kv.k[0])[:, untouched] == 0)
    assert np.all(np.asarray(kv.k[1]) == 0)
