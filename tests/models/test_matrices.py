"""Products with plain matrices against numpy in float64; 16 bits go another way on CPUs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from alaya_jax.models.matrices import FEW, contract, contract_last, summed

HALVES = [ml_dtypes.bfloat16, np.float16]
# shape, how many axes x is contracted over; 30 is no multiple of the terms of a sum
SHAPES = {"q": ((96, 4, 16), 1), "o": ((4, 16, 96), 2), "odd": ((30, 12), 1)}
LEADS = [(1,), (1, 1), (2, 3), (FEW,), (FEW + 1,), (2, 20)]


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_contract(rng, case, lead, dtype):
    shape, n = SHAPES[case]
    matrix = jnp.asarray(rng.standard_normal(shape), dtype)
    x = jnp.asarray(rng.standard_normal((*lead, *shape[:n])), dtype)
    want = np.tensordot(np.asarray(x, np.float64), np.asarray(matrix, np.float64), n)
    run = jax.jit(contract, static_argnums=(2, 3))
    got = run(x, matrix, n, None)
    assert got.dtype == dtype
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=step, atol=1e-4)
    wide = run(x, matrix, n, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, want, rtol=1e-5, atol=1e-4)  # no sum is one of 16 bits


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("lead", [(1,), (1, 1), (2, 3)], ids=str)
def test_contract_last(rng, lead, dtype):
    matrix = jnp.asarray(rng.standard_normal((50, 96)), dtype)
    x = jnp.asarray(rng.standard_normal((*lead, 96)), dtype)
    got = jax.jit(contract_last)(x, matrix)
    assert got.dtype == jnp.float32
    want = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_derivatives(rng, rows):
    matrix = jnp.asarray(rng.standard_normal((96, 24)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((rows, 96)), jnp.float32)
    found = jax.jit(jax.grad(lambda x, m: contract(x, m, 1).sum(), (0, 1)))(x, matrix)
    wide = np.asarray(matrix, np.float64)
    of_x = np.broadcast_to(wide.sum(1), x.shape)
    of_matrix = np.broadcast_to(np.asarray(x, np.float64).sum(0)[:, None], wide.shape)
    np.testing.assert_allclose(found[0], of_x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.asarray(found[1], np.float64), of_matrix, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 7, 32, 33, 96, 344])
def test_summed(rng, groups):
    x = rng.standard_normal((2, groups, 5)).astype(np.float32)
    np.testing.assert_allclose(summed(jnp.asarray(x)), x.astype(np.float64).sum(1), atol=1e-4)


@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_under_settings_of_jax(rng, rows):
    matrix = jnp.asarray(rng.standard_normal((96, 24)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((rows, 96)), jnp.bfloat16)
    want = np.asarray(contract(x, matrix, 1), np.float64)
    for setting in ("enable_x64", "debug_nans"):
        with getattr(jax, setting)(True):
            got = contract(x, matrix, 1)
            assert got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(got, np.float64), want)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(np.asarray(contract(x, matrix, 1), np.float64), want)
