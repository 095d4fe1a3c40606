"""The sketch against flat truth: its bound, DIPR through it, and that it follows its pages."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alaya_jax as aj
from alaya_jax import cache, configs
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.errors import ConfigError
from alaya_jax.index import MISS, Sketch, SketchLayer
from alaya_jax.index.recovery import Weights
from alaya_jax.index.select import in_range
from alaya_jax.models import LlamaConfig


def same(a, b):
    """Equal sketches. Sums over batches of other shapes may round otherwise, by float16's last."""
    chex.assert_trees_all_close(a, b, rtol=2e-3, atol=1e-7)
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
    want, got = (
        np.asarray(in_range(scores, np.maximum(scores.max(-1), np.float32(seed)), beta))
        for scores in (asked.true, asked.found)
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


@settings(max_examples=40)
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
    monkeypatch.setattr("alaya_jax.cache.views.TILE_TOKENS", 64)
    monkeypatch.setattr("alaya_jax.attention.kept.BLOCK", 16)
    monkeypatch.setattr("alaya_jax.index.sketch._BLOCK", 8)
    paged = make_keys(rng, n=901)  # of a shape that no other test has compiled
    asked = paged.ask(paged.sketch(), 60.0, low=9, high=850)
    assert np.sum(asked.found > -np.inf) > 500
    check_answer(asked, 60.0, -np.inf)


@pytest.mark.parametrize("bits", [2, 4])
def test_grown_equals_built(rng, make_keys, bits):
    """Page by page, in part and again when it is full, or at once: the same."""
    paged = make_keys(rng, n=75, heads=2)
    ids, filled = np.asarray(paged.ids[:5]), np.asarray(paged.filled(75)[:5])
    built = paged.build(paged.empty(bits), ids, filled)
    # More pages than are sketched at once, with the page of nobody among them.
    many = np.pad(ids, (200, 0))
    at_once = paged.build(paged.empty(bits), many, np.pad(filled, (200, 0)))
    grown = paged.empty(bits)
    # Keys that are not there yet must not count: the pool holds only what was appended so far.
    pool = np.full_like(paged.k_pages, np.nan)
    done = 0
    for length in (1, 2, 15, 16, 49, 75):
        for j in range(done, length):
            pool[:, ids[j // 16], j % 16] = paged.k[:, j]
        held = np.asarray(paged.filled(length))
        touched = (16 * np.arange(7) < length) & (16 * (1 + np.arange(7)) > done)
        some = np.where(touched, paged.ids, 0)
        grown = paged.build(grown, some, np.where(touched, held, 0), pool)
        done = length
    for other in (at_once, grown):
        same(pages_of(other, ids), pages_of(built, ids))
    others = np.setdiff1d(np.arange(1, pool.shape[1]), ids)
    same(pages_of(grown, others), pages_of(paged.empty(bits), others))


def test_pages_are_copied_by_the_cache_own_words(rng, make_keys):
    paged = make_keys(rng, n=30)
    layer = paged.sketch()
    source, target = paged.ids[:2], jnp.asarray([x for x in range(1, 8) if x not in paged.ids][:2])
    copied = cache.copy_pages(layer, source, target)
    same(pages_of(copied, target), pages_of(layer, source))


def test_sizes_on_device(tiny_model):
    config = tiny_model.config
    for bits in (2, 4, 8):
        layer = Sketch(bits).create(config, 9, 16)
        heads, dim = config.num_key_value_heads, config.head_dim
        keys = heads * 9 * 16
        assert layer.bits == bits
        assert layer.codes.nbytes == keys * dim * bits // 8
        assert layer.scale.nbytes == layer.spread.nbytes == 2 * keys
        assert layer.centre.nbytes == heads * 9 * dim
        total = sum(x.nbytes for x in jax.tree.leaves(layer))
        assert total == 9 * Sketch(bits).page_bytes(config, 16, jnp.float32)


def test_bits_are_checked():
    for wrong in (3, 0.5, True):
        with pytest.raises(ConfigError, match=r"bits=.*\): use one of \[1, 2, 4, 8\]"):
            Sketch(bits=wrong)
    with pytest.raises(ConfigError, match=r"'learnt'\): use one of \[0.5, 1, 1.5, 2, 4\]"):
        Sketch(8, "learnt")
    with pytest.raises(ConfigError, match=r"basis='pca'"):
        Sketch(4, "pca")
    odd = LlamaConfig.from_hf({**configs.load("llama-tiny"), "head_dim": 6})
    with pytest.raises(ConfigError, match=r"use Sketch\(8\)"):
        Sketch(bits=2).create(odd, 2, 16)


def test_donated_index_is_written_in_place(rng, make_keys):
    paged = make_keys(rng, n=75, heads=2)
    layer = paged.sketch()
    build = jax.jit(SketchLayer.build, donate_argnums=0)
    args = (paged.k_pages, paged.k_pages, paged.ids, paged.filled(75))
    lowered = build.lower(layer, *args).compile()
    pool = sum(x.nbytes for x in jax.tree.leaves(layer))
    assert lowered.memory_analysis().alias_size_in_bytes == pool
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(layer)]
    after = build(layer, *args)
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
    empty = Sketch().create(config, pages, 16, mesh=mesh)
    k_pages = jax.device_put(paged.k_pages, empty.codes.sharding)
    q = jax.device_put(jnp.asarray(paged.q), empty.codes.sharding)

    @jax.jit
    def both(layer, k_pages, q, ids):
        pages = dataclasses.replace(paged.pages, k=k_pages, v=k_pages, ids=ids)
        layer = layer.build(k_pages, k_pages, ids, paged.filled(200))
        keys = KeyRange(jnp.full(q.shape[2], 3), jnp.full(q.shape[2], 190))
        return layer, layer.scan(q, pages, keys).estimate

    program = both.lower(empty, k_pages, q, paged.ids).compile()
    layer, found = program(empty, k_pages, q, paged.ids)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(layer))
    assert "all-gather" not in program.as_text()
    alone, want = both(Sketch().create(config, pages, 16), paged.k_pages, paged.q, paged.ids)
    same(pages_of(layer, paged.ids[:13]), pages_of(alone, paged.ids[:13]))
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


def test_what_lies_beside_the_pages_that_are_seen_is_of_no_effect(rng):
    """In files it may be anything: other contexts', damaged, not a number."""
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    heads, dim, size = config.num_key_value_heads, config.head_dim, 16
    shape = heads, 8, size, dim
    k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((heads, 2, 1, dim)), jnp.float32)
    ids = jnp.asarray([3, 5, 1, 2], jnp.int32)  # the last one only fills the table
    pages, keys = Pages(k, v, ids), KeyRange(jnp.zeros(1, jnp.int32), jnp.full(1, 3 * size))

    def spoilt(array):
        raw = np.array(array)
        raw.reshape(heads, 8, -1)[:, [2, 4, 6, 7]] = np.frombuffer(b"\xff" * 8, raw.dtype)[0]
        return jnp.asarray(raw)

    @jax.jit
    def answers(layer):
        scan = layer.scan(q, pages, keys)
        seen = jnp.where(jnp.isneginf(scan.estimate), 0.0, scan.estimate)
        weights = Weights.of(scan, jnp.max(scan.estimate, -1), dim)
        means = layer.attend_means(q, pages, weights, seen > 1.0)
        return scan.estimate, *means, layer.value_spreads(pages, keys)

    filled = jnp.full(4, size, jnp.int32)
    layer = jax.jit(SketchLayer.build)(Sketch().create(config, 8, size), k, v, ids, filled)
    wrong = jax.tree.map(spoilt, layer)
    assert np.isnan(np.asarray(wrong.value_scale, np.float32)).any()
    for one, other in zip(answers(layer), answers(wrong), strict=True):
        assert np.isfinite(np.asarray(one)[..., : 3 * size]).all()
        np.testing.assert_array_equal(one, other)
