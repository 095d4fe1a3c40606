"""Plans through a graph: equal to the flat scan where the graph leaves nothing out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alaya_jax as aj
from alaya_jax.attention.engine import attend
from alaya_jax.attention.graph import attend_found
from alaya_jax.cache import PageTable
from alaya_jax.cache.views import Pages
from alaya_jax.errors import ConfigError, RequestError
from alaya_jax.index import Found, GraphLayer
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query import DIPR, TopK, Window
from alaya_jax.query.plan import Plan

KV_HEADS, GROUP, DIM, PAGE, KEYS, T = 2, 3, 8, 4, 45, 3
WHOLE = aj.Graph(degree=8, sink=0, l0=64, capacity=64)
"""Its searches list everything that they can reach."""


def pool(rng, batch=1):
    """Keys of sequences of KEYS tokens in scattered pages of a poisoned pool, and T queries."""
    per_sequence = -(-KEYS // PAGE)
    ids = rng.permutation(batch * per_sequence + 3)
    pages = np.full((2, KV_HEADS, len(ids), PAGE, DIM), np.nan, np.float32)
    table = ids[: batch * per_sequence].reshape(batch, per_sequence)
    for row in table:
        for j in range(KEYS):
            pages[:, :, row[j // PAGE], j % PAGE] = rng.standard_normal((2, KV_HEADS, DIM))
    q = 2 * rng.standard_normal((batch, T, KV_HEADS * GROUP, DIM)).astype(np.float32)
    table = PageTable(jnp.asarray(table, jnp.int32), jnp.full(batch, KEYS - T, jnp.int32))
    return q, jnp.asarray(pages[0]), jnp.asarray(pages[1]), table


def graph(length, rows=KEYS + 5, degree=None):
    """Every key is a neighbour of every other; or the next few are, by position."""
    near = np.arange(rows)[:, None] + np.arange(1, 1 + (degree or rows))
    near = np.broadcast_to(near % rows, (KV_HEADS, *near.shape)).astype(np.int32)
    return GraphLayer(jnp.asarray(near), jnp.zeros((KV_HEADS, 2), jnp.int32), jnp.int32(length))


def ask(query, data, graphs, index=WHOLE, **options):
    """By the graph, and the flat answer with the window that the graph makes of it."""
    q, k, v, table = data
    count = jnp.full(q.shape[0], T, jnp.int32)
    memory = LayerMemory(k, v, table, graphs)
    found = attend(Plan(query, index=index), q, memory, count, **options)
    return jax.tree.map(np.asarray, found)


def flat(query, data, covered):
    """Token by token: each one's window reaches back to what the graph covers."""
    q, k, v, table = data
    outs, counts = [], []
    for i in range(T):
        recent = max(query.window.recent, KEYS - T + i + 1 - covered)
        asked = dataclasses.replace(query, window=Window(query.window.sink, recent))
        at = dataclasses.replace(table, length=table.length + i)
        one = jnp.ones(q.shape[0], jnp.int32)
        out, count = attend(Plan(asked), q[:, i : i + 1], LayerMemory(k, v, at), one)
        outs.append(out)
        counts.append(count.attended)
    return np.concatenate(outs, 1), np.concatenate(counts, 1)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    covered=st.integers(0, KEYS),
    sink=st.integers(0, 9),
    recent=st.integers(1, 9),
    beta=st.floats(0, 15),
)
def test_a_complete_graph_is_the_flat_answer(seed, covered, sink, recent, beta):
    """New keys, which the graph does not know, are in the window; an empty graph is full attention.

    A score within rounding of the threshold may fall on either side.
    """
    data = pool(np.random.default_rng(seed))
    query = DIPR(beta=beta, window=Window(sink, recent))
    out, counts = ask(query, data, (graph(covered),))
    want, attended = flat(query, data, covered)
    same = counts.attended == attended
    assert np.abs(counts.attended - attended).max() <= 1
    np.testing.assert_allclose(out[same], want[same], atol=2e-6)
    assert not counts.widened.any()
    if covered <= sink:
        full, _ = ask(DIPR(beta=np.inf, window=query.window), data, None, index=aj.Flat())
        np.testing.assert_allclose(out, full, atol=2e-6)


def test_only_what_was_scored_is_counted(rng):
    """A line of keys, of which a search with a small l0 visits a part; and the window."""
    data = pool(rng)
    index = dataclasses.replace(WHOLE, l0=2)
    query = DIPR(beta=0.5, window=Window(2, 4))
    _, counts = ask(query, data, (graph(30, degree=1),), index)
    window = 2 + KEYS - 30 - np.arange(T - 1, -1, -1)
    scored, end = counts.scored, KEYS - np.arange(T - 1, -1, -1)
    assert (scored < end[:, None]).all()
    np.testing.assert_array_equal(counts.read, scored - window[:, None])
    assert (counts.attended <= scored).all()
    assert np.isnan(counts.mass).all()


