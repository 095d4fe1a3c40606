"""Attention by the kernels' operations is that of the engine without them: outputs and counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from alaya_jax.attention import engine, kernels
from alaya_jax.attention.kernels import decode
from alaya_jax.cache import PageTable
from alaya_jax.errors import KernelError, RequestError
from alaya_jax.index import Block, Flat, Graph, Sketch, SketchLayer
from alaya_jax.index.basis import Turned
from alaya_jax.index.block import BlockLayer
from alaya_jax.index.memory import LayerMemory
from alaya_jax.pallas_kernels.dispatch import CPU, H100, INTERPRET
from alaya_jax.query import DIPR, Full, Tiles, TopK, Window
from alaya_jax.query.plan import Plan

K, G, D, Z, N = 2, 3, 64, 16, 24
POOL = 96
WINDOW = Window(20, 41)
LEARNT = Sketch(1, "learnt")

DECODE = {
    "full": Plan(Full()),
    "window": Plan(WINDOW),
    "dipr": Plan(DIPR(beta=60.0, window=WINDOW), Flat()),
    "dipr, sketch": Plan(DIPR(beta=60.0, window=WINDOW), Sketch()),
    "dipr, sketch, all": Plan(DIPR(beta=float("inf"), window=WINDOW), Sketch()),
    "dipr, sketch, part": Plan(DIPR(beta=50.0, window=WINDOW, before=150), Sketch()),
    "dipr, tail": Plan(DIPR(beta=40.0, window=WINDOW), Sketch(), tail=True),
    "recovery": Plan(DIPR(recovery=0.9, window=WINDOW), Sketch()),
    "recovery, group": Plan(DIPR(recovery=0.8, window=WINDOW), Sketch(), share="group"),
    "recovery, page": Plan(DIPR(recovery=0.8, window=WINDOW), Sketch(), "page", "group"),
    "dipr, page": Plan(DIPR(beta=60.0, window=WINDOW), Sketch(), "page", "group"),
    "dipr, learnt": Plan(DIPR(beta=60.0, window=WINDOW), LEARNT),
    "recovery, page, learnt": Plan(DIPR(recovery=0.8, window=WINDOW), LEARNT, "page", "group"),
    "dipr, page, learnt": Plan(DIPR(beta=60.0, window=WINDOW), LEARNT, "page", "group"),
    "error": Plan(DIPR(error=0.1, window=WINDOW), Sketch()),
    "topk": Plan(TopK(9, WINDOW), Sketch()),
    "topk, page": Plan(TopK(64, WINDOW), Flat(), "page"),
    "quest": Plan(TopK(64, WINDOW), Block("mean"), "page", "group"),
}

PREFILL = {
    "full": Plan(Full()),
    "recovery": Plan(Tiles(recovery=0.8, kv_block=64, window=Window(16, 64))),
    "beta": Plan(Tiles(beta=30.0, kv_block=64, window=Window(16, 64))),
}


@dataclasses.dataclass
class Case:
    """Ragged sequences scattered over a poisoned pool."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    table: PageTable
    count: jax.Array
    covered: jax.Array
    indexes: dict

    def memory(self, index=None):
        return LayerMemory(self.k, self.v, self.table, index, self.covered)


def basis_of(rng, bits):
    """Channels of falling variance, an offset, and centres in units of their own."""
    rows = np.linalg.qr(rng.standard_normal((K, D, D)))[0]
    spread = np.broadcast_to(np.exp(-np.arange(D) / 20), (K, D))
    offset = 0.3 * rng.standard_normal((K, D))
    grain = 2.0 ** rng.integers(-3, 3, (K, D))
    return Turned(rows / spread[..., None], spread, offset, grain).basis(bits)


