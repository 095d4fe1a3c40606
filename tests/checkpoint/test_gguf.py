"""GGUF files written by the `gguf` package: values, layouts, RoPE, and refusals."""

import dataclasses

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant

from alaya_jax.checkpoint import bundled, open_checkpoint, read_checkpoint
from alaya_jax.checkpoint.gguf import read_header
from alaya_jax.checkpoint.params import match
from alaya_jax.errors import AlayaError, CheckpointError, ConfigError
from alaya_jax.models.config import RopeConfig
from alaya_jax.models.rope import inverse_frequencies
from alaya_jax.optimizer.situation import default_dtype
from alaya_jax.pallas_kernels.dispatch import H100
from alaya_jax.sharding import make_mesh


def read(path, **kwargs):
    return read_checkpoint(path, progress=False, **kwargs)


@pytest.mark.parametrize("biases", [True, False])
def test_float32_equals_hf(make_config, make_tensors, write_gguf, as_params, assert_same, biases):
    config = make_config(attention_bias=biases, mlp_bias=biases)
    tensors = make_tensors(config)
    checkpoint = read(write_gguf(config, tensors))
    assert checkpoint.config == config
    assert checkpoint.tokenizer is None
    assert_same(checkpoint.params, as_params(config, tensors))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_kinds(make_config, make_tensors, write_gguf, as_params, assert_same, kind):
    """Matrices come back as the package dequantizes them; norms follow their type."""
    kind = Quant[kind]
    dtype = {Quant.F16: np.float16, Quant.BF16: ml_dtypes.bfloat16}.get(kind, np.float32)
    config = make_config(tie_word_embeddings=True)
    tensors = make_tensors(config)
    # Rounded by rows of the HF tensor: permuting q and k moves whole rows, so it may come after.
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).reshape(x.shape)
        if x.ndim > 1
        else x
        for name, x in tensors.items()
    }
    checkpoint = read(write_gguf(config, tensors, kind))
    want = {name: x.astype(dtype) for name, x in rounded.items()}
    assert_same(checkpoint.params, as_params(config, want))
    assert checkpoint.config == dataclasses.replace(config, dtype=np.dtype(dtype).name)


def test_quantized_types_become_what_the_target_computes_in(
    make_config, make_tensors, write_gguf, monkeypatch
):
    """The kernels' target; `jax.default_device` or a mesh decides it, not the default backend."""
    config = make_config()
    path = write_gguf(config, make_tensors(config), Quant.Q8_0)

    def dtypes():
        return default_dtype({"Q8_0": 9}), read(path).params["embed"]["embedding"].dtype.name

    assert dtypes() == ("float32", "float32")
    for module in ("pallas_kernels.dispatch", "optimizer.situation"):
        monkeypatch.setattr(f"alaya_jax.{module}.current_target", lambda: H100)
    assert dtypes() == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_S"])
