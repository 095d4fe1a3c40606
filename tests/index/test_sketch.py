"""The sketch against flat truth: its bound, DIPR through it, and that it follows its pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alaya_jax as aj
from alaya_jax import DIPR, cache, configs
from alaya_jax.attention.paged import KeyRange
from alaya_jax.cache import PageTable
from alaya_jax.errors import ConfigError
from alaya_jax.index import MISS, Sketch, SketchLayer
from alaya_jax.models import LlamaConfig
from alaya_jax.query.select import select


def same(a, b):
    """Equal sketches. Sums over batches of other shapes may round otherwise, by float16's last."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-7), a, b)
    np.testing.assert_array_equal(a.codes, b.codes)


def pages_of(layer, ids):
    """What a sketch holds of some pages."""
    return jax.tree.map(lambda pool: np.asarray(pool)[:, np.asarray(ids)], layer)


@pytest.mark.parametrize(("bits", "miss"), [(2, MISS), (4, MISS), (8, MISS), (4, 0.1)])
def test_bound_fails_no_more_than_stated(paged, bits, miss):
    """The statement is of the mean over rotations; this is one rotation and many scores."""
    n = paged.length
    true = paged.scores()
    asked = paged.ask(paged.sketch(bits), miss=miss)
    estimate, error = asked.estimate[..., :n], asked.error[..., :n]
    assert np.mean(true > estimate + error) <= miss
    assert np.mean(true < estimate - error) <= miss
    off = (estimate - true) / error
    assert abs(off.mean()) < 0.05  # no bias
    assert np.abs(off).max() > 0.5  # nor is the bound an idle one
    assert np.all(asked.estimate[..., n:] == -np.inf)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dipr_is_that_of_all_scores(paged, bits):
    """Each key of the answer, none other, with its exact score."""
    layer = paged.sketch(bits)
    for beta in (0.0, 12.0, 60.0, float("inf")):
        asked = paged.ask(layer, beta, low=5, high=paged.length - 40)
        check_answer(asked, beta, -np.inf)


def check_answer(asked, beta, seed):
    rows = np.full(asked.true.shape[:-1], seed, np.float32)
    want, got = (
        np.asarray(select(DIPR(beta=beta), scores, rows)) for scores in (asked.true, asked.found)
    )
    differ = np.argwhere(want != got)
    for row in map(tuple, differ):  # a score within rounding of the threshold
        scores = asked.true[row[:-1]]
        threshold = max(scores.max(), seed) - beta
        size = max(abs(threshold), np.abs(scores[scores > -np.inf]).max())
        assert abs(scores[row[-1]] - threshold) <= 1e-5 * size
    assert len(differ) <= 0.01 * want.sum() + 1
    tolerance = 1e-5 * np.abs(asked.true[asked.true > -np.inf]).max(initial=1e-30)
    np.testing.assert_allclose(asked.found[got], asked.true[got], rtol=0, atol=tolerance)
    assert not np.any((asked.found > -np.inf) & (asked.true == -np.inf))


@settings(max_examples=40, deadline=None)
@given(
    beta=st.floats(0, 200),
    ends=st.tuples(st.integers(0, 120), st.integers(0, 120)),
    seed=st.one_of(st.just(-float("inf")), st.floats(-50, 100)),
    length=st.floats(0.01, 30),
    kind=st.sampled_from(["random", "clustered"]),
    number=st.integers(0, 2**31),
)
def test_dipr_of_any_numbers(make_keys, beta, ends, seed, length, kind, number):
    rng = np.random.default_rng(number)
    paged = make_keys(rng, kind, heads=2, n=120, dim=16, group=2, t=3, page_size=8, scale=length)
    low, high = min(ends), max(ends)
    check_answer(paged.ask(paged.sketch(), beta, seed, low, max(high, 1)), beta, seed)


@pytest.mark.parametrize(
    ("n", "group", "page_size", "bits"),
    [(1, 1, 16, 2), (150, 8, 7, 4), (33, 5, 1, 8)],
)
def test_any_shape(rng, make_keys, n, group, page_size, bits):
    paged = make_keys(rng, n=n, dim=16, group=group, t=2, page_size=page_size)
    asked = paged.ask(paged.sketch(bits), 10.0)
    assert asked.found.shape == asked.true.shape
    check_answer(asked, 10.0, -np.inf)


@pytest.mark.parametrize("kind", ["random", "real 6", "real 20"])
def test_most_keys_are_spared_at_four_bits(rng, all_keys, kind):
    """A scan that let everything pass would be exact, too."""
    paged = all_keys[kind](rng)
    true = paged.scores()
    beta = 0.2 * np.ptp(true, axis=-1).mean()
    critical = np.mean(true >= true.max(-1, keepdims=True) - beta)
    found = np.mean(paged.ask(paged.sketch(), beta).found[..., : paged.length] > -np.inf)
    assert critical <= found <= 3 * critical


