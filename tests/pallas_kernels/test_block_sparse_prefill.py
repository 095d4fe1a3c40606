"""One suite for every implementation; the oracle is numpy in float64, tile by tile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels import block_sparse_prefill as op
from alaya_jax.pallas_kernels.dispatch import B200, CPU, H100, INTERPRET

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu")
SIMULATED_LONG = ("reference", "xla", pytest.param("mosaic_gpu", marks=pytest.mark.slow))


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled; the same case with other numbers is the same program."""

    dim: int = 64
    page: int = 16
    block_kv: int = 64
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 130
    table: int = 16
    dtype: str = "bfloat16"
    lists: int | None = None  # how many heads have one
    beta: bool = False


@functools.lru_cache
def compiled(case: Case, implementation: str):
    target = INTERPRET if implementation == "mosaic_gpu" else CPU

    def run(q, k, v, pages, lengths, count, lists, beta):
        blocks, block_counts, block_kept = lists or (None, None, None)
        return op.block_sparse_prefill(
            q,
            k,
            v,
            pages,
            lengths,
            count,
            blocks=blocks,
            block_counts=block_counts,
            block_kept=block_kept,
            beta=beta,
            block_kv=case.block_kv,
            implementation=implementation,
            target=target,
        )

    return jax.jit(run)


