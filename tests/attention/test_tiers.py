"""Attention reads a page where it lies: any split of a sequence between the pool and mapped files
gives the answer of the pool alone, bit by bit.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.attention.engine import attend
from alaya_jax.cache import PageTable
from alaya_jax.cache.tiers import HostPages
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query import DIPR, Custom, Full, Tiles, TopK, Window
from alaya_jax.query.plan import Plan

HEADS, GROUP, DIM = 2, 3, 16
WINDOW = Window(8, 24)
PLANS = {
    "full": (Plan(Full()), 1),
    "full, a chunk": (Plan(Full()), 40),
    "window": (Plan(WINDOW), 1),
    "range": (Plan(DIPR(beta=12.0, window=WINDOW)), 1),
    "range, a chunk": (Plan(DIPR(beta=12.0, window=WINDOW)), 9),
    "promise": (Plan(DIPR(recovery=0.9, window=WINDOW)), 1),
    "best": (Plan(TopK(20, window=WINDOW)), 1),
    "own": (Plan(Custom(lambda scores, positions: scores > 3.0, window=WINDOW)), 1),
    "tiles": (Plan(Tiles(recovery=0.9)), 40),
}


def placed(rng, size, length, share, *, scattered):
    """The same sequence in a poisoned pool, and with its first pages in another."""
    count = -(-length // size)
    pool = np.full((2, HEADS, count + 9, size, DIM), np.nan, np.float32)
    host = np.full((2, HEADS, count + 5, size, DIM), np.nan, np.float32)
    ids = rng.permutation(count + 9)[:count] if scattered else 3 + np.arange(count)
    there = rng.permutation(count + 5)[:count] if scattered else 2 + np.arange(count)
    kv = rng.standard_normal((2, HEADS, count, size, DIM)).astype(np.float32)
    pool[:, :, ids] = kv
    whole = pool.copy()
    first = round(share * count)
    pool[:, :, ids[:first]] = np.nan  # a page is read where the table says, and nowhere else
    host[:, :, there[:first]] = kv[:, :, :first]
    mixed = ids.copy()
    mixed[:first] = there[:first] + pool.shape[2]
    return whole, ids, pool, host, mixed


@pytest.mark.parametrize(
    "size", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 7, 64))]
)
@pytest.mark.parametrize("name", PLANS)
def test_a_split_sequence_is_answered_as_one_that_is_not(rng, name, size):
    plan, t = PLANS[name]
    if isinstance(plan.query, Tiles) and size not in (16, 64):
        pytest.skip("blocks of whole pages")
    length = 333
    q = jnp.asarray(2 * rng.standard_normal((1, t, HEADS * GROUP, DIM)), jnp.float32)
    count = jnp.full(1, t, jnp.int32)

    def run(pool, ids, host=None):
        pages = np.zeros((1, -(-length // size) + 2), np.int32)
        pages[0, : len(ids)] = ids
        table = PageTable(jnp.asarray(pages), jnp.asarray([length - t], jnp.int32))
        beside = None if host is None else HostPages(*map(jnp.asarray, host))
        memory = LayerMemory(*map(jnp.asarray, pool), table, host=beside)
        return jax.tree.map(np.asarray, attend(plan, q, memory, count))

    for share, scattered in ((0.4, True), (1.0, False), (0.0, False)):
        whole, ids, pool, host, mixed = placed(rng, size, length, share, scattered=scattered)
        expected, counts = run(whole, ids)
        got, read = run(pool, mixed, host)
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(got, expected)
        read = dataclasses.replace(read, met=None)  # see test_met
        chex.assert_trees_all_equal(read, counts)


@pytest.mark.parametrize("name", PLANS)
def test_no_program_copies_what_it_reads(name):
    """By the compiler's account: mapped files may be larger than memory."""
    plan, t = PLANS[name]
    pages, size = 2**14, 16
    pool = jax.ShapeDtypeStruct((HEADS, 8, size, DIM), jnp.float32)
    mapped = jax.ShapeDtypeStruct((HEADS, pages, size, DIM), jnp.float32)
    table = PageTable(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 32), (1,))))
    memory = LayerMemory(pool, pool, table, host=HostPages(mapped, mapped))
    q = jax.ShapeDtypeStruct((1, t, HEADS * GROUP, DIM), jnp.float32)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = attend.lower(plan, q, memory, count).compile()
    one = HEADS * pages * size * DIM * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one / 4
