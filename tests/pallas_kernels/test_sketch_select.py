"""One suite for every implementation; the oracle is numpy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.errors import KernelError
from alaya_jax.index.basis import Turned
from alaya_jax.index.codes import deviations, norm_bound, rotate
from alaya_jax.index.sketch import MISS, SketchLayer
from alaya_jax.pallas_kernels import sketch_select as op
from alaya_jax.pallas_kernels.dispatch import B200, CPU, H100, INTERPRET
from alaya_jax.pallas_kernels.sketch_select import mosaic_gpu, mosaic_layouts, reference

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu")
SIMULATED_LONG = ("reference", "xla", pytest.param("mosaic_gpu", marks=pytest.mark.slow))
KV_HEADS, HEADS = 1, 4


@functools.lru_cache
def compiled(implementation: str, capacity: int | None = None, lse: bool = False):
    target = INTERPRET if implementation == "mosaic_gpu" else CPU

    def run(query, keys, pages, low, high, beta, best):
        return op.sketch_select(
            query,
            keys,
            pages,
            low,
            high,
            beta=beta,
            best=best,
            capacity=capacity,
            scale=query.q.shape[-1] ** -0.5 if lse else None,
            implementation=implementation,
            target=target,
        )

    return jax.jit(run)


def request_of(
    rng, low, high, table=37, page=16, dim=64, run=False, dtype="bfloat16", pool=80, words=None
):
    """Random numbers; what belongs to no sequence is inf, NaN and noise. `words`: of signs."""
    batch = len(low)
    pool = pool * 16 // page
    shape = (KV_HEADS, pool, page)
    scale, spread = rng.uniform(0, 0.1, shape), rng.uniform(0, 0.2, shape)
    pages = np.stack([np.roll(np.arange(pool), -3)[:table] for _ in low])
    if not run:
        pages = np.stack([rng.permutation(pool)[:table] for _ in low])
    used = np.zeros((batch, pool, page), bool)
    for b in range(batch):
        used[b, pages[b]] = (np.arange(table * page) < high[b]).reshape(table, page)
        pages[b, -(-high[b] // page) :] = np.iinfo(np.int32).max
    unused = ~used.any(0)
    scale[:, unused], spread[:, unused] = np.nan, np.nan
    unit = np.where(unused.all(-1), np.nan, rng.uniform(0, 0.01, (KV_HEADS, pool)))
    halves = (jnp.asarray(x, jnp.float16) for x in (scale, spread, unit))
    if words is None:
        keys = codes_of(
            jnp.asarray(rng.integers(0, 256, (*shape, dim // 2)), jnp.uint8),
            jnp.asarray(rng.integers(-127, 128, (KV_HEADS, pool, dim)), jnp.int8),
            *halves,
        )
    else:
        codes = rng.integers(0, 2**32, (KV_HEADS, pool, words, page), dtype=np.uint64)
        centre = rng.integers(0, 256, (KV_HEADS, pool, dim // 2))
        keys = codes_of(codes.astype(np.uint32), jnp.asarray(centre, jnp.uint8), *halves, op.Signs)
    levels = dim if words is None else 32 * words
    rows = (batch, HEADS)
    query = op.Query(
        q=jnp.asarray(rng.standard_normal((*rows, dim)), dtype),
        integers=jnp.asarray(rng.integers(-127, 128, (*rows, levels)), jnp.int8),
        step=jnp.asarray(rng.uniform(0.01, 0.02, rows), jnp.float32),
        of_spread=jnp.asarray(rng.uniform(1, 4, rows), jnp.float32),
        of_scale=jnp.asarray(rng.uniform(0, 1, rows), jnp.float32),
        offset=None if words is None else jnp.asarray(rng.uniform(-9, 9, rows), jnp.float32),
    )
    return query, keys, *(jnp.asarray(x, jnp.int32) for x in (pages, low, high))


def codes_of(codes, centre, scale, spread, unit, layout=op.Codes):
    return layout(jnp.asarray(codes), scale, spread, centre, unit)


def fields_of(byte):
    field = np.concatenate([byte & 15, byte >> 4], axis=-1)
    return np.where(field >= 8, field - 16, field)


def key_of(keys, k, page, z):
    """The levels of some keys of a page, and the page's centre."""
    centre = np.asarray(keys.centre[k, page]).astype(int)
    codes = np.asarray(keys.codes[k, page])
    if isinstance(keys, op.Codes):
        return 2 * fields_of(codes[z].astype(int)) + 1, centre
    octets = np.ascontiguousarray(codes.T[z].astype("<u4")).view(np.uint8)
    return 2 * np.unpackbits(octets, axis=1, bitorder="little").astype(int) - 1, fields_of(centre)


