"""A RoPE stretched on load: equal to a config.json edited by hand, and a model of its own."""

import json
import shutil

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.models import llama, rope

SCALINGS = {
    "linear": (aj.Rope("linear", 2.0), {"rope_type": "linear", "factor": 2.0}),
    "dynamic": (aj.Rope("dynamic", 2.0), {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": (aj.Rope("yarn", 4), {"rope_type": "yarn", "factor": 4.0}),
    "yarn by hand": (
        aj.Rope("yarn", 4.0, 4096, beta_fast=24.0, beta_slow=2.0, attention_factor=1.1),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 1.1,
        },
    ),
    "llama3": (
        aj.Rope("llama3", 8.0, 1024),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    ),
}


def logits(model, length=300):
    tokens = np.arange(length)[None] * 7 % 250
    positions = np.arange(length)[None] * 5
    return llama.forward(
        model.params,
        model.config,
        tokens,
        positions,
        llama.causal_attend,
        rope_length=model.rope_length,
    )[0]


@pytest.mark.parametrize("name", SCALINGS)
def test_equals_a_config_edited_by_hand(name, llama3, tmp_path):
    stretched, scaling = SCALINGS[name]
    path = llama3()
    edited = tmp_path / "edited"
    shutil.copytree(path, edited)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10_000.0} | scaling
    (edited / "config.json").write_text(json.dumps(config))

    plain = aj.load(path, progress=False)
    by_hand = aj.load(edited, progress=False)
    on_load = aj.load(path, rope=stretched, progress=False)
    np.testing.assert_array_equal(logits(on_load), logits(by_hand))
    assert np.abs(logits(on_load) - logits(plain)).max() > 1e-3
    assert on_load.fingerprint != plain.fingerprint
    assert aj.load(path, rope=stretched, progress=False).fingerprint == on_load.fingerprint
    factor, original = stretched.factor, stretched.original_length or 8192
    assert on_load.length_limit == round(factor * original)
    ours, attention = rope.inverse_frequencies(on_load.config)
    theirs, same = rope.inverse_frequencies(by_hand.config)
    np.testing.assert_array_equal(ours, theirs)
    assert attention == same


def test_each_has_contexts_of_its_own(llama3, tmp_path):
    path, text = llama3(), "When in the Course of human events, it becomes necessary " * 8
    ropes = [None, aj.Rope("yarn", 2.0), aj.Rope("yarn", 4.0), aj.Rope("linear", 2.0)]
    ropes += [aj.Rope("yarn", 2.0, 4096), aj.Rope("dynamic", 2.0), aj.Rope("dynamic", 2.0, 4096)]
    models = [aj.load(path, rope=rope, progress=False) for rope in ropes]
    assert len({model.fingerprint for model in models}) == len(ropes)
    budget = aj.Budget(device="4MiB")
    for model in models[:3]:
        with aj.DB(tmp_path / "db", model, budget) as db:
            _, rest = db.create_session(text)
            assert len(rest) == len(model.encode(text))  # nothing of the models before it
            db.import_context(text)
    with aj.DB(tmp_path / "db", models[1], budget) as db:
        _, rest = db.create_session(text)
        assert len(rest) == 1


def test_the_same_rope_is_the_same_model(llama3, tmp_path):
    path = tmp_path / "yarn"
    shutil.copytree(llama3(), path)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}
    (path / "config.json").write_text(json.dumps(config))
    stored = aj.load(path, progress=False)
    again = aj.load(path, rope=aj.Rope("yarn", 4.0), progress=False)
    assert again.fingerprint == stored.fingerprint
    assert again.length_limit == stored.length_limit == 4 * 8192
    assert "declares 32,768" not in str(again)
    assert aj.load(path, max_length=32_768, progress=False).length_limit == 32_768
    with pytest.raises(RequestError, match=r"max_length=32769; .* has RoPE for 32,768"):
        aj.load(path, max_length=32_769, progress=False)


def test_a_linear_model_is_served_longer_when_asked(llama3, tmp_path):
    path = tmp_path / "vicuna"
    shutil.copytree(llama3(), path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (path / "config.json").write_text(json.dumps(config))
    model = aj.load(path, progress=False)
    assert model.length_limit == 8192
    with (
        aj.DB(tmp_path / "db", model, aj.Budget(device="16MiB")) as db,
        pytest.raises(RequestError, match="load it with max_length=32768, which its RoPE allows"),
    ):
        db.create_session([5] * 9000)
    assert aj.load(path, max_length=32_768, progress=False).length_limit == 32_768
    with pytest.raises(RequestError, match="give original_length="):
        aj.load(path, rope=aj.Rope("yarn", 8.0), progress=False)
    longer = aj.load(path, rope=aj.Rope("yarn", 8.0, 8192), progress=False)
    assert longer.length_limit == 65_536
    assert longer.config.rope.factor == 8.0


@pytest.mark.parametrize(
    ("words", "arguments", "fields"),
    [
        (r"Rope\('ntk'\): use one of 'linear', 'dynamic'", ("ntk", 2.0), {}),
        (r"Rope\(factor=0.5\): must be a number, at least 1", ("yarn", 0.5), {}),
        (r"Rope\(factor='4'\)", ("yarn", "4"), {}),
        (r"Rope\(factor=nan\)", ("yarn", float("nan")), {}),
        (r"Rope\(factor=True\)", ("yarn", True), {}),
        (r"Rope\(original_length=0\)", ("yarn", 2.0, 0), {}),
        (r"Rope\('linear', beta_fast=...\): this kind has no", ("linear", 2.0), {"beta_fast": 8.0}),
        (r"'beta_slow' must be positive", ("yarn", 2.0), {"beta_slow": -1.0}),
        (r"'theta' must be positive", ("linear", 2.0), {"theta": 0.0}),
        (r"'high_freq_factor' = 1.0", ("llama3", 2.0), {"high_freq_factor": 1.0}),
    ],
)
def test_refused_by_name(words, arguments, fields):
    with pytest.raises(RequestError, match=words):
        aj.Rope(*arguments, **fields)


def test_load_takes_a_rope_only(llama3):
    with pytest.raises(RequestError, match=r"rope='yarn:4': give aj.Rope\(kind, factor\)"):
        aj.load(llama3(), rope="yarn:4", progress=False)
