"""A learnt basis: what it keeps of keys and queries, against numpy; its bound, on real keys."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax import configs
from alaya_jax.cache.views import FEW_ROWS, KeyRange, Pages
from alaya_jax.errors import ConfigError
from alaya_jax.index import MISS, Sketch
from alaya_jax.index import learnt as learning
from alaya_jax.index.basis import BITS, QUANTIZERS, Basis, Turned, share_out
from alaya_jax.index.codes import STEPS
from alaya_jax.models import LlamaConfig

K, D, Z, PAGES = 2, 64, 16, 12


@pytest.fixture
def turned(rng):
    rows = rng.standard_normal((K, D, D)) + 3 * np.eye(D)
    spread = np.sort(np.exp(rng.standard_normal((K, D))), axis=-1)[:, ::-1]
    grain = np.exp2(rng.integers(-2, 3, (K, D)))
    return Turned(rows, spread, rng.standard_normal((K, D)), grain)


@pytest.fixture
def sketched(rng, turned):
    """A sketch of random keys by each number of bits, and these keys."""
    config = LlamaConfig.from_hf(
        {**configs.load("llama-tiny"), "num_key_value_heads": K, "head_dim": D}
    )
    keys = rng.standard_normal((K, PAGES + 1, Z, D)).astype(np.float32)
    values = rng.standard_normal(keys.shape).astype(np.float32)

    def of(bits, keys=keys):
        basis = turned.basis(bits)
        empty = Sketch(bits, "learnt").create(config, PAGES + 1, Z).seen_by(basis)
        ids, filled = jnp.arange(1, PAGES + 1), jnp.full(PAGES, Z)
        return jax.jit(lambda x, *a: x.build(*a))(empty, keys, values, ids, filled), basis

    return of, keys, values


def scanned(layer, q, keys):
    """The scan of all pages but the first."""
    n, size, rows = keys.shape[1] - 1, keys.shape[2], q.shape[2]

    @jax.jit
    def scan(layer, q, keys):
        pages = Pages(keys, keys, jnp.arange(1, n + 1, dtype=jnp.int32))
        every = KeyRange(jnp.zeros(rows, jnp.int32), jnp.full(rows, n * size, jnp.int32))
        found = layer.scan(q, pages, every)
        return Scanned(found.estimate, found.error)

    return scan(layer, q, keys)


class Scanned(NamedTuple):
    estimate: jax.Array
    error: jax.Array


def whole_keys(layer, basis):
    """Keys as their sketch has them, and their distance from those, in float64: by definition."""
    b = jax.tree.map(lambda x: np.asarray(x, np.float64), basis)
    packed = np.asarray(layer.centre[:, 1:]).astype(np.int8)
    fields = np.concatenate([(packed << 4).astype(np.int8) >> 4, packed >> 4], -1)
    unit = np.asarray(layer.centre_scale[:, 1:], np.float64)[..., None]
    centre = b.offset[:, None] + fields * unit * b.grain[:, None]
    words = np.asarray(layer.codes[:, 1:])
    signs = (words[:, :, :, None] >> np.arange(32, dtype=np.uint32)[:, None]) & 1
    signs = 2.0 * signs.reshape(K, PAGES, -1, Z).swapaxes(2, 3) - 1  # [K, N, Z, F]
    u = np.zeros((K, PAGES, Z, D))
    for head in range(K):
        for f, (channel, place) in enumerate(
            zip(np.asarray(basis.channel)[head], np.asarray(basis.place)[head], strict=True)
        ):
            u[head, ..., channel] += signs[head, ..., f] * b.unit[head, channel] * 2.0**place
    u *= np.asarray(layer.scale[:, 1:], np.float64)[..., None]
    return centre, u, b


@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_is_what_the_scan_reads(rng, sketched, bits):
    of, keys, _ = sketched
    layer, basis = of(bits)
    centre, u, b = whole_keys(layer, basis)
    r = keys[:, 1:].astype(np.float64) - centre[:, :, None]
    true_u = np.einsum("ked,knzd->knze", b.keys, r)
    e = np.linalg.norm(u - true_u, axis=-1)
    spread = np.asarray(layer.spread[:, 1:], np.float64) * np.sqrt(D)
    assert (spread >= e * (1 - 1e-3)).all()
    np.testing.assert_allclose(spread, e, rtol=4e-3, atol=1e-2)
    # The scale is the one of least error: more or less of it is no nearer.
    for factor in (0.99, 1.01):
        assert (np.linalg.norm(factor * u - true_u, axis=-1) >= e - 1e-3).all()

    for rows in (1, FEW_ROWS + 1):
        q = rng.standard_normal((K, 1, rows, D)).astype(np.float32)
        scan = scanned(layer, q, keys)
        asked = basis.ask(jnp.asarray(q[:, 0]), MISS)
        turned = np.einsum("ked,krd->kre", b.queries, q[:, 0].astype(np.float64))
        weight = np.take_along_axis(
            turned * b.unit[:, None], np.asarray(basis.channel)[:, None], -1
        )
        weight *= 2.0 ** np.asarray(basis.place)[:, None]
        step = np.abs(weight).max(-1, keepdims=True) / 127
        np.testing.assert_allclose(np.asarray(asked.step), step[..., 0], rtol=1e-5)
        want = np.einsum("kre,knze->krnz", turned, u)
        want = want + np.einsum("krd,knd->krn", q[:, 0].astype(np.float64), centre)[..., None]
        # Between the two lies the rounding of the query, of which at most half a step a sign.
        bound = (
            step[..., None] / 2 * basis.channel.shape[1] * np.asarray(layer.scale[:, 1:])[:, None]
        )
        got = np.asarray(scan.estimate)[:, 0].reshape(want.shape)
        assert (np.abs(got - want) <= bound + 1e-3).all()
        true = np.einsum("krd,knzd->krnz", q[:, 0].astype(np.float64), keys[:, 1:])
        error = np.asarray(scan.error)[:, 0].reshape(want.shape)
        assert np.mean(np.abs(got - true) > error) < 1e-3


@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS, FEW_ROWS + 3])
def test_products_are_exact(rng, rows):
    codes = rng.integers(0, 2**32, (K, 7, 3, Z), dtype=np.uint32)
    integers = rng.integers(-128, 128, (K, rows, 96)).astype(np.int8)
    signs = (codes[:, :, :, None] >> np.arange(32, dtype=np.uint32)[:, None]) & 1
    signs = 2 * signs.reshape(K, 7, 96, Z).astype(np.int64) - 1
    want = np.einsum("knfz,krf->krnz", signs, integers.astype(np.int64))
    got = jax.jit(Basis.products)(codes, integers)
    np.testing.assert_array_equal(got, want)


def test_a_query_and_a_key_keep_their_product(rng, turned):
    basis = turned.basis(1)
    q, r = rng.standard_normal((2, K, 5, D))
    there = np.einsum("ked,knd->kne", np.asarray(basis.queries, np.float64), q)
    u = np.einsum("ked,knd->kne", np.asarray(basis.keys, np.float64), r)
    np.testing.assert_allclose((there * u).sum(-1), (q * r).sum(-1), rtol=1e-3, atol=1e-3)


def test_levels_are_those_of_least_error():
    """The table, against a search on the normal density."""
    x = np.linspace(-12, 12, 240_001)
    density = np.exp(-(x**2) / 2)
    density /= density.sum()
    for bits, (step, stated) in enumerate(QUANTIZERS[1:], 1):
        half = 2 ** (bits - 1)

        def error(step, half=half):
            cell = np.clip(np.floor(x / step), -half, half - 1)
            return np.sum(density * (x - step * (cell + 0.5)) ** 2)

        np.testing.assert_allclose(error(step), stated, rtol=1e-6)
        assert stated < min(error(0.99 * step), error(1.01 * step))
        assert bits not in STEPS or abs(STEPS[bits] - step) < 1e-4


def test_bits_are_shared_out_to_the_least_total_error():
    """Against all ways to share six bits between four channels."""
    variance = np.array([9.0, 4.0, 1.0, 0.1])
    ways = [w for w in np.ndindex(7, 7, 7, 7) if sum(w) == 6]
    least = min(ways, key=lambda w: (variance / 4.0 ** np.array(w)).sum())
    assert share_out(variance, 6).tolist() == list(least)
    assert share_out(np.ones(2), 16).tolist() == [8, 8], "none has more than 8"


def test_bytes():
    config = LlamaConfig.from_hf(configs.load("llama-3-8b"))
    kv = 2 * 128 * 2  # bfloat16
    for bits, most in ((1, 0.07), (2, 0.105)):
        spec = Sketch(bits, "learnt")
        a_key = spec.page_bytes(config, 16, jnp.bfloat16) / 16 / config.num_key_value_heads
        assert a_key <= most * kv
        layer = spec.create(config, 3, 16)
        total = sum(x.nbytes for x in jax.tree.leaves(layer))
        assert total == 3 * spec.page_bytes(config, 16, jnp.bfloat16)
        assert layer.bits == bits
    # What a scan reads: all but the mean of the values.
    scan = Sketch(1, "learnt").page_bytes(config, 16, jnp.bfloat16) / 16 / 8 - (128 + 2) / 16
    assert scan <= 0.055 * kv
    with pytest.raises(ConfigError, match="words of 32 bits"):
        Sketch(0.5, "learnt").create(dataclasses.replace(config, head_dim=96), 2, 16)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e18])
def test_keys_of_any_size(sketched, factor, rng):
    """Nothing becomes NaN; a key that float16 cannot hold has an error without bound."""
    of, keys, _ = sketched
    layer, _ = of(1, (factor * keys).astype(np.float32))
    q = rng.standard_normal((K, 1, 1, D)).astype(np.float32)
    scan = scanned(layer, q, keys)
    true = np.einsum("krd,kpzd->krpz", q[:, :, 0], factor * keys[:, 1:].astype(np.float64))
    upper = np.asarray(scan.estimate + scan.error, np.float64).reshape(true.shape)
    assert not np.isnan(upper).any()
    assert (upper >= true - 1e-3 * np.abs(true) - 1e-3).all()


SETTINGS = {
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "nans": lambda: jax.debug_nans(True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_jax_change_nothing(sketched, rng, name):
    of, keys, _ = sketched
    q = rng.standard_normal((K, 1, 2, D)).astype(np.float32)

    def answer():
        layer, _ = of(1.5)
        return scanned(layer, q, keys).estimate

    want = answer()
    with SETTINGS[name]():
        got = answer()
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def real():
    """Keys and queries of two layers of SmolLM2-135M, and what this package brings of the model;
    learnt from other texts.
    """
    found = np.load(Path(__file__).parent / "smollm2_keys.npz")
    (place,) = learning._BROUGHT.glob("*.safetensors")
    learnt = learning.Learnt.load(place)
    return found["k"].astype(np.float32), found["q"].astype(np.float32), learnt


@pytest.mark.parametrize("bits", [0.5, 1, 2])
def test_the_bound_holds_on_keys_of_a_real_model(real, bits):
    """Misses no more than a random rotation is proven to, and lets half as many keys pass."""
    k, q, learnt = real
    kv_heads, size = k.shape[1], k.shape[-1]
    n = k[0][0].reshape(-1, size).shape[0]
    config = LlamaConfig.from_hf(
        {
            **configs.load("llama-tiny"),
            "num_attention_heads": 3 * kv_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": size,
        }
    )
    beta, passed, wrong, total = 4.24 * np.sqrt(size), {}, 0, 0
    for spec in (Sketch(bits, "learnt"), Sketch(bits, "learnt").random()):
        count = 0
        for i, layer in enumerate((6, 20)):
            pool = np.concatenate(
                [np.zeros_like(k[i][:, :1]), k[i].reshape(kv_heads, -1, Z, size)], 1
            )
            basis = learnt.layers[layer].basis(bits) if spec.basis == "learnt" else None
            empty = spec.create(config, n // Z + 1, Z).seen_by(basis)
            ids = jnp.arange(1, n // Z + 1)
            made = jax.jit(lambda x, *a: x.build(*a))(empty, pool, pool, ids, jnp.full(n // Z, Z))
            scan = scanned(made, q[i], pool)
            true = np.einsum("kgtd,ksd->kgts", q[i], k[i].reshape(kv_heads, n, size))
            upper = np.asarray(scan.estimate + scan.error)
            best = true.max(-1, keepdims=True)
            critical = true >= best - beta
            assert (upper >= best - beta)[critical].mean() > 0.9999
            count += np.mean(upper >= best - beta) - critical.mean()
            if spec.basis == "learnt":
                wrong, total = wrong + (true > upper).sum(), total + true.size
        passed[spec.basis] = count
    assert wrong <= max(2 * MISS * total, 4)
    assert passed["learnt"] < passed["random"] * (0.6 if bits >= 1 else 0.9)
