"""Attention on a mesh of eight devices is that of one: outputs, and what was selected and read.

Keys are small integers: scores are exact however they are summed, and many are equal, on different
devices too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax import DIPR, Full, TopK, Window
from alaya_jax.attention import engine
from alaya_jax.cache import UNUSED, PagedKV, PageTable
from alaya_jax.errors import RequestError
from alaya_jax.index import Block, BlockLayer, Flat, Sketch, SketchLayer
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query.plan import Plan

K, G, D, Z, N = 8, 2, 8, 4, 24
PAGES = 8 * 10
LENGTHS = (70, 33, 5)
WINDOW = Window(3, 9)

MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 2, 4)]
"""data x tensor x context."""

# Plan, sequences, new tokens of each.
CASES = {
    "full": (Plan(Full()), 3, 5),
    "window": (Plan(WINDOW), 2, 1),
    "dipr": (Plan(DIPR(beta=60.0, window=WINDOW)), 2, 5),
    "dipr, sketch": (Plan(DIPR(beta=60.0, window=WINDOW), Sketch()), 3, 1),
    "dipr, tail": (Plan(DIPR(beta=40.0, window=WINDOW), Sketch(), tail=True), 2, 1),
    "recovery, group": (Plan(DIPR(recovery=0.9, window=WINDOW), Sketch(), share="group"), 1, 1),
    "error": (Plan(DIPR(error=0.2, window=WINDOW), Sketch()), 2, 1),
    "topk": (Plan(TopK(9, WINDOW)), 3, 1),
    "topk, sketch, group": (Plan(TopK(9, WINDOW), Sketch(), share="group"), 2, 1),
    "topk, block, layer": (Plan(TopK(24, WINDOW), Block("mean"), "page", "layer"), 2, 1),
    "recovery, page": (Plan(DIPR(recovery=0.8, window=WINDOW), Flat(), "page"), 1, 5),
    "dipr, page, group": (Plan(DIPR(beta=20.0, window=WINDOW), Flat(), "page", "group"), 1, 1),
}


LONG = ("dipr, tail", "topk, sketch, group", "recovery, page", "dipr, page, group")
"""Their parts are in the other cases; each compiles for long."""


def unless_long(*values):
    return pytest.param(*values, marks=pytest.mark.slow if values[-1] in LONG else [])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many tiles and query blocks even in a small case; the programs are this file's own."""
    monkeypatch.setattr("alaya_jax.cache.views.TILE_TOKENS", 16)
    monkeypatch.setattr("alaya_jax.attention.engine.QUERY_BLOCK", 4)


# What is compiled here runs once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
attend = jax.jit(
    engine.attend.__wrapped__, static_argnames=("mesh", "rules"), compiler_options=QUICK
)
append = jax.jit(engine.append, static_argnames=("layer", "mesh", "rules"), compiler_options=QUICK)


