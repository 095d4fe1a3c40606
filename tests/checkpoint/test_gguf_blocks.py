"""Blocks of GGUF files, kept as they are, against what the `gguf` package makes of them."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType

from alaya_jax.checkpoint import gguf_blocks, read_checkpoint
from alaya_jax.models.quantized import QuantizedMatrix

EXACT = (QuantType.Q8_0, QuantType.Q5_0, QuantType.Q4_0, QuantType.Q5_1, QuantType.Q4_1)
NEAR = (QuantType.Q6_K, QuantType.Q5_K, QuantType.Q4_K)
PACKED = (QuantType.Q4_0, QuantType.Q4_1, QuantType.Q4_K)
OFFSETS = (*PACKED, QuantType.Q5_1, QuantType.Q5_K)
GROUPS = dict.fromkeys(EXACT, 32) | dict.fromkeys(NEAR, 32) | {QuantType.Q6_K: 16}
# Where each float16 of a block begins; the first is its scale.
HALVES = {
    QuantType.Q8_0: (0,),
    QuantType.Q5_0: (0,),
    QuantType.Q4_0: (0,),
    QuantType.Q5_1: (0, 2),
    QuantType.Q4_1: (0, 2),
    QuantType.Q6_K: (208,),
    QuantType.Q5_K: (0, 2),
    QuantType.Q4_K: (0, 2),
}


def random_bytes(rng, kind, rows, columns, scale=0.01):
    """Any integers, and scales of about this size, of either sign."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    count = rows * columns // size
    blocks = rng.integers(0, 256, (count, length)).astype(np.uint8)
    for start in HALVES[kind]:
        halves = (rng.standard_normal(count) * scale).astype(np.float16)
        blocks[:, start : start + 2] = halves[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def read_groups(data, kind):
    """Blocks of it and the values that gguf makes of it."""
    values = gguf.quants.dequantize(data, kind)
    return gguf_blocks.groups(data.reshape(-1), values.shape, kind, lambda: values), values


def unpacked(blocks):
    """In float64, groups along the last axis."""
    scale = blocks.scale.astype(np.float64)
    codes = blocks.values.reshape(*scale.shape, -1)
    if codes.dtype == np.uint8:
        codes = np.concatenate([codes % 16, codes // 16], -1)
    wide = codes * scale[..., None]
    if blocks.offset is not None:
        wide = wide + blocks.offset.astype(np.float64)[..., None]
    return wide.reshape(*scale.shape[:-1], -1)


@pytest.mark.parametrize("kind", [*EXACT, *NEAR], ids=lambda kind: kind.name)
def test_values_are_those_of_the_file(rng, kind):
    assert gguf_blocks.is_kept(kind)
    data = random_bytes(rng, kind, 6, 512)
    blocks, values = read_groups(data, kind)
    assert blocks.scale.dtype == np.float16
    assert blocks.scale.shape == (6, 512 // GROUPS[kind])
    assert (blocks.offset is not None) == (kind in OFFSETS)
    assert blocks.values.dtype == (np.uint8 if kind in PACKED else np.int8)
    assert blocks.values.shape == (6, 256 if kind in PACKED else 512)
    got = unpacked(blocks)
    if kind in EXACT:
        # gguf adds a group's offset in float32; here no rounding is between.
        np.testing.assert_allclose(got, values, rtol=0, atol=np.abs(values).max() * 2**-23)
    else:
        groups = np.abs(values).reshape(*blocks.scale.shape, -1).max(-1, keepdims=True)
        error = np.abs(got - values).reshape(*blocks.scale.shape, -1)
        assert (error <= np.maximum(groups * 2**-10, 2e-3 * np.abs(values).max())).all()
        assert error.max() <= 2**-10 * np.abs(values).max()


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_what_gguf_quantizes(rng, kind):
    matrix = rng.standard_normal((5, 96), np.float32)
    matrix[2, 32:64] = 0
    blocks, values = read_groups(gguf.quants.quantize(matrix, kind), kind)
    got = unpacked(blocks).astype(np.float32)
    np.testing.assert_allclose(got, values, rtol=0, atol=np.abs(values).max() * 2**-23)
    if kind not in (QuantType.Q5_1, QuantType.Q4_1):
        np.testing.assert_array_equal(got, values)
    assert not got[2, 32:64].any()


@pytest.mark.parametrize("kind", [*EXACT, *NEAR], ids=lambda kind: kind.name)
def test_a_scale_of_zero(rng, kind):
    data = random_bytes(rng, kind, 2, 512).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    data[::2, HALVES[kind][0] : HALVES[kind][0] + 2] = 0
    blocks, values = read_groups(data.reshape(2, -1), kind)
    got = unpacked(blocks)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, values, rtol=0, atol=np.abs(values).max() * 2**-10)


@pytest.mark.parametrize("kind", NEAR, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [1e-7, 1e-5])
def test_scales_that_float16_hardly_holds(rng, kind, scale):
    """Off by at most what float16 steps by there, for each of a code's steps; no code wraps."""
    blocks, values = read_groups(random_bytes(rng, kind, 6, 512, scale), kind)
    steps = {QuantType.Q6_K: 32, QuantType.Q5_K: 32, QuantType.Q4_K: 16}[kind]
    bound = 2.0**-25 * (steps + 1) * 1.5 + np.abs(values) * 2**-10
    assert (np.abs(unpacked(blocks) - values) <= bound).all()


@pytest.mark.parametrize("kind", [QuantType.Q4_K, QuantType.Q5_K], ids=lambda kind: kind.name)
def test_an_offset_far_from_its_scale(rng, kind):
    """What float16 rounds from the offset may be steps of the scale: no code may wrap."""
    data = random_bytes(rng, kind, 6, 512).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    data[:, :2] = np.full((len(data), 1), 3e-4, np.float16).view(np.uint8)
    data[:, 2:4] = np.full((len(data), 1), 0.3, np.float16).view(np.uint8)
    blocks, values = read_groups(data.reshape(6, -1), kind)
    assert np.abs(unpacked(blocks) - values).max() <= 2**-10 * np.abs(values).max()


@pytest.mark.parametrize("kind", [QuantType.Q2_K, QuantType.Q3_K, QuantType.F16, QuantType.BF16])
def test_types_that_are_not_kept(kind):
    assert not gguf_blocks.is_kept(kind)


def leaf(params, *path):
    for part in path:
        params = params[part]
    return params


def read(path, **kwargs):
    return read_checkpoint(path, dtype="float32", progress=False, **kwargs)


KERNELS = [
    *(("layers_1", "attention", part, "kernel") for part in "qkvo"),
    *(("layers_1", "mlp", part, "kernel") for part in ("gate", "up", "down")),
    ("embed", "embedding"),
    ("lm_head", "kernel"),
]


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_a_file_keeps_its_values(make_config, make_tensors, write_gguf, kind):
    """Every matrix where it belongs, rows of q and k in the model's order."""
    config = make_config(head_dim=32)
    path = write_gguf(config, make_tensors(config), kind)
    dense, found = read(path), read(path, quantize="stored")
    for where in KERNELS:
        kernel = leaf(found.params, *where)
        assert isinstance(kernel, QuantizedMatrix)
        assert kernel.group == 32
        assert kernel.scale.dtype == np.float16
        assert kernel.scheme == ("int4" if kind in PACKED else "int8")
        want = np.asarray(leaf(dense.params, *where))
        np.testing.assert_allclose(kernel.dense(), want, rtol=0, atol=2**-22 * np.abs(want).max())
    norm = found.params["norm"]["scale"]
    np.testing.assert_array_equal(norm, dense.params["norm"]["scale"])


def test_a_block_across_two_heads_becomes_int8(make_config, make_tensors, write_gguf):
    config = make_config(head_dim=48)
    path = write_gguf(config, make_tensors(config), QuantType.Q4_0)
    dense, found = read(path), read(path, quantize="stored")
    for where in KERNELS:
        kernel, want = leaf(found.params, *where), np.asarray(leaf(dense.params, *where))
        across = where[-2] == "o"
        assert kernel.scheme == ("int8" if across else "int4"), where
        step = np.abs(want).max() / 127
        atol = step if across else 0  # bfloat16 scales round the farthest by half a step more
        np.testing.assert_allclose(kernel.dense(), want, rtol=0, atol=atol)
    assert leaf(found.params, "layers_1", "attention", "o", "kernel").group == 24


def test_a_type_that_is_not_kept_becomes_int8(rng, make_config, make_tensors, write_gguf):
    config = make_config(hidden_size=256, intermediate_size=256, head_dim=64)
    size, length = gguf.GGML_QUANT_SIZES[QuantType.Q2_K]
    tensors = make_tensors(config)
    for name, x in tensors.items():
        if x.ndim > 1:
            data = rng.integers(0, 256, (x.size // size, length)).astype(np.uint8)
            scales = np.full((len(data), 2), 0.01, np.float16).view(np.uint8)
            data[:, 80:84] = scales
            # The tests' writer permutes rows of q and k; any bytes will do for a type of bytes.
            tensors[name] = data.reshape(x.shape[0], -1)
    path = write_gguf(config, tensors, QuantType.Q2_K)
    dense, found = read(path), read(path, quantize="stored")
    for where in KERNELS:
        kernel, want = leaf(found.params, *where), np.asarray(leaf(dense.params, *where))
        assert (kernel.scheme, str(kernel.scale.dtype)) == ("int8", "bfloat16")
        np.testing.assert_allclose(kernel.dense(), want, rtol=0, atol=np.abs(want).max() / 127)


def test_a_dense_tensor_of_a_quantized_file_stays_dense(make_config, make_tensors, write_gguf):
    """Files of several types: here each tensor's is changed in turn as it is written."""
    config = make_config(head_dim=32)
    path = write_gguf(config, make_tensors(config), QuantType.Q8_0)
    mixed = path.with_name("mixed.gguf")
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(mixed, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if "attn_v" in tensor.name:
            kind = QuantType.F32
            data = gguf.quants.dequantize(data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.array(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, dense = read(mixed, quantize="stored"), read(path)
    for where in KERNELS:
        kernel, want = leaf(found.params, *where), np.asarray(leaf(dense.params, *where))
        if where[-2] == "v":
            assert not isinstance(kernel, QuantizedMatrix)
            np.testing.assert_array_equal(kernel, want)
        else:
            assert kernel.scheme == "int8"
            np.testing.assert_array_equal(kernel.dense(), want)
    assert isinstance(leaf(read(mixed, quantize="int4").params, *KERNELS[2]), QuantizedMatrix)
