"""Quantized matrices against numpy in float64, unpacked here by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.errors import ConfigError
from alaya_jax.models import quantized
from alaya_jax.models.matrices import Matrix
from alaya_jax.models.quantized import QuantizedMatrix, check_scheme, quantize

# shape, axis of E, output axes, how many axes x is contracted over
CASES = {
    "q": ((96, 4, 16), 0, (1, 2), 1),
    "o": ((4, 16, 96), 2, (2,), 2),
    "gate": ((96, 40), 0, (1,), 1),
    "down": ((40, 96), 1, (1,), 1),
}


def make(matrix, scheme, axis, outputs, compute="float32"):
    values, scale = quantize(matrix, scheme, axis, outputs)
    return QuantizedMatrix(jnp.asarray(values), jnp.asarray(scale), axis, compute)


def unpacked(kernel):
    """The matrix in float64, E first while it is unpacked, one group after another."""
    scale = np.asarray(kernel.scale).astype(np.float64)
    values = np.asarray(kernel.values)
    if values.dtype == np.int8:
        return values * scale
    values, scale = np.moveaxis(values, kernel.axis, 0), np.moveaxis(scale, kernel.axis, 0)
    rows = []
    for group, own in enumerate(scale):
        packed = values[16 * group : 16 * group + 16]
        rows += [(byte % 16 - 8.0) * own for byte in packed]
        rows += [(byte // 16 - 8.0) * own for byte in packed]
    return np.moveaxis(np.array(rows), 0, kernel.axis)


@pytest.mark.parametrize("block", [1, 1 << 22], ids=["blocks", "halves"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("case", ["q", "o", "down"])
def test_products_are_those_of_the_dense_matrix(rng, monkeypatch, case, scheme, block):
    monkeypatch.setattr(quantized, "_BLOCK", block)
    shape, axis, outputs, n = CASES[case]
    kernel = make(rng.standard_normal(shape, np.float32), scheme, axis, outputs)
    assert kernel.block_width == (48 if scheme == "int8" and block > 1 else 32)
    assert isinstance(kernel, Matrix)
    assert (kernel.shape, kernel.scheme) == (shape, scheme)
    want = unpacked(kernel)
    np.testing.assert_allclose(kernel.dense(), want, rtol=1e-6)
    x = rng.standard_normal((2, 3, *shape[:n]), np.float32)
    got = jax.jit(lambda x, kernel: kernel.contract(x, n))(x, kernel)
    np.testing.assert_allclose(got, np.tensordot(x.astype(np.float64), want, n), atol=2e-5)
    half = kernel.contract(jnp.asarray(x, jnp.bfloat16), n, jnp.float32)
    assert half.dtype == jnp.float32
    gradient = jax.grad(lambda x: kernel.contract(x, n).sum())(jnp.asarray(x))
    summed = want.sum(axis=tuple(range(n, len(shape))))
    np.testing.assert_allclose(gradient, np.broadcast_to(summed, x.shape), atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_embedding(rng, monkeypatch, scheme):
    monkeypatch.setattr(quantized, "_BLOCK", 1)
    kernel = make(rng.standard_normal((50, 96), np.float32), scheme, 1, (0,))
    assert kernel.scale.shape == ((50, 1) if scheme == "int8" else (50, 3))
    want = unpacked(kernel)
    ids = np.array([[3, 49, 0], [7, 7, 1]])
    np.testing.assert_allclose(kernel.rows(ids), want[ids], rtol=1e-6)
    x = rng.standard_normal((2, 96), np.float32)
    np.testing.assert_allclose(kernel.contract_last(x), x.astype(np.float64) @ want.T, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_half_a_step(rng, monkeypatch, case, dtype):
    monkeypatch.setattr(quantized, "_PASS", 4 * 32 * 64 * 4)  # more than one
    shape, axis, outputs, _ = CASES[case]
    matrix = (rng.standard_normal(shape) * rng.lognormal(0, 2, shape)).astype(dtype)
    wide = matrix.astype(np.float64)
    kernel = make(matrix, "int8", axis, outputs)
    assert (np.abs(unpacked(kernel) - wide) <= np.asarray(kernel.scale) * 0.5001).all()
    summed = tuple(a for a in range(len(shape)) if a not in outputs)
    largest = np.abs(wide).max(axis=summed, keepdims=True)
    np.testing.assert_allclose(kernel.scale, largest / 127, rtol=1e-6)

    kernel = make(matrix, "int4", axis, outputs)
    error = np.moveaxis(np.abs(unpacked(kernel) - wide), axis, 0).reshape(3, 32, -1)
    signed = np.moveaxis(np.asarray(kernel.scale, np.float64), axis, 0).reshape(3, 1, -1)
    step = np.abs(signed)
    groups = np.moveaxis(wide, axis, 0).reshape(3, 32, -1)
    # -8 steps reach the farthest value (less the rounding of the scale); to the other side there
    # are 7, so what lies beyond 7.5 is off by up to one.
    beyond = (np.sign(groups) == np.sign(signed)) & (np.abs(groups) > 7.5 * step)
    assert (error <= step * np.where(beyond, 1.04, 0.54)).all()
    np.testing.assert_allclose(step, np.abs(groups).max(1, keepdims=True) / 8, rtol=2**-8)


def test_bits(rng):
    matrix = rng.standard_normal((256, 512), np.float32)
    for scheme, bits in (("int8", 8 + 32 / 256), ("int4", 4.5)):
        kernel = make(matrix, scheme, 0, (1,))
        assert sum(x.nbytes for x in jax.tree.leaves(kernel)) * 8 == bits * matrix.size
        assert kernel.size == matrix.size


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("axis", "method"), [(0, "contract"), (1, "contract"), (1, "last")])
def test_the_dense_matrix_never_exists(scheme, axis, method):
    """By the compiler's account: what a product needs beside its operands and its result."""
    n = 1024
    shape, parts = (n, n), (2 if scheme == "int4" else 1)
    values = [n, n]
    values[axis] //= parts
    scale = [1, 1]
    scale[axis if scheme == "int4" else 1 - axis] = n
    if scheme == "int4":
        scale = [n, n]
        scale[axis] //= 32
    kind = (jnp.uint8, jnp.bfloat16) if scheme == "int4" else (jnp.int8, jnp.float32)
    kernel = QuantizedMatrix(
        jax.ShapeDtypeStruct(tuple(values), kind[0]),
        jax.ShapeDtypeStruct(tuple(scale), kind[1]),
        axis,
        "float32",
    )
    x = jax.ShapeDtypeStruct((4, n), jnp.float32)
    product = {
        "contract": lambda x, kernel: kernel.contract(x, 1),
        "last": lambda x, kernel: kernel.contract_last(x),
    }[method]
    memory = jax.jit(product).lower(x, kernel).compile().memory_analysis()
    dense = 4 * np.prod(shape)
    assert memory.temp_size_in_bytes < dense / 3
    plain = jax.jit(lambda x, kernel: x @ kernel.dense()).lower(x, kernel).compile()
    assert plain.memory_analysis().temp_size_in_bytes >= dense  # what it is not


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e30]),
    st.integers(0, 99),
)
def test_any_size_stays_finite(groups, rows, size, seed):
    matrix = np.random.default_rng(seed).standard_normal((rows, 32 * groups), np.float32) * size
    matrix = matrix.astype(np.float32)
    for scheme in ("int8", "int4"):
        got = unpacked(make(matrix, scheme, 1, (0,)))
        assert np.abs(got - matrix).max() <= np.abs(matrix).max() / 8 + 1e-30


def test_refused(rng):
    with pytest.raises(ConfigError, match=r"'int3'.*int8, int4"):
        check_scheme("int3")
    with pytest.raises(ConfigError, match=r"48 is no multiple.*int8"):
        quantize(np.ones((48, 4), np.float32), "int4", 0, (1,))
    matrix = rng.standard_normal((32, 4), np.float32)
    matrix[5, 2:] = np.nan, np.inf
    for scheme in ("int8", "int4"):
        with pytest.raises(ValueError, match="2 of its values"):
            quantize(matrix, scheme, 0, (1,))
