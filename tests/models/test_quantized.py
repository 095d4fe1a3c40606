"""Quantized matrices against numpy in float64, unpacked here by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from alaya_jax.errors import ConfigError
from alaya_jax.models import quantized
from alaya_jax.models.matrices import Matrix
from alaya_jax.models.quantized import (
    QuantizedMatrix,
    check_scheme,
    group_of,
    packed,
    quantize,
    tiled,
)

# shape, how many axes are summed over (groups lie along the last of those), which axis is E, group
CASES = {
    "q": ((96, 4, 16), 1, 0, 32),
    "o": ((4, 16, 96), 2, 2, 16),
    "gate": ((48, 40), 1, 0, 24),
    "down": ((56, 96), 1, 1, 28),
}
SCHEMES = ("int8", "int4")


def make(matrix, scheme, inputs=1, axis=0, compute="float32", embedding=False):
    laid = matrix.T if embedding else matrix
    return placed(*quantize(laid, scheme, inputs - 1), inputs, axis, embedding, compute)


def placed(values, scale, offset, inputs=1, axis=0, embedding=False, compute="float32"):
    parts = (tiled(values, scale.shape[inputs - 1], inputs - 1), scale, offset)
    parts = (x if x is None else jnp.asarray(x) for x in parts)
    return QuantizedMatrix(*parts, inputs, axis, embedding, compute)


def random(rng, case, scheme, compute="float32"):
    shape, inputs, axis, group = CASES[case]
    kernel = make(rng.standard_normal(shape, np.float32), scheme, inputs, axis, compute)
    assert (kernel.shape, kernel.scheme, kernel.group) == (shape, scheme, group)
    assert isinstance(kernel, Matrix)
    return kernel


def pieces(kernel):
    """Integers, scale and offset of every weight, float64, as the matrix lies."""
    at = kernel.inputs  # of what is behind the groups
    scale = np.asarray(kernel.scale).astype(np.float64)
    values = np.moveaxis(np.asarray(kernel.values), -2, at)
    if values.dtype == np.uint8:
        values = np.concatenate([values % 16, values // 16], at)
    # Tiles join the last axis.
    values = values.reshape(*values.shape[:-2], -1)
    offset = np.zeros_like(scale)
    if kernel.offset is not None:
        offset = np.asarray(kernel.offset).astype(np.float64)
    size = values.shape[at]
    whole = [values, *(np.repeat(np.expand_dims(x, at), size, at) for x in (scale, offset))]
    laid = (*scale.shape[: at - 1], scale.shape[at - 1] * size, *scale.shape[at:])
    return [x.astype(np.float64).reshape(laid) for x in whole]


def unpacked(kernel):
    codes, scale, offset = pieces(kernel)
    whole = codes * scale + offset
    return whole.T if kernel.embedding else whole


def assert_product(got, x, kernel, sixteen_bits):
    """Within half a step of 16 bits of what is multiplied, and what float32 rounds."""
    n, laid = kernel.inputs, unpacked(kernel)
    laid = laid.T if kernel.embedding else laid
    x = np.asarray(x, np.float64)
    want = np.tensordot(x, laid, n)
    codes, scale, offset = pieces(kernel)
    bound = np.tensordot(np.abs(x), np.abs(codes * scale) + np.abs(offset), n) * 2e-6
    if sixteen_bits:
        groups = np.abs(x).reshape(*x.shape[:-1], -1, kernel.group)
        step = np.broadcast_to(groups.max(-1, keepdims=True) / 32767, groups.shape)
        bound = bound + np.tensordot(step.reshape(x.shape) / 2, np.abs(laid), n)
    assert got.dtype == jnp.float32
    assert got.shape == want.shape
    assert (np.abs(np.asarray(got) - want) <= bound + 1e-30).all()


@pytest.mark.parametrize("lead", [(1,), (2,), (8,), (9,), (2, 3), (2, 20)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_dense_matrix(rng, case, scheme, lead):
    kernel = random(rng, case, scheme)
    np.testing.assert_allclose(kernel.dense(), unpacked(kernel), rtol=1e-6, atol=1e-6)
    n = kernel.inputs
    x = rng.standard_normal((*lead, *kernel.shape[:n]), np.float32)
    got = jax.jit(lambda x, kernel: kernel.contract(x, n))(x, kernel)
    assert_product(got, x, kernel, np.prod(lead) <= 8)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    ("case", "length"), [("down", 35), ("down", 49), ("down", 26), ("gate", 112), ("gate", 49)]
)
def test_lengths_of_every_sort(rng, case, length, rows):
    """Where no number of 8 to 32 divides a length, all of it is one group."""
    shape, _, axis, _ = CASES[case]
    whole = length in (35, 49)
    matrix = rng.standard_normal((length, shape[1]), np.float32)
    for scheme in SCHEMES[: 1 if whole else 2]:
        kernel = make(matrix, scheme, 1, axis)
        assert kernel.group == {35: 35, 49: 49, 26: 26, 112: 28}[length]
        x = rng.standard_normal((rows, length), np.float32)
        assert_product(kernel.contract(jnp.asarray(x), 1), x, kernel, rows == 1)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (9,)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding(rng, scheme, lead):
    kernel = make(rng.standard_normal((50, 96), np.float32), scheme, embedding=True)
    assert kernel.shape == (50, 96)
    assert kernel.scale.shape == (3, 50)
    want = unpacked(kernel)
    ids = rng.integers(0, 50, lead)
    got = jax.jit(QuantizedMatrix.rows)(kernel, ids)
    assert got.shape == (*lead, 96)
    np.testing.assert_allclose(got, want[ids], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(kernel.dense(), want, rtol=1e-6, atol=1e-6)
    x = rng.standard_normal((*lead, 96), np.float32)
    got = jax.jit(QuantizedMatrix.contract_last)(kernel, x)
    assert_product(got, x, kernel, lead != (9,))


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", ["q", "o", "down"])
def test_bfloat16(rng, case, scheme, rows):
    """Rows in bfloat16 are taken as they are; few rows are multiplied as exactly as in float32."""
    kernel = random(rng, case, scheme, "bfloat16")
    assert kernel.dtype == kernel.dense().dtype == jnp.bfloat16
    n = kernel.inputs
    x = jnp.asarray(rng.standard_normal((rows, *kernel.shape[:n])), jnp.bfloat16)
    wide = kernel.contract(x, n, jnp.float32)
    if rows <= 8:
        assert_product(wide, x, kernel, True)
    else:
        want = np.tensordot(np.asarray(x, np.float64), unpacked(kernel), n)
        norm = np.linalg.norm(want)
        assert np.linalg.norm(np.asarray(wide) - want) < 2**-8 * norm
    own = kernel.contract(x, n)
    assert own.dtype == jnp.bfloat16
    np.testing.assert_array_equal(own, wide.astype(jnp.bfloat16))


def own_blocks(rng, scale_type, offset, bits, shape=(64, 24), group=16):
    """A matrix as a file may hold it; groups of 16, scales of either sign."""
    groups = (shape[0] // group, shape[1])
    scale = (rng.standard_normal(groups) / 100).astype(scale_type)
    if bits == 8:
        values = rng.integers(-128, 128, shape).astype(np.int8)
    else:
        values = rng.integers(0, 256, (shape[0] // 2, shape[1])).astype(np.uint8)
    least = rng.standard_normal(groups).astype(scale_type) if offset else None
    return placed(values, scale, least)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("scale_type", [np.float16, ml_dtypes.bfloat16])
def test_blocks_of_a_file(rng, scale_type, offset, bits, rows):
    kernel = own_blocks(rng, scale_type, offset, bits)
    assert (kernel.group, kernel.scheme) == (16, f"int{bits}")
    np.testing.assert_allclose(kernel.dense(), unpacked(kernel), rtol=1e-6, atol=1e-6)
    x = rng.standard_normal((rows, 64), np.float32)
    assert_product(kernel.contract(jnp.asarray(x), 1), x, kernel, rows == 1)


def test_float16_scales_are_exact():
    """Each that is finite: subnormal, negative, zero."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    kernel = placed(np.ones((16, every.size), np.int8), every[None], None)
    want = every.astype(np.float32)
    np.testing.assert_array_equal(jax.jit(QuantizedMatrix.dense)(kernel)[0], want)
    for rows in (1, 9):
        x = jnp.zeros((rows, 16)).at[:, 3].set(1.0)
        got = jax.jit(lambda x, kernel: kernel.contract(x, 1))(x, kernel)
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("length", [32, 521])
def test_integers_do_not_overflow(length, rows):
    """The largest codes and the largest x; 521 is a prime, so all of it is one group."""
    signs = np.where(np.arange(length) % 3, 1, -1).astype(np.float32)
    kernel = make(np.stack([signs, np.ones(length, np.float32)], 1) * 3, "int8")
    assert np.abs(np.asarray(kernel.values)).min() == 127
    assert kernel.group == length
    for x in (signs, np.ones(length, np.float32)):
        many = np.repeat(x[None] * 7, rows, 0)
        assert_product(kernel.contract(jnp.asarray(many), 1), many, kernel, True)
    kernel = placed(np.full((32, 2), -128, np.int8), np.asarray(kernel.scale[:1]), None)
    x = np.ones((rows, 32), np.float32)
    assert_product(kernel.contract(jnp.asarray(x), 1), x, kernel, True)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-36, 1e-30, 1e30])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_any_size(rng, scheme, size):
    """And with zeros among them, which an infinite inverse would make no numbers."""
    kernel = random(rng, "gate", scheme)
    x = rng.standard_normal((4, 48)).astype(np.float32) * np.float32(size)
    x[0] = 0
    x[1, 5:] = 0
    got = kernel.contract(jnp.asarray(x), 1)
    want = x.astype(np.float64) @ unpacked(kernel)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=max(1e-3 * size, 1e-34))


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_stays_so(rng, scheme, bad, rows):
    kernel = random(rng, "q", scheme)
    x = rng.standard_normal((rows, 96), np.float32)
    x[0, 50] = bad
    got = np.asarray(jax.jit(lambda x, kernel: kernel.contract(x, 1))(x, kernel))
    assert not np.isfinite(got[0]).any()
    assert np.isfinite(got[1:]).all()


