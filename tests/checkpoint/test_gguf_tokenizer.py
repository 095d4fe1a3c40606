"""Ids that begin and end a text as GGUF metadata; tokenizers that GGUF cannot hold."""

from types import SimpleNamespace
from typing import Any

import pytest

from alaya_jax.checkpoint.gguf_tokenizer import same_ids, tokenizer_metadata
from alaya_jax.errors import ConfigError


def source(tokenizer: Any = None, carried: Any = None) -> Any:
    return SimpleNamespace(gguf_tokenizer=carried, read_tokenizer=lambda: tokenizer)


def test_without_a_tokenizer_the_ids_are_the_configs(make_config):
    config = make_config(bos_token_id=5, eos_token_ids=(7, 9))
    assert tokenizer_metadata(source(), config, None) == {
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 9,
    }
    with pytest.raises(ConfigError, match="--gguf-pre llama-bpe names a tokenizer's cut"):
        tokenizer_metadata(source(), config, "llama-bpe")


def test_what_a_gguf_file_said_is_carried_and_its_cut_may_be_corrected(make_config):
    carried = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default"}
    config = make_config(eos_token_ids=(7,))
    found = tokenizer_metadata(source(carried=carried), config, None)
    assert found == carried | {"tokenizer.ggml.eos_token_id": 7}
    found = tokenizer_metadata(source(carried=carried), config, "smollm")
    assert found["tokenizer.ggml.pre"] == "smollm"


def test_more_ends_than_gguf_has_room_for(make_config):
    with pytest.raises(ConfigError, match="room for 3 ids that end a text"):
        tokenizer_metadata(source(), make_config(eos_token_ids=(1, 2, 3, 4)), None)


def test_none_is_the_same_as_none_and_as_nothing_else():
    assert same_ids(None, None, "text")
    tokenizer: Any = SimpleNamespace(encode=lambda text: [len(text)])
    other: Any = SimpleNamespace(encode=lambda text: [len(text), 0])
    assert not same_ids(None, tokenizer, "text")
    assert same_ids(tokenizer, tokenizer, "text")
    assert not same_ids(tokenizer, other, "text")
