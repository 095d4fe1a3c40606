"""Derivatives through paged attention, against float64 and against attention without pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.attention.engine import attend
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.paged import append
from alaya_jax.errors import RequestError
from alaya_jax.frame import Frame
from alaya_jax.index.memory import LayerMemory, Memory
from alaya_jax.models import llama
from alaya_jax.query.plan import Plan
from alaya_jax.runtime import programs

K, G, D, Z, P = 2, 3, 8, 4, 40


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a few dozen keys are several tiles, and a chunk several blocks of queries."""
    monkeypatch.setattr("alaya_jax.cache.views.TILE_TOKENS", 12)
    monkeypatch.setattr("alaya_jax.cache.views.WINDOW_TILE", 8)
    monkeypatch.setattr("alaya_jax.attention.engine.QUERY_BLOCK", 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


def make(rng, lengths, t, width=12):
    """Queries, new keys and values, and a poisoned pool with cached ones before them."""
    batch = len(lengths)
    pool = rng.standard_normal((2, K, P, Z, D)).astype(np.float32)
    pages = rng.permutation(np.arange(1, P))[: batch * width].reshape(batch, width)
    filled = np.zeros((P, Z), bool)
    for b, n in enumerate(lengths):
        for j in range(n):
            filled[pages[b, j // Z], j % Z] = True
    pool[:, :, ~filled] = np.nan
    table = PageTable(jnp.asarray(pages, jnp.int32), jnp.asarray(lengths, jnp.int32))
    q = 2 * rng.standard_normal((batch, t, K * G, D)).astype(np.float32)
    new = rng.standard_normal((2, batch, t, K, D)).astype(np.float32)
    return jnp.asarray(q), jnp.asarray(new), jnp.asarray(pool), table


def paged(query, table, q, new, pool):
    """Attention of new tokens behind cached ones, as a step does it."""
    count = jnp.full(q.shape[0], q.shape[1], jnp.int32)
    kv = append(PagedKV((pool[0],), (pool[1],)), 0, new[0], new[1], table, count)
    return attend(Plan(query), q, LayerMemory(kv.k[0], kv.v[0], table), count)[0]


def dense(query, table, q, new, pool):
    """The same, every key in one array; differentiable by itself."""
    outs = []
    for b, n in enumerate(np.asarray(table.length)):
        cached = pool[:, :, table.pages[b]].reshape(2, K, -1, D)[:, :, :n]
        k, v = jnp.concatenate([cached, jnp.moveaxis(new[:, b], 1, 2)], axis=2)
        t = q.shape[1]
        at, position = jnp.arange(n + t), n + jnp.arange(t)[:, None]
        seen = at <= position
        if isinstance(query, aj.Window):
            seen &= (at < query.sink) | (at > position - query.recent)
        rows = q[b].reshape(t, K, G, D)
        scores = jnp.einsum("tkgd,ksd->kgts", rows, k) / np.sqrt(D)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        outs.append(jnp.einsum("kgts,ksd->tkgd", weights, v).reshape(t, K * G, D))
    return jnp.stack(outs)


def in_float64(function, *arguments):
    with jax.enable_x64(True):
        return function(*(jnp.asarray(np.asarray(x), jnp.float64) for x in arguments))


def clean(pool):
    """Zeros in place of what no token is in: a dense reference would meet 0 * NaN."""
    return jnp.nan_to_num(pool)


QUERIES = {"full": aj.Full(), "window": aj.Window(5, 7)}


BATCHES = {"empty": ((0,), 7), "decode": ((30,), 1), "ragged": ((17, 0, 33), 6)}
FAST = {("full", "empty"), ("window", "decode"), ("full", "ragged"), ("window", "ragged")}


@pytest.mark.parametrize(
    ("query", "batch"),
    [
        pytest.param(query, batch, marks=[] if (query, batch) in FAST else pytest.mark.slow)
        for query in QUERIES
        for batch in BATCHES
    ],
)
def test_reverse_mode_equals_float64(query, batch, rng, small_tiles):
    query, (lengths, t) = QUERIES[query], BATCHES[batch]
    q, new, pool, table = make(rng, lengths, t)
    weight = rng.standard_normal(q.shape).astype(np.float32)

    def loss(attention, q, new, pool, weight):
        return jnp.sum(jnp.sin(attention(query, table, q, new, pool)) * weight)

    by_pages = jax.jit(jax.value_and_grad(functools.partial(loss, paged), (0, 1, 2)))
    value, ours = by_pages(q, new, pool, weight)
    there = in_float64(
        jax.jit(jax.value_and_grad(functools.partial(loss, dense), (0, 1, 2))),
        q,
        new,
        clean(pool),
        weight,
    )
    np.testing.assert_allclose(value, there[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, there[1], strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    assert any(np.abs(x).max() > 0.1 for x in ours)


def test_forward_mode_and_second_derivatives(rng, small_tiles):
    q, new, pool, table = make(rng, (9, 21), 3)
    pool = clean(pool)
    move = [rng.standard_normal(x.shape).astype(np.float32) for x in (q, new, pool)]

    def loss(attention, *arrays):
        return jnp.sum(attention(aj.Full(), table, *arrays) ** 2)

    def along(attention, *arrays):
        half = len(arrays) // 2
        return jax.jvp(functools.partial(loss, attention), arrays[:half], arrays[half:])[1]

    first = jax.jit(functools.partial(along, paged))(q, new, pool, *move)
    np.testing.assert_allclose(
        first, in_float64(jax.jit(functools.partial(along, dense)), q, new, pool, *move), rtol=1e-4
    )
    second = jax.jit(jax.grad(functools.partial(along, paged), (0, 1, 2)))(q, new, pool, *move)
    there = in_float64(
        jax.jit(jax.grad(functools.partial(along, dense), (0, 1, 2))), q, new, pool, *move
    )
    for one, other in zip(second, there, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-3)


def test_only_what_is_asked_for(rng, small_tiles):
    """Each of queries, keys and values alone, as when the others are frozen."""
    q, _, pool, table = make(rng, (22,), 1)
    pool = clean(pool)
    count = jnp.zeros(1, jnp.int32) + 1
    before = PageTable(table.pages, table.length - 1)

    def loss(q, k, v):
        return jnp.sum(attend(Plan(aj.Full()), q, LayerMemory(k, v, before), count)[0] ** 3)

    whole = jax.jit(jax.grad(loss, (0, 1, 2)))(q, *pool)
    for i, expected in enumerate(whole):
        alone = jax.jit(jax.grad(loss, i))(q, *pool)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)


def test_vmap_and_jit_of_a_gradient(rng, small_tiles):
    q, new, pool, table = make(rng, (13,), 2)
    pool = clean(pool)
    several = jnp.stack([q, q * 0.5, -q])

    def loss(q):
        return jnp.sum(paged(aj.Full(), table, q, new, pool) ** 2)

    one = jax.jit(jax.grad(loss))
    each = jnp.stack([one(q) for q in several])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(loss)))(several), each, rtol=1e-5, atol=1e-6
    )
    lengths = jnp.asarray([[13], [9], [2]])

    def of_length(n, q):
        shorter = PageTable(table.pages, n)
        return jnp.sum(paged(aj.Full(), shorter, q, new, pool) ** 2)

    one = jax.jit(jax.grad(of_length, 1))
    each = jnp.stack([one(n, q) for n, q in zip(lengths, several, strict=True)])
    ours = jax.jit(jax.vmap(jax.grad(of_length, 1)))(lengths, several)
    np.testing.assert_allclose(ours, each, rtol=1e-5, atol=1e-6)


def test_forward_is_what_it_was(rng):
    """The derivative's loop is no part of the program that only goes forward."""
    q, new, pool, table = make(rng, (30,), 1)
    program = jax.jit(functools.partial(paged, aj.Full(), table)).lower(q, new, pool).as_text()
    assert "stablehlo.while" in program
    taken = jax.jit(jax.grad(lambda *x: paged(aj.Full(), table, *x).sum()))
    assert taken.lower(q, new, pool).as_text().count("while") > program.count("while")


@pytest.mark.parametrize(
    ("query", "name"),
    [
        (aj.DIPR(beta=2.0, window=aj.Window(2, 4)), "DIPR"),
        pytest.param(aj.TopK(3, window=aj.Window(2, 4)), "TopK", marks=pytest.mark.slow),
        pytest.param(aj.Tiles(q_block=4, samples=2), "Tiles", marks=pytest.mark.slow),
    ],
)
def test_other_plans_say_what_can_be_differentiated(query, name, rng):
    q, new, pool, table = make(rng, (22,), 2)

    def loss(q):
        return jnp.sum(paged(query, table, q, new, pool) ** 2)

    for grad in (
        jax.grad(loss),
        jax.jit(jax.grad(loss)),
        lambda q: jax.vmap(jax.grad(loss))(q[None]),
    ):
        with pytest.raises(RequestError, match=rf"by {name}: .* Full\(\) and Window\(\) can be"):
            grad(q)
    value = loss(q)
    moved, slope = jax.jvp(loss, (q,), (q,))  # forward mode runs as before
    assert moved == pytest.approx(value)
    assert np.isfinite(slope)


@pytest.mark.slow
def test_through_a_step_with_a_cached_prefix(tiny_model, rng):
    """Gradients of a loss on new tokens, in the parameters and in the cached keys and values."""
    config, params, n, t = tiny_model.config, tiny_model.params, 37, 5
    tokens = rng.integers(32, 127, n + t)[None]
    count = jnp.asarray([t], jnp.int32)
    table = PageTable(jnp.arange(1, 5, dtype=jnp.int32)[None], jnp.asarray([0], jnp.int32))
    kv = PagedKV.create(config, 6, 16, jnp.float32)
    step, frame = jax.jit(programs.step, static_argnames="frame"), Frame(config)
    before = Memory(kv, table)
    _, memory, _ = step(
        params, before, tokens[:, :n], jnp.asarray([n], jnp.int32), aj.Full(), frame=frame
    )
    kv, behind = memory.kv, PageTable(table.pages, jnp.asarray([n], jnp.int32))

    def by_pages(params, kv):
        memory = Memory(kv, behind)
        logits, _, _ = programs.step(params, memory, tokens[:, n:], count, aj.Full(), frame)
        return -jax.nn.log_softmax(logits)[0, 65]

    def alone(params, kv):
        cached = [
            [pool[:, table.pages[0]].reshape(pool.shape[0], -1, pool.shape[3])[:, :n] for pool in x]
            for x in (kv.k, kv.v)
        ]

        def behind_it(layer, q, k, v, state):
            both = [
                jnp.concatenate([jnp.moveaxis(c[layer], 0, 1)[None], x], axis=1)
                for c, x in zip(cached, (k, v), strict=True)
            ]
            padded = jnp.pad(q, ((0, 0), (n, 0), (0, 0), (0, 0)))
            out, state = llama.causal_attend(layer, padded, *both, state)
            return out[:, n:], state

        positions = n + jnp.arange(t)[None]
        logits, _ = llama.forward(params, config, tokens[:, n:], positions, behind_it)
        return -jax.nn.log_softmax(logits)[0, -1, 65]

    value, ours = jax.jit(jax.value_and_grad(by_pages, (0, 1)))(params, kv)
    expected, theirs = jax.jit(jax.value_and_grad(alone, (0, 1)))(params, kv)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * scale)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(ours[1]))