def oracle(query, keys, pages, low, high, beta, best):
    """Pages kept, best score, and each page's log-sum-exp, in float64."""

    def wide(x):
        return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, np.float64)

    batch, heads, dim = query.q.shape
    size, table = keys.scale.shape[2], pages.shape[1]
    kept, lse = [], np.full((batch, heads, table), -np.inf)
    top = np.full((batch, heads), -np.inf) if best is None else wide(best).copy()
    for b in range(batch):
        upper = np.full((heads, table), -np.inf)
        for h in range(heads):
            k = h * KV_HEADS // heads
            for n in range(table):
                position = n * size + np.arange(size)
                z = np.flatnonzero((position >= low[b]) & (position < high[b]))
                if z.size == 0:
                    continue
                page = int(pages[b, n])
                level, centre = key_of(keys, k, page, z)
                scale, spread = wide(keys.scale[k, page])[z], wide(keys.spread[k, page])[z]
                centre = centre @ wide(query.q[b, h]) * wide(keys.unit[k, page])
                if query.offset is not None:
                    centre += float(query.offset[b, h])
                inner = level @ wide(query.integers[b, h])
                estimate = scale * float(query.step[b, h]) * inner + centre
                of_spread = float(query.of_spread[b, h])
                error = (of_spread * spread if of_spread else 0) + float(
                    query.of_scale[b, h]
                ) * scale
                upper[h, n] = np.max(estimate + error)
                top[b, h] = max(top[b, h], np.max(estimate - error))
                x = estimate * dim**-0.5
                lse[b, h, n] = np.log(np.sum(np.exp(x - x.max()))) + x.max()
        wanted = upper >= (top[b] - np.asarray(beta)[b])[:, None]
        wanted &= upper > -np.inf
        kept.append([np.flatnonzero(g.any(0)) for g in np.split(wanted, KV_HEADS)])
    return kept, top, lse


def check(implementation, request, beta, best=None, capacity=None, lse=False):
    query, keys, pages, low, high = request
    beta = jnp.broadcast_to(jnp.asarray(beta, jnp.float32), query.step.shape)
    got = compiled(implementation, capacity, lse)(*request, beta, best)
    kept, top, mass = oracle(query, keys, pages, low, high, beta, best)
    np.testing.assert_allclose(got.best, top, rtol=1e-5, atol=1e-4)
    for b, of_sequence in enumerate(kept):
        for k, index in enumerate(of_sequence):
            assert int(got.count[b, k]) == len(index)
            shown = index[: got.page_ids.shape[2]]
            np.testing.assert_array_equal(got.page_ids[b, k, : len(shown)], pages[b, shown])
            np.testing.assert_array_equal(
                got.starts[b, k, : len(shown)], shown * keys.scale.shape[2]
            )
    if lse:
        np.testing.assert_allclose(got.page_lse, mass, rtol=1e-5, atol=1e-4)
    return got


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pages_in_range(implementation, rng):
    request = request_of(rng, low=[37, 0], high=[37 * 16 - 5, 0])  # the second has no key
    got = check(implementation, request, beta=4.0, lse=True)
    assert 0 < int(got.count[0, 0]) < 30
    assert int(got.count[1, 0]) == 0
    assert np.all(np.isneginf(np.asarray(got.best[1])))
    assert np.all(np.isneginf(np.asarray(got.page_lse[1])))


