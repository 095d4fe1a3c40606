"""A tokenizer as GGUF metadata: carried from a GGUF file as it is, or made from tokenizer.json."""

import json
from typing import Any

import numpy as np

from alaya_jax.checkpoint.source import Source
from alaya_jax.errors import ConfigError
from alaya_jax.models import bpe
from alaya_jax.models.bpe import TokenType
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_ENDS = ("eos", "eot", "eom")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_metadata(source: Source, config: LlamaConfig, pre: str | None) -> dict[str, Any]:
    """The metadata of a source's tokenizer, and the ids that begin and end a text.

    Args:
      source: an opened checkpoint.
      config: its architecture; ids of the embedding that have no token are filled up.
      pre: `tokenizer.ggml.pre`, the name of how text is cut before merging; None finds it by
        comparing the tokenizer with those that are known.

    Raises:
      ConfigError: the tokenizer is not byte-level, or is cut in a way that is not known.
    """
    ends = list(config.eos_token_ids)
    if source.gguf_tokenizer is not None:
        carried = source.gguf_tokenizer | ({_PREFIX + "pre": pre} if pre else {})
        return _ids(config.bos_token_id, ends) | carried
    tokenizer = source.read_tokenizer()
    if tokenizer is None:
        if pre is not None:
            raise ConfigError(f"--gguf-pre {pre} names a tokenizer's cut, and there is none")
        return _ids(config.bos_token_id, ends)
    metadata = _from_tokenizer(tokenizer, config.vocab_size, pre)
    if "eos_token" in tokenizer.named_tokens:
        ends.insert(0, tokenizer.eos_ids[0])
    if metadata[_PREFIX + "pre"] not in bpe.LLAMA3_PRES:  # whose ends readers know by their texts
        ends += tokenizer.eos_ids
    return _ids(config.bos_token_id, list(dict.fromkeys(ends))) | metadata


def _ids(bos: int | None, ends: list[int]) -> dict[str, Any]:
    if len(ends) > len(_ENDS):
        raise ConfigError(
            f"GGUF has room for {len(_ENDS)} ids that end a text, and the model has {ends}; write "
            "--to hf"
        )
    ids = zip(_ENDS, ends, strict=False)
    own = {} if bos is None else {f"{_PREFIX}bos_token_id": bos}
    return own | {f"{_PREFIX}{name}_token_id": index for name, index in ids}


def _from_tokenizer(tokenizer: Tokenizer, vocab_size: int, pre: str | None) -> dict[str, Any]:
    state = json.loads(tokenizer.to_json())
    model = state["model"]
    decoder = (state.get("decoder") or {}).get("type")
    if model["type"] != "BPE" or decoder != "ByteLevel":
        raise ConfigError(
            "the tokenizer is no byte-level BPE, and a sentencepiece one needs scores that "
            "tokenizer.json does not hold; convert from a GGUF file, which is carried as it is, or "
            "write --to hf"
        )
    ids = dict(model["vocab"])
    types = dict.fromkeys(ids.values(), TokenType.NORMAL)
    for token in state["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    texts = {index: text for text, index in ids.items()}
    if max(texts, default=-1) >= vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {max(texts)}, the embedding {vocab_size} rows; they are "
            "not of the same model"
        )
    if not model["merges"]:
        raise ConfigError("the tokenizer has no merges, and a GGUF file must; write --to hf")
    whole = range(vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre or _find_pre(state),
        "tokens": [texts.get(i, f"[PAD{i}]") for i in whole],
        "token_type": [int(types.get(i, TokenType.UNUSED)) for i in whole],
        "merges": merges,
    }
    for role, name in _ROLES.items():
        if (text := tokenizer.named_tokens.get(role)) is not None:
            values[f"{name}_token_id"] = ids[text]
    around = tokenizer.encode("").tolist()
    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        if around == [bos] * add_bos + [eos] * add_eos:
            values |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
            break
    else:
        raise ConfigError(
            f"the tokenizer puts the ids {around} around a text, and GGUF can only say BOS and "
            "EOS; write --to hf"
        )
    metadata = {_PREFIX + name: value for name, value in values.items()}
    for name, template in (tokenizer.chat.sources if tokenizer.chat else {}).items():
        metadata["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return metadata


def _find_pre(state: dict[str, Any]) -> str:
    found = bpe.known_pre(
        state.get("pre_tokenizer"),
        state.get("normalizer"),
        ignore_merges=bool(state["model"].get("ignore_merges")),
    )
    if found is None:
        raise ConfigError(
            "how the tokenizer cuts text before merging has no name that is known here, and "
            "llama.cpp goes by that name (tokenizer.ggml.pre). If you know it, give it: --gguf-pre "
            f"NAME (known: {', '.join(bpe.PRES)}); a wrong one gives other ids"
        )
    return found


def same_ids(a: Tokenizer | None, b: Tokenizer | None, text: str) -> bool:
    """Whether two tokenizers give the same ids for a text; also true of none and none."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a.encode(text), b.encode(text))
