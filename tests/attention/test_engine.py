"""The engine against its definitions in numpy float64."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax import configs
from alaya_jax.attention import Partial, merge
from alaya_jax.attention.engine import attend
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.index import Sketch
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models import LlamaConfig
from alaya_jax.query import DIPR, Full, TopK, Window
from alaya_jax.query.plan import Plan

KV_HEADS, DIM, PAGE = 2, 8, 4


def kept_keys(query, scores, position):
    """Set of keys a query attends to, from raw scores [S] of keys 0..position."""
    n = position + 1
    everything = set(range(n))
    if isinstance(query, Full):
        return everything
    window = query if isinstance(query, Window) else query.window
    inside = set(range(min(window.sink, n))) | set(range(max(0, n - window.recent), n))
    outside = sorted(everything - inside)
    if isinstance(query, DIPR):
        best = max(scores[:n])
        return inside | {j for j in outside if scores[j] >= best - query.beta}
    if isinstance(query, TopK):
        order = sorted(outside, key=lambda j: (-scores[j], j))
        return inside | set(order[: query.k])
    return inside


def expected(query, q, k, v, start):
    """q [T, H, D], k and v [S, K, D] of one sequence; float64."""
    t, heads, dim = q.shape
    group = heads // k.shape[1]
    out, count = np.zeros(q.shape), np.zeros((t, heads), int)
    for i in range(t):
        for h in range(heads):
            scores = k[:, h // group] @ q[i, h]
            keep = sorted(kept_keys(query, scores, start + i))
            weights = np.exp((scores[keep] - scores[keep].max()) / np.sqrt(dim))
            out[i, h] = weights @ v[keep, h // group] / weights.sum()
            count[i, h] = len(keep)
    return out, count


def make_batch(rng, lengths, t, group, pool_pages=64, consecutive=False):
    """Ragged sequences of keys scattered over a poisoned pool."""
    heads = KV_HEADS * group
    ends = [n + t for n in lengths]
    per_sequence = [-(-n // PAGE) for n in ends]
    order = np.arange(pool_pages) if consecutive else rng.permutation(pool_pages)
    pool = np.full((2, KV_HEADS, pool_pages, PAGE, DIM), np.nan, np.float32)
    table = np.zeros((len(lengths), max(per_sequence) + 2), np.int32)
    ks, vs, used = [], [], 0
    for b, (n, pages) in enumerate(zip(ends, per_sequence, strict=True)):
        ids = order[used : used + pages]
        used += pages
        table[b, :pages] = ids
        kv = rng.standard_normal((2, n, KV_HEADS, DIM)).astype(np.float32)
        for j in range(n):
            pool[:, :, ids[j // PAGE], j % PAGE] = kv[:, j]
        ks.append(kv[0])
        vs.append(kv[1])
    q = 2 * rng.standard_normal((len(lengths), t, heads, DIM)).astype(np.float32)
    return q, ks, vs, jnp.asarray(pool[0]), jnp.asarray(pool[1]), jnp.asarray(table)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many tiles and query blocks even in a small case."""
    monkeypatch.setattr("alaya_jax.cache.views.TILE_TOKENS", 16)
    monkeypatch.setattr("alaya_jax.attention.engine.QUERY_BLOCK", 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


QUERIES = [
    Full(),
    Window(sink=3, recent=5),
    DIPR(beta=4.0, window=Window(3, 5)),
    DIPR(beta=0.0, window=Window(0, 1)),
    DIPR(beta=float("inf"), window=Window(2, 3)),
    TopK(k=4, window=Window(3, 5)),
    TopK(k=1000, window=Window(1, 1)),
]


BATCHES = [([37], 1), ([5, 30, 0], 1), ([21, 2], 9)]
PAIRS = [
    pytest.param(
        query,
        *batch,
        # Each query with one batch is fast, and the two that retrieve with a chunk besides.
        marks=[] if i % 3 == j or (i in (2, 5) and j == 2) else pytest.mark.slow,
        id=f"{query}-{batch}",
    )
    for i, query in enumerate(QUERIES)
    for j, batch in enumerate(BATCHES)
]


@pytest.mark.parametrize(("query", "lengths", "t"), PAIRS)
def test_equals_definition(query, lengths, t, rng, small_blocks):
    q, ks, vs, k_pages, v_pages, pages = make_batch(rng, lengths, t, group=3)
    table = PageTable(pages, jnp.asarray(lengths, jnp.int32))
    count = jnp.full(len(lengths), t, jnp.int32)
    out, counts = attend(Plan(query), q, LayerMemory(k_pages, v_pages, table), count)
    for b, start in enumerate(lengths):
        want, want_count = expected(
            query, *(x.astype(np.float64) for x in (q[b], ks[b], vs[b])), start
        )
        np.testing.assert_allclose(out[b], want, atol=2e-6)
        np.testing.assert_array_equal(counts.attended[b], want_count)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    group=st.integers(1, 8),
    consecutive=st.booleans(),
    beta=st.floats(0, 20),
    seed=st.integers(0, 2**31),
)
def test_dipr_any_shape(lengths, group, consecutive, beta, seed):
    rng = np.random.default_rng(seed)
    query = DIPR(beta=beta, window=Window(2, 3))
    q, ks, vs, k_pages, v_pages, pages = make_batch(rng, lengths, 1, group, consecutive=consecutive)
    table = PageTable(pages, jnp.asarray(lengths, jnp.int32))
    out, counts = attend(
        Plan(query), q, LayerMemory(k_pages, v_pages, table), jnp.ones(len(lengths), jnp.int32)
    )
    for b, start in enumerate(lengths):
        # float32 scores, so that a key on the very edge falls on the same side
        want, want_count = expected(query, q[b], ks[b], vs[b], start)
        if np.array_equal(counts.attended[b], want_count):
            np.testing.assert_allclose(out[b], want, atol=1e-5)
        else:  # a score within rounding of the threshold
            assert np.abs(np.asarray(counts.attended[b]) - want_count).max() <= 1


