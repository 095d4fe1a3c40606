"""Builds `tokenizers` BPE backends from what GGUF files and Meta's tiktoken files store."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alaya_jax.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Meta's Llama 3 names the 256 ids after its 128,000 ranks (llama-models 0.3.0, Llama 3.1 and later;
# Llama 3.0 has the same ids and calls some of them reserved).
LLAMA3_RANKS = 128_000
LLAMA3_NAMED_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
LLAMA3_SPECIAL_TOKENS = LLAMA3_NAMED_TOKENS + tuple(
    f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(LLAMA3_NAMED_TOKENS))
)
LLAMA3_STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# The split patterns are part of the models (their tokenizer.json); llama.cpp names them by `pre`.
# A name stands here once its ids were seen to equal Hugging Face's on llama.cpp's vocabulary files.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` of a GGUF file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte value: character -> byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[str],
    pre: str,
    types: Sequence[int] | None = None,
) -> Backend:
    """A GPT-2 style byte-level BPE (`tokenizer.ggml.model` "gpt2").

    Args:
      tokens: text of each id, in the byte alphabet.
      merges: pairs "left right", most important first.
      pre: `tokenizer.ggml.pre`: how text is cut before merging.
      types: `TokenType` of each id; all normal when None.

    Raises:
      TokenizerError: `pre` is unknown, or vocabulary and merges do not fit together.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"the GGUF file's tokenizer.ggml.pre is '{pre}', and how that cuts text is not known "
            f"here (known: {', '.join(sorted(_PRE_TOKENIZERS))}); "
            "use the model's Hugging Face directory with its tokenizer.json"
        )
    pairs = [_pair(merge) for merge in merges]
    try:
        model = BPE(vocab=_vocabulary(tokens), merges=pairs, ignore_merges=pre in _IGNORE_MERGES)
    except Exception as error:  # the bindings raise plain Exception
        raise TokenizerError(
            f"the tokenizer's merges do not fit its vocabulary: {error}"
        ) from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    _add_tokens(backend, tokens, types)
    return backend


def sentencepiece_bpe(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unk: str | None,
    space_prefix: bool = True,
) -> Backend:
    """A sentencepiece BPE with byte fallback (`tokenizer.ggml.model` "llama": Llama 1 and 2).

    Merges are not stored; any two pieces whose join is a piece merge, best score first. Control,
    byte and unused pieces take no part, so no text can merge into a control token.

    Args:
      tokens: text of each id, spaces written as U+2581.
      scores: score of each id; the higher, the earlier it merges.
      types: `TokenType` of each id.
      unk: the unknown token, for what has neither piece nor byte.
      space_prefix: whether text between control tokens starts with a space.

    Raises:
      TokenizerError: arrays of different lengths, or a vocabulary that contradicts itself.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    if not len(tokens) == len(scores) == len(types):
        raise TokenizerError(
            f"the tokenizer has {len(tokens)} tokens, {len(scores)} scores and {len(types)} token "
            "types; they must be as many: the file is damaged or was converted wrongly"
        )
    pieces = {
        token: (-score, index)
        for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
        if kind == TokenType.NORMAL
    }
    merges = _joins(pieces, lambda piece: pieces[piece])
    try:
        model = BPE(
            vocab=_vocabulary(tokens),
            merges=merges,
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # the bindings raise plain Exception
        raise TokenizerError(f"the tokenizer's vocabulary does not stand: {error}") from error
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = spaces
        backend.decoder = decoders.Sequence(steps)
    _add_tokens(backend, tokens, types)
    return backend


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a tiktoken file: one line for each token, base64 of its bytes and its rank.

    Raises:
      TokenizerError: the file is something else, such as a sentencepiece model.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{path}: line {number} is not 'base64 rank', so this is no Llama 3 tokenizer "
                "(a sentencepiece tokenizer.model cannot be read); put the model's "
                "tokenizer.json beside it"
            ) from error
    return ranks


def tiktoken_bpe(ranks: Mapping[bytes, int], special_tokens: Sequence[str]) -> Backend:
    """Llama 3's tokenizer from its ranks: ids equal tiktoken's, special tokens follow the ranks.

    Raises:
      TokenizerError: the ranks are not 0, 1, 2, ... or lack a byte.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    if sorted(ranks.values()) != list(range(len(ranks))) or any(
        bytes([b]) not in ranks for b in range(256)
    ):
        raise TokenizerError(
            f"the {len(ranks)} tokenizer ranks are not 0..{len(ranks) - 1} over all 256 bytes: "
            "the file is damaged or cut short; download it again"
        )
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    text = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    # A pair may merge whenever its join is a token, lowest rank first; a word that is a token needs
    # no merging (ignore_merges). Together that is tiktoken's rule.
    backend = Tokenizer(
        BPE(vocab=dict(text), merges=_joins(text, text.__getitem__), ignore_merges=True)
    )
    backend.pre_tokenizer = _PRE_TOKENIZERS["llama-bpe"]()
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, special_tokens, [TokenType.CONTROL] * len(special_tokens))
    return backend


