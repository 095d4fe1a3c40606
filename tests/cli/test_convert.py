"""`alaya convert` and `alaya verify`: reports, exit codes, and one model in every format."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

META = Path(__file__).parents[1] / "checkpoint" / "golden" / "meta"


def generated(alaya, model):
    fixed = ("generate", "--model", model, "--max-new-tokens", 6, "--json")
    return json.loads(alaya(*fixed, "We the People").stdout)


def test_the_same_text_from_each_format(alaya, tiny_model, tmp_path):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    first = alaya("convert", tiny_model, orbax, "--to", "orbax", "--verify").stdout
    assert "21 tensors" in first
    assert f"{orbax} is the model {tiny_model}" in first
    done = json.loads(alaya("convert", orbax, back, "--shard-size", "20kB", "--json").stdout)
    assert done["to"] == "hf"
    assert done["nonfinite"] == {}
    assert json.loads(alaya("verify", tiny_model, back, "--json").stdout)["same"] is True
    gguf = tmp_path / "tiny.gguf"
    alaya("convert", orbax, gguf, "--to", "gguf-f32", "--verify")
    want = generated(alaya, tiny_model)
    assert len(want["text"]) > 5
    for path in (orbax, back, gguf):
        got = generated(alaya, path)
        assert (got["text"], got["ids"]) == (want["text"], want["ids"])
    for path in (orbax, back):
        shown = json.loads(alaya("inspect", path, "--json").stdout)
        assert shown["fingerprint"] == done["fingerprint"]


@pytest.mark.slow
def test_the_same_text_from_metas_files(alaya, tmp_path):
    """Weights that torch wrote in two parts; a tokenizer of the 48 ids they have."""
    meta = tmp_path / "meta"
    shutil.copytree(META, meta)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"
    vocab = {piece: i for i, piece in enumerate([*letters[:46], "Ġ", "th"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    (meta / "tokenizer.json").write_text(backend.to_str())
    source, found = meta, {}
    for to in ("hf", "orbax", "gguf-bf16"):
        alaya("convert", source, tmp_path / f"{to}.gguf", "--to", to, "--verify")
        source = tmp_path / f"{to}.gguf"
        found[to] = generated(alaya, source)
    want = generated(alaya, meta)
    assert len(want["ids"]) == 6
    for got in found.values():
        assert (got["text"], got["ids"]) == (want["text"], want["ids"])


@pytest.mark.parametrize("verb", ["convert", "verify"])
def test_help_teaches(alaya, verb):
    shown, listed = alaya(verb, "--help").stdout.split("\nOptions:")
    examples = [line for line in shown.splitlines() if line.strip().startswith(f"alaya {verb} ")]
    assert len(examples) == 3
    for option in re.findall(r"--[a-z-]+", " ".join(examples)):
        assert option in listed


def test_not_the_same(alaya, tiny_model, tmp_path):
    path = tmp_path / "half"
    alaya("convert", tiny_model, path, "--dtype", "float16")
    shown = alaya("verify", tiny_model, path).stdout
    assert "rounded to float16" in shown
    assert "KL mean" in shown
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, path / "model.safetensors")
    shown = alaya("verify", tiny_model, path, "--no-logits", code=1).stdout
    assert "is NOT the model" in shown
    assert "model.norm.weight is different" in shown
    result = alaya("convert", path, tmp_path / "again")
    assert "model.norm.weight has 1 values" in result.stderr


def test_what_cannot_be_done(alaya, tiny_model, tmp_path):
    assert "is there already" in alaya("convert", tiny_model, tiny_model, code=1).stderr
    assert (
        "is no size"
        in alaya("convert", tiny_model, tmp_path / "x", "--shard-size", "big", code=1).stderr
    )
    assert "'gif'" in alaya("convert", tiny_model, tmp_path / "x", "--to", "gif", code=2).stderr
    assert "no checkpoint" in alaya("verify", tiny_model, tmp_path / "x", code=1).stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_interrupted(alaya, tiny_model, tmp_path, monkeypatch, to):
    from alaya_jax.checkpoint import weights

    layout, left = weights.Weight.layout, [12]

    def interrupted(self, fmt):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return layout(self, fmt)

    monkeypatch.setattr(weights.Weight, "layout", interrupted)
    out = tmp_path / "out"
    said = alaya("convert", tiny_model, out, "--to", to, code=130).stderr
    assert "continue with --resume" in said
    monkeypatch.undo()
    alaya("convert", tiny_model, out, "--to", to, "--resume", "--verify")


def test_quantized(alaya, tiny_model):
    found = json.loads(alaya("verify", tiny_model, "--quantize", "int8", "--json").stdout)
    assert found["quantize"] == "int8"
    assert found["same"]
    assert 0 < found["logits"]["mean_kl"] < 0.01
    assert "--quantize or --against" in alaya("verify", tiny_model, code=2).stderr
    both = ("verify", tiny_model, tiny_model, "--against", "transformers")
    assert "compares A alone" in alaya(*both, code=2).stderr
    python = ("verify", tiny_model, tiny_model, "--peer-python", "python")
    assert "is for --against" in alaya(*python, code=2).stderr
    options = ("generate", "--model", tiny_model, "Who?", "--max-new-tokens", "3", "--json")
    written = json.loads(alaya(*options, "--quantize", "int4").stdout)
    assert written["finish_reason"] == "length"


def test_paths_may_be_relative_for_every_verb(alaya, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copytree(tiny_model, tmp_path / "tiny")
    for to in ("orbax", "hf", "gguf-f32"):
        monkeypatch.chdir(tmp_path / "a")
        alaya("convert", "../tiny", to, "--to", to, "--verify")
        monkeypatch.chdir(tmp_path / "b")
        path = f"../a/{to}"
        assert json.loads(alaya("inspect", path, "--json").stdout)["path"].startswith(str(tmp_path))
        assert alaya("verify", "../tiny", path).exit_code == 0
        assert len(generated(alaya, path)["ids"]) == 6
        alaya("convert", path, f"back-{to}")
        assert (tmp_path / "b" / f"back-{to}" / "model.safetensors").exists()
