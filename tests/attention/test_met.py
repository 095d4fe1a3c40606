"""An answer comes from the pages that it says it met, and from no others: whatever these hold."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.attention import met
from alaya_jax.attention.engine import attend
from alaya_jax.cache import PageTable
from alaya_jax.cache.tiers import HostPages, Tiers
from alaya_jax.index import Block, Graph, GraphLayer, Sketch
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR, Custom, Full, Tiles, TopK, Window
from alaya_jax.query.plan import Plan

HEADS, GROUP, DIM, SIZE, LENGTH = 2, 2, 16, 8, 1000
COUNT = LENGTH // SIZE
WINDOW = Window(8, 24)
RANGE = DIPR(beta=6.0, window=WINDOW)
PLANS = {
    "window": Plan(WINDOW),
    "range, sketch": Plan(RANGE, Sketch()),
    "range, sketch, group": Plan(RANGE, Sketch(), share="group"),
    "range, sketch, by page": Plan(RANGE, Sketch(), by="page"),
    "promise, sketch": Plan(DIPR(recovery=0.6, window=WINDOW), Sketch()),
    "tail, sketch": Plan(DIPR(recovery=0.6, window=WINDOW), Sketch(), tail=True),
    "error, sketch": Plan(DIPR(error=0.3, window=WINDOW), Sketch()),
    "promise, by page": Plan(DIPR(recovery=0.6, window=WINDOW), Sketch(), by="page"),
    "best, sketch": Plan(TopK(10, window=WINDOW), Sketch()),
    "range, block": Plan(RANGE, Block("bounds"), by="page"),
    "best, block": Plan(TopK(32, window=WINDOW), Block("mean"), by="page", share="layer"),
    "range, graph": Plan(RANGE, Graph(l0=4)),
    "best, graph": Plan(TopK(5, window=WINDOW), Graph(l0=4)),
    "before": Plan(dataclasses.replace(RANGE, before=300), Graph(l0=4)),
}

ONE = {"best, graph", "promise, sketch", "range, block", "tail, sketch"}
"""Asked by one query token; the others by four."""


def graph_of(rng, length):
    """Every key beside those next to it: a walk goes where it is led, and not everywhere."""
    step = np.array([-3, -2, -1, 1, 2, 3])
    near = np.arange(length)[:, None] + step
    near = np.broadcast_to(np.where((near < 0) | (near >= length), -1, near), (HEADS, length, 6))
    starts = jnp.asarray(rng.integers(0, length, (HEADS, 3)), jnp.int32)
    return GraphLayer(jnp.asarray(near, jnp.int32), starts, jnp.int32(length))


@jax.jit
def build(known, host):
    ids = jnp.arange(COUNT, dtype=jnp.int32)
    return known.build(*host, ids, jnp.full(COUNT, SIZE, jnp.int32))


def indexed(plan, host, covered, rng):
    """What the plan's index holds of pages of a pool of 4 and of the files."""
    if isinstance(plan.index, Graph):
        return (graph_of(rng, covered),)
    if not plan.retrieves:
        return None
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HEADS * GROUP * DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=4096,
    )
    known = build(plan.index.create(config, COUNT, SIZE, jnp.float32), host)
    empty = plan.index.create(config, 4, SIZE, jnp.float32)
    return jax.tree.map(Tiers, empty, known)


FAST = {"window", "range, sketch", "best, sketch", "best, block", "range, graph", "promise, sketch"}
FAST |= {"error, sketch"}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PLANS]
)
def test_nothing_else_has_a_part_in_the_answer(rng, name):
    plan = PLANS[name]
    covered = LENGTH - 5 * SIZE
    for t in (1,) if name in ONE else (4,):
        host = 0.2 * rng.standard_normal((2, HEADS, COUNT, SIZE, DIM)).astype(np.float32)
        # Of each kv head a few keys that score high for all queries: what a plan looks for.
        wanted = rng.standard_normal((HEADS, DIM)).astype(np.float32)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        for head in range(HEADS):
            for at in (*rng.integers(0, LENGTH, 5), LENGTH - 10):
                host[0, head, at // SIZE, at % SIZE] = 4 * wanted[head]
        queries = 8 * np.repeat(wanted, GROUP, axis=0)
        queries = (queries + 0.3 * rng.standard_normal((1, t, *queries.shape))).astype(np.float32)
        index = indexed(plan, host, covered, rng)
        table = PageTable(
            jnp.arange(4, 4 + COUNT, dtype=jnp.int32)[None], jnp.asarray([LENGTH - t], jnp.int32)
        )

        def run(host, t=t, index=index, table=table, queries=queries):
            pool = jnp.full((HEADS, 4, SIZE, DIM), jnp.nan)
            pages = HostPages(*map(jnp.asarray, host))
            known = jnp.asarray([covered], jnp.int32)
            memory = LayerMemory(pool, pool, table, index, known, pages)
            return attend(plan, jnp.asarray(queries), memory, jnp.full(1, t, jnp.int32))

        out, counts = run(host)
        assert np.isfinite(out).all()
        said = np.asarray(counts.met[0])
        assert said.shape == (HEADS, COUNT)
        assert 0 < (said > 0).mean() < 0.8
        for scale in (1e-3, 30.0):
            poisoned = scale * rng.standard_normal(host.shape).astype(np.float32)
            for kind, bit in enumerate((met.KEYS, met.VALUES)):
                here = (said & bit) > 0
                poisoned[kind][here] = host[kind][here]
            again, read = run(poisoned)
            np.testing.assert_array_equal(again, out)
            chex.assert_trees_all_equal(read, counts)


def test_a_search_without_room_met_all(rng):
    plan = Plan(DIPR(beta=1e6, window=WINDOW), Graph(l0=4, capacity=16))
    host = rng.standard_normal((2, HEADS, COUNT, SIZE, DIM)).astype(np.float32)
    pool = jnp.zeros((HEADS, 4, SIZE, DIM))
    table = PageTable(jnp.arange(4, 4 + COUNT)[None], jnp.asarray([LENGTH - 1], jnp.int32))
    memory = LayerMemory(
        pool,
        pool,
        table,
        (graph_of(rng, LENGTH),),
        host=HostPages(*map(jnp.asarray, host)),
    )
    q = jnp.asarray(rng.standard_normal((1, 1, HEADS * GROUP, DIM)), jnp.float32)
    _, counts = attend(plan, q, memory, jnp.ones(1, jnp.int32))
    assert np.asarray(counts.widened).any()
    assert (np.asarray(counts.met) == met.BOTH).all()


@pytest.mark.parametrize(
    "query", [Full(), Tiles(recovery=0.9), RANGE, Custom(lambda scores, positions: scores > 3.0)]
)
def test_a_plan_that_may_read_anything_says_nothing(query):
    assert not met.tells(Plan(query))


def test_a_pool_alone_keeps_no_account(rng):
    pool = jnp.asarray(rng.standard_normal((HEADS, COUNT, SIZE, DIM)), jnp.float32)
    table = PageTable(jnp.arange(COUNT)[None], jnp.asarray([LENGTH - 1], jnp.int32))
    q = jnp.asarray(rng.standard_normal((1, 1, HEADS * GROUP, DIM)), jnp.float32)
    _, counts = attend(Plan(WINDOW), q, LayerMemory(pool, pool, table), jnp.ones(1, jnp.int32))
    assert counts.met is None