def _joins(pieces: Mapping[str, Any], rank: Callable[[str], Any]) -> list[tuple[str, str]]:
    """All pairs of pieces whose join is a piece, by rank of the join, then of the two parts."""
    pairs = [
        (rank(piece), rank(piece[:cut]), rank(piece[cut:]), piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    pairs.sort(key=lambda pair: pair[:3])
    return [pair[3:] for pair in pairs]


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")  # a token may itself begin with the separator
    return merge[:1] + left, right


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(t for index, t in enumerate(tokens) if vocabulary[t] != index)
        raise TokenizerError(
            f"the tokenizer's vocabulary holds {twice!r} twice, so ids would be ambiguous; "
            "convert the model again from its original files"
        )
    return vocabulary


def _add_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int] | None) -> None:
    """Makes control tokens special and user-defined ones atomic; both are found in text first."""
    from tokenizers import AddedToken

    if types is not None and len(types) != len(tokens):
        raise TokenizerError(
            f"the tokenizer has {len(tokens)} tokens and {len(types)} token types; they must be as "
            "many: the file is damaged or was converted wrongly"
        )
    special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(token, special=special[TokenType(kind)], normalized=False)
            for token, kind in zip(tokens, types or (), strict=False)
            if kind in special and token
        ]
    )


def _gpt2_cut() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_cut() -> Any:
    # SmolLM2's own tokenizer.json: single digits, then GPT-2. transformers' GGUF reader leaves the
    # digits out and gets other ids for numbers.
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_cut()])


def _pattern_cut(pattern: str) -> Callable[[], Any]:
    def cut() -> Any:
        from tokenizers import Regex, pre_tokenizers

        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return cut


LLAMA3_PRES = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("gpt-2", "mpt"), _gpt2_cut),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _digits_cut),
    **dict.fromkeys(LLAMA3_PRES, _pattern_cut(_LLAMA3_SPLIT)),
    "qwen2": _pattern_cut(_QWEN2_SPLIT),
}
_IGNORE_MERGES = set(LLAMA3_PRES)
_NFC = {"qwen2"}
PRES = tuple(_PRE_TOKENIZERS)
"""The names of `tokenizer.ggml.pre` that are known here."""


def known_pre(
    pre_tokenizer: Mapping[str, Any] | None,
    normalizer: Mapping[str, Any] | None,
    *,
    ignore_merges: bool,
) -> str | None:
    """llama.cpp's name for the way a tokenizer.json cuts text; the inverse of `byte_level_bpe`.

    Args:
      pre_tokenizer, normalizer: those parts of the file.
      ignore_merges: whether a word that is a token is taken whole.

    Returns:
      the first name that means exactly this, None where no known one does.
    """
    for name, cut in _PRE_TOKENIZERS.items():
        same = _steps(pre_tokenizer) == _steps(json.loads(cut().__getstate__()))
        forms = [step.get("type") for step in _steps(normalizer)]
        same = same and ignore_merges == (name in _IGNORE_MERGES)
        if same and forms == (["NFC"] if name in _NFC else []):
            return name
    return None


def _steps(state: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer's or normalizer's steps, without what does not change the pieces."""
    if state is None:
        return []
    steps = state.get("pretokenizers") or state.get("normalizers") or [state]
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