@pytest.mark.parametrize("setting", ["debug_nans", "x64", "rank_promotion", "dtype_promotion"])
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_settings_of_jax(rng, scheme, rows, setting):
    own = {
        "debug_nans": lambda: jax.debug_nans(True),
        "x64": lambda: jax.enable_x64(True),
        "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
        "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    }[setting]
    head = make(rng.standard_normal((40, 64), np.float32), scheme, embedding=True)
    kernels = {case: random(rng, case, scheme) for case in ("q", "o", "down")}
    file = own_blocks(rng, np.float16, True, 4)
    with own():
        for kernel in (*kernels.values(), file):
            n = kernel.inputs
            x = rng.standard_normal((rows, *kernel.shape[:n]), np.float32)
            x[1] = 0  # no group has a largest
            assert_product(kernel.contract(jnp.asarray(x), n), x, kernel, rows == 3)
            gradient = jax.grad(lambda x, k=kernel: k.contract(x, k.inputs).sum())(jnp.asarray(x))
            assert gradient.dtype == jnp.float32
            assert gradient.shape == x.shape
        x = rng.standard_normal((rows, 64), np.float32)
        assert_product(head.contract_last(jnp.asarray(x)), x, head, rows == 3)
        assert head.rows(jnp.arange(3)).dtype == jnp.float32


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", ["q", "o", "down", "head"])
def test_derivatives_are_those_of_the_dense_matrix(rng, case, scheme, rows):
    if case == "head":
        kernel = make(rng.standard_normal((40, 64), np.float32), scheme, embedding=True)
        laid, product = unpacked(kernel).T, QuantizedMatrix.contract_last
    else:
        kernel = random(rng, case, scheme)
        laid = unpacked(kernel)

        def product(kernel, x):
            return kernel.contract(x, kernel.inputs)

    n = kernel.inputs
    x, v = rng.standard_normal((2, rows, *laid.shape[:n]), np.float32)
    g = rng.standard_normal((rows, *laid.shape[n:]), np.float32)
    back = np.tensordot(
        g.astype(np.float64), laid, [list(range(1, g.ndim)), list(range(n, laid.ndim))]
    )

    def reverse(x, kernel):
        return jax.vjp(lambda x: product(kernel, x), x)[1](g)[0]

    def forward(x, kernel):
        return jax.jvp(lambda x: product(kernel, x), (x,), (v,))[1]

    for wrap in (lambda f: f, jax.jit):
        np.testing.assert_allclose(wrap(reverse)(x, kernel), back, atol=1e-4)
        pushed = wrap(forward)(x, kernel)
        np.testing.assert_allclose(pushed, np.tensordot(v.astype(np.float64), laid, n), atol=1e-4)
    # Each row by itself is few, however many there are.
    each = jax.jit(jax.vmap(product, (None, 0)))(kernel, x)
    assert_product(each, x, kernel, True)
    alone = jax.vmap(jax.grad(lambda x, g: (product(kernel, x) * g).sum()))(x, g)
    np.testing.assert_allclose(alone, back, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 9])
