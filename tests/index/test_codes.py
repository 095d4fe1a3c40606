"""Rounding to a few bits: real packing, and the geometry that the error bound rests on."""

import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.index import codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_dense_and_lossless(bits, rng):
    cell = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 5, 48)).astype(np.int8)
    packed = codes.pack(cell, bits)
    assert packed.nbytes == cell.size * bits // 8
    np.testing.assert_array_equal(jnp.concatenate(codes.fields(packed, bits), axis=-1), cell)


@pytest.mark.parametrize("dim", [8, 64, 128])
def test_rotation_keeps_products(dim, rng):
    x, y = rng.standard_normal((2, 1, 20, dim)).astype(np.float32)
    turned = np.einsum("knd,kmd->knm", codes.rotate(x), codes.rotate(y))
    np.testing.assert_allclose(turned, np.einsum("knd,kmd->knm", x, y), atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [16, 64])
def test_error_is_at_right_angles_and_as_long_as_stated(bits, dim, rng):
    r = rng.standard_normal((2, 3, 4, dim)) * 10.0 ** rng.integers(-2, 4, (2, 3, 4, 1))
    r[0, 0, 0] = 0
    r[0, 0, 1] = np.eye(dim)[3]
    packed, scale, spread = codes.quantize(r.astype(np.float32), bits)
    levels = 2 * np.asarray(jnp.concatenate(codes.fields(packed, bits), axis=-1), np.float64) + 1
    u = np.asarray(codes.rotate(r.reshape(2, -1, dim).astype(np.float32))).reshape(r.shape)
    scale = np.asarray(scale, np.float64)
    e = scale[..., None] * levels - u
    length = np.linalg.norm(u, axis=-1)
    # Without bias: e has nothing along u, but for what float16 lost of the scale.
    assert np.all(np.abs(np.sum(e * u, -1)) <= (2.0**-11 + 1e-5) * length**2 + 1e-6)
    # The spread is |e| / sqrt(D - 1), and what float16 lost in full.
    stated = np.asarray(spread, np.float64) * np.sqrt(dim - 1)
    size = np.linalg.norm(e, axis=-1)
    assert np.all(size <= 1.001 * stated + 1e-5 * length)
    assert np.all(stated <= size + (2.0**-11 * np.sqrt(dim - 1) + 1e-3) * length)
    assert np.all(length <= codes.norm_bound(bits, dim) * scale)
    assert scale[0, 0, 0] * levels[0, 0, 0, 0] == 0


@pytest.mark.parametrize(("dim", "probability"), [(8, 0.05), (64, 0.05), (64, 0.002)])
def test_deviations_are_quantiles_of_random_points_on_the_sphere(dim, probability, rng):
    x = rng.standard_normal((100_000, dim - 1))
    coordinate = x[:, 0] / np.linalg.norm(x, axis=-1)
    beyond = coordinate > codes.deviations(probability, dim) / np.sqrt(dim - 1)
    error = np.sqrt(probability / len(x))
    assert abs(beyond.mean() - probability) < 5 * error


def test_more_bits_err_less(rng):
    r = rng.standard_normal((1, 1, 200, 64)).astype(np.float32)
    spreads = [float(codes.quantize(r, bits)[2].mean()) for bits in (2, 4, 8)]
    # Max's square errors for a normal number are 0.119, 0.0115 and about 1e-4.
    np.testing.assert_allclose(spreads, np.sqrt([0.119, 0.0115, 1e-4]), rtol=0.1)


def test_half_precision_never_understates():
    x = np.geomspace(1e-9, 6e4, 5000).astype(np.float32)
    assert np.all(np.asarray(codes.to_half_above(jnp.asarray(x)), np.float32) >= x)
    assert np.isinf(codes.to_half_above(jnp.float32(1e6)))
    assert codes.to_half(jnp.float32(1e6)) == 65504
