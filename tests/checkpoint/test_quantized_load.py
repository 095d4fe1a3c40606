"""A model loaded in 8 or 4 bits: from any format, on any mesh, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import alaya_jax as aj
from alaya_jax.checkpoint import convert, open_checkpoint, read_checkpoint, verify
from alaya_jax.checkpoint.params import match
from alaya_jax.checkpoint.verification import stream_logits
from alaya_jax.checkpoint.weights import Weight
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models import llama
from alaya_jax.models.quantized import QuantizedMatrix, quantize, tiled

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16, "hidden_size": 64}
TOKENS = np.arange(24)[None] % 48


def read(path, **kwargs):
    return read_checkpoint(path, progress=False, **kwargs)


@functools.partial(jax.jit, static_argnames="config")
def run(params, tokens, config):
    positions = np.arange(tokens.shape[1])[None]
    return llama.forward(params, config, tokens, positions, llama.causal_attend)[0]


def forward(model, params, tokens=TOKENS):
    return np.asarray(run(params, tokens, model.config))


def is_quantized(x):
    return isinstance(x, QuantizedMatrix)


def dense_values(params):
    dense = jax.jit(QuantizedMatrix.dense)
    return jax.tree.map(lambda x: dense(x) if is_quantized(x) else x, params, is_leaf=is_quantized)


def kernels(params):
    return [x for x in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(x)]


@pytest.fixture
def hf(make_config, make_tensors, write_hf):
    def make(dtype=np.float32, **changes):
        config = make_config(dtype=np.dtype(dtype).name, **SIZES | changes)
        tensors = make_tensors(config)
        for values in tensors.values():
            if values.ndim > 1:
                values /= np.sqrt(values.shape[1])  # logits of about 1, so that 1e-5 is rounding
        return write_hf(config, {name: x.astype(dtype) for name, x in tensors.items()})

    return make


@pytest.mark.parametrize(("scheme", "tied"), [("int8", False), ("int4", True)])
def test_same_logits_as_its_dense_values(hf, scheme, tied):
    source = hf(tie_word_embeddings=tied, attention_bias=True)
    found, plain = read(source, quantize=scheme), read(source)
    assert len(kernels(found.params)) == 15 + (not tied)
    got = forward(found, found.params)
    np.testing.assert_allclose(got, forward(found, dense_values(found.params)), atol=2e-5)
    far = np.abs(got - forward(plain, plain.params)).max()
    assert 1e-4 < far < (0.05 if scheme == "int8" else 1.0)
    for name, part in found.params.items():
        bits = sum(x.nbytes for x in jax.tree.leaves(kernels(part))) * 8
        weights = sum(x.size for x in kernels(part))
        if name.startswith("layers_"):
            o = found.params[name]["attention"]["o"]["kernel"]
            assert o.group == 16  # all of a head
            more = (1.0 if scheme == "int4" else 0.5) * o.size / weights
            assert bits / weights == (5 if scheme == "int4" else 8.5) + more
        elif weights:  # embedding and head
            assert bits / weights == 8.5


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_on_a_mesh(hf, scheme):
    source = hf(intermediate_size=256, vocab_size=256)
    alone = read(source, quantize=scheme)
    mesh = aj.make_mesh(data=2, tensor=4)
    spread = read(source, quantize=scheme, mesh=mesh)
    for one, two in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    q, o, down, embedding = (
        spread.params["layers_0"]["attention"]["q"]["kernel"],
        spread.params["layers_0"]["attention"]["o"]["kernel"],
        spread.params["layers_0"]["mlp"]["down"]["kernel"],
        spread.params["embed"]["embedding"],
    )

    def parts(kernel):
        return [x.addressable_shards[0].data.shape for x in jax.tree.leaves(kernel)]

    size, both = (32, 1) if scheme == "int8" else (16, 2)
    assert parts(q) == [(2, 2, 1, size, 16), *[(2, 2, 16)] * both]
    assert parts(o) == [(2, 1, 1, size // 2, 64), *[(2, 1, 64)] * both]
    assert parts(down) == [(2, 1, size, 64), *[(2, 64)] * both]
    assert parts(embedding) == [(2, 1, 32, 64), (2, 64)]
    np.testing.assert_allclose(
        forward(spread, spread.params), forward(alone, alone.params), atol=2e-5
    )
    with pytest.raises(ConfigError, match="'vocab' of size 256"):
        read(source, quantize=scheme, mesh=aj.make_mesh(tensor=5))


def test_from_any_format(make_config, make_tensors, write_gguf, tmp_path):
    config = make_config()
    source = write_gguf(config, make_tensors(config))
    convert(source, tmp_path / "hf", progress=False)
    convert(source, tmp_path / "orbax", to="orbax", progress=False)
    want = jax.tree.leaves(read(source, quantize="int4").params)
    for path in ("hf", "orbax"):
        got = jax.tree.leaves(read(tmp_path / path, quantize="int4").params)
        for one, two in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_the_matrix_that_was_stored_is_quantized(hf):
    """A bfloat16 model computes in bfloat16 with the quantized values of what is stored."""
    source = hf(ml_dtypes.bfloat16)
    tensors = load_file(source / "model.safetensors")
    found = read(source, quantize="int4")
    down = found.params["layers_1"]["mlp"]["down"]["kernel"]
    stored = tensors["model.layers.1.mlp.down_proj.weight"]
    values, scale, offset = quantize(stored.T.astype(np.float32), "int4", 0)
    np.testing.assert_array_equal(down.values, tiled(values, len(scale), 0))
    np.testing.assert_array_equal(np.asarray(down.scale), scale)
    np.testing.assert_array_equal(np.asarray(down.offset), offset)
    assert down.dtype == found.params["embed"]["embedding"].dtype == jnp.bfloat16
    assert found.params["norm"]["scale"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_another_model_with_contexts_of_its_own(tiny_model, tmp_path):
    from alaya_jax.checkpoint import save

    path = tmp_path / "tiny"
    save(path, tiny_model.config, tiny_model.params, tiny_model.tokenizer, progress=False)
    dense, four, eight = (
        aj.load(path, quantize=scheme, progress=False) for scheme in (None, "int4", "int8")
    )
    assert len({dense.fingerprint, four.fingerprint, eight.fingerprint}) == 3
    assert "weights in int4" in repr(four)
    assert "0.1M parameters, float32, weights in int8" in repr(eight)
    assert "weights" not in repr(dense)
    text, budget = "In the beginning was the word", aj.Budget(device=1 << 20)
    with aj.DB(tmp_path / "db", dense, budget) as db:
        db.import_context(text)
    with aj.DB(tmp_path / "db", four, budget) as db:
        session, rest = db.create_session(text + ", and")
        assert session.reused[0] == 0
        tokens = [token.id for token in aj.generate(session, rest, max_new_tokens=4)]
    ids = [*four.encode(text + ", and").tolist(), *tokens]
    logits = forward(four, dense_values(four.params), np.array([ids]))[0]
    assert logits[-5:-1].argmax(1).tolist() == tokens


@pytest.mark.slow
def test_verify_says_what_it_costs(hf):
    source = hf()
    exact = verify(source, source, progress=False)
    found = {s: verify(source, source, quantize=s, progress=False) for s in ("int8", "int4")}
    assert exact.logits.max_kl < 1e-5 < found["int8"].logits.mean_kl < found["int4"].logits.mean_kl
    assert found["int4"].same
    assert "(b quantized to int4)" in str(found["int4"])
    model = read(source, quantize="int4")
    opened = open_checkpoint(source)
    weights = {e.hf: Weight(e, t, "hf", t.dtype) for e, t in match(opened)}
    got = stream_logits(model.config, weights, TOKENS[0], quantize="int4")
    np.testing.assert_allclose(got, forward(model, model.params)[0], atol=3e-5)


def test_refused(hf, tmp_path):
    source = hf()
    with pytest.raises(ConfigError, match="'q3'"):
        read(source, quantize="q3")
    with pytest.raises(aj.AlayaError, match="logits"):
        verify(source, source, quantize="int8", logits=False, progress=False)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*1 of its values"):
        read(source, quantize="int8")


def test_a_length_that_does_not_divide(hf):
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj.*divides 34.*int8"):
        read(hf(hidden_size=34), quantize="int4")


def test_groups_that_a_mesh_cannot_split(hf):
    """Two groups along the FFN dim, four devices."""
    with pytest.raises(ConfigError, match="tensor"):
        read(hf(), quantize="int8", mesh=aj.make_mesh(tensor=4))


@pytest.mark.parametrize("call", [read, lambda path, **kw: verify(path, path, **kw)])
def test_stored_wants_a_quantized_file(hf, call):
    source = hf()
    options = {} if call is read else {"progress": False}
    with pytest.raises(ConfigError, match=r"quantize='stored'.*holds none.*'int8' or 'int4'") as it:
        call(source, quantize="stored", **options)
    assert str(source) in str(it.value)


def test_an_unquantized_gguf_has_nothing_stored(make_config, make_tensors, write_gguf):
    config = make_config()
    with pytest.raises(ConfigError, match=r"model-F32\.gguf holds none"):
        read(write_gguf(config, make_tensors(config)), quantize="stored")


def greedy(model, path, prompt):
    with aj.DB(path, model, aj.Budget(device=1 << 30)) as db:
        session, rest = db.create_session(prompt)
        found = [
            (token.sequence, token.id) for token in aj.generate(session, rest, max_new_tokens=16)
        ]
    return sorted(found, key=lambda each: each[0])


@pytest.mark.slow
def test_a_bundled_file_as_stored(tmp_path):
    """4-bit blocks with offsets, and the same answers as of their dense values."""
    dense = aj.load("smollm2-135m", progress=False)
    stored = aj.load("smollm2-135m", quantize="stored", progress=False)
    eight = aj.load("smollm2-135m", quantize="int8", progress=False)
    prints = {dense.fingerprint, stored.fingerprint, eight.fingerprint}
    assert len(prints) == 3
    assert "weights in" in repr(stored)
    assert "weights in" not in repr(dense)
    text = "The library of Alexandria was built in the third century, and it held"
    tokens = np.asarray(dense.encode(text))[None]
    assert tokens.size > 8
    want = forward(dense, dense.params, tokens)
    np.testing.assert_allclose(forward(stored, stored.params, tokens), want, rtol=0, atol=1e-3)
    # A few rows are multiplied in integers, after 30 layers of 16 bits.
    few = forward(stored, stored.params, tokens[:, :5])
    np.testing.assert_allclose(few, want[:, :5], rtol=0, atol=3e-2)
    for prompt in (text, [text, "Once upon a time", "Water boils at"]):
        name = type(prompt).__name__
        got = greedy(stored, tmp_path / f"stored-{name}", prompt)
        assert len(got) == 16 * (1 if name == "str" else 3)
        assert got == greedy(dense, tmp_path / f"dense-{name}", prompt)
    found = verify("smollm2-135m", "smollm2-135m", quantize="stored", progress=False)
    assert found.logits.mean_kl < 1e-5
    assert "(b quantized to stored)" in str(found)
