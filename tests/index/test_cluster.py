"""Clusters: complete with the radius, and a share of the answer for a share of the cost without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.attention.paged import Pages
from alaya_jax.errors import ConfigError
from alaya_jax.index import cluster


@functools.partial(jax.jit, static_argnames=("z", "capacity"))
def compiled(layer, q, k_pages, ids, limit, low, beta, seed, z, capacity):
    pages = Pages(k_pages, k_pages, ids)
    return layer.search_range(q, pages, limit, low, beta, seed, z=z, capacity=capacity)


def find(layer, paged, beta, *, low=0, limit=None, seed=-np.inf, z=None, capacity=1024):
    rows = paged.q.shape[:3]
    limit = np.asarray(paged.length if limit is None else limit, np.int32)
    seed = np.broadcast_to(np.asarray(seed, np.float32), rows)
    beta = np.broadcast_to(np.asarray(beta, np.float32), rows)
    limit = np.broadcast_to(limit, rows[2])
    found = compiled(
        layer, paged.q, paged.k_pages, paged.ids, limit, np.int32(low), beta, seed, z, capacity
    )
    return jax.tree.map(np.asarray, found)


def keys_of(found, row):
    used = found.scores[row] > -np.inf
    assert used[: used.sum()].all()
    positions = found.positions[row][used].tolist()
    assert len(set(positions)) == len(positions)
    return set(positions)


def build(paged, extra=20, **options):
    """Clusters over a padded array, whose padding is not to be looked at."""
    heads, n, dim = paged.k.shape
    keys = np.full((heads, n + extra, dim), np.nan, np.float32)
    keys[:, :n] = paged.k
    return cluster.build(jnp.asarray(keys), n, **options)


@pytest.fixture(scope="module", params=["random", "clustered", "real 20"])
def built(request, all_keys):
    paged = all_keys[request.param](np.random.default_rng(2))
    return paged, build(paged)


def test_each_key_is_in_one_cluster(built):
    paged, layer = built
    n = paged.length
    for head in range(len(paged.k)):
        assert sorted(np.asarray(layer.members[head, :n]).tolist()) == list(range(n))
        first = np.asarray(layer.first[head])
        assert first[0] == 0
        assert first[-1] == n
        for m in np.flatnonzero(np.diff(first)):
            members = np.asarray(layer.members[head, first[m] : first[m + 1]])
            assert (np.diff(members) > 0).all()
            keys = paged.k[head, members].astype(np.float64)
            np.testing.assert_allclose(layer.centroids[head, m], keys.mean(0), rtol=1e-4, atol=1e-4)
            away = np.linalg.norm(keys - keys.mean(0), axis=-1)
            np.testing.assert_allclose(layer.radius[head, m], away.max(), rtol=1e-3, atol=1e-3)
            rms = np.sqrt(np.mean(away**2))
            np.testing.assert_allclose(layer.spread[head, m], rms, rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    spread=st.floats(0, 1.2),
    low=st.integers(0, 1000),
    limit=st.integers(0, 1100),
    above=st.none() | st.floats(-1, 1),
)
def test_with_the_radius_dipr_is_complete(built, spread, low, limit, above):
    paged, layer = built
    true = paged.scores()
    scale = true.max() - true.min()
    beta = spread * scale
    seed = -np.inf if above is None else true.max() + above * scale
    found = find(layer, paged, beta, low=low, limit=limit, seed=seed)
    slip = 1e-5 * scale  # float32 scores
    for row in np.ndindex(true.shape[:3]):
        mine = keys_of(found, row)
        eligible = np.arange(low, min(limit, paged.length))
        scores = true[row][eligible]
        best = max(scores.max(initial=-np.inf), seed)
        assert mine >= set(eligible[scores >= best - beta + slip].tolist())
        assert mine <= set(eligible[scores >= best - beta - slip].tolist())
        used = found.positions[row][: len(mine)]
        np.testing.assert_allclose(found.scores[row][: len(mine)], true[row][used], atol=slip)
    assert not found.overflow.any()


def test_without_it_less_is_read(built):
    paged, layer = built
    true = paged.scores()
    beta = 0.1 * np.ptp(true, axis=-1)
    complete, some = find(layer, paged, beta), find(layer, paged, beta, z=0.5)
    assert some.visited.sum() < complete.visited.sum()
    assert (some.count > 0).all()


def test_overflow_is_flagged(built):
    paged, layer = built
    beta = 0.3 * np.ptp(paged.scores(), axis=-1)
    wide, narrow = find(layer, paged, beta), find(layer, paged, beta, capacity=24)
    assert narrow.overflow.any()
    for row in np.argwhere(~narrow.overflow):
        assert keys_of(narrow, tuple(row)) == keys_of(wide, tuple(row))


def test_segments_and_odd_shapes(make_keys, monkeypatch):
    """Several segments, the last one short; queries of one head and page of odd size."""
    monkeypatch.setattr(cluster, "SEGMENT", 64)
    rng = np.random.default_rng(0)
    paged = make_keys(rng, heads=2, n=205, dim=8, group=1, t=2, page_size=7)
    seen = []
    layer = build(paged, extra=0, cluster_size=5, on_block=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert layer.centroids.shape == (2, 4 * 12, 8)
    true = paged.scores()
    found = find(layer, paged, 20.0, low=10, limit=[205, 100])
    for row in np.ndindex(true.shape[:3]):
        eligible = np.arange(10, (205, 100)[row[2]])
        scores = true[row][eligible]
        assert keys_of(found, row) == set(eligible[scores >= scores.max() - 20.0].tolist())


def test_settings_that_make_no_sense_are_refused(built):
    paged, layer = built
    with pytest.raises(ConfigError, match="capacity=0"):
        find(layer, paged, 1.0, capacity=0)
    with pytest.raises(ConfigError, match="clusters of 0"):
        build(paged, cluster_size=0)
