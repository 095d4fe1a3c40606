"""What makes a tokenizer out of a directory's files, and what is said of files that do not."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from alaya_jax.errors import TokenizerError
from alaya_jax.models import bpe
from alaya_jax.models.tokenizer_files import read_directory, read_gguf, require_known


@pytest.fixture
def backend():
    """A byte-level BPE without merges."""
    made = Backend(models.BPE(vocab=dict(bpe.byte_alphabet()), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture
def write(tmp_path, backend):
    def written(**files):
        (tmp_path / "tokenizer.json").write_text(backend.to_str())
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return written


def token(text):
    return {"content": text, "special": True, "normalized": False}


def test_ends_are_those_of_all_files_and_tokens_that_only_the_config_declares_are_added(write):
    parts = read_directory(
        write(
            tokenizer_config={
                "eos_token": token("<end>"),
                "added_tokens_decoder": {"256": token("<end>")},
                "chat_template": "{{ messages[0]['content'] }}",
            },
            special_tokens_map={"bos_token": "a"},
            generation_config={"eos_token_id": [256, 3]},
            config={"eos_token_id": 4, "vocab_size": 300},
        )
    )
    assert parts["named_tokens"] == {"bos_token": "a", "eos_token": "<end>"}
    assert parts["eos_ids"] == [256, 3, 4]
    assert parts["backend"].token_to_id("<end>") == 256
    assert parts["padded_to"] == 300
    assert list(parts["chat"].sources) == ["default"]


def test_bos_is_added_where_the_config_says_so(write):
    parts = read_directory(write(tokenizer_config={"bos_token": "a", "add_bos_token": True}))
    assert parts["backend"].encode("b").tokens == ["a", "b"]


def test_templates_beside_the_config_come_first(write):
    path = write(tokenizer_config={"chat_template": [{"name": "default", "template": "old"}]})
    (path / "chat_template.jinja").write_text("new")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert read_directory(path)["chat"].sources == {"default": "new", "tool_use": "tools"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config": {"eos_token_id": "two"}}, r"config\.json: eos_token_id must be ids"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json holds a list"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"300": token("<end>")}}},
            "gives '<end>' the id 300, but in .* it is 256",
        ),
        ({"tokenizer_config": {"bos_token": "<none>", "add_bos_token": True}}, "'<none>' is not"),
    ],
)
def test_files_that_do_not_belong_together_are_named(write, files, said):
    with pytest.raises(TokenizerError, match=said):
        read_directory(write(**files))


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        read_directory(tmp_path)
    with pytest.raises(TokenizerError, match="is not a directory"):
        read_directory(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged"):
        read_directory(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGU")
    with pytest.raises(TokenizerError, match="is not a readable GGUF file"):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.model": None}, r"no tokenizer\.ggml\.model"),
        ({"tokenizer.ggml.model": "bert"}, "is of kind 'bert'"),
        ({"tokenizer.ggml.pre": None}, r"no tokenizer\.ggml\.pre"),
        ({"tokenizer.ggml.eos_token_id": 256}, "eos_token has id 256, outside its 256 tokens"),
    ],
)
def test_metadata_that_is_no_tokenizer(changes, said):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(bpe.byte_alphabet()),
        "tokenizer.ggml.merges": [],
    }
    with pytest.raises(TokenizerError, match=said):
        read_gguf({key: x for key, x in (metadata | changes).items() if x is not None})


def test_the_id_of_a_token(backend):
    assert require_known(backend, "a") == bpe.byte_alphabet()["a"]
    with pytest.raises(TokenizerError, match="'<none>' is not in the tokenizer's vocabulary"):
        require_known(backend, "<none>")