def make(rng, lengths, count, t, dtype=jnp.float32) -> Case:
    ids = rng.permutation(POOL)[: len(lengths) * N].reshape(-1, N)
    pool = np.full((2, K, POOL, Z, D), np.nan, np.float32)
    for row, n, new in zip(ids, lengths, count, strict=True):
        for j in range(n + new):
            pool[:, :, row[j // Z], j % Z] = rng.standard_normal((2, K, D))
    k, v = jnp.asarray(pool, dtype)
    q = jnp.asarray(3 * rng.standard_normal((len(lengths), t, K * G, D)), dtype)
    whole = [row[: n // Z] for row, n in zip(ids, lengths, strict=True)]
    built = jnp.asarray(np.concatenate(whole))
    filled = jnp.full(len(built), Z)

    def zeros(shape, dtype):
        return jnp.zeros((K, POOL, *shape), dtype)

    empty = {
        Sketch(): SketchLayer(
            zeros((Z, D // 2), jnp.uint8),
            *(zeros((Z,), jnp.float16),) * 2,
            zeros((D,), jnp.int8),
            zeros((), jnp.float16),
            zeros((D,), jnp.int8),
            zeros((), jnp.float16),
            zeros((2,), jnp.float16),
        ),
        LEARNT: SketchLayer(
            zeros((D // 32, Z), jnp.uint32),
            *(zeros((Z,), jnp.float16),) * 2,
            zeros((D // 2,), jnp.uint8),
            zeros((), jnp.float16),
            zeros((D,), jnp.int8),
            zeros((), jnp.float16),
            zeros((2,), jnp.float16),
            basis_of(np.random.default_rng(9), LEARNT.bits),
        ),
        Block("mean"): BlockLayer(zeros((1, D), jnp.float32), "mean"),
    }
    build = jax.jit(lambda layer: layer.build(k, v, built, filled))
    # Not all that might be covered is: those keys are scored one by one.
    covered = [max(n // Z - 4, 0) * Z for n in lengths]
    return Case(
        q,
        k,
        v,
        PageTable(jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32)),
        jnp.asarray(count, jnp.int32),
        jnp.asarray(covered, jnp.int32),
        {name: build(layer) for name, layer in empty.items()},
    )


# What is compiled here runs once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
by_engine = jax.jit(
    engine.attend.__wrapped__, static_argnames=("mesh", "rules"), compiler_options=QUICK
)


@functools.partial(jax.jit, static_argnames=("implementation", "target"), compiler_options=QUICK)
def by_kernels(plan, batch, implementation, target=CPU):
    assert kernels.unfit(plan, batch, implementation, target) is None
    return kernels.attend(plan, batch, implementation, target)


def both(plan, case, implementation, target=CPU):
    memory = case.memory(case.indexes.get(plan.index))
    got = by_kernels(plan, kernels.LayerQueries(case.q, memory, case.count), implementation, target)
    return got, by_engine(plan, case.q, memory, case.count)


def check(got, want, real, atol):
    out, counts = got
    expected, seen = want
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=atol
    )
    for name in ("attended", "scored"):
        np.testing.assert_array_equal(
            np.where(real, getattr(counts, name), 0), np.where(real, getattr(seen, name), 0), name
        )
    for name in ("mass", "error"):
        np.testing.assert_allclose(getattr(counts, name), getattr(seen, name), atol=1e-4)
    # Whole pages are read, those of the keys at least.
    assert np.all(np.asarray(counts.read).sum(1) >= np.asarray(seen.read).sum(1))


@pytest.fixture(scope="module")
def tokens() -> Case:
    return make(np.random.default_rng(3), [331, 75, 0, 200], [1, 1, 1, 0], 1)


FAST = (
    "full",
    "window",
    "dipr, sketch, part",
    "dipr, tail",
    "recovery",
    "recovery, page",
    "dipr, learnt",
    "recovery, page, learnt",
    "error",
    "topk",
    "quest",
)
"""Each of the others differs from one of these in one part."""


@pytest.mark.parametrize(
    "name", [pytest.param(p, marks=[] if p in FAST else pytest.mark.slow) for p in DECODE]
)
def test_one_token_of_each_sequence(name, tokens):
    case = tokens
    if DECODE[name].by == "page" and isinstance(DECODE[name].index, Sketch):
        # What the sketch does not cover would be read, in whole pages, instead of scored.
        case = dataclasses.replace(case, covered=case.table.length // Z * Z)
    got, want = both(DECODE[name], case, "xla")
    check(got, want, np.asarray(case.count)[:, None, None] > 0, atol=1e-5)


@pytest.mark.parametrize("name", [p for p in DECODE if "learnt" in p])
def test_a_learnt_sketch_is_scanned_by_the_kernel(name, simulated):
    case = simulated
    batch = kernels.LayerQueries(case.q, case.memory(case.indexes[LEARNT]), case.count)
    assert decode._by_sketch(DECODE[name], batch, "mosaic_gpu", H100)
    # Of centres' factors float16 could lose some: XLA scans those.
    half = dataclasses.replace(batch, q=case.q.astype(jnp.float16))
    assert not decode._by_sketch(DECODE[name], half, "mosaic_gpu", H100)


def test_pages_that_the_sketch_does_not_cover_are_read(tokens):
    plan = Plan(DIPR(recovery=1e-6, window=WINDOW), Sketch(), "page", "group")
    (_, counts), _ = both(plan, tokens, "xla")
    end = np.asarray(tokens.table.length + 1)[:2]
    uncovered = end - WINDOW.recent - np.maximum(np.asarray(tokens.covered)[:2], WINDOW.sink)
    assert np.all(uncovered > 0)
    assert np.all(counts.attended[:2, 0] >= (WINDOW.sink + WINDOW.recent + uncovered)[:, None])


@pytest.fixture(scope="module")
def simulated() -> Case:
    return make(np.random.default_rng(4), [331], [1], 1, jnp.bfloat16)


@pytest.mark.parametrize(
    "name",
    [
        "window",
        "recovery",
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ("full", "dipr, sketch", "dipr, learnt", "topk")
        ),
    ],
)
def test_one_token_by_the_simulated_kernel(name, simulated):
    case = simulated
    got, want = both(DECODE[name], case, "mosaic_gpu", INTERPRET)
    out, counts = got
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(want[0], np.float32), atol=2e-2
    )
    # Without kernels, scores are sums in another order: a key on the edge may fall differently.
    assert np.abs(np.asarray(counts.attended - want[1].attended)).max() <= 1


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "xla") for name in PREFILL),
        ("recovery", "reference"),
        pytest.param("full", "reference", marks=pytest.mark.slow),
        pytest.param("beta", "reference", marks=pytest.mark.slow),
    ],
)
def test_a_chunk_of_tokens(name, implementation, rng):
    case = make(rng, [140, 77, 130], [150, 60, 0], 150)
    got, want = both(PREFILL[name], case, implementation)
    real = np.arange(150)[None, :, None] < np.asarray(case.count)[:, None, None]
    if name == "beta":  # tiles of 64 queries of a head are skipped, not of all queries of a list
        out, counts = got
        np.testing.assert_allclose(out, want[0], atol=2e-2)
        assert np.all(counts.attended <= want[1].scored)
        assert np.all(np.where(real, counts.attended > 0, True))
        return
    check(got, want, real, atol=1e-5)


def test_what_is_skipped_is_not_counted(rng):
    """All keys behind the window are far below it: they are listed, and skipped."""
    case = make(rng, [256], [128], 128)
    k = np.asarray(case.k).copy()
    ids = np.asarray(case.table.pages)[0]
    k[:, ids[4:16]] *= 1e-3
    case.k, case.q = jnp.asarray(k), 5 * case.q
    plan = Plan(Tiles(beta=1.0, kv_block=64, window=Window(64, 1)))
    (_, counts), _ = both(plan, case, "xla")
    attended = np.asarray(counts.attended)[0]
    visible = np.arange(257, 385)[:, None]
    np.testing.assert_array_equal(attended, np.broadcast_to(visible - 192, attended.shape))


@pytest.mark.parametrize("name", ["full", pytest.param("dipr, tail", marks=pytest.mark.slow)])
def test_inside_a_sharded_program(name, tokens):
    """Heads and pages over devices, by the operations' XLA; see test_mesh for the engine's own."""
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("tensor", "context"), kinds, devices=jax.devices()[:4])
    case, half = tokens, POOL // 2
    ids = np.zeros((4, 2, N), np.int32)
    start = np.full((4, 2, N), np.iinfo(np.int32).max, np.int32)
    for b, row in enumerate(np.asarray(case.table.pages)):
        for s in range(2):
            mine = np.flatnonzero(row // half == s)
            ids[b, s, : len(mine)], start[b, s, : len(mine)] = row[mine] % half, mine * Z
    table = PageTable(
        jnp.asarray(ids.reshape(4, -1)), case.table.length, jnp.asarray(start.reshape(4, -1))
    )
    plan = dataclasses.replace(DECODE[name], implementation="reference")
    index = case.indexes.get(plan.index)
    memory = dataclasses.replace(case.memory(index), table=table)
    got = by_engine(plan, case.q, memory, case.count, mesh=mesh)
    _, want = both(DECODE[name], case, "xla")
    check(got, want, np.asarray(case.count)[:, None, None] > 0, atol=1e-5)


@pytest.mark.parametrize("name", ["dipr, learnt"])
def test_heads_of_a_sketch_over_devices(name, tokens):
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 1), ("tensor", "context"), kinds, devices=jax.devices()[:2])
    case = tokens
    plan = dataclasses.replace(DECODE[name], implementation="reference")
    memory = case.memory(case.indexes[plan.index])
    got = by_engine(plan, case.q, memory, case.count, mesh=mesh)
    want, _ = both(DECODE[name], case, "xla")
    check(got, want, np.asarray(case.count)[:, None, None] > 0, atol=1e-5)


def test_what_is_chosen_and_why(simulated):
    case = simulated

    def batch(**changes):
        changed = dataclasses.replace(case, **changes)
        return kernels.LayerQueries(changed.q, changed.memory(), changed.count)

    plan = DECODE["recovery"]
    assert kernels.choose(plan, batch(), H100).implementation == "mosaic_gpu"
    chosen = kernels.choose(plan, batch(), CPU)
    assert chosen.implementation == "xla"
    assert "needs a Hopper GPU" in str(chosen)
    chunk = batch(q=jnp.zeros((1, 9, K * G, D), jnp.bfloat16))
    wide = {name: getattr(case, name).astype(jnp.float32) for name in "qkv"}
    for plan, at, reason in (
        (DECODE["topk"], chunk, "for Full and Tiles, not TopK"),
        (Plan(Tiles(recovery=0.9)), chunk, "kv_block=None"),
        (Plan(Tiles(recovery=0.9)), batch(), "this is one token"),
        (Plan(TopK(3), Graph()), batch(), "a graph is walked"),
        (Plan(Full()), batch(**wide), "pages are float32"),
    ):
        assert reason in str(kernels.choose(plan, at, H100))
        named = dataclasses.replace(plan, implementation="mosaic_gpu")
        with pytest.raises(KernelError, match=reason):
            kernels.choose(named, at, H100)
    named = dataclasses.replace(PREFILL["recovery"], implementation="xla")
    assert kernels.choose(named, chunk, H100).implementation == "xla"
    with pytest.raises(RequestError, match="implementation='cuda'"):
        Plan(Full(), implementation="cuda")
