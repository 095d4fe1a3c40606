"""Reads what makes a tokenizer out of a checkpoint directory or a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from alaya_jax.errors import TokenizerError
from alaya_jax.models import bpe
from alaya_jax.models.chat import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


class Parts(TypedDict):
    """The arguments of `Tokenizer`."""

    backend: Backend
    named_tokens: dict[str, str]
    eos_ids: list[int]
    chat: ChatTemplate | None
    padded_to: int


def read_directory(directory: Path) -> Parts:
    """Reads a Hugging Face or Meta checkpoint directory; see `Tokenizer.from_directory`."""
    if not directory.is_dir():
        raise TokenizerError(
            f"{directory} is not a directory; give the checkpoint's directory, "
            "which holds tokenizer.json or tokenizer.model"
        )
    config = _read_object(directory / "tokenizer_config.json")
    older = _read_object(directory / "special_tokens_map.json")
    named = {role: _text(config.get(role, older.get(role))) for role in _ROLES}
    eos_ids: list[int] = []
    if (file := directory / "tokenizer.json").is_file():
        backend = _read_backend(file)
    elif (file := directory / "tokenizer.model").is_file():
        backend = _read_llama3(file)
        named["bos_token"] = named["bos_token"] or "<|begin_of_text|>"
        named["eos_token"] = named["eos_token"] or "<|end_of_text|>"
        eos_ids += [require_known(backend, text) for text in bpe.LLAMA3_STOP_TOKENS]
        _begin_and_end_with(backend, named["bos_token"], None)
    else:
        raise TokenizerError(
            f"no tokenizer in {directory}: looked for tokenizer.json (Hugging Face) and "
            "tokenizer.model (Llama 3, tiktoken); copy it there from the model's original files"
        )
    named = {role: text for role, text in named.items() if text is not None}
    _add_missing(backend, config.get("added_tokens_decoder") or {}, file)
    if not backend.encode("").ids:  # tokenizer.json adds nothing of its own
        _begin_and_end_with(
            backend,
            named.get("bos_token") if config.get("add_bos_token") else None,
            named.get("eos_token") if config.get("add_eos_token") else None,
        )
    for name in ("generation_config.json", "config.json"):
        ids = _read_object(directory / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(index) is int for index in ids):
            raise TokenizerError(f"{directory / name}: eos_token_id must be ids, got {ids!r}")
        eos_ids += ids
    sources = _chat_sources(directory, config)
    chat = ChatTemplate(sources, named) if sources else None
    vocab_size = _read_object(directory / "config.json").get("vocab_size")
    return Parts(
        backend=backend,
        named_tokens=named,
        eos_ids=eos_ids,
        chat=chat,
        padded_to=vocab_size if isinstance(vocab_size, int) else 0,
    )


def read_gguf(source: Mapping[str, Any] | str | Path) -> Parts:
    """Reads a GGUF file's metadata; see `Tokenizer.from_gguf`."""
    if isinstance(source, str | Path):
        from gguf import GGUFReader

        try:
            fields = GGUFReader(source).fields
            source = {key: field.contents() for key, field in fields.items()}
        except (OSError, ValueError, LookupError) as error:
            raise TokenizerError(f"{source} is not a readable GGUF file: {error}") from error
    metadata = _Metadata(source)
    kind = metadata.require("model")
    tokens = metadata.require("tokens")
    types = metadata.get("token_type")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
    roles["pad_token"] = "padding"
    ids = {role: metadata.get(f"{name}_token_id") for role, name in roles.items()}
    for role, index in ids.items():
        if index is not None and not 0 <= index < len(tokens):
            raise TokenizerError(
                f"the GGUF file's {role} has id {index}, outside its {len(tokens)} tokens; "
                "the file is damaged or was converted wrongly"
            )
    named = {role: tokens[index] for role, index in ids.items() if index is not None}
    pre = metadata.get("pre")
    if kind == "gpt2":
        if pre is None:
            raise TokenizerError(
                "the GGUF file has no tokenizer.ggml.pre, so how it cuts text is unknown; "
                "convert the model again with a llama.cpp of May 2024 or later"
            )
        backend = bpe.byte_level_bpe(tokens, metadata.require("merges"), pre, types)
    elif kind == "llama":
        backend = bpe.sentencepiece_bpe(
            tokens,
            metadata.require("scores"),
            metadata.require("token_type"),
            unk=named.get("unk_token"),
            space_prefix=metadata.get("add_space_prefix", True),
        )
    else:
        raise TokenizerError(
            f"the GGUF file's tokenizer is of kind '{kind}' (tokenizer.ggml.model); only "
            "'gpt2' and 'llama' can be read: use the model's Hugging Face directory"
        )
    # Where the key is missing llama.cpp adds a BOS for these two.
    default_bos = kind == "llama" or pre in bpe.LLAMA3_PRES
    add_bos = metadata.get("add_bos_token", default_bos)
    add_eos = metadata.get("add_eos_token", False)
    _begin_and_end_with(
        backend,
        named.get("bos_token") if add_bos else None,
        named.get("eos_token") if add_eos else None,
    )
    eos_ids = [metadata.get(f"{name}_token_id") for name in ("eot", "eom")]
    if pre in bpe.LLAMA3_PRES:  # files name one of the three; generation must stop at any
        eos_ids += [backend.token_to_id(text) for text in bpe.LLAMA3_STOP_TOKENS]
    chat = metadata.chat_sources()
    return Parts(
        backend=backend,
        named_tokens=named,
        eos_ids=[index for index in eos_ids if index is not None],
        chat=ChatTemplate(chat, named) if chat else None,
        padded_to=len(tokens),
    )