def test_seed_of_the_window_raises_the_threshold(rng, make_keys):
    paged = make_keys(rng)
    layer, best = paged.sketch(), paged.scores().max(-1)
    seeds = (-np.inf, best, best + 20, best + 1e6)
    counts = [np.sum(paged.ask(layer, 20.0, seed).found > -np.inf) for seed in seeds]
    assert counts[0] >= counts[1] > counts[2] > counts[3] == 0


def test_beta_by_head(rng, make_keys):
    paged = make_keys(rng)
    layer, betas = paged.sketch(), np.linspace(0, 60, 9)
    found = paged.ask(layer, betas).found > -np.inf
    for head in (0, 4, 8):
        alone = paged.ask(layer, betas[head]).found > -np.inf
        np.testing.assert_array_equal(found[divmod(head, 3)], alone[divmod(head, 3)])


def test_many_tiles_and_blocks(rng, make_keys, monkeypatch):
    monkeypatch.setattr("alaya_jax.attention.paged.TILE_TOKENS", 64)
    monkeypatch.setattr("alaya_jax.index.exact.BLOCK", 16)
    monkeypatch.setattr("alaya_jax.index.sketch._BLOCK", 8)
    paged = make_keys(rng, n=901)  # of a shape that no other test has compiled
    asked = paged.ask(paged.sketch(), 60.0, low=9, high=850)
    assert np.sum(asked.found > -np.inf) > 500
    check_answer(asked, 60.0, -np.inf)


@pytest.mark.parametrize("bits", [2, 4])
def test_grown_equals_built(rng, make_keys, extend, bits):
    """Token by token, in chunks across page ends, or at once: the same."""
    build = jax.jit(SketchLayer.build)
    paged = make_keys(rng, n=75, heads=2)
    ids = np.asarray(paged.ids[:5])
    filled = np.clip(75 - 16 * np.arange(5), 0, 16)
    built = build(paged.empty(bits), paged.k_pages, ids, filled)
    # More pages than are sketched at once, with the page of nobody among them.
    many = np.pad(ids, (200, 0))
    at_once = build(paged.empty(bits), paged.k_pages, many, np.pad(filled, (200, 0)))
    grown, length = paged.empty(bits), 0
    # Keys that are not there yet must not count: the pool holds only what was appended so far.
    pool = np.full_like(paged.k_pages, np.nan)
    for count, padded in [(1, 1), (1, 1), (13, 40), (1, 1), (33, 40), (0, 40), (26, 40)]:
        table, new = paged.table(length), jnp.full(1, count, jnp.int32)
        for j in range(length, length + count):
            pool[:, ids[j // 16], j % 16] = paged.k[:, j]
        grown = extend(grown, pool, table, new, padded)
        length += count
    assert length == 75
    for other in (at_once, grown):
        same(pages_of(other, ids), pages_of(built, ids))
    others = np.setdiff1d(np.arange(1, pool.shape[1]), ids)
    same(pages_of(grown, others), pages_of(paged.empty(bits), others))


def test_ragged_batch_equals_each_alone(rng, make_keys, extend):
    """Sequences of one pool grow by different counts, one of them by nothing."""
    first, second = make_keys(rng, n=40), make_keys(rng, n=40)
    pool = jnp.concatenate([first.k_pages, second.k_pages], axis=1)
    shift = first.k_pages.shape[1]
    table = jnp.stack([first.ids, second.ids + shift, first.ids])
    lengths, counts = jnp.asarray([0, 0, 7]), jnp.asarray([40, 21, 0])
    empty = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), first.empty(4))
    both = extend(empty, pool, PageTable(table, lengths), counts, 40)
    for paged, count, at in ((first, 40, 0), (second, 21, shift)):
        filled = -(-count // 16)
        table, count = paged.table(0), jnp.asarray([count])
        alone = extend(paged.empty(4), paged.k_pages, table, count, 40)
        same(pages_of(both, paged.ids[:filled] + at), pages_of(alone, paged.ids[:filled]))


def test_pages_are_copied_by_the_cache_own_words(rng, make_keys):
    paged = make_keys(rng, n=30)
    layer = paged.sketch()
    source, target = paged.ids[:2], jnp.asarray([x for x in range(1, 8) if x not in paged.ids][:2])
    copied = cache.copy_pages(layer, source, target)
    same(pages_of(copied, target), pages_of(layer, source))


def test_sizes_on_device(tiny_model):
    config = tiny_model.config
    for bits in (2, 4, 8):
        sketch = Sketch.create(config, 9, 16, bits)
        layer = sketch.layers[0]
        heads, dim = config.num_key_value_heads, config.head_dim
        keys = heads * 9 * 16
        assert layer.bits == bits
        assert layer.codes.nbytes == keys * dim * bits // 8
        assert layer.scale.nbytes == layer.spread.nbytes == 2 * keys
        assert layer.centre.nbytes == heads * 9 * dim
        total = sum(x.nbytes for x in jax.tree.leaves(layer))
        assert f"{bits} bits a channel, {total / keys:.1f} bytes a key" in repr(sketch)
        assert len(sketch.layers) == config.num_hidden_layers


def test_bits_are_checked(tiny_model):
    with pytest.raises(ConfigError, match=r"bits=3\): use one of \[2, 4, 8\]"):
        Sketch.create(tiny_model.config, 2, 16, bits=3)
    odd = LlamaConfig.from_hf({**configs.load("llama-tiny"), "head_dim": 6})
    with pytest.raises(ConfigError, match="use 8"):
        Sketch.create(odd, 2, 16, bits=2)


def test_donated_index_is_written_in_place(rng, make_keys):
    paged = make_keys(rng, n=75, heads=2)
    layer = paged.sketch()
    extend = jax.jit(SketchLayer.extend, static_argnames="new_tokens", donate_argnums=0)
    count = jnp.ones(1, jnp.int32)
    lowered = extend.lower(layer, paged.k_pages, paged.table(74), count, 1).compile()
    pool = sum(x.nbytes for x in jax.tree.leaves(layer))
    assert lowered.memory_analysis().alias_size_in_bytes == pool
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(layer)]
    after = extend(layer, paged.k_pages, paged.table(74), count, 1)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)] == before
    same(pages_of(after, paged.ids[:5]), pages_of(paged.sketch(), paged.ids[:5]))


