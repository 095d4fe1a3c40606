"""Two pools under one numbering: what is read is what numpy reads of them put side by side."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.at_rest import decoded, encoded
from alaya_jax.cache.tiers import Coded, HostPages, HostPool, Tiers, joined
from alaya_jax.cache.views import read_pages
from alaya_jax.errors import ContextError

P, Q = 5, 9


@pytest.fixture(params=["", "int8", "fp8"])
def pools(rng, request):
    device, host = (rng.standard_normal((2, n, 4, 3)).astype(np.float32) for n in (P, Q))
    there = jnp.asarray(host)
    if kind := request.param:
        rows = encoded(host.reshape(2, Q * 4, 3), kind).reshape(2, Q, 4, -1)
        host = decoded(rows, kind, np.float32)
        there = Coded(jnp.asarray(rows), kind, np.dtype(np.float32))
        np.testing.assert_array_equal(there.on_host(np.array([3, 1])), host[:, [3, 1]])
    tiers = joined(jnp.asarray(device), there)
    assert isinstance(tiers, Tiers)
    assert tiers.shape == (2, P + Q, 4, 3)
    return tiers, np.concatenate([device, host], axis=1)


def test_a_pool_alone_stays_as_it_is():
    pool = jnp.zeros((1, 2, 3))
    assert joined(pool, None) is pool


def test_pages_and_tokens(pools, rng):
    tiers, both = pools
    ids = rng.permutation(P + Q)
    np.testing.assert_array_equal(jax.jit(Tiers.pages)(tiers, ids), both[:, ids])
    for id in (0, P - 1, P, P + Q - 1):
        np.testing.assert_array_equal(jax.jit(Tiers.page)(tiers, 1, id), both[1, id])
    head, slot = rng.integers(0, 2, (6, 7)), rng.integers(0, 4, (6, 7))
    id = rng.integers(0, P + Q, (6, 7))
    np.testing.assert_array_equal(
        jax.jit(Tiers.tokens)(tiers, head, id, slot), both[head, id, slot]
    )


@pytest.mark.parametrize("count", [1, 3, P, P + 1, Q])
def test_runs_are_of_one_pool(pools, count):
    tiers, both = pools
    run = jax.jit(Tiers.run, static_argnums=2)
    for first in range(P + Q - count + 1):
        whole = first + count <= P or first >= P
        assert bool(tiers.is_run(first, count)) == whole
        if whole:
            np.testing.assert_array_equal(run(tiers, first, count), both[:, first : first + count])
    assert not tiers.is_run(P + Q - count + 1, count)


@pytest.mark.parametrize("n", [1, 4, P + 2, Q + 3])
def test_a_list_of_pages_may_cross_from_one_to_the_other(pools, rng, n):
    tiers, both = pools
    lists = [np.arange(k, k + n) % (P + Q) for k in range(P + Q)]
    for ids in (*lists, rng.integers(0, P + Q, n)):
        np.testing.assert_array_equal(jax.jit(read_pages)(tiers, ids), both[:, ids])


def test_what_was_met_is_verified_once_piece_by_piece(rng):
    k = jnp.asarray(rng.standard_normal((2, Q, 4, 3)), jnp.float32)
    seen = []

    def verify(layer, pages, asked=None):
        seen.append((layer, pages.tolist(), asked.astype(int).tolist()))
        if layer == 1:
            raise ContextError("layer 1 is damaged")
        return 7

    layers = (HostPages(k, k),) * 2
    host = HostPool("here", layers, np.array([4, 2, 0]), np.array([7, 7, 7]), verify=verify)
    met = np.zeros((2, 2), np.uint8)
    host.verify_met(0, met)
    assert seen == []
    met[0, 1], met[1, 1] = 1, 3
    host.verify_met(0, met)
    assert seen.pop() == (0, [2], [[[1], [1]], [[0], [1]]])
    host.verify_met(0, met)
    assert seen == []
    met[0] = 3
    host.verify_met(0, met)
    assert seen.pop() == (0, [4, 2], [[[1, 0], [0, 0]], [[1, 1], [0, 0]]])
    for _ in range(2):  # what is damaged stays so
        with pytest.raises(ContextError, match="layer 1 is damaged"):
            host.verify_met(1, met)
    reads = host.take_reads()
    assert reads.bytes_verified.tolist() == [14, 0]
    assert (reads.disk + reads.memory).tolist() == [2 + 2 + 3, 3 + 3]
    assert (reads.disk.tolist(), host.take_reads().disk.tolist()) == ([4, 3], [0, 0])


def test_a_second_holder_counts_for_itself(rng):
    k = jnp.zeros((2, Q, 4, 3))
    released = []
    host = HostPool(
        "here",
        (HostPages(k, k),),
        np.array([4, 2]),
        np.array([7, 7]),
        release=lambda: released.append(1),
    )
    other = host.again().again()
    host.meet(0, 2)
    other.meet(0, 2, in_pool=5)
    assert host.reads.disk.tolist() == [4]
    assert host.reads.bytes_read.tolist() == [2 * k.nbytes * 2 // Q]
    assert (other.reads.disk.tolist(), other.reads.memory.tolist()) == ([0], [4])
    assert other.reads.pool.tolist() == [5]
    del host
    gc.collect()
    assert not released, "somebody holds it still"
    del other
    gc.collect()
    assert released == [1]


def test_mapped_pages_are_verified_once_and_let_go_with_their_last_holder(rng):
    k = rng.standard_normal((2, Q, 4, 3)).astype(np.float32)
    seen, released = [], []

    def verify(layer, pages, asked=None):
        assert asked is None
        seen.append((layer, list(pages)))
        if layer == 1:
            raise ContextError("layer 1 is damaged")
        return 7

    layers = tuple(HostPages(jnp.asarray(k + i), jnp.asarray(k - i)) for i in range(2))
    listed = np.array([4, 2]), np.array([7, 7])
    host = HostPool("here", layers, *listed, verify=verify, release=lambda: released.append(1))
    assert host.num_pages == Q
    host.verify(0)
    host.verify(0)
    assert seen == [(0, [4, 2])]
    for _ in range(2):  # what is damaged stays so
        with pytest.raises(ContextError, match="layer 1 is damaged"):
            host.verify(1)
    with pytest.raises(ContextError, match="layer 1 is damaged"):
        host.read(np.array([2]))
    assert not released
    del host
    gc.collect()
    assert released == [1]
    host = HostPool("here", layers, *listed)
    assert host.verified() is layers
    keys, values = host.read(np.array([2, 4]))
    np.testing.assert_array_equal(keys, np.stack([k[:, [2, 4]], k[:, [2, 4]] + 1]))
    np.testing.assert_array_equal(values, np.stack([k[:, [2, 4]], k[:, [2, 4]] - 1]))