def test_every_page_with_a_key_in_range_is_within_an_infinite_range(rng):
    request = request_of(rng, low=[37, 0], high=[37 * 16 - 5, 0])
    for implementation in ("reference", "xla"):
        got = check(implementation, request, beta=np.inf, lse=True)
        assert int(got.count[0, 0]) == 37 - 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dim", "words", "page", "run"),
    [
        (128, 4, 16, False),  # a bit a channel
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in (
                (128, 8, 16, True),
                (128, 2, 64, False),
                (96, 3, 16, False),  # a page is less than TMA can place
                (96, 6, 32, True),
                (64, 1, 128, False),
            )
        ),
    ],
)
def test_signs(implementation, dim, words, page, run, rng):
    table = 592 // page
    request = request_of(
        rng, [37, 0], [587 // page * page - 5, 0], table, page, dim, run, words=words
    )
    got = check(implementation, request, beta=4.0, lse=True)
    assert 0 < int(got.count[0, 0]) <= table
    assert int(got.count[1, 0]) == 0


def test_signs_are_in_the_order_that_wgmma_reads(rng):
    """Each bit of a word meets its integer; words that a group of four lacks meet zeros."""
    words = 6
    layout = mosaic_layouts.Words(128, words, 64)
    codes = rng.integers(0, 2**32, (1, words, 64), dtype=np.uint64).astype(np.uint32)
    query, keys, *_ = request_of(rng, [0], [16], dim=128, words=words)
    integers = layout.operands(query, keys).integers[0][0, 0].reshape(layout.groups, -1)
    spread = [
        np.asarray(mosaic_layouts._spread_simulated(codes, group), int)
        for group in range(layout.groups)
    ]
    assert {-128, 0} == set(np.unique(spread))
    got = sum(x @ np.asarray(y, int) for x, y in zip(spread, integers, strict=True)) // -128
    octets = np.ascontiguousarray(codes[0].T.astype("<u4")).view(np.uint8)
    signs = np.unpackbits(octets, axis=1, bitorder="little").astype(int)
    np.testing.assert_array_equal(got, signs @ np.asarray(query.integers[0, 0], int))


@pytest.mark.slow
@pytest.mark.parametrize("words", [None, 2])
def test_the_kernel_uses_its_slots_again(words, rng):
    low, high = [700], [160 * 16 - 3]  # five steps, less one, in two slots
    request = request_of(rng, low, high, table=160, run=True, pool=200, words=words)
    request = (dataclasses.replace(request[0], offset=None), *request[1:])
    got = mosaic_gpu.bounds(
        *request, scale=0.1, target=INTERPRET, tuning=mosaic_gpu.Tuning(stages=2, blocks=1)
    )
    wanted = reference.bounds(*request, scale=0.1)
    some = slice(700 // 16, None)
    for x, y in ((got.upper, wanted.upper), (got.lse, wanted.lse)):
        np.testing.assert_allclose(x[:, :, some], y[:, :, some], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.best, wanted.best, rtol=1e-5, atol=1e-4)


def test_an_arrival_barrier_belongs_to_one_warpgroup():
    """A thread counts the phases it waited for: of a barrier that two wait at by turns, each would
    count half, and the device would read too early or wait for ever.
    """
    for stages in range(1, 7):
        turns = mosaic_gpu._turns(stages)
        assert turns % stages == 0
        assert turns % mosaic_layouts.COMPUTE == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_neighbours_in_the_pool_a_given_best_and_a_full_list(implementation, rng):
    request = request_of(rng, low=[3], high=[520], run=True, dim=128, dtype="float16")
    best = jnp.asarray(rng.uniform(0, 60, (1, HEADS)), jnp.float32)
    got = check(implementation, request, beta=30.0, best=best, capacity=4)
    assert int(got.count[0, 0]) > 4  # what did not fit is counted


@pytest.mark.parametrize("implementation", SIMULATED_LONG)
def test_long_pages_and_extreme_numbers(implementation, rng):
    query, keys, *rest = request_of(rng, low=[70], high=[300], table=10, page=32)
    spread = np.array(keys.spread)
    spread[0, int(rest[0][0, 5]), 7] = np.inf  # a key of which nothing is known
    keys = op.Codes(keys.codes, keys.scale, jnp.asarray(spread), keys.centre, keys.unit)
    got = check(implementation, (query, keys, *rest), beta=0.0)
    assert int(rest[0][0, 5]) in np.asarray(got.page_ids[0, 0, : int(got.count[0, 0])])
    zeros = jax.tree.map(jnp.zeros_like, query)
    got = check(implementation, (zeros, keys, *rest), beta=0.0)  # all score 0, without error
    assert int(got.count[0, 0]) == 8


def test_the_sketch_of_the_index_is_what_is_scanned(rng):
    dim, size, heads, pool = 64, 16, 2, 20
    k = jnp.asarray(rng.standard_normal((heads, pool, size, dim)) * 3, jnp.bfloat16)
    empty = SketchLayer(
        codes=jnp.zeros((heads, pool, size, dim // 2), jnp.uint8),
        scale=jnp.zeros((heads, pool, size), jnp.float16),
        spread=jnp.zeros((heads, pool, size), jnp.float16),
        centre=jnp.zeros((heads, pool, dim), jnp.int8),
        centre_scale=jnp.zeros((heads, pool), jnp.float16),
        value=jnp.zeros((heads, pool, dim), jnp.int8),
        value_scale=jnp.zeros((heads, pool), jnp.float16),
        value_spread=jnp.zeros((heads, pool, 2), jnp.float16),
    )
    layer = jax.jit(SketchLayer.build)(empty, k, k, jnp.arange(pool), jnp.full(pool, size))
    q = jnp.asarray(rng.standard_normal((1, 4, dim)) * 3, jnp.bfloat16)
    turned = rotate(q.astype(jnp.float32))
    unit = jnp.max(jnp.abs(turned), axis=-1, keepdims=True) / 127
    whole = jnp.round(turned / unit)
    square = jnp.sum(turned**2, axis=-1)
    step = square / jnp.sum(whole * turned, axis=-1)
    lost = jnp.sqrt(jnp.sum((step[..., None] * whole - turned) ** 2, axis=-1))
    sure = deviations(5e-5, dim)
    query = op.Query(
        q,
        whole.astype(jnp.int8),
        step,
        sure * jnp.sqrt(square) + (dim - 1) ** 0.5 * lost,
        sure * norm_bound(4, dim) / (dim - 1) ** 0.5 * lost,
    )
    keys = op.Codes(layer.codes, layer.scale, layer.spread, layer.centre, layer.centre_scale)
    pages = jnp.arange(pool)[None]
    got = op.sketch_select(
        query, keys, pages, jnp.array([0]), jnp.array([pool * size]), beta=5.0, target=CPU
    )
    score = jnp.einsum("kgd,kpzd->kgpz", q[0].reshape(2, 2, dim), k, precision="highest")
    wanted = jnp.any(score >= score.max((2, 3), keepdims=True) - 5.0, axis=(1, 3))
    for head in range(heads):
        kept = set(np.asarray(got.page_ids[0, head, : int(got.count[0, head])]).tolist())
        assert set(np.flatnonzero(wanted[head]).tolist()) <= kept
        assert len(kept) < pool
    assert np.all(np.asarray(got.best).reshape(2, 2) <= np.asarray(score.max((2, 3))))


def test_what_does_not_fit_says_why(rng):
    request = request_of(rng, low=[3], high=[520])
    query, keys, *rest = request
    assert op.choose(*request, target=H100).implementation == "mosaic_gpu"
    assert "sm_100" in str(op.choose(*request, target=B200))
    assert op.choose(*request, target=CPU).implementation == "xla"
    wide = op.Query(query.q.astype(jnp.float32), *jax.tree.leaves(query)[1:])
    with pytest.raises(KernelError, match="float32"):
        op.choose(wide, keys, *rest, target=H100, implementation="mosaic_gpu")
    short = op.Codes(keys.codes[..., :16], *jax.tree.leaves(keys)[1:])
    learnt = request_of(rng, low=[3], high=[520], words=2)
    assert op.choose(*learnt, target=H100).implementation == "mosaic_gpu"
    half = dataclasses.replace(learnt[0], q=learnt[0].q.astype(jnp.float16))
    with pytest.raises(KernelError, match=r"float16; needs bfloat16$"):
        op.choose(half, *learnt[1:], target=H100, implementation="mosaic_gpu")
    many = request_of(rng, low=[3], high=[520], words=17)
    with pytest.raises(KernelError, match="544 signs; needs at most 512"):
        op.choose(*many, target=H100, implementation="mosaic_gpu")
    with pytest.raises(KernelError, match=r"query\.offset is"):
        op.choose(dataclasses.replace(learnt[0], offset=jnp.zeros(3)), *learnt[1:])
    wrong = dataclasses.replace(learnt[0], integers=many[0].integers[..., :96])
    with pytest.raises(KernelError, match=r"keys.codes is .*, not \(1, 80, 3, 16\)"):
        op.choose(wrong, *learnt[1:])
    with pytest.raises(KernelError, match=r"keys.codes is .*, not \(1, 80, 16, 32\)"):
        op.choose(query, short, *rest)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_learnt_sketch_of_the_index_is_what_is_scanned(implementation, rng):
    """Its bounds are those of the layer's own scan."""
    dim, size, heads, pool, bits = 64, 16, 2, 20, 1.5
    spread = np.broadcast_to(np.exp(-np.arange(dim) / 20), (heads, dim))
    rows = np.linalg.qr(rng.standard_normal((heads, dim, dim)))[0] / spread[..., None]
    offset, grain = rng.standard_normal((heads, dim)), 2.0 ** rng.integers(-3, 3, (heads, dim))
    basis = Turned(rows, spread, offset, grain).basis(bits)
    half = jnp.zeros((heads, pool, size), jnp.float16)
    empty = SketchLayer(
        codes=jnp.zeros((heads, pool, int(dim * bits) // 32, size), jnp.uint32),
        scale=half,
        spread=half,
        centre=jnp.zeros((heads, pool, dim // 2), jnp.uint8),
        centre_scale=half[..., 0],
        value=jnp.zeros((heads, pool, dim), jnp.int8),
        value_scale=half[..., 0],
        value_spread=jnp.zeros((heads, pool, 2), jnp.float16),
        basis=basis,
    )
    k = jnp.asarray(rng.standard_normal((heads, pool, size, dim)) + offset[:, None, None])
    layer = jax.jit(SketchLayer.build)(empty, k, k, jnp.arange(pool), jnp.full(pool, size))
    q = jnp.asarray(3 * rng.standard_normal((heads, 2, dim)), jnp.float32)
    asked = layer.ask(q, MISS)
    of_centre, of_all = layer.ask_centre(q)
    query = op.Query(
        *(
            x.reshape(1, 4, *x.shape[2:])
            for x in (of_centre, asked.integers, asked.step, asked.of_spread, asked.of_scale)
        ),
        offset=of_all.reshape(1, 4),
    )
    keys = op.Signs(layer.codes, layer.scale, layer.spread, layer.centre, layer.centre_scale)
    ids, end = jnp.arange(pool), pool * size
    got = op.bounds(
        query,
        keys,
        ids[None],
        jnp.array([0]),
        jnp.array([end]),
        implementation=implementation,
        target=CPU,
    )
    view = Pages(k, k, ids)
    seen = KeyRange(jnp.zeros(1, jnp.int32), jnp.array([end]))
    scan = layer.scan(q[:, :, None], view, seen, MISS)
    ends = scan.estimate + scan.error, scan.estimate - scan.error
    upper, lower = (x[:, :, 0, :end] for x in ends)
    upper = upper.reshape(heads, 2, pool, size).max(-1)
    np.testing.assert_allclose(got.upper[0], np.swapaxes(upper, 1, 2), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got.best[0], lower.max(-1), rtol=1e-4, atol=1e-3)