def test_numbers_that_vary_do_not_recompile(rng, make_keys, answers):
    paged = make_keys(rng)
    layer = paged.sketch()
    paged.ask(layer, 3.0)
    before = answers._cache_size()
    paged.ask(layer, 50.0, seed=-9.0, low=7, high=31)
    assert answers._cache_size() == before


def test_sharded_over_kv_heads_equals_one_device(rng, make_keys):
    paged = make_keys(rng, heads=8, n=200, group=2)
    config = LlamaConfig.from_hf(
        {
            **configs.load("llama-tiny"),
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
        }
    )
    mesh = aj.make_mesh(tensor=8)
    pages = paged.k_pages.shape[1]
    empty = Sketch.create(config, pages, 16, mesh=mesh).layers[0]
    k_pages = jax.device_put(paged.k_pages, empty.codes.sharding)
    q = jax.device_put(jnp.asarray(paged.q), empty.codes.sharding)

    @jax.jit
    def both(layer, k_pages, q, ids):
        pages = dataclasses.replace(paged.pages, k=k_pages, v=k_pages, ids=ids)
        layer = layer.extend(
            k_pages, PageTable(ids[None], jnp.zeros(1, int)), jnp.full(1, 200), 200
        )
        keys = KeyRange(jnp.full(q.shape[2], 3), jnp.full(q.shape[2], 190))
        seed = jnp.full(q.shape[:3], -jnp.inf)
        return layer, layer.range_scores(q, pages, keys, 30.0, seed)

    program = both.lower(empty, k_pages, q, paged.ids).compile()
    layer, found = program(empty, k_pages, q, paged.ids)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(layer))
    assert "all-gather" not in program.as_text()
    alone, want = both(
        Sketch.create(config, pages, 16).layers[0], paged.k_pages, paged.q, paged.ids
    )
    same(pages_of(layer, paged.ids[:13]), pages_of(alone, paged.ids[:13]))
    assert np.sum(np.asarray(want) > -np.inf) > 50
    np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.parametrize("factor", [1e6, 1e-9])
def test_keys_out_of_range_of_float16(rng, make_keys, factor):
    """Too large: always rescored. Too small: no worse than others."""
    paged = make_keys(rng, scale=factor)
    asked = paged.ask(paged.sketch())
    np.testing.assert_array_equal(asked.found.argmax(-1), asked.true.argmax(-1))
    assert np.all(asked.found.max(-1) > -np.inf)


def test_query_of_zeros_and_no_key_in_range(rng, make_keys):
    paged = make_keys(rng)
    layer = paged.sketch()
    assert np.all(paged.ask(layer, 5.0, low=20, high=20).found == -np.inf)
    zeros = dataclasses.replace(paged, q=np.zeros_like(paged.q)).ask(layer)
    np.testing.assert_array_equal(zeros.found[..., : paged.length], 0)  # all are best
