"""Walks over a graph against Algorithm 1 in plain Python, and what a built graph finds."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.cache.views import Pages
from alaya_jax.errors import ConfigError
from alaya_jax.index import GraphLayer, GraphSpec
from alaya_jax.index.graph import build as graph_build
from alaya_jax.index.graph.layer import Effort
from alaya_jax.index.graph.search import SECOND_HOP


@functools.partial(jax.jit, static_argnames=("l0", "capacity", "shared"))
def compiled_range(layer, q, k_pages, ids, limit, low, beta, seed, l0, capacity, shared):
    pages = Pages(k_pages, k_pages, ids)
    return layer.search_range(q, pages, limit, low, beta, seed, Effort(l0, capacity, shared))


@functools.partial(jax.jit, static_argnames=("k", "ef", "shared"))
def compiled_top(layer, q, k_pages, ids, limit, low, k, ef, shared):
    return layer.search_top(q, Pages(k_pages, k_pages, ids), limit, low, k, ef, shared=shared)


def find(layer, paged, beta, *, low=0, limit=None, seed=-np.inf, l0=4, capacity=320, shared=False):
    """search_range, as numpy."""
    rows = paged.q.shape[:3]
    limit = paged.length if limit is None else limit
    found = compiled_range(
        layer,
        paged.q,
        paged.k_pages,
        paged.ids,
        np.broadcast_to(np.asarray(limit, np.int32), rows[2]),
        np.int32(low),
        np.broadcast_to(np.asarray(beta, np.float32), rows),
        np.broadcast_to(np.asarray(seed, np.float32), rows),
        l0,
        capacity,
        shared,
    )
    return jax.tree.map(np.asarray, found)


def keys_of(found, row):
    """The positions found for a row; each once, first in the list, with a score."""
    used = found.scores[row] > -np.inf
    assert used[: used.sum()].all()
    positions = found.positions[row][used].tolist()
    assert len(set(positions)) == len(positions)
    return set(positions)


def exact(scores, beta, low, limit, seed=-np.inf):
    """DIPR's answer in low <= j < limit."""
    some = scores[low:limit]
    best = max(some.max(initial=-np.inf), seed)
    return set((low + np.flatnonzero(some >= best - beta)).tolist())


def algorithm_1(neighbours, scores, starts, l0, beta, seed, low, limit):
    """DIPRS as the paper has it, a key at a time; its answer and how many keys it scored."""
    listed, seen, best, scored = [], set(), seed, 0

    def try_append(key):
        nonlocal best, scored
        seen.add(key)
        scored += 1
        best = max(best, scores[key])
        if len(listed) <= l0 or scores[key] >= best - beta:
            listed.append(key)

    def eligible(keys):
        return [key for key in keys if low <= key < limit]

    def meet(keys, two_hops=True):
        for key in keys:
            if key < 0 or key in seen:
                continue
            if low <= key < limit:
                try_append(key)
            elif two_hops:
                seen.add(key)
                meet(eligible(neighbours[key][:SECOND_HOP]), two_hops=False)

    meet(starts)
    i = 0
    while i < len(listed):
        meet(neighbours[listed[i]])
        i += 1
    return {key for key in listed if scores[key] >= best - beta}, scored


def random_graph(rng, paged, degree=8, starts=6, width=None):
    """Any edges, some missing; more rows than keys."""
    heads, n, _ = paged.k.shape
    near = rng.integers(0, n, (heads, width or n + 9, degree)).astype(np.int32)
    near[rng.random(near.shape) < 0.2] = -1
    start = np.stack([rng.permutation(n)[:starts] for _ in range(heads)]).astype(np.int32)
    start[:, -1] = -1
    return GraphLayer(jnp.asarray(near), jnp.asarray(start), jnp.int32(n))


