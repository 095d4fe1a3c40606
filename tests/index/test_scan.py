"""Estimates and their errors against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.index.scan import FAR, Scan, half_variance, sum_of_products

K, G, T, S, PAGE = 2, 3, 1, 12, 4


@pytest.fixture
def scan(rng):
    return Scan(
        rng.standard_normal((K, G, T, S)),
        tuple(rng.random((2, K, G, T))),
        tuple(rng.random((2, K, S))),
        deviations=2.0,
    )


def written_out(scan):
    return sum(
        np.asarray(row)[..., None] * np.asarray(key)[:, None, None]
        for row, key in zip(scan.of_row, scan.of_key, strict=True)
    )


def test_the_error_is_a_sum_of_products(scan):
    assert not scan.exact
    np.testing.assert_allclose(scan.error, written_out(scan), rtol=1e-6)
    np.testing.assert_allclose(sum_of_products(scan.of_row, scan.of_key), scan.error, rtol=1e-6)


def test_exact_scores_err_by_nothing(rng):
    scan = Scan(rng.standard_normal((K, G, T, S), np.float32))
    assert scan.exact
    assert scan.error == 0.0
    np.testing.assert_array_equal(scan.likely(1, 1, 16), scan.estimate[:, 1:2])


def test_a_page_errs_like_the_worst_of_its_keys(scan, rng):
    pages = scan.by_page(rng.standard_normal((K, G, T, S // PAGE)), PAGE)
    for page in range(S // PAGE):
        inside = slice(PAGE * page, PAGE * (page + 1))
        assert np.all(pages.error[..., page, None] >= scan.error[..., inside] - 1e-6)
    for of_page, of_key in zip(pages.of_key, scan.of_key, strict=True):
        want = np.asarray(of_key).reshape(K, -1, PAGE).max(-1)
        np.testing.assert_allclose(of_page, want, rtol=1e-6)
    assert pages.deviations == scan.deviations


@pytest.mark.parametrize("axis", [0, 1])
def test_likely_adds_half_the_variance_of_the_scaled_score(scan, axis):
    dim = 16
    head = 1
    error = np.take(written_out(scan), [head], axis)
    deviation = error / scan.deviations
    want = np.take(np.asarray(scan.estimate), [head], axis)
    # exp(score / sqrt(D)) has the mean of a lognormal variable; in raw scores, times sqrt(D).
    want = want + np.minimum(error, (deviation**2 / np.sqrt(dim)) / 2)
    np.testing.assert_allclose(scan.likely(head, axis, dim), want, rtol=1e-5)


def test_an_error_without_end_adds_a_finite_number():
    added = np.asarray(half_variance(jnp.asarray([np.inf, 1e35, 0.0]), 1.0, 16))
    assert np.isfinite(added).all()
    np.testing.assert_array_equal(added, np.array([FAR, FAR, 0.0], np.float32))