def request_of(
    case, rng, lengths, count, gain=1.0, blocks=None, block_counts=None, block_kept=0, beta=None
):
    """Random numbers; NaN wherever no implementation may look."""
    batch, pool = len(lengths), len(lengths) * case.table + 3
    q = rng.standard_normal((batch, case.tokens, case.heads, case.dim)) * gain
    shape = (case.kv_heads, pool, case.page, case.dim)
    k, v = rng.standard_normal(shape), rng.standard_normal(shape)
    pages = rng.permutation(pool)[: batch * case.table].reshape(batch, case.table)
    used = np.zeros((pool, case.page), bool)
    for b in range(batch):
        filled = np.arange(case.table * case.page) < lengths[b] + count[b]
        used[pages[b]] = filled.reshape(case.table, case.page)
        pages[b, -(-(lengths[b] + count[b]) // case.page) :] = np.iinfo(np.int32).max
    k[:, ~used] = v[:, ~used] = np.nan
    dtype = jnp.dtype(case.dtype)
    lists = None
    if case.lists:
        block_kept = np.broadcast_to(block_kept, np.shape(block_counts))
        lists = tuple(jnp.asarray(x, jnp.int32) for x in (blocks, block_counts, block_kept))
    return (
        *(jnp.asarray(x, dtype) for x in (q, k, v)),
        *(jnp.asarray(x, jnp.int32) for x in (pages, lengths, count)),
        lists,
        None if beta is None else jnp.broadcast_to(jnp.asarray(beta, jnp.float32), case.heads),
    )


def oracle(case, q, k, v, pages, lengths, count, lists, beta):
    """Attention, tile by tile, in float64."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    pages, lengths, count = (np.asarray(x) for x in (pages, lengths, count))
    batch, tokens, heads, dim = q.shape
    out = np.zeros(q.shape)
    lse = np.full((batch, heads, tokens), -np.inf)
    skipped = np.zeros((batch, heads, -(-tokens // op.ROWS)), int)
    for b in range(batch):
        total = lengths[b] + count[b]
        ids = pages[b, : -(-total // case.page)]
        for h in range(heads):
            rows_k, rows_v = (
                x[h * case.kv_heads // heads, ids].reshape(-1, dim)[:total] for x in (k, v)
            )
            for tile in range(skipped.shape[2]):
                first = tile * op.ROWS
                t = np.arange(first, min(first + op.ROWS, count[b]))
                if t.size == 0:
                    continue
                block = tile * op.ROWS // op.QUERY_BLOCK
                kept = 0
                if lists is None:
                    end = lengths[b] + min((block + 1) * op.QUERY_BLOCK, count[b])
                    order = list(range(-(-end // case.block_kv)))[::-1]
                else:
                    j = h * lists[0].shape[1] // heads
                    order = np.asarray(lists[0])[b, j, block][: lists[1][b, j, block]]
                    kept = int(lists[2][b, j, block])
                top = np.full(t.size, -np.inf)
                seen = np.zeros((t.size, total), bool)
                score = q[b, t, h] @ rows_k.T
                causal = np.arange(total) <= (lengths[b] + t)[:, None]
                score = np.where(causal, score, -np.inf)
                for i, j in enumerate(order):
                    of = (np.arange(total) // case.block_kv == j) & causal
                    tile_top = np.max(np.where(of, score, -np.inf), axis=1, initial=-np.inf)
                    exempt = (
                        beta is None
                        or i < kept
                        or (j + 1) * case.block_kv > lengths[b] + first + 1
                        or first + op.ROWS > count[b]
                    )
                    if not exempt and np.all(tile_top < top - float(beta[h])):
                        skipped[b, h, tile] += 1
                        continue
                    top = np.maximum(top, tile_top)
                    seen |= of
                score = np.where(seen, score * dim**-0.5, -np.inf)
                best = np.max(score, axis=1, initial=-np.inf, keepdims=True)
                p = np.exp(score - np.where(np.isinf(best), 0, best))
                total_p = p.sum(axis=1)
                some = total_p > 0
                out[b, t[some], h] = (p @ rows_v)[some] / total_p[some, None]
                lse[b, h, t[some]] = best[some, 0] + np.log(total_p[some])
    return out, lse, skipped


def check(case, implementation, request):
    got = compiled(case, implementation)(*request)
    out, lse, skipped = oracle(case, *request)
    assert got.out.dtype == request[0].dtype
    # Outputs, and p before it multiplies v, are rounded to the dtype.
    tolerance = {"bfloat16": 2e-2, "float16": 3e-3}[case.dtype]
    np.testing.assert_allclose(np.asarray(got.out, np.float64), out, atol=tolerance)
    # A score is a float32 sum whose terms may cancel.
    norms = [np.nanmax(np.sum(np.square(np.asarray(x, np.float64)), -1)) for x in request[:2]]
    rounding = 2e-7 * np.sqrt(np.prod(norms) / case.dim)
    np.testing.assert_allclose(got.lse, lse, atol=1e-5 + rounding, rtol=1e-6)
    np.testing.assert_array_equal(got.skipped, skipped)
    assert np.all(np.asarray(got.out, np.float32)[np.moveaxis(np.isneginf(lse), 1, 2)] == 0)
    return got


@pytest.mark.parametrize("implementation", SIMULATED_LONG)
def test_dense(implementation, rng):
    case = Case()
    check(case, implementation, request_of(case, rng, lengths=[45, 0], count=[130, 65]))
    check(case, implementation, request_of(case, rng, lengths=[126, 113], count=[1, 0], gain=30))


@pytest.mark.parametrize("implementation", SIMULATED_LONG)
def test_lists_of_kv_heads(implementation, rng):
    case = Case(lists=2)
    lengths, count = [100, 126], [130, 129]
    blocks = np.full((2, 2, 2, 4), 10**6)  # what is past a count is not read
    counts = np.array([[[2, 3], [0, 1]], [[1, 4], [3, 0]]])
    blocks[0, 0, 0, :2] = 0, 2
    blocks[0, 0, 1, :3] = 3, 0, 2
    blocks[0, 1, 1, :1] = 1
    blocks[1, 0, 0, :1] = 3  # behind some of the queries, and alone
    blocks[1, 0, 1, :4] = 0, 1, 2, 3
    blocks[1, 1, 0, :3] = 2, 0, 15  # the last is behind every key
    given = {"blocks": blocks, "block_counts": counts}
    got = check(case, implementation, request_of(case, rng, lengths, count, **given))
    assert np.isneginf(got.lse).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lists_of_heads_in_float16_with_wide_tiles(implementation, rng):
    case = Case(128, 32, 128, table=14, dtype="float16", lists=4, tokens=90)
    blocks = np.stack([rng.permutation(4) for _ in range(4)]).reshape(1, 4, 1, 4)
    given = {"blocks": blocks, "block_counts": [[[1], [4], [4], [2]]]}  # more tiles than stages
    check(case, implementation, request_of(case, rng, [350], [90], **given))


@pytest.mark.parametrize("implementation", SIMULATED_LONG)
def test_the_first_of_a_list_are_never_skipped(implementation, rng):
    case = Case(lists=2, beta=True)
    given = {
        "blocks": np.broadcast_to([0, 1, 2, 3], (2, 2, 2, 4)),
        "block_counts": np.full((2, 2, 2), 4),
        "beta": 0.0,  # of what comes after the best, nothing
    }
    q, k, v, pages, *rest = request_of(case, rng, [120, 120], [130, 130], **given)
    later = np.asarray(pages)[:, 4:16]  # all but the first block are far from every query
    k = k.at[:, later[later < k.shape[1]]].multiply(0.01)
    blocks, counts, _ = rest[2]
    skipped = []
    for kept in (jnp.zeros_like(counts), jnp.asarray([[[0, 1], [2, 3]], [[4, 4], [0, 4]]])):
        rest[2] = (blocks, counts, kept)
        skipped.append(check(case, implementation, (q, k, v, pages, *rest)).skipped.sum())
    assert skipped[0] > skipped[1] > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tiles_far_below_the_running_maximum_are_skipped(implementation, rng):
    case = Case(beta=True, tokens=128)
    lengths, count = [127, 100], [128, 128]
    request = request_of(case, rng, lengths, count, beta=[20.0, 3.0, np.inf, 0.0])
    # Two blocks of keys are much like each query's own, and two are not.
    q, k, v, pages, *rest = request
    own = jnp.repeat(jnp.asarray(rng.standard_normal((1, 1, 2, 64)), q.dtype), 2, axis=2)
    factor = np.where(np.arange(16 * 16) // 64 % 2 == 0, 0.1, 1.0).reshape(16, 16)
    for b in range(2):
        ids = np.asarray(pages[b])
        ids = ids[ids < k.shape[1]]
        near = own[0, 0, ::2][:, None, None] * jnp.asarray(factor[: len(ids)], q.dtype)[..., None]
        noise = k[:, ids] * 0.1
        k = k.at[:, ids].set((near + noise).astype(k.dtype))
    q = (own + q * 0.05).astype(q.dtype)
    got = check(case, implementation, (q, k, v, pages, *rest))
    assert np.asarray(got.skipped)[:, 0].sum() > 0
    assert np.asarray(got.skipped)[:, 2].sum() == 0


@pytest.mark.parametrize("implementation", SIMULATED_LONG)
def test_extreme_scores(implementation, rng):
    case = Case()
    q, k, *rest = request_of(case, rng, lengths=[45, 0], count=[130, 65], gain=100)
    k = k * 100
    check(case, implementation, (q, k, *rest))
    got = check(case, implementation, (q, -jnp.abs(k), *rest))  # all far below 0
    assert np.isfinite(np.asarray(got.out, np.float32)).all()


def test_what_does_not_fit_says_why(rng):
    case = Case()
    request = request_of(case, rng, lengths=[45, 0], count=[130, 65])
    args = request[:6]
    assert op.choose(*args, target=H100).implementation == "mosaic_gpu"
    assert "sm_100" in str(op.choose(*args, target=B200))
    assert op.choose(*args, target=CPU).implementation == "xla"
    f32 = tuple(x.astype(jnp.float32) for x in args[:3])
    for bad, reason in (
        (lambda: op.choose(*f32, *args[3:], target=H100, implementation="mosaic_gpu"), "float32"),
        (
            lambda: op.choose(*args, block_kv=32, target=H100, implementation="mosaic_gpu"),
            "block_kv is 32",
        ),
        (lambda: op.choose(*args, block_kv=40), "page size 16"),
        (lambda: op.choose(*args, blocks=jnp.zeros((2, 2, 2, 1), jnp.int32)), "together"),
        (
            lambda: op.choose(
                *args,
                blocks=jnp.zeros((2, 3, 2, 1), jnp.int32),
                block_counts=jnp.zeros((2, 3, 2), jnp.int32),
            ),
            "2 kv heads or 4 heads",
        ),
        (lambda: op.choose(args[0], args[1], args[2][..., :32], *args[3:]), "queries have D"),
        (lambda: op.choose(*args[:3], args[3][:1], *args[4:]), "batch is 2"),
        (lambda: op.choose(args[0][:, :, :3], *args[1:]), "no multiple"),
    ):
        with pytest.raises(KernelError, match=reason):
            bad()