def test_second_derivatives(rng, rows):
    kernel = random(rng, "down", "int4")
    x, v = rng.standard_normal((2, rows, 56), np.float32)

    def loss(x):
        return (kernel.contract(x, 1) ** 2).sum() / 2

    got = jax.jvp(jax.grad(loss), (x,), (v,))[1]
    dense = unpacked(kernel)
    np.testing.assert_allclose(got, v.astype(np.float64) @ dense @ dense.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_half_a_step(rng, monkeypatch, case, dtype):
    """Of a scale that bfloat16 rounds, so the last codes may lie half a step further in."""
    monkeypatch.setattr(quantized, "_PASS", 4 * 32 * 64 * 4)  # more than one
    shape, inputs, axis, group = CASES[case]
    matrix = (rng.standard_normal(shape) * rng.lognormal(0, 2, shape)).astype(dtype)
    wide = matrix.astype(np.float64)
    grouped = np.moveaxis(wide, inputs - 1, -1)
    grouped = grouped.reshape(*grouped.shape[:-1], -1, group)
    largest, spread = np.abs(grouped).max(-1), np.ptp(grouped, axis=-1)
    for scheme, steps in (("int8", 127), ("int4", 15)):
        kernel = make(matrix, scheme, inputs, axis)
        _, step, _ = pieces(kernel)
        error = np.abs(unpacked(kernel) - wide)
        # A step may be 2^-9 too short, over all of the codes; an offset is rounded too.
        slack = 0.5001 + steps * 2**-9
        assert (error <= step * slack).all()
        scale = np.moveaxis(np.asarray(kernel.scale, np.float64), inputs - 1, -1)
        if scheme == "int8":
            np.testing.assert_allclose(scale, largest / 127, rtol=2**-8)
        else:
            assert (np.abs(scale - spread / 15) <= 2**-8 * (spread + largest) / 15).all()
        inside = np.abs(np.asarray(pieces(kernel)[0])) < (127 if scheme == "int8" else 15)
        inside &= pieces(kernel)[0] > (-127 if scheme == "int8" else 0)
        assert inside.mean() > 0.7
        assert (error <= step * 0.5001)[inside].all()


def test_groups_of_zeros_and_of_one_value(rng):
    matrix = rng.standard_normal((96, 5), np.float32)
    matrix[32:64, 1] = 0
    matrix[32:64, 2] = -1.5
    matrix[32:64, 3] = 1.5
    for scheme in SCHEMES:
        got = unpacked(make(matrix, scheme))[32:64]
        assert not got[:, 1].any()
        np.testing.assert_allclose(got[:, 2:4], matrix[32:64, 2:4], rtol=2**-8)


def test_bits(rng):
    matrix = rng.standard_normal((256, 512), np.float32)
    for scheme, bits in (("int8", 8.5), ("int4", 5)):
        kernel = make(matrix, scheme)
        assert sum(x.nbytes for x in jax.tree.leaves(kernel)) * 8 == bits * matrix.size
        assert kernel.size == matrix.size


@pytest.mark.parametrize("outputs", [1, 61, 64, 100, 128, 192])
@pytest.mark.parametrize("rows", [2, 9])
def test_tiles(rng, outputs, rows):
    """Of at most 64 outputs, and of all sizes that divide their count."""
    kernel = make(rng.standard_normal((64, outputs), np.float32), "int4")
    tile = {1: 1, 61: 61, 64: 64, 100: 50, 128: 64, 192: 64}[outputs]
    assert kernel.values.shape == (2, outputs // tile, 16, tile)
    x = rng.standard_normal((rows, 64), np.float32)
    assert_product(kernel.contract(jnp.asarray(x), 1), x, kernel, rows == 2)
    ids = np.arange(outputs)
    head = dataclasses.replace(kernel, embedding=True)
    np.testing.assert_allclose(head.rows(ids), unpacked(head), rtol=1e-6, atol=1e-6)


def test_two_values_share_a_byte():
    np.testing.assert_array_equal(
        packed(np.array([[1, 2, 15, 3]])), np.array([[0xF1, 0x32]], np.uint8)
    )


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("axis", "method"), [(0, "contract"), (1, "contract"), (0, "last")])
def test_the_dense_matrix_never_exists(scheme, axis, method, rows):
    """By the compiler's account: what a product needs beside its operands and its result."""
    n, halves = 2048, 1 if scheme == "int8" else 2
    integers = jnp.int8 if halves == 1 else jnp.uint8
    scale = jax.ShapeDtypeStruct((n // 32, n), jnp.bfloat16)
    kernel = QuantizedMatrix(
        jax.ShapeDtypeStruct((n // 32, n // 64, 32 // halves, 64), integers),
        scale,
        None if halves == 1 else scale,
        1,
        axis,
        method == "last",
        "float32",
    )
    x = jax.ShapeDtypeStruct((rows, n), jnp.float32)
    product = {
        "contract": lambda x, kernel: kernel.contract(x, 1),
        "last": lambda x, kernel: kernel.contract_last(x),
    }[method]
    memory = jax.jit(product).lower(x, kernel).compile().memory_analysis()
    dense = 4 * n * n
    assert memory.temp_size_in_bytes < dense / 2
    plain = jax.jit(lambda x, kernel: x @ lax.optimization_barrier(kernel.dense()))
    plain = plain.lower(x, kernel).compile()
    assert plain.memory_analysis().temp_size_in_bytes >= dense  # what it is not


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e30]),
    st.integers(0, 99),
)
def test_any_size_stays_finite(groups, columns, size, seed):
    matrix = np.random.default_rng(seed).standard_normal((32 * groups, columns), np.float32) * size
    matrix = matrix.astype(np.float32)
    for scheme, steps in (("int8", 127), ("int4", 7)):
        got = unpacked(make(matrix, scheme))
        assert np.abs(got - matrix).max() <= np.abs(matrix).max() / steps + 1e-30


def test_how_many_share_a_scale():
    found = {n: group_of(n) for n in (1, 7, 16, 48, 56, 64, 97, 100, 576, 960, 4096)}
    assert found == {1: 1, 7: 7, 16: 16, 48: 24, 56: 28, 64: 32, 97: 97, 100: 25, 576: 32} | {
        960: 32,
        4096: 32,
    }
    assert [group_of(n, even=True) for n in (16, 48, 100, 4096)] == [16, 24, 20, 32]


def test_refused(rng):
    with pytest.raises(ConfigError, match=r"'int3'.*int8, int4"):
        check_scheme("int3")
    for length in (7, 27, 35, 97):
        with pytest.raises(ConfigError, match=rf"divides {length}.*int8"):
            quantize(np.ones((length, 4), np.float32), "int4", 0)
    matrix = rng.standard_normal((32, 4), np.float32)
    matrix[5, 2:] = np.nan, np.inf
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match="2 of its values"):
            quantize(matrix, scheme, 0)