class _Metadata:
    """The tokenizer's part of a GGUF file's metadata."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(f"tokenizer.ggml.{name}", default)

    def require(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise TokenizerError(
                f"the GGUF file has no tokenizer.ggml.{name}; it carries no tokenizer that can be "
                "read: use the model's Hugging Face directory"
            )
        return value

    def chat_sources(self) -> dict[str, str]:
        start = "tokenizer.chat_template"
        return {
            key.removeprefix(start).removeprefix(".") or "default": template
            for key, template in self._values.items()
            if key == start or key.startswith(f"{start}.")
        }


def _begin_and_end_with(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Makes encoding add these tokens around a text, and nothing else."""
    from tokenizers.processors import TemplateProcessing

    added = [text for text in (bos, eos) if text is not None]
    for text in added:
        require_known(backend, text)
    backend.post_processor = TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        pair=["$A", "$B"],
        special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(added)],
    )


def require_known(backend: Backend, text: str) -> int:
    """The id of a special token.

    Raises:
      TokenizerError: the vocabulary does not have it.
    """
    index = backend.token_to_id(text)
    if index is None:
        raise TokenizerError(
            f"the special token {text!r} is not in the tokenizer's vocabulary; "
            "tokenizer.json and tokenizer_config.json are not of the same model"
        )
    return index


def _add_missing(backend: Backend, declared: Mapping[str, Any], file: Path) -> None:
    """Adds the tokens that only tokenizer_config.json declares."""
    from tokenizers import AddedToken

    known = backend.get_added_tokens_decoder()
    for index, token in sorted((int(index), token) for index, token in declared.items()):
        if index in known:
            continue
        flags = {k: bool(token.get(k)) for k in ("special", "normalized", "lstrip", "rstrip")}
        backend.add_tokens([AddedToken(token["content"], **flags)])
        if backend.token_to_id(token["content"]) != index:
            raise TokenizerError(
                f"tokenizer_config.json gives {token['content']!r} the id {index}, but in {file} "
                f"it is {backend.token_to_id(token['content'])}; they are not of the same model"
            )


def _read_backend(file: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    text = json.dumps(_read_object(file))
    try:
        return Backend.from_str(text)
    except Exception as error:  # the bindings raise plain Exception
        raise TokenizerError(
            f"{file} is not a tokenizer that the tokenizers library reads: {error}; "
            "download it again, or update the library"
        ) from error


def _read_llama3(file: Path) -> Backend:
    ranks = bpe.read_ranks(file)
    if len(ranks) != bpe.LLAMA3_RANKS:
        raise TokenizerError(
            f"{file} holds {len(ranks)} ranks, Llama 3 has {bpe.LLAMA3_RANKS}: another model's "
            "file, or one cut short; put the model's tokenizer.json beside it"
        )
    return bpe.tiktoken_bpe(ranks, bpe.LLAMA3_SPECIAL_TOKENS)


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise TokenizerError(f"{file} is damaged: {error}; download it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} holds a {type(value).__name__}, not a JSON object")
    return value


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _chat_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    declared = config.get("chat_template") or {}
    if isinstance(declared, str):
        sources = {"default": declared}
    elif isinstance(declared, list):
        sources = {entry["name"]: entry["template"] for entry in declared}
    else:
        sources = dict(declared)
    files = {"default": directory / "chat_template.jinja"}
    files |= {p.stem: p for p in (directory / "additional_chat_templates").glob("*.jinja")}
    return sources | {
        name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()
    }