def complete_graph(paged):
    heads, n, _ = paged.k.shape
    near = np.broadcast_to(np.arange(n, dtype=np.int32), (heads, n, n))
    return GraphLayer(
        jnp.asarray(near), jnp.full((heads, 2), n // 2, jnp.int32), jnp.asarray(n, jnp.int32)
    )


@pytest.fixture(scope="module")
def odd(make_keys):
    """301 keys in pages of 7, two kv heads of three query heads, two query tokens."""
    rng = np.random.default_rng(3)
    return make_keys(rng, heads=2, n=301, dim=16, group=3, t=2, page_size=7)


@pytest.fixture(scope="module")
def odd_graph(odd):
    return random_graph(np.random.default_rng(4), odd)


@pytest.mark.parametrize("beta", [15.0, 40.0])
@pytest.mark.parametrize(("low", "limit"), [(0, 301), (20, 150)])
def test_walk_is_algorithm_1(odd, odd_graph, beta, low, limit):
    """With the threshold known from the start, the order of visits does not matter."""
    true = odd.scores()
    seed = true[..., low:limit].max(-1)
    found = find(odd_graph, odd, beta, low=low, limit=limit, seed=seed, l0=1)
    for row in np.ndindex(true.shape[:3]):
        scores = true[row]
        starts = sorted(
            {*np.asarray(odd_graph.starts[row[0]]).tolist(), low} - {-1},
            key=lambda j: -scores[j] if low <= j < limit else np.inf,
        )
        want, scored = algorithm_1(
            np.asarray(odd_graph.neighbours[row[0]]), scores, starts, 1, beta, seed[row], low, limit
        )
        assert keys_of(found, row) == want
        assert found.visited[row] == scored
    assert not found.overflow.any()


@pytest.mark.parametrize("shared", [False, True])
@settings(max_examples=25)
@given(
    beta=st.floats(0, 60),
    low=st.integers(0, 301),
    limits=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    above=st.none() | st.floats(-20, 20),
)
def test_what_is_found_is_right(odd, odd_graph, shared, beta, low, limits, above):
    """Any graph: exact scores of eligible keys, none below the range of the best that is known."""
    true = odd.scores()
    seed = -np.inf if above is None else above
    found = find(odd_graph, odd, beta, low=low, limit=limits, seed=seed, shared=shared)
    assert not found.overflow.any()
    for row in np.ndindex(true.shape[:3]):
        scores, limit = true[row], min(limits[row[2]], odd.length)
        mine = keys_of(found, row)
        assert all(low <= j < limit for j in mine)
        c = len(mine)
        np.testing.assert_allclose(
            found.scores[row][:c], scores[found.positions[row][:c]], rtol=1e-5, atol=1e-4
        )
        best = max([seed, *(scores[j] for j in mine)])
        assert all(scores[j] >= best - beta - 1e-3 for j in mine)
        if limit > low and scores[low:limit].max() <= best:
            assert mine <= exact(scores, beta + 1e-3, low, limit, seed)


SHAPES = {
    "one head": ({"heads": 1, "n": 33, "group": 1, "t": 1, "page_size": 16}, True),
    "group of 8": ({"heads": 2, "n": 61, "group": 8, "t": 1, "page_size": 5}, True),
    "group of 8, each alone": ({"heads": 2, "n": 61, "group": 8, "t": 1, "page_size": 5}, False),
    "tokens": ({"heads": 3, "n": 47, "group": 2, "t": 3, "page_size": 1}, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_complete_graph_gives_all_of_dipr(make_keys, shape):
    shape, shared = SHAPES[shape]
    paged = make_keys(np.random.default_rng(0), dim=8, **shape)
    layer, true = complete_graph(paged), paged.scores()
    for beta, low, limit in ((0, 0, None), (9.5, 0, None), (20, 7, 30), (np.inf, 3, None)):
        found = find(layer, paged, beta, low=low, limit=limit, shared=shared)
        high = limit or paged.length
        for row in np.ndindex(true.shape[:3]):
            assert keys_of(found, row) == exact(true[row], beta, low, high)
        assert (found.visited == high - low).all()


def test_shared_walk_finds_what_its_heads_find(odd, odd_graph):
    """With a threshold that is known, a walk of the group goes wherever one of its heads does."""
    seed = odd.scores().max(-1)
    alone, shared = (find(odd_graph, odd, 30, seed=seed, shared=s) for s in (False, True))
    for row in np.ndindex(seed.shape):
        assert keys_of(alone, row) <= keys_of(shared, row)
    assert shared.visited.sum(1).sum() > alone.visited.max()


def test_seed_spares_visits(odd, odd_graph):
    best = odd.scores().max(-1)
    counts = [find(odd_graph, odd, 15, seed=s).visited.sum() for s in (-np.inf, best, best + 30)]
    assert counts[0] > counts[1] > counts[2]


def test_overflow_is_flagged(odd, odd_graph):
    """A row that needs more than there is room for says so; the others are as with more room."""
    wide = find(odd_graph, odd, 12)
    narrow = find(odd_graph, odd, 12, capacity=20)
    assert narrow.overflow.any()
    assert not narrow.overflow.all()
    for row in np.argwhere(~narrow.overflow):
        assert keys_of(narrow, tuple(row)) == keys_of(wide, tuple(row))


def test_second_hop_is_taken_where_the_first_is_not_eligible(make_keys):
    """10 -> 2 -> 11 is walked for low = 5; 10 -> 3 -> 4 -> 12 is not."""
    paged = make_keys(np.random.default_rng(1), heads=1, n=16, dim=8, group=1, t=1, page_size=4)
    near = np.full((1, 16, 2), -1, np.int32)
    near[0, 10], near[0, 2], near[0, 3], near[0, 4] = (2, 3), (11, -1), (4, -1), (12, -1)
    layer = GraphLayer(jnp.asarray(near), jnp.asarray([[10]]), jnp.int32(16))
    assert keys_of(find(layer, paged, np.inf, low=5), (0, 0, 0)) == {5, 10, 11}
    assert keys_of(find(layer, paged, np.inf), (0, 0, 0)) == {0, 2, 3, 4, 10, 11, 12}


@pytest.mark.parametrize("shared", [False, True])
def test_top_of_a_complete_graph(make_keys, shared):
    paged = make_keys(np.random.default_rng(5), heads=2, n=61, dim=8, group=2, t=2, page_size=8)
    limit, low = np.array([61, 40], np.int32), np.int32(3)
    found = compiled_top(
        complete_graph(paged), paged.q, paged.k_pages, paged.ids, limit, low, 9, 12, shared
    )
    true = paged.scores()
    for row in np.ndindex(true.shape[:3]):
        want = 3 + np.argsort(-true[row][3 : limit[row[2]]])[:9]
        np.testing.assert_array_equal(found.positions[row], want)
    assert not found.overflow.any()


@pytest.mark.parametrize("k", [1, 9])
def test_top_holds_more_starts_than_it_wants(odd, k):
    """A walk for few keys starts near the best, and its list has room for what it meets there."""
    graph = random_graph(np.random.default_rng(4), odd, degree=32, starts=290)
    limit = np.full(2, odd.length, np.int32)
    found = compiled_top(graph, odd.q, odd.k_pages, odd.ids, limit, np.int32(0), k, 2 * k, False)
    assert not found.overflow.any()
    best = np.sort(odd.scores(), -1)[..., -k:]
    hit = np.isclose(best[..., None], np.asarray(found.scores)[..., None, :]).any(-1)
    assert hit[..., -1].mean() > 0.8  # nearly every key is a start, and the best of them are taken
    assert hit.mean() > 0.6


def test_top_with_too_few_keys(make_keys):
    paged = make_keys(np.random.default_rng(5), heads=2, n=61, dim=8, group=2, t=2, page_size=8)
    found = compiled_top(
        complete_graph(paged), paged.q, paged.k_pages, paged.ids, np.full(2, 7), 3, 9, 12, False
    )
    assert (found.count == 4).all()


def test_settings_that_make_no_sense_are_refused(odd, odd_graph):
    with pytest.raises(ConfigError, match="ef must be"):
        compiled_top(odd_graph, odd.q, odd.k_pages, odd.ids, np.full(2, 7), 0, 9, 3, False)
    with pytest.raises(ConfigError, match="l0=0"):
        find(odd_graph, odd, 1.0, l0=0)
    with pytest.raises(ConfigError, match="degree"):
        GraphSpec(degree=4, beside=2)
    with pytest.raises(ConfigError, match="listed"):
        GraphSpec(listed=0)


def test_most_asked_counts_edges(rng):
    n, width = 20, 3
    source, target = rng.integers(0, n, (2, 900)).astype(np.int32)
    got = graph_build.most_asked(source, target, n, width)
    times = collections.Counter(zip(source.tolist(), target.tolist(), strict=True))
    for node in range(n):
        want = sorted((c for (s, _), c in times.items() if s == node), reverse=True)[:width]
        assert [times[node, t] for t in got[node].tolist() if t >= 0] == want


@pytest.mark.parametrize("n", [37, 3000])
def test_best_keys_are_exact(rng, n):
    """By sorting all, and by chunks."""
    keys, q = rng.standard_normal((n, 8)), rng.standard_normal((5, 8))
    low, high = 3, np.array([n, 0, n // 2, 6, n - 1])
    got = np.asarray(
        graph_build.best_keys(*(jnp.asarray(x, jnp.float32) for x in (keys, q)), low, high, 10)
    )
    for row, scores in enumerate(q @ keys.T):
        scores = np.where((np.arange(n) >= low) & (np.arange(n) < high[row]), scores, -np.inf)
        want = np.argsort(-scores)[:10]
        np.testing.assert_array_equal(got[row], np.where(scores[want] > -np.inf, want, -1))


@pytest.fixture(scope="module")
def asked(make_keys):
    """1,021 keys of 12 topics, and a graph from queries like those that will be asked."""
    rng = np.random.default_rng(6)
    centres = rng.standard_normal((12, 16))
    paged = make_keys(rng, heads=2, dim=16, group=2, t=40)
    topic = rng.integers(0, 12, (2, 2, 40))
    paged = dataclasses.replace(
        paged,
        k=(2 * centres[rng.integers(0, 12, (2, 1021))] + paged.k / 2).astype(np.float32),
        q=(3 * centres[topic] + paged.q / 3).astype(np.float32),
    )
    seen = []
    keys = np.full((2, 1100, 16), np.nan, np.float32)  # what lies past the length is not read
    keys[:, : paged.length] = paged.k
    layer = graph_build.build(
        jnp.asarray(keys),
        paged.length,
        jnp.asarray(paged.q[:, :, :36].reshape(2, 72, 16)),
        spec=GraphSpec(degree=24, listed=64, starts=16),
        on_block=lambda done, all_: seen.append((done, all_)),
    )
    return paged, layer, seen


def test_build_reports_its_blocks(asked):
    assert asked[2] == [(1, 2), (2, 2)]


def test_built_graph_stays_within_the_context(asked):
    paged, layer, _ = asked
    near, n = np.asarray(layer.neighbours), paged.length
    assert near.shape == (2, 1100, 24)
    assert near.max() < n
    assert (near[:, n:] == -1).all()
    assert (near[:, :n] != np.arange(n)[:, None]).all()
    for head in near[:, :n]:
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in head[:, :22])
        np.testing.assert_array_equal(head[1:-1, 22:], np.arange(1, n - 1)[:, None] + [1, -1])


def test_starts_grow_with_the_context(rng):
    """A search with a good seed does not walk up to its answer: it must start there."""
    assert [graph_build.default_starts(n) for n in (1, 2**14, 2**14 + 1, 2**17)] == [
        64,
        64,
        128,
        512,
    ]
    n = 2**14 + 2**13
    lists = rng.permutation(n)[:600].reshape(1, 300, 2).astype(np.int32)
    lists[0, :200, 0] = np.repeat(lists[0, :100, 0], 2)  # the best of two queries each
    starts = np.asarray(graph_build.link(lists, n, n, GraphSpec(listed=2)).starts[0])
    assert len(starts) == 128
    assert set(starts[:100]) == set(lists[0, :200, 0])
    assert (starts >= 0).all()


def test_every_prefix_of_a_list_is_found(make_keys):
    """Of a query that the graph was built from, as long as no key has more edges than fit."""
    rng = np.random.default_rng(8)
    paged = make_keys(rng, heads=2, n=301, dim=16, group=1, t=3, page_size=16)
    spec = GraphSpec(degree=64, listed=48, starts=3)
    layer = graph_build.build(jnp.asarray(paged.k), 301, jnp.asarray(paged.q[:, 0]), spec=spec)
    true = paged.scores()
    ranked = -np.sort(-true, axis=-1)
    for count in (1, 2, 17, 48):
        beta = ranked[..., 0] - ranked[..., count - 1] + 1e-4
        found = find(layer, paged, beta, l0=1)
        for row in np.ndindex(true.shape[:3]):
            assert keys_of(found, row) == exact(true[row], beta[row], 0, 301)


@pytest.mark.parametrize("limit", [1021, 400])
def test_critical_keys_of_new_queries(asked, limit):
    """Queries that the graph was not built from, all of the context or the first part of it."""
    paged, layer, _ = asked
    beta = 17
    found = find(layer, paged, beta, limit=limit, l0=8, capacity=320)
    true = paged.scores()
    hit = total = 0
    for row in np.ndindex(true.shape[:3]):
        if row[2] >= 36:
            want = exact(true[row], beta, 0, limit)
            hit += len(want & keys_of(found, row))
            total += len(want)
    assert total > 100
    assert hit >= 0.95 * total


def test_queries_list_what_they_could_see(make_keys):
    """Keys before `low` and from a query's position on have edges by position only."""
    rng = np.random.default_rng(9)
    paged = make_keys(rng, heads=1, n=200, dim=16, group=1, t=30, page_size=16)
    layer = graph_build.build(
        jnp.asarray(paged.k),
        200,
        jnp.asarray(paged.q[:, 0]),
        jnp.full((1, 30), 90),
        low=20,
        spec=GraphSpec(degree=12, listed=16, starts=8),
    )
    near = np.asarray(layer.neighbours[0])
    assert (near[:20, :-2] == -1).all()
    assert (near[90:, :-2] == -1).all()
    assert (near[20:90, :-2] >= 0).any()
    listed = near[:, :-2]
    assert ((listed == -1) | ((listed >= 20) & (listed < 90))).all()