def test_kinds_that_only_decode(make_config, make_tensors, write_gguf, rng, kind):
    """No encoder for these in Python: random blocks, of moderate scales, as the embedding."""
    kind = Quant[kind]
    config = make_config(hidden_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 60, (config.vocab_size, 256 // block * size), np.uint8)
    tensors = make_tensors(config)
    path = write_gguf(config, {n: x for n, x in tensors.items() if x.ndim == 1})
    metadata, _ = read_header(path)
    assert metadata["general.architecture"] == "llama"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_header(path)[1]["token_embd.weight"]
    assert tensor.shape == (config.vocab_size, 256)
    assert tensor.stored_dtype == kind.name
    values = tensor.read()
    np.testing.assert_array_equal(values, gguf.quants.dequantize(blocks, kind))
    assert np.isfinite(values).all()
    assert values.std() > 0


def test_cast_and_mesh(make_config, make_tensors, write_gguf, assert_same):
    config = make_config()
    path = write_gguf(config, make_tensors(config), Quant.Q8_0)
    single = read(path, dtype=jnp.bfloat16)
    sharded = read(path, dtype=jnp.bfloat16, mesh=make_mesh(data=4, tensor=2))
    assert single.fingerprint == sharded.fingerprint
    assert_same(sharded.params, single.params)
    key = sharded.params["layers_0"]["attention"]["k"]["kernel"]
    assert key.dtype == jnp.bfloat16
    assert key.addressable_shards[0].data.shape == (32, 1, 16)


def llama3_divisors(head_dim, theta, factor, low, high, length):
    """Scaling by frequency as Llama 3.1 states it, as a divisor of each frequency."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1.0 / ((1 - smooth) / factor + smooth))
    return np.asarray(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("head_dim", "said"), [(16, None), (128, None), (64, 4096)])
def test_llama3_scaling_is_recovered(make_config, make_tensors, write_gguf, factor, head_dim, said):
    length = said or 8192
    config = make_config(head_dim=head_dim, rope=RopeConfig(theta=500_000.0), num_hidden_layers=1)
    tensors = make_tensors(config)

    def keys(writer):
        divisors = llama3_divisors(head_dim, 500_000.0, factor, 1.0, 4.0, length)
        writer.add_tensor("rope_freqs.weight", divisors)
        if said:
            writer.add_rope_scaling_orig_ctx_len(said)

    rope = read(write_gguf(config, tensors, keys=keys)).config.rope
    assert rope == RopeConfig(
        rope_type="llama3",
        theta=500_000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=length,
    )


def test_known_llama3_frequencies(make_config, make_tensors, write_gguf):
    """head_dim 16, theta 5e5, factor 8: inverse frequencies that transformers computes."""
    config = make_config(rope=RopeConfig(theta=500_000.0))
    divisors = llama3_divisors(16, 500_000.0, 8.0, 1.0, 4.0, 8192)
    path = write_gguf(
        config,
        make_tensors(config),
        keys=lambda writer: writer.add_tensor("rope_freqs.weight", divisors),
    )
    golden = [
        1.0,
        0.193922758,
        0.037606031,
        0.007292665,
        5.24846e-4,
        3.4281e-5,
        6.6479e-6,
        1.28917e-6,
    ]
    inv_freq, _ = inverse_frequencies(open_checkpoint(path).config)
    np.testing.assert_allclose(inv_freq, golden, rtol=1e-5)


def test_other_frequency_tables_are_refused(make_config, make_tensors, write_gguf):
    config = make_config(rope=RopeConfig(theta=500_000.0), head_dim=128)
    tensors = make_tensors(config)
    for divisors, words in (
        (llama3_divisors(128, 500_000.0, 8.0, 1.0, 4.001, 8192), "no llama3 scaling of factor 8"),
        (np.linspace(1, 30, 64, dtype=np.float32), "no llama3 scaling of factor 30"),
        (np.ones(5, np.float32), r"has shape \[5\], not \[64\]"),
    ):
        path = write_gguf(
            config, tensors, keys=lambda w, d=divisors: w.add_tensor("rope_freqs.weight", d)
        )
        with pytest.raises(ConfigError, match=rf"gguf: rope_freqs\.weight.*{words}|{words}"):
            read(path)


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


ROPES = {
    "linear": (linear, RopeConfig("linear", factor=4.0)),
    "early linear": (
        lambda w: w.add_float32("llama.rope.scale_linear", 4.0),
        RopeConfig("linear", factor=4.0),
    ),
    "yarn": (yarn, RopeConfig("yarn", factor=4.0, original_max_position_embeddings=32)),
    "none": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), RopeConfig()),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(make_config, make_tensors, write_gguf, name):
    config = make_config()
    keys, rope = ROPES[name]
    path = write_gguf(config, make_tensors(config), keys=keys)
    assert open_checkpoint(path).config == dataclasses.replace(config, rope=rope)


def two_factors(writer):
    yarn(writer)
    writer.add_float32("llama.rope.scaling.attn_factor", 1.25)
    writer.add_float32("llama.rope.scaling.yarn_attn_factor", 1.5)


REFUSED_KEYS = {
    "two factors of yarn": (two_factors, r"attn_factor' = 1.25 and .*1.5 differ"),
    "experts": (lambda w: w.add_expert_count(8), "llama.expert_count' = 8"),
    "longrope": (
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        "rope.scaling.type' = 'longrope'",
    ),
    "unknown key": (
        lambda w: w.add_residual_scale(0.5),
        r"not understood: \['llama.residual_scale'",
    ),
}


@pytest.mark.parametrize("name", REFUSED_KEYS)
def test_metadata_not_understood(make_config, make_tensors, write_gguf, name):
    keys, words = REFUSED_KEYS[name]
    path = write_gguf(make_config(), make_tensors(make_config()), keys=keys)
    with pytest.raises(ConfigError, match=words):
        read(path)


def test_part_of_a_split_file(make_config, make_tensors, write_gguf):
    keys = lambda w: w.add_uint16("split.count", 3)  # noqa: E731
    path = write_gguf(make_config(), make_tensors(make_config()), keys=keys)
    with pytest.raises(CheckpointError, match=r"one of 3 parts.*--merge"):
        read(path)
    writer = gguf.GGUFWriter(path, "llama")
    del writer.kv_data[0]["general.architecture"]  # which the later parts do not say
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"one of 3 parts.*--merge"):
        read(path)


def test_other_architecture(make_config, make_tensors, write_gguf):
    path = write_gguf(make_config(), make_tensors(make_config()), arch="qwen3")
    with pytest.raises(CheckpointError, match="architecture 'qwen3'"):
        read(path)


def test_missing_and_unexpected_tensors(make_config, make_tensors, write_gguf):
    tensors = make_tensors(make_config())
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    with pytest.raises(CheckpointError) as error:
        read(write_gguf(make_config(), tensors))
    message = str(error.value)
    assert "3 problems" in message
    assert "tensor 'blk.1.ffn_up.weight' [64, 32] is missing" in message
    assert "tensor 'blk.7.ffn_up.weight' in model-F32.gguf belongs to no parameter" in message
    assert "'output_norm.weight' in model-F32.gguf has shape [31]" in message


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (-1, "is truncated: tensor"),
        (600, "is truncated: its header"),
        (6, "truncated"),
        (0, "not a"),
    ],
)
def test_truncated(make_config, make_tensors, write_gguf, size, words):
    path = write_gguf(make_config(), make_tensors(make_config()))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)


def test_not_a_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        read(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(64))
    with pytest.raises(CheckpointError, match="GGUF version 1"):
        read(path)


def test_header_agrees_with_the_gguf_package(make_config, make_tensors, write_gguf):
    def keys(writer):
        writer.add_token_list(["<s>", "ä", "b" * 300])
        writer.add_token_scores([0.0, -1.5, 2.0])
        writer.add_bool("x.flag", True)
        writer.add_array("x.empty.no", [1])
        writer.add_int64("x.big", -(2**40))

    path = write_gguf(make_config(), make_tensors(make_config()), Quant.Q5_1, keys=keys)
    metadata, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert metadata == fields
    assert {t.name: (t.tensor_type.name, t.n_bytes) for t in reader.tensors} == {
        name: (t.stored_dtype, t.data.size) for name, t in tensors.items()
    }


def test_fuzzed_headers_never_escape(make_config, make_tensors, write_gguf, rng):
    path = write_gguf(
        make_config(num_hidden_layers=1), make_tensors(make_config(num_hidden_layers=1))
    )
    good = path.read_bytes()
    header = len(good) - sum(t.data.size for t in read_header(path)[1].values())
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            match(open_checkpoint(path))
        except AlayaError:
            refused += 1
    assert refused > 150


def test_bundled_model():
    """SmolLM2 through this reader and through the `gguf` package's own."""
    path = bundled.find("smollm2-135m")
    if path is None:
        pytest.skip("the bundled model is not here; get it with `alaya fetch smollm2-135m`")
    source = open_checkpoint("smollm2-135m")
    config = source.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.rms_norm_eps, config.rope.theta, config.tie_word_embeddings) == (1e-5, 1e5, True)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(stored) == 272
    pairs = {"/".join(entry.path): (entry, tensor) for entry, tensor in match(source)}
    assert len(pairs) == 272

    def params(name):
        entry, tensor = pairs[name]
        return entry.to_params(tensor.read(), "gguf")

    def values(name):
        return gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)

    for layer in (0, 29):
        for name, heads in (("q", 9), ("k", 3)):
            rows = values(f"blk.{layer}.attn_{name}.weight")
            rows = rows.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(heads, 64, 576)
            got = params(f"layers_{layer}/attention/{name}/kernel")
            np.testing.assert_array_equal(got, rows.transpose(2, 0, 1))
        down = values(f"blk.{layer}.ffn_down.weight")
        np.testing.assert_array_equal(params(f"layers_{layer}/mlp/down/kernel"), down.T)
    np.testing.assert_array_equal(params("embed/embedding"), values("token_embd.weight"))
    tokenizer = source.read_tokenizer()
    assert tokenizer is not None
    assert (
        tokenizer.decode(tokenizer.encode("The capital of France is")) == "The capital of France is"
    )