@pytest.mark.parametrize("beta", [pytest.param(3.0, marks=pytest.mark.slow), np.inf])
def test_overflow_gives_the_flat_answer_and_is_counted(beta, rng):
    """With room for 5 keys, some rows list more: those are answered by the scan of all keys."""
    data = pool(rng)
    query = DIPR(beta=beta, window=Window(2, 4))
    small = dataclasses.replace(WHOLE, l0=1, capacity=5)
    out, counts = ask(query, data, (graph(40),), small)
    want, attended = flat(query, data, 40)
    assert counts.widened.any()
    rows = counts.widened == 1
    np.testing.assert_allclose(out[rows], want[rows], atol=2e-6)
    np.testing.assert_array_equal(counts.attended[rows], attended[rows])
    assert (counts.attended <= attended).all()
    assert (counts.scored[rows] >= 38).all()
    if beta == np.inf:
        assert rows.all()


def test_top_k(rng):
    data = pool(rng)
    query = TopK(k=4, window=Window(2, 4))
    out, counts = ask(query, data, (graph(40),))
    want, attended = flat(query, data, 40)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_array_equal(counts.attended, attended)


@pytest.mark.parametrize(
    "query", [DIPR(beta=np.inf), pytest.param(TopK(k=30), marks=pytest.mark.slow)]
)
def test_before_is_a_limit(query, rng):
    """Of keys 2..39, those below 17 and the window from 40 on."""
    data = pool(rng)
    query = dataclasses.replace(query, window=Window(2, 1), before=17)
    _, counts = ask(query, data, (graph(40),))
    end = KEYS - np.arange(T - 1, -1, -1)
    np.testing.assert_array_equal(
        counts.attended, np.broadcast_to((17 + end - 40)[:, None], (1, T, KV_HEADS * GROUP))
    )


@pytest.mark.slow
def test_a_batch_has_a_graph_each_and_heads_are_split_over_a_mesh(rng):
    """Graphs of other sizes; on a mesh each device walks the graphs of its heads."""
    data = pool(rng, batch=2)
    query = DIPR(beta=4.0, window=Window(2, 4))
    graphs = (graph(40), graph(20, rows=24))
    out, counts = ask(query, data, graphs)
    for b, covered in enumerate((40, 20)):
        q, k, v, table = data
        alone = jax.tree.map(lambda x: x[b : b + 1], (q, table))  # noqa: B023
        want, attended = flat(query, (alone[0], k, v, alone[1]), covered)
        np.testing.assert_allclose(out[b : b + 1], want, atol=2e-6)
        np.testing.assert_array_equal(counts.attended[b : b + 1], attended)
    mesh = aj.make_mesh(data=2, tensor=2)
    split, on_mesh = ask(query, data, graphs, mesh=mesh)
    np.testing.assert_allclose(split, out, atol=2e-6)
    np.testing.assert_array_equal(on_mesh.scored, counts.scored)


def test_attention_over_what_was_found_is_a_softmax(rng):
    """Lists of any length, longer than what is read at once, and an empty one."""
    _, k, v, table = pool(rng)
    pages = Pages(k, v, table.pages[0])
    q = rng.standard_normal((KV_HEADS, GROUP, 1, DIM)).astype(np.float32)
    room, count = 37, rng.integers(0, 38, (KV_HEADS, GROUP, 1))
    count[0, 0], count[1, 1] = 0, 37
    positions = np.stack([rng.permutation(KEYS)[:room] for _ in range(KV_HEADS * GROUP)])
    positions = positions.reshape(KV_HEADS, GROUP, 1, room).astype(np.int32)
    keys, values = (
        np.asarray(x)[:, np.asarray(table.pages[0])].reshape(KV_HEADS, -1, DIM) for x in (k, v)
    )
    scores = np.einsum("kgtd,ksd->kgts", q, keys)
    scores = np.take_along_axis(scores, positions, -1)
    used = np.arange(room) < count[..., None]
    zero = jnp.zeros(count.shape, jnp.int32)
    found = Found(jnp.asarray(positions), jnp.where(used, scores, -jnp.inf), zero, zero > 0)
    partial, attended = attend_found(q, pages, found)
    np.testing.assert_array_equal(attended, count)
    assert not np.any(partial.out[0, 0])
    assert np.isneginf(partial.lse[0, 0, 0])
    for row in np.ndindex(count.shape):
        if not count[row]:
            continue
        at = positions[row][: count[row]]
        logits = scores[row][: count[row]].astype(np.float64) / np.sqrt(DIM)
        weights = np.exp(logits)
        want = weights @ values[row[0]][at] / weights.sum()
        np.testing.assert_allclose(partial.out[row], want, atol=1e-5)
        np.testing.assert_allclose(partial.lse[row], np.log(weights.sum()), atol=1e-5)


@pytest.mark.parametrize(
    ("query", "options", "words"),
    [
        (DIPR(recovery=0.9), {}, "recovery"),
        (DIPR(beta=1.0), {"by": "page"}, "by='key'"),
        (TopK(3), {"share": "group"}, "share='head'"),
        (DIPR(beta=1.0), {"tail": True}, "tail=True"),
    ],
)
def test_what_a_graph_cannot_do_is_refused(query, options, words):
    with pytest.raises(RequestError, match=words):
        Plan(query, index=aj.Graph(), **options)


@pytest.mark.parametrize(
    "setting", [{"degree": 1}, {"listed": 1}, {"queries": 0.0}, {"l0": 0}, {"capacity": 0}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        aj.Graph(**setting)
