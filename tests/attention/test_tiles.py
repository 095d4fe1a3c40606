"""Block-sparse attention against its definitions in numpy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.attention import merge, tiles
from alaya_jax.attention.engine import attend
from alaya_jax.attention.paged import attend_range
from alaya_jax.attention.tiles import attend_list, attend_tiles, select_tiles
from alaya_jax.cache import UNUSED, PageTable, views
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.errors import RequestError
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query import Tiles, Window
from alaya_jax.query.plan import Plan

HEADS, DIM, PAGE, POOL, TABLE, VISIT, TILE, Q_BLOCK = 2, 16, 4, 48, 43, 8, 16, 8
small = functools.partial(Tiles, window=Window(3, 5), q_block=Q_BLOCK, samples=3)


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Many visits, tiles and blocks even in a small case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "VISIT_TOKENS", VISIT)
        patch.setattr(views, "TILE_TOKENS", TILE)
        jax.clear_caches()
        yield
    jax.clear_caches()


@jax.jit
def run(q, pages, positions, rule):
    """All that a test asks, in one program a shape."""
    chosen = select_tiles(q, Pages(*pages), positions, rule)
    partial, attended, skipped = attend_list(q, Pages(*pages), positions, chosen, rule.beta)
    return chosen, partial, attended, skipped


@jax.jit
def dense(q, pages, positions):
    partial, _ = attend_range(q, Pages(*pages), KeyRange(jnp.zeros_like(positions), positions + 1))
    return partial


def make(rng, n, group=2, t=20, start=None, padding=0, scale=2.0):
    """Keys of a sequence scattered over a poisoned pool, and its last t queries or those from
    `start`, `padding` of them at the end no queries at all.
    """
    k, v = rng.standard_normal((2, HEADS, n, DIM)).astype(np.float32)
    used = -(-n // PAGE)
    ids = 1 + rng.permutation(POOL - 1)[:used]
    pool = np.full((2, HEADS, POOL, PAGE, DIM), np.nan, np.float32)
    for j in range(n):
        pool[0][:, ids[j // PAGE], j % PAGE] = k[:, j]
        pool[1][:, ids[j // PAGE], j % PAGE] = v[:, j]
    table = np.zeros(TABLE, np.int32)  # is wider
    table[:used] = ids
    q = (scale * rng.standard_normal((HEADS, group, t, DIM))).astype(np.float32)
    start = n - t + padding if start is None else start
    positions = np.where(np.arange(t) < t - padding, start + np.arange(t), -1).astype(np.int32)
    return q, k, v, (pool[0], pool[1], table), positions


def exact_scores(q, k, positions):
    scores = np.einsum("kgtd,ksd->kgts", q.astype(np.float64), k.astype(np.float64))
    return np.where(np.arange(k.shape[1]) <= positions[:, None], scores, -np.inf)


def expected_list(q, k, positions, rule, kv_block, q_block):
    """By the definition: lists of blocks, how many are always there, mass of each head."""
    scores = exact_scores(q, k, positions) / np.sqrt(DIM)
    heads, group, t, _ = scores.shape
    for first in range(0, t, q_block):
        real = [i for i in range(first, min(t, first + q_block)) if positions[i] >= 0]
        seen = positions[real]
        blocks = range(max(seen, default=-1) // kv_block + 1)
        always = [
            b
            for b in blocks
            if b * kv_block < rule.window.sink
            or (b + 1) * kv_block > min(seen) + 1 - rule.window.recent
        ]
        asked = [
            real[-(-(i + 1) * len(real) // rule.samples) - 1] if real else None
            for i in range(min(rule.samples, q_block))
        ]
        for head in range(heads):
            rest = [b for b in blocks if b not in always]
            if rule.recovery is None or not real:
                yield always + rest, always, np.ones(group)
                continue
            p = np.exp(scores[head][:, asked])
            p /= p.sum(-1, keepdims=True)
            mass = np.stack([p[..., b * kv_block :][..., :kv_block].sum(-1) for b in blocks], -1)
            order = always + sorted(rest, key=lambda b: -mass[:, :, b].mean())
            count = len(always)
            while count < len(order) and mass[:, :, order[:count]].sum(-1).min() < rule.recovery:
                count += 1
            kept = order if rule.recovery >= 1 else order[:count]
            yield kept, always, mass[:, :, kept].sum(-1).mean(-1)


def expected_attention(q, k, v, positions, chosen, beta):
    """By the definition: online softmax in the order of the lists, a visit's blocks at a time.

    Returns out, lse, attended, blocks skipped, and of each query the keys attended to.
    """
    scores = exact_scores(q, k, positions)
    heads, group, t, n = scores.shape
    used = np.zeros(scores.shape, bool)
    skipped = np.zeros(chosen.count.shape, int)
    at_once = max(1, VISIT // chosen.kv_block)
    beta = np.broadcast_to(beta, heads * group).reshape(heads, group)
    for head in range(heads):
        for block in range(chosen.count.shape[1]):
            rows = slice(block * chosen.q_block, min(t, (block + 1) * chosen.q_block))
            top = np.full((group, rows.stop - rows.start), -np.inf)
            listed = list(chosen.blocks[head, block][: chosen.count[head, block]])
            for i in range(0, len(listed), at_once):
                keys = [
                    j
                    for b in listed[i : i + at_once]
                    for j in range(b * chosen.kv_block, min(n, (b + 1) * chosen.kv_block))
                ]
                tile = scores[head][:, rows][..., keys]
                out_of_range = np.isneginf(tile.max(-1)) | (
                    tile.max(-1) < top - beta[head][:, None]
                )
                if i >= chosen.kept[head, block] and out_of_range.all() and np.isfinite(beta).all():
                    skipped[head, block] += len(listed[i : i + at_once])
                    continue
                used[head][:, rows, keys] = True
                top = np.maximum(top, tile.max(-1))
    used &= np.isfinite(scores)
    weight = np.where(used, np.exp(scores / np.sqrt(DIM)), 0)
    total = weight.sum(-1)
    out = np.einsum("kgts,ksd->kgtd", weight, v.astype(np.float64))
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    return out / np.where(total > 0, total, 1)[..., None], lse, used.sum(-1), skipped, used


def check(data, rule):
    """Everything about one case; returns what ran."""
    q, k, v, pages, positions = data
    chosen, partial, attended, skipped = jax.tree.map(np.asarray, run(q, pages, positions, rule))
    assert not np.isnan(partial.out).any()
    wanted = expected_list(q, k, positions, rule, chosen.kv_block, chosen.q_block)
    for block in range(chosen.count.shape[1]):
        for head in range(HEADS):
            blocks, always, mass = next(wanted)
            found = chosen.blocks[head, block][: chosen.count[head, block]].tolist()
            assert found == blocks
            assert chosen.kept[head, block] == len(always)
            if blocks:
                np.testing.assert_allclose(chosen.mass[head, :, block], mass, atol=1e-5)
    out, lse, count, left, used = expected_attention(q, k, v, positions, chosen, rule.beta)
    np.testing.assert_array_equal(attended, count)
    np.testing.assert_array_equal(skipped, left)
    np.testing.assert_allclose(partial.out, out, atol=3e-6)
    np.testing.assert_allclose(partial.lse, lse, rtol=1e-5, atol=1e-5)
    return chosen, attended, skipped, used


RULES = [
    small(window=Window(0, 1)),
    small(beta=6.0),
    small(recovery=0.7),
    small(beta=6.0, recovery=1.0, window=Window(0, 1)),
    small(beta=4.0, recovery=0.9, window=Window(5, 2), kv_block=8),
]
SHAPES = {
    "from the start": {"n": 20, "t": 20},
    "a suffix, ragged": {"n": 93, "t": 20},
    "in the middle": {"n": 93, "t": 20, "start": 41},
    "padded": {"n": 77, "t": 20, "padding": 7},
    "a block of padding": {"n": 61, "t": 20, "padding": 15},
    "one query": {"n": 90, "t": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_equals_its_definition(rule, shape, rng):
    check(make(rng, **SHAPES[shape]), rule)


@pytest.mark.parametrize("group", [1, 8])
def test_groups_and_a_beta_a_head(group, rng):
    beta = jnp.asarray(rng.uniform(3, 9, HEADS * group), jnp.float32)
    check(make(rng, 93, group), small(beta, recovery=0.8))


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recovery", [None, 1.0])
def test_infinite_beta_is_full_attention(recovery, shape, rng):
    q, _, _, pages, positions = make(rng, **SHAPES[shape])
    rule = small(recovery=recovery)
    _, partial, attended, skipped = run(q, pages, positions, rule)
    want = dense(q, pages, positions)
    np.testing.assert_allclose(partial.out, want.out, atol=1e-6)
    np.testing.assert_allclose(partial.lse, want.lse, atol=1e-6)
    np.testing.assert_array_equal(attended, np.broadcast_to(positions + 1, attended.shape))
    assert not np.any(skipped)


def test_all_padding_attends_to_nothing(rng):
    q, _, _, pages, _ = make(rng, 93)
    nothing = np.full(20, -1, np.int32)
    for rule in RULES:
        chosen, partial, attended, _ = run(q, pages, nothing, rule)
        assert not np.any(chosen.count)
        assert not np.any(attended)
        assert not np.any(partial.out)
        assert np.all(np.isneginf(partial.lse))


def test_no_key_in_range_of_a_query_is_lost(rng):
    skips = 0
    for beta in (0.0, 3.0, 10.0):
        data = make(rng, 93, scale=3.0)
        q, k, _, _, positions = data
        for recovery in (None, 1.0):
            rule = small(beta, recovery, window=Window(0, 1))
            *_, skipped, used = check(data, rule)
            scores = exact_scores(q, k, positions)
            assert np.all(used | (scores < scores.max(-1, keepdims=True) - beta))
            skips += skipped.sum()
    assert skips > 40  # and it does skip


def planted(rng, n=160, blocks=(3, 17), t=20):
    """Queries that all want the keys of a few blocks."""
    q, k, v, pages, positions = make(rng, n, t=t, scale=0.3)
    k *= 0.3
    want = rng.standard_normal((HEADS, 1, DIM)).astype(np.float32)
    q += 4 * want[:, None]
    for b in blocks:
        k[:, b * PAGE : (b + 1) * PAGE] += want
    pool = np.array(pages[0])
    for j in range(n):
        pool[:, pages[2][j // PAGE], j % PAGE] = k[:, j]
    return q, k, v, (pool, *pages[1:]), positions


def test_cost_follows_what_is_wanted(rng):
    data = planted(rng)
    rule = small(recovery=0.9, window=Window(0, 1))
    chosen, attended, *_ = check(data, rule)
    assert set(chosen.blocks[0, 0][: chosen.count[0, 0]]) >= {3, 17}
    # The block of queries' own keys, and the planted.
    assert chosen.count.max() <= 3 + 2
    assert attended.max() <= 5 * PAGE
    # The tile rule leaves the same out, once the planted are seen.
    *_, skipped, _ = check(data, small(5.0, 1.0, window=Window(0, 1)))
    assert skipped.min() > 25


def test_blocks_that_are_not_listed_have_no_part(rng):
    q, _, _, pages, positions = planted(rng)
    chosen, partial, *_ = run(q, pages, positions, RULES[2])
    listed = [np.asarray(chosen.blocks[i, j][: chosen.count[i, j]]) for i, j in np.ndindex(2, 3)]
    unlisted = np.setdiff1d(np.arange(40), np.concatenate(listed))
    assert len(unlisted) > 20
    k_pool, v_pool = (np.array(pool) for pool in pages[:2])
    k_pool[:, pages[2][unlisted]] = v_pool[:, pages[2][unlisted]] = np.inf
    attend = jax.jit(lambda *args: attend_list(args[0], Pages(*args[1]), *args[2:])[0].out)
    out = attend(q, (k_pool, v_pool, pages[2]), positions, chosen, RULES[2].beta)
    np.testing.assert_allclose(out, partial.out, atol=1e-6)


def test_attend_tiles_selects_and_attends(rng):
    q, _, _, pages, positions = make(rng, 93)
    rule = small(beta=4.0, recovery=0.9)
    _, partial, attended, _ = run(q, pages, positions, rule)
    both = jax.jit(lambda q, pages, *args: attend_tiles(q, Pages(*pages), *args))
    again, count = both(q, pages, positions, rule)
    np.testing.assert_allclose(again.out, partial.out, atol=1e-6)
    np.testing.assert_array_equal(count, attended)


@pytest.mark.parametrize("rule", [small(), small(recovery=0.7)], ids=["full", "recovery"])
def test_pages_spread_over_devices_merge_to_the_whole(rule, rng):
    q, _, _, pages, positions = make(rng, 93)
    parts = []
    for device in range(2):  # holds every other page
        mine = np.arange(device, -(-93 // PAGE), 2)
        ids, start = np.zeros(TABLE, np.int32), np.full(TABLE, UNUSED, np.int32)
        ids[: len(mine)], start[: len(mine)] = pages[2][mine], mine * PAGE
        chosen, partial, *_ = run(q, (*pages[:2], ids, start), positions, rule)
        parts.append(partial)
        assert np.all(chosen.count[:, -1] == len(mine)) == (rule.recovery is None)
    merged, want = merge(*parts), dense(q, pages, positions)
    if rule.recovery is None:
        np.testing.assert_allclose(merged.out, want.out, atol=1e-6)
        np.testing.assert_allclose(merged.lse, want.lse, atol=1e-6)
    else:  # the queries that were asked keep their share
        asked = [2, 5, 7, 10, 13, 15, 17, 18, 19]
        mass = np.exp(merged.lse - want.lse)
        assert mass[:, :, asked].min() >= 0.7
        assert mass.max() < 1


def test_another_backend_reads_pages_by_a_gather(rng, monkeypatch):
    q, _, _, pages, positions = make(rng, 93)
    rule = small(beta=4.0, recovery=0.9)
    _, partial, attended, _ = run(q, pages, positions, rule)
    for module in (views, tiles):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    gathered = jax.jit(lambda q, pages, *args: attend_tiles(q, Pages(*pages), *args))
    again, count = gathered(q, pages, positions, rule)
    np.testing.assert_allclose(again.out, partial.out, atol=1e-6)
    np.testing.assert_array_equal(count, attended)


def test_new_numbers_do_not_recompile(rng):
    q, _, _, pages, positions = make(rng, 93)
    run(q, pages, positions, small(1.0, 0.5, window=Window(1, 2)))
    before = run._cache_size()
    run(q, pages, positions, small(9.0, 0.7, window=Window(7, 9)))
    assert run._cache_size() == before


@pytest.mark.parametrize(
    ("make_rule", "message"),
    [
        (functools.partial(Tiles, beta=-1.0), "beta=-1.0"),
        (functools.partial(Tiles, recovery=0.0), "recovery=0.0"),
        (functools.partial(Tiles, recovery=1.1), "recovery=1.1"),
        (functools.partial(Tiles, q_block=0), "q_block=0"),
        (functools.partial(Tiles, samples=0), "samples=0"),
    ],
)
def test_bad_numbers_are_refused(make_rule, message):
    with pytest.raises(RequestError, match=message):
        make_rule()


@pytest.mark.parametrize("kv_block", [6, 32])
def test_blocks_that_do_not_fit_pages_are_refused(kv_block, rng):
    q, _, _, pages, positions = make(rng, 93)
    with pytest.raises(RequestError, match=f"kv_block={kv_block}.*page size, 4, that divides 16"):
        select_tiles(q, Pages(*pages), positions, Tiles(kv_block=kv_block))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Tiles(), Tiles(recovery=0.9), Tiles(beta=8.0, recovery=1)])
def test_the_engine_runs_tiles_for_ragged_batches(rng, rule):
    """What `attend_tiles` gives each sequence alone; padding attends to nothing."""
    lengths, counts, t, dim, size = [37, 0], [9, 5], 9, 8, 4
    pages = [-(-(n + c) // size) for n, c in zip(lengths, counts, strict=True)]
    ids = 1 + rng.permutation(sum(pages))
    table = np.zeros((2, max(pages)), np.int32)
    table[0, : pages[0]], table[1, : pages[1]] = ids[: pages[0]], ids[pages[0] :]
    k, v = jnp.asarray(rng.standard_normal((2, 2, sum(pages) + 1, size, dim)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((2, t, 6, dim)), jnp.float32)
    out, read = attend(
        Plan(rule),
        q,
        LayerMemory(k, v, PageTable(jnp.asarray(table), jnp.asarray(lengths, jnp.int32))),
        jnp.asarray(counts, jnp.int32),
    )
    for b in range(2):
        rows = jnp.moveaxis(q[b].reshape(t, 2, 3, dim), 0, 2)
        positions = jnp.where(jnp.arange(t) < counts[b], lengths[b] + jnp.arange(t), -1)
        want, attended = attend_tiles(rows, Pages(k, v, jnp.asarray(table[b])), positions, rule)
        got = jnp.moveaxis(out[b].reshape(t, 2, 3, dim), 0, 2)
        np.testing.assert_allclose(got, want.out, atol=1e-6)
        np.testing.assert_array_equal(
            np.moveaxis(np.asarray(read.attended[b]).reshape(t, 2, 3), 0, 2), attended
        )
        assert not np.any(out[b, counts[b] :])
        assert np.all(read.scored[b] >= read.attended[b])
