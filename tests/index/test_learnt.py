"""What is learnt of moments, against sums over positions; files, and which is found."""

import numpy as np
import pytest

from alaya_jax.checkpoint import beside
from alaya_jax.errors import RequestError
from alaya_jax.index import learnt as learning
from alaya_jax.index.learnt import LEAST_TOKENS, Learnt, Moments, turned_to

L, K, D = 2, 3, 16
FREQUENCIES = 100.0 ** -(np.arange(0, D, 2) / D)


def turn(x, positions):
    """RoPE, rotate half."""
    angle = np.asarray(positions)[..., None] * FREQUENCIES
    first, second = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def moments(rng, scale=1.0):
    def product():
        a = rng.standard_normal((L, K, D, D)) * np.exp(rng.standard_normal(D))
        return scale * a @ a.swapaxes(-1, -2)

    return Moments(product(), product(), product(), rng.standard_normal((L, K, D)))


def digests(learnt):
    return [layer.digest() for layer in learnt.layers]


@pytest.fixture
def learnt(rng):
    return Learnt.of([(moments(rng), LEAST_TOKENS)], FREQUENCIES, 512, "a model")


def test_a_moment_turned_to_all_positions(rng):
    """Against the mean over positions, one by one; its steps are finer than a position."""
    x = rng.standard_normal((5, D))
    length, steps = 37, (np.arange(37 * 64) + 0.5) / 64
    want = np.zeros((D, D))
    for p in steps:
        at = turn(x, np.full(5, p))
        want += at.T @ at / len(steps)
    np.testing.assert_allclose(turned_to(FREQUENCIES, length, x.T @ x), want, atol=1e-3)
    mean = np.mean([turn(x[0], p) for p in steps], axis=0)
    np.testing.assert_allclose(learning._mean_turned_to(FREQUENCIES, length, x[0]), mean, atol=1e-4)


def test_texts_together_are_one_text(rng):
    """Moments of two parts, joined, are those of the whole."""
    centres = rng.standard_normal((L, K, 12, D)) + 50
    parts = [centres[:, :, :4], centres[:, :, 4:]]

    def of(c):
        mean = c.mean(2)
        apart = c - mean[:, :, None]
        square = np.einsum("lknd,lkne->lkde", apart, apart) / c.shape[2]
        raw = np.einsum("lknd,lkne->lkde", c, c) / c.shape[2]
        return Moments(raw, 2 * raw, square, mean)

    joined = learning.joined([(of(part), 16 * part.shape[2]) for part in parts])
    for name in ("queries", "residuals", "centres", "mean"):
        np.testing.assert_allclose(joined[name], getattr(of(centres), name), rtol=1e-9)


def test_queries_are_white_and_keys_uncorrelated(rng):
    """In the basis: the identity for queries, falling variances for residuals."""
    m = moments(rng)
    found = Learnt.of([(m, LEAST_TOKENS)], FREQUENCIES, 512, "a model")
    for layer in range(L):
        basis = found.layers[layer].basis(2)
        for head in range(K):
            ask, make = (np.asarray(x[head], np.float64) for x in (basis.queries, basis.keys))
            white = ask @ turned_to(FREQUENCIES, 512, m.queries[layer, head]) @ ask.T
            np.testing.assert_allclose(white, np.eye(D), atol=0.02)
            square = make @ turned_to(FREQUENCIES, 512, m.residuals[layer, head]) @ make.T
            spread = np.asarray(basis.spread[head])
            np.testing.assert_allclose(square / np.outer(spread, spread), np.eye(D), atol=0.02)
            assert (np.diff(spread) <= 1e-5 * spread[:-1]).all()


def test_units_do_not_matter(rng):
    m = moments(rng)
    twice = Moments(m.queries * 9, m.residuals, m.centres, m.mean)
    one, other = (
        Learnt.of([(x, LEAST_TOKENS)], FREQUENCIES, 512, "a model").layers[0].basis(1)
        for x in (m, twice)
    )
    np.testing.assert_array_equal(one.bits, other.bits)
    np.testing.assert_allclose(3 * one.keys, other.keys, rtol=1e-3)


def test_channels_that_never_vary(rng):
    """Queries and keys in half of the channels: no number is infinite or NaN."""
    m = moments(rng)
    kept = np.outer(np.arange(D) < D // 2, np.arange(D) < D // 2)
    flat = Moments(m.queries * kept, m.residuals * kept, 0 * m.centres, 0 * m.mean)
    for one in (flat, Moments(0 * m.queries, 0 * m.residuals, 0 * m.centres, 0 * m.mean)):
        found = Learnt.of([(one, LEAST_TOKENS)], FREQUENCIES, 512, "a model")
        basis = found.layers[0].basis(2)
        for name in ("keys", "queries", "offset", "grain", "unit", "spread", "error"):
            assert np.isfinite(np.asarray(getattr(basis, name))).all(), name


def test_a_file_is_what_was_learnt(learnt, tmp_path):
    place = tmp_path / "a" / "basis.safetensors"
    learnt.save(place)
    again = Learnt.load(place)
    assert (again.fingerprint, again.length, again.tokens) == ("a model", 512, LEAST_TOKENS)
    assert digests(again) == digests(learnt)
    for one, other in zip(learnt.layers, again.layers, strict=True):
        for name in ("rows", "spread", "offset", "grain"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert "2,048 tokens, for 512 positions" in str(again)


@pytest.mark.parametrize("harm", ["cut", "other", "nan", "empty"])
def test_a_damaged_file_is_refused_by_name(learnt, tmp_path, harm, rng):
    place = tmp_path / "basis.safetensors"
    learnt.save(place)
    data = place.read_bytes()
    if harm == "cut":
        place.write_bytes(data[: len(data) // 2])
    elif harm == "other":
        place.write_bytes(data.replace(b'"version":"1"', b'"version":"9"'))
    elif harm == "nan":
        place.write_bytes(data[:-4] + np.array([np.nan], np.float32).tobytes())
    else:
        place.write_bytes(b"")
    with pytest.raises(RequestError, match=place.name):
        Learnt.load(place)


def test_too_little_text_is_refused(rng):
    with pytest.raises(RequestError, match=r"have 2,047 tokens; .* takes 2,048"):
        Learnt.of([(moments(rng), LEAST_TOKENS - 1)], FREQUENCIES, 512, "a model")


def test_the_users_own_is_found_first(learnt, tmp_path, monkeypatch):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(learning, "_BROUGHT", tmp_path / "brought")
    assert learning.find("a model", None) is None
    learnt.save(tmp_path / "brought" / beside.file_name("basis", "a model", ".safetensors"))
    assert digests(learning.find("a model", None)) == digests(learnt)
    assert learning.find("another", None) is None
    own = Learnt("a model", 99, LEAST_TOKENS, learnt.layers)
    assert learning.keep(own, tmp_path / "model").parent == tmp_path / "model"
    assert learning.find("a model", tmp_path / "model").length == 99
    assert learning.find("a model", None).length == 512
