"""Which parameters are quantized while loading, and how a matrix that cannot be is named."""

import jax.numpy as jnp
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
    stored = entry.to_stored(values, "hf")
    tensor = StoredTensor(
        entry.hf,
        entry.stored_shape,
        "F32",
        np.dtype(np.float32),
        tmp_path / "m.safetensors",
        None,
        lambda tensor: stored,
    )

    def place(array, axes):
        laid.append((array.shape, axes))
        return jnp.asarray(array)

    return quantized_kernel(entry, tensor, "hf", scheme, np.dtype(np.float32), place), laid


def test_matrices_are_and_norms_and_biases_are_not(parameters, tmp_path):
    plain, grouped = (
        StoredTensor("x", (1,), "F32", np.dtype(np.float32), tmp_path, None, len, in_groups=held)
        for held in (False, True)
    )
    for scheme in ("int8", "int4"):
        kept = {n for n, entry in parameters.items() if not is_quantizable(entry, plain, scheme)}
        assert "norm/scale" in kept
        assert any(name.endswith("bias") for name in kept)
        assert all(name.endswith(("scale", "bias")) for name in kept)
    entry = parameters["embed/embedding"]
    assert is_quantizable(entry, plain, "int8")
    assert is_quantizable(entry, grouped, "stored")
    assert not is_quantizable(entry, plain, "stored")
    assert not is_quantizable(entry, grouped, None)
    assert not is_quantizable(parameters["norm/scale"], grouped, "stored")


# How each matrix lies, what its groups lie along, and where E is.
LAID = {
    "layers_0/attention/q/kernel": (("embed", "heads", "head_dim"), 0, 0),
    "layers_0/attention/o/kernel": (("heads", "head_dim", "embed"), 1, 2),
    "layers_0/mlp/up/kernel": (("embed", "ffn"), 0, 0),
    "layers_0/mlp/down/kernel": (("ffn", "embed"), 0, 1),
    "embed/embedding": (("embed", "vocab"), 0, 0),
    "lm_head/kernel": (("embed", "vocab"), 0, 0),
}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", LAID)
def test_groups_lie_along_what_is_summed_over(parameters, rng, tmp_path, name, scheme):
    entry = parameters[name]
    values = rng.standard_normal(entry.shape).astype(np.float32)
    kernel, laid = make(entry, values, scheme, tmp_path)
    axes, along, at = LAID[name]
    assert [of for _, of in laid] == [(*axes, None, None), *[axes] * (len(laid) - 1)]
    assert len(laid) == (3 if kernel.scheme == "int4" else 2)
    assert (kernel.inputs, kernel.axis) == (along + 1, at)
    whole = list(values.T.shape if name == "embed/embedding" else values.shape)
    whole[along] //= min(32, whole[along])
    assert kernel.scale.shape == tuple(whole)
    assert kernel.shape == entry.shape
    # Half a step, of a scale that bfloat16 may have made too small for the farthest value.
    step = 2 * np.abs(values).max() / (15 if kernel.scheme == "int4" else 254)
    assert np.abs(np.asarray(kernel.dense()) - values).max() <= step * 0.6
    vocab = "vocab" in axes
    assert kernel.scheme == ("int8" if vocab else scheme)  # embedding and head stay in int8


def test_a_weight_that_is_no_number_is_named(parameters, tmp_path):
    entry = parameters["layers_1/mlp/up/kernel"]
    values = np.ones(entry.shape, np.float32)
    values[0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*without quantize"):
        make(entry, values, "int8", tmp_path)
