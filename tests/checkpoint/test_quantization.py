"""Which parameters are quantized while loading, and how a matrix that cannot be is named."""

import numpy as np
import pytest

from alaya_jax.checkpoint.names import entries
from alaya_jax.checkpoint.quantization import is_quantizable, quantized_kernel
from alaya_jax.checkpoint.source import StoredTensor
from alaya_jax.errors import CheckpointError


@pytest.fixture
def parameters(make_config):
    return {"/".join(e.path): e for e in entries(make_config(attention_bias=True))}


def make(entry, values, scheme, tmp_path):
    laid = []
    tensor = StoredTensor(
        entry.hf, entry.shape, "F32", np.dtype(np.float32), tmp_path / "m.safetensors", None, None
    )

    def place(array, axes):
        laid.append((array.shape, axes))
        return array

    kernel = quantized_kernel(entry, tensor, values, scheme, np.dtype(np.float32), place)
    return kernel, laid


def test_matrices_are_and_norms_and_biases_are_not(parameters):
    kept = {name for name, entry in parameters.items() if not is_quantizable(entry)}
    assert "norm/scale" in kept
    assert any(name.endswith("bias") for name in kept)
    assert all(name.endswith(("scale", "bias")) for name in kept)
    assert is_quantizable(parameters["embed/embedding"])


def test_values_are_near_and_scales_lie_like_them(parameters, rng, tmp_path):
    entry = parameters["layers_0/attention/q/kernel"]
    values = rng.standard_normal(entry.shape).astype(np.float32)
    kernel, laid = make(entry, values, "int8", tmp_path)
    found = np.asarray(kernel.values, np.float32) * np.asarray(kernel.scale, np.float32)
    # Half a step of 127 that reach the largest value of a row.
    assert np.abs(found - values).max() <= np.abs(values).max() / 127 / 2 * 1.01
    (_, of_values), (short, of_scale) = laid
    assert of_values == entry.logical_axes
    assert [a for a, n in zip(of_scale, short, strict=True) if n == 1] == [None] * short.count(1)


def test_with_int4_the_embedding_stays_in_int8(parameters, rng, tmp_path):
    entry = parameters["embed/embedding"]
    kernel, _ = make(entry, rng.standard_normal(entry.shape).astype(np.float32), "int4", tmp_path)
    assert np.asarray(kernel.values).dtype == np.int8
    assert np.abs(np.asarray(kernel.values, np.int32)).max() > 7


def test_a_weight_that_is_no_number_is_named(parameters, tmp_path):
    entry = parameters["layers_1/mlp/up/kernel"]
    values = np.ones(entry.shape, np.float32)
    values[0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*without quantize"):
        make(entry, values, "int8", tmp_path)