@dataclasses.dataclass
class Batch:
    """Sequences in pages scattered over a poisoned pool."""

    pages: np.ndarray  # ids in the whole pool, [B, N]
    k: jax.Array
    v: jax.Array
    q: jax.Array

    def table(self, shards: int, rows: int) -> PageTable:
        """As on a mesh whose devices hold a `shards`-th of the pool each."""
        length = jnp.asarray(LENGTHS[:rows], jnp.int32)
        if shards == 1:
            return PageTable(jnp.asarray(self.pages[:rows]), length)
        ids = np.zeros((rows, shards, N), np.int32)
        start = np.full((rows, shards, N), UNUSED, np.int32)
        for b, row in enumerate(self.pages[:rows]):
            shard, local = np.divmod(row, PAGES // shards)
            for s in range(shards):
                mine = np.flatnonzero(shard == s)
                ids[b, s, : len(mine)] = local[mine]
                start[b, s, : len(mine)] = mine * Z
        flat = (rows, shards * N)
        return PageTable(jnp.asarray(ids.reshape(flat)), length, jnp.asarray(start.reshape(flat)))

    @functools.cached_property
    def indexes(self) -> dict:
        full = [row[: n // Z] for row, n in zip(self.pages, LENGTHS, strict=True)]
        ids = jnp.asarray(np.concatenate(full))

        def zeros(shape, dtype):
            return jnp.zeros((K, PAGES, *shape), dtype)

        half, byte = functools.partial(zeros, dtype=jnp.float16), functools.partial(zeros, ())
        sketch = SketchLayer(
            codes=zeros((Z, D // 2), jnp.uint8),
            scale=half((Z,)),
            spread=half((Z,)),
            centre=zeros((D,), jnp.int8),
            centre_scale=byte(jnp.float16),
            value=zeros((D,), jnp.int8),
            value_scale=byte(jnp.float16),
            value_spread=half((2,)),
        )
        layers = {Sketch(): sketch, Flat(): None, None: None}
        layers[Block("mean")] = BlockLayer(zeros((1, D), jnp.float32), "mean")
        filled = jnp.full(len(ids), Z)
        build = jax.jit(lambda layer: layer.build(self.k, self.v, ids, filled))
        return {name: layer and build(layer) for name, layer in layers.items()}


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(5)
    free = np.setdiff1d(np.arange(PAGES), np.arange(0, PAGES, PAGES // 8))
    ids = rng.permutation(free)[: 3 * N].astype(np.int32).reshape(3, N)
    pool = np.full((2, K, PAGES, Z, D), np.nan, np.float32)
    for row, length in zip(ids, LENGTHS, strict=True):
        for j in range(length + 5):
            pool[:, :, row[j // Z], j % Z] = rng.integers(-4, 5, (2, K, D))
    q = rng.integers(-4, 5, (3, 5, K * G, D)).astype(np.float32)
    return Batch(ids, jnp.asarray(pool[0]), jnp.asarray(pool[1]), jnp.asarray(q))


@pytest.fixture(scope="module")
def answer(batch):
    """What attention gives on a mesh, or on one device; the latter computed once."""

    @functools.cache
    def on(case, shape=None):
        plan, rows, t = CASES[case]
        mesh = shape and aj.make_mesh(
            **dict(zip(("data", "tensor", "context"), shape, strict=True))
        )
        lengths = np.asarray(LENGTHS[:rows])
        memory = LayerMemory(
            batch.k,
            batch.v,
            batch.table(shape[2] if shape else 1, rows),
            batch.indexes[plan.index],
            jnp.asarray(lengths // Z * Z, jnp.int32),
        )
        count = jnp.asarray([t, 2, t][:rows] if t > 1 else [t, t, 0][:rows], jnp.int32)
        out = attend(plan, batch.q[:rows, :t], memory, count, mesh=mesh)
        return jax.tree.map(np.asarray, out)

    return on


def check(got, want, case):
    np.testing.assert_allclose(got[0], want[0], atol=2e-6, rtol=1e-5)
    for name in ("attended", "scored", "read"):
        np.testing.assert_array_equal(getattr(got[1], name), getattr(want[1], name), err_msg=name)
    for name in ("mass", "error"):
        np.testing.assert_allclose(getattr(got[1], name), getattr(want[1], name), rtol=1e-5)
    plan, rows, _ = CASES[case]
    if plan.retrieves:  # something was, and not everything
        visible = np.asarray(LENGTHS[:rows])[:, None]
        attended = want[1].attended[:, 0]
        assert (attended > 12).any()
        assert (attended < visible).any()


@pytest.mark.parametrize("case", [unless_long(case) for case in CASES])
def test_every_plan_on_eight_shards_of_the_context(answer, case):
    check(answer(case, (1, 1, 8)), answer(case), case)


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((1, 8, 1), "full"),
        ((1, 8, 1), "topk, block, layer"),
        ((2, 2, 2), "dipr, sketch"),
        unless_long((2, 2, 2), "dipr, tail"),
        ((2, 2, 2), "topk"),
        ((1, 2, 4), "dipr"),
        pytest.param((1, 2, 4), "recovery, group", marks=pytest.mark.slow),
        pytest.param((1, 4, 2), "topk, block, layer", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_meshes(answer, shape, case):
    check(answer(case, shape), answer(case), case)


def test_append_writes_what_one_device_writes(batch, rng):
    """Ragged, over page ends, to pages on all devices; page 0 of each device belongs to nobody."""
    k = rng.integers(-4, 5, (2, 5, K, D)).astype(np.float32)
    count = jnp.asarray([5, 3])
    kv = PagedKV((batch.k,), (batch.v,))
    mesh = aj.make_mesh(data=2, tensor=2, context=2)
    alone = append(kv, 0, k, k + 1, batch.table(1, 2), count)
    there = append(kv, 0, k, k + 1, batch.table(2, 2), count, mesh=mesh)

    def owned(pool):
        return np.delete(np.asarray(pool), [0, PAGES // 2], axis=1)

    for got, want, before in zip(*map(jax.tree.leaves, (there, alone, kv)), strict=True):
        np.testing.assert_array_equal(owned(got), owned(want))
        assert not np.array_equal(owned(want), owned(before), equal_nan=True)


def test_a_table_that_does_not_say_who_holds_what_is_refused(batch):
    mesh = aj.make_mesh(context=8)
    table, one = batch.table(1, 1), jnp.ones(1, jnp.int32)
    memory = LayerMemory(batch.k, batch.v, table)
    with pytest.raises(RequestError, match=r"'context' of size 8, .*PageTable\(start=.*pages=None"):
        engine.attend(Plan(Full()), batch.q[:1, :1], memory, one, mesh=mesh)
    kv = PagedKV((batch.k,), (batch.v,))
    with pytest.raises(RequestError, match="start="):
        engine.append(kv, 0, batch.q[:1, :1, :K], batch.q[:1, :1, :K], table, one, mesh=mesh)
