"""Rows in 8 bits: how far off they are, and that numpy and JAX read the same numbers."""

import jax
import ml_dtypes
import numpy as np
import pytest

from alaya_jax.at_rest import CODES, STORE_DTYPES, decoded, encoded, row_bytes
from alaya_jax.errors import RequestError

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]
STEP = {"int8": 1 / 254, "fp8": 1 / 16}
"""Half a step of the codes: of a row's largest number, or of the number itself."""


@pytest.mark.parametrize("kind", STORE_DTYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_come_back_within_half_a_step(rng, kind, dtype):
    scale = 10.0 ** rng.integers(-3, 4, (3, 200, 1))
    x = (rng.standard_normal((3, 200, 24)) * scale).astype(dtype)
    rows = encoded(x, kind)
    assert (rows.dtype, rows.shape) == (np.uint8, (3, 200, row_bytes(24)))
    read = decoded(rows, kind, dtype)
    assert read.dtype == dtype
    exact, error = x.astype(np.float64), np.abs(read.astype(np.float64) - x.astype(np.float64))
    most = np.abs(exact).max(axis=-1, keepdims=True)
    of = most if kind == "int8" else np.abs(exact)
    rounded = float(ml_dtypes.finfo(dtype).eps)  # and the scale, to 8 bits: 1/128 of a step
    least = most * 2.0**-9 / 448 * 1.01  # half the least number of float8
    assert (error <= of * (STEP[kind] * 1.01 + rounded) + least).all()
    jitted = jax.jit(lambda rows: decoded(rows, kind, dtype))
    np.testing.assert_array_equal(np.asarray(jitted(rows)).view(np.uint8), read.view(np.uint8))


@pytest.mark.parametrize("kind", STORE_DTYPES)
def test_edges(kind):
    x = np.zeros((1, 4, 2), np.float32)
    x[0, 1] = 1e-40, -1e-41  # devices take them for 0
    x[0, 2] = 3e38, -3e38
    x[0, 3] = 1e-35, 0
    read = decoded(encoded(x, kind), kind, np.float32)
    np.testing.assert_array_equal(read[0, :2], 0)
    np.testing.assert_allclose(read[0, 2:], x[0, 2:], rtol=0.07)
    assert np.isfinite(read).all()


@pytest.mark.parametrize("kind", STORE_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(kind, bad):
    x = np.ones((2, 3, 4), np.float32)
    x[1, 2, 3] = bad
    with pytest.raises(RequestError, match=f"cannot be stored in {kind}; store them with"):
        encoded(x, kind)
    largest = np.full((1, 1, 2), 65504, np.float16)
    with pytest.raises(RequestError, match="that reach 65504"):
        encoded(largest, kind)


def test_codes_are_bytes():
    assert {dtype.itemsize for dtype in CODES.values()} == {1}