def test_infinite_beta_is_full_attention(rng):
    q, _, _, k_pages, v_pages, pages = make_batch(rng, [90, 13], 1, group=2)
    table, ones = PageTable(pages, jnp.asarray([90, 13], jnp.int32)), jnp.ones(2, jnp.int32)
    full, _ = attend(Plan(Full()), q, LayerMemory(k_pages, v_pages, table), ones)
    dipr, _ = attend(
        Plan(DIPR(beta=float("inf"), window=Window(4, 4))),
        q,
        LayerMemory(k_pages, v_pages, table),
        ones,
    )
    np.testing.assert_allclose(dipr, full, atol=1e-6)


def test_rows_past_count_are_zero_and_others_unchanged(rng):
    q, _, _, k_pages, v_pages, pages = make_batch(rng, [10, 20], 6, group=2)
    table = PageTable(pages, jnp.asarray([10, 20], jnp.int32))
    query = DIPR(beta=3.0, window=Window(2, 2))
    ragged, counts = attend(
        Plan(query), q, LayerMemory(k_pages, v_pages, table), jnp.asarray([6, 2])
    )
    whole, _ = attend(Plan(query), q, LayerMemory(k_pages, v_pages, table), jnp.asarray([6, 6]))
    np.testing.assert_allclose(ragged[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(ragged[1, :2], whole[1, :2], atol=1e-6)
    assert not np.any(ragged[1, 2:])
    assert not np.any(counts.attended[1, 2:])


def test_new_beta_does_not_recompile(rng):
    q, _, _, k_pages, v_pages, pages = make_batch(rng, [30], 1, group=2)
    table, one = PageTable(pages, jnp.asarray([30], jnp.int32)), jnp.ones(1, jnp.int32)
    memory = LayerMemory(k_pages, v_pages, table)
    run = jax.jit(chex.assert_max_traces(lambda plan: attend(plan, q, memory, one), n=1))
    for query in (DIPR(beta=1.0), DIPR(beta=9.0), DIPR(beta=2.0, window=Window(5, 7))):
        run(Plan(query))


def test_merge_is_exact_and_ignores_empty_sets(rng):
    scores, values = rng.standard_normal(12) * 9, rng.standard_normal((12, DIM))

    def partial(keys):
        weights = np.exp(scores[keys])
        return Partial(jnp.asarray(weights @ values[keys] / weights.sum()), jnp.log(weights.sum()))

    empty = Partial(jnp.zeros(DIM), jnp.asarray(-jnp.inf))
    merged = merge(partial([0, 1, 2]), empty, partial([3]), partial(list(range(4, 12))))
    weights = np.exp(scores)
    np.testing.assert_allclose(merged.out, weights @ values / weights.sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged.lse, np.log(weights.sum()), rtol=1e-6)
    nothing = merge(empty, empty)
    assert not np.any(nothing.out)
    assert np.isneginf(nothing.lse)


def test_paged_kv_repr_says_its_size():
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    assert "5 pages of 16 tokens" in repr(PagedKV.create(config, 5, 16, jnp.float32))


@pytest.mark.parametrize(
    ("room", "share"),
    [
        (0, "head"),
        (2048, "group"),
        pytest.param(0, "group", marks=pytest.mark.slow),
        pytest.param(2048, "head", marks=pytest.mark.slow),
    ],
)
def test_the_best_keys_through_a_sketch_are_those_of_flat(share, room, rng, monkeypatch):
    """However many may be among the best: with no room for them put side by side, all are."""
    monkeypatch.setattr("alaya_jax.attention.retrieve._ROOM", room)
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    config = dataclasses.replace(config, num_key_value_heads=KV_HEADS, head_dim=DIM)
    length = 190
    q, _, _, k_pages, v_pages, pages = make_batch(rng, [length], 1, group=2)
    full = (length // PAGE) * PAGE
    ids, filled = pages[0, : full // PAGE], jnp.full(full // PAGE, PAGE)
    sketch = Sketch(bits=2).create(config, k_pages.shape[1], PAGE)
    sketch = sketch.build(k_pages, v_pages, ids, filled)
    asked, covered = TopK(k=3, window=Window(3, 5)), jnp.full(1, full)
    flatly = LayerMemory(k_pages, v_pages, PageTable(pages, jnp.full(1, length)))
    sketched, one = dataclasses.replace(flatly, index=sketch, covered=covered), jnp.ones(1, int)
    attend_now = jax.jit(lambda *args: attend.__wrapped__(*args))  # with the room of this test
    through = attend_now(Plan(asked, Sketch(bits=2), share=share), q, sketched, one)
    flat = attend_now(Plan(asked, share=share), q, flatly, one)
    np.testing.assert_allclose(through[0], flat[0], atol=1e-6)
    np.testing.assert_array_equal(through[1].attended, flat[1].attended)
    assert (np.asarray(flat[1].attended) == 3 + 5 + 3).all()
