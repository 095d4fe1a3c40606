"""Verification says the same of two checkpoints when they are, and names what is not."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alaya_jax.checkpoint import convert, open_checkpoint, read_checkpoint, save, verify
from alaya_jax.checkpoint.params import match
from alaya_jax.checkpoint.verification import stream_logits
from alaya_jax.checkpoint.weights import Weight
from alaya_jax.models import llama

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(make_config, make_tensors, write_hf):
    config = make_config(tie_word_embeddings=False)
    return write_hf(config, make_tensors(config))


def run(a, b, **kwargs):
    return verify(a, b, progress=False, **kwargs)


@pytest.fixture
def altered(source, tmp_path):
    """A copy of `source` with one change."""

    def make(change=lambda tensors: None, **config):
        path = tmp_path / "altered"
        convert(source, path, progress=False)
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)
        if config:
            own = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(own | config))
        return path

    return make


def test_equal_across_formats(source, tmp_path):
    convert(source, tmp_path / "orbax", to="orbax", progress=False)
    found = run(source, tmp_path / "orbax")
    assert found.same
    assert (found.tensors, found.equal, found.differences) == (21, 21, ())
    assert found.config == {}
    assert found.logits.max_difference == 0
    assert found.logits.top1_agreement == 1
    assert found.logits.max_kl == pytest.approx(0, abs=1e-5)
    assert "is the model" in str(found)
    assert "21 of 21 equal" in str(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded(source, tmp_path, dtype):
    convert(source, tmp_path / "half", to="orbax", dtype=dtype, progress=False)
    convert(tmp_path / "half", tmp_path / "wide", dtype="float32", progress=False)
    for path, config in (("half", {"dtype": ("float32", dtype)}), ("wide", {})):
        found = run(source, tmp_path / path, logits=path == "half")
        assert found.same
        assert found.config == config
        assert {d.relation for d in found.differences} == {f"rounded to {dtype}"}
        assert found.equal == 0
        if found.logits:
            assert 0 < found.logits.max_kl < 1
        assert 0 < max(d.max_difference for d in found.differences) < 0.02
    other = {"bfloat16": "float16", "float16": "bfloat16"}[dtype]
    convert(source, tmp_path / "other", dtype=other, progress=False)
    assert not run(tmp_path / "half", tmp_path / "other", logits=False).same


def test_one_number(source, altered):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] += 0.5

    found = run(source, altered(change))
    assert not found.same
    assert found.equal == 20
    (difference,) = found.differences
    assert difference.name == "model.layers.1.mlp.up_proj.weight"
    assert difference.relation == "different"
    assert difference.count == 1
    assert difference.max_difference == pytest.approx(0.5, abs=1e-6)
    assert found.logits.max_difference > 0
    assert "up_proj.weight is different: 1 values" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["same"] is False


def test_sign_of_zero_and_nan(source, altered):
    def change(tensors):
        norm = tensors["model.norm.weight"]
        norm[:] = 0

    path = altered(change)
    a = path.rename(path.with_name("zeros"))
    b = altered(lambda tensors: tensors["model.norm.weight"].fill(-0.0))
    assert [d.count for d in run(a, b, logits=False).differences] == [32]
    save_nan(a)
    save_nan(b)
    assert run(a, b, logits=False).same


def save_nan(path):
    tensors = load_file(path / WEIGHTS)
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, path / WEIGHTS)


def test_rope_permutation_lost(source, altered):
    """The classic: q rows of another order give a model that runs and is wrong."""

    def change(tensors):
        q = tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = (
            q.reshape(4, 8, 2, 32).swapaxes(1, 2).reshape(64, 32).copy()
        )

    found = run(source, altered(change))
    assert [d.name for d in found.differences] == ["model.layers.0.self_attn.q_proj.weight"]
    assert found.logits.max_kl > 1e-3


def test_config_field_by_field(source, altered):
    found = run(source, altered(rms_norm_eps=1e-3, eos_token_id=7))
    assert found.config == {"rms_norm_eps": (1e-5, 1e-3), "eos_token_ids": ((), (7,))}
    assert found.equal == found.tensors
    assert found.logits.max_difference > 0
    assert not found.same


def test_other_shapes_and_other_tensors(source, make_config, make_tensors, tmp_path):
    config = make_config(num_hidden_layers=1, intermediate_size=32, tie_word_embeddings=True)
    other = tmp_path / "other"
    other.mkdir()
    save_file(make_tensors(config), other / WEIGHTS)
    (other / "config.json").write_text(json.dumps(config.to_hf()))
    found = run(source, other, logits=False)
    relations = {d.name.removeprefix("model."): d.relation for d in found.differences}
    assert relations["lm_head.weight"] == "missing"
    assert relations["layers.1.input_layernorm.weight"] == "missing"
    assert relations["layers.0.mlp.up_proj.weight"] == "of another shape"
    assert not found.same
    back = {d.name: d.relation for d in run(other, source, logits=False).differences}
    assert back["lm_head.weight"] == "unexpected"


def test_tokenizers(tiny_model, tmp_path):
    parts = tiny_model.config, tiny_model.params
    save(tmp_path / "with", *parts, tiny_model.tokenizer, to="hf", progress=False)
    save(tmp_path / "without", *parts, progress=False)
    assert run(tmp_path / "with", tmp_path / "with", logits=False).same
    found = run(tmp_path / "with", tmp_path / "without", logits=False)
    assert found.tokenizer == ("only a has one",)
    assert not found.same


@pytest.mark.parametrize("tied", [True, False])
def test_streamed_logits_are_the_models(make_config, make_tensors, write_hf, tied):
    config = make_config(tie_word_embeddings=tied, attention_bias=True, dtype="bfloat16")
    path = write_hf(config, make_tensors(config, ml_dtypes.bfloat16))
    source = open_checkpoint(path)
    weights = {e.hf: Weight(e, t, "hf", t.dtype) for e, t in match(source)}
    tokens = np.arange(20, dtype=np.int32)
    params = read_checkpoint(path, dtype="float32", progress=False).params
    want, _ = jax.jit(
        lambda params: llama.forward(
            params, config, tokens[None], np.arange(20)[None], llama.causal_attend
        )
    )(params)
    got = stream_logits(config, weights, tokens)
    np.testing.assert_allclose(got, want[0], atol=2e-4, rtol=1e-4)
