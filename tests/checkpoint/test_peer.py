"""Our logits beside transformers', in its own environment; and how its absence is told."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from alaya_jax.checkpoint import convert, save, verify_against
from alaya_jax.errors import RequestError
from alaya_jax.models.config import RopeConfig

PEER = Path(__file__).parents[2] / ".cache" / "peer-venv" / "bin" / "python"
needs_peer = pytest.mark.skipif(
    not PEER.exists(), reason="no torch here: `python benchmarks/peer.py --setup-only` makes it"
)
LLAMA3 = RopeConfig("llama3", 500_000.0, factor=8.0, original_max_position_embeddings=64)


@pytest.fixture
def source(make_config, make_tensors, write_hf):
    config = make_config(rope=LLAMA3, attention_bias=True)
    tensors = make_tensors(config)
    for values in tensors.values():
        values /= np.sqrt(values.shape[-1])
    return write_hf(config, tensors)


def run(path, **kwargs):
    return verify_against(path, progress=False, **kwargs)


@needs_peer
@pytest.mark.slow
def test_transformers_computes_the_same(source, tmp_path):
    convert(source, tmp_path / "half", dtype="bfloat16", progress=False)
    found = run(tmp_path / "half", python=str(PEER))
    assert found.same, str(found)
    assert found.logits.max_difference < 1e-4
    assert found.logits.top1_agreement == 1
    assert found.peer.startswith("transformers ")
    assert "computes the same as transformers" in str(found)


def test_another_answer_is_noticed(source, tmp_path):
    """A peer that finds all tokens equally likely."""
    script = tmp_path / "peer"
    script.write_text(f"""#!{sys.executable}
import json, sys, numpy as np
count = len(json.load(open(sys.argv[3]))["tokens"])
np.save(sys.argv[4], np.zeros((count, 48), np.float32))
print(json.dumps({{"versions": {{"transformers": "0"}}, "ids": None}}))
""")
    script.chmod(0o755)
    found = run(source, python=str(script))
    assert not found.same
    assert found.to_dict()["same"] is False
    assert "does NOT compute the same as transformers 0" in str(found)


@needs_peer
@pytest.mark.slow
def test_tokenizer_of_transformers(tiny_model, tmp_path):
    path = tmp_path / "tiny"
    config, params, tokenizer = tiny_model.config, tiny_model.params, tiny_model.tokenizer
    save(path, config, params, tokenizer, to="hf", progress=False)
    found = run(path, python=str(PEER))
    assert found.tokenizer == ()
    assert found.same, str(found)


def test_refused(source, tmp_path):
    convert(source, tmp_path / "orbax", to="orbax", progress=False)
    with pytest.raises(RequestError, match="of format orbax; write one with `alaya convert"):
        run(tmp_path / "orbax")
    with pytest.raises(RequestError, match=r"nowhere.* cannot be run"):
        run(source, python=str(tmp_path / "nowhere"))
    script = tmp_path / "bare"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    os.chmod(script, 0o755)
    with pytest.raises(RequestError, match="--peer-python"):
        run(source, python=str(script))
    with pytest.raises(RequestError, match="there is 'transformers'"):
        run(source, peer="llama.cpp")
