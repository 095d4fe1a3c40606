"""Text to token ids and back."""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alaya_jax.errors import RequestError, TokenizerError
from alaya_jax.models import bpe, tokenizer_files
from alaya_jax.models.chat import ChatTemplate
from alaya_jax.models.rendered import Names, Rendered, spelled, told_apart

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from tokenizers import Tokenizer as Backend

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_RUN = 4_000_000
"""Most characters of white space in one run that the tokenizers library is given at once: its
search panics after ten million steps back.
"""
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_RUN},}}")
_INSIDE = "\ue0a3"
"""A meaningless token, put before a text that does not begin a prompt."""


class Tokenizer:
    """A byte-level or sentencepiece BPE tokenizer with its special tokens and chat template.

    Decoding joins the bytes of the tokens and reads them as UTF-8; bytes that are not UTF-8 become
    U+FFFD. The stream does the same piece by piece, so the two always agree.

    Args:
      backend: the tokenizer of the `tokenizers` library.
      named_tokens: texts of the special tokens by role, such as `{"bos_token": "<s>"}`.
      eos_ids: ids that end a generation; the eos token's own id is put first.
      chat: the model's chat template, None where the checkpoint has none.
      padded_to: the model's own count of ids; those without a token here have no text.

    Raises:
      TokenizerError: a named token is not in the vocabulary, or the backend's decoder is neither
        byte-level nor sentencepiece.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        named_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        chat: ChatTemplate | None = None,
        padded_to: int = 0,
    ):
        # A tokenizer.json may ask to cut or pad texts: right for training, wrong for documents.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._byte_level, self._strips_space = _decoding(backend)
        self.named_tokens = dict(named_tokens or {})
        self.bos_id: int | None = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        first = () if eos is None else (eos,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*first, *map(int, eos_ids))))
        self.chat = chat
        self.padded_to = padded_to

    def __repr__(self) -> str:
        chat = "with" if self.chat else "no"
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, bos_id={self.bos_id}, "
            f"eos_ids={self.eos_ids}, {chat} chat template)"
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face or Meta checkpoint directory.

        Reads tokenizer.json, or Meta's Llama 3 tokenizer.model where there is none; the roles of
        tokens from tokenizer_config.json (older: special_tokens_map.json); more eos ids from
        generation_config.json and config.json; the chat template from chat_template.jinja or
        tokenizer_config.json. Without a chat template `chat` is None.

        What is added around a text is what tokenizer.json says, as in transformers 5; where it
        says nothing, add_bos_token and add_eos_token of tokenizer_config.json decide.

        Raises:
          TokenizerError: no tokenizer there, or a file that is damaged or not understood.
        """
        return cls(**tokenizer_files.read_directory(Path(path)))

    @classmethod
    def from_gguf(cls, source: Mapping[str, Any] | str | Path) -> Tokenizer:
        """Reads the tokenizer in a GGUF file's metadata: "gpt2" (byte-level) or "llama" models.

        Args:
          source: the file, or its metadata as plain values.

        Raises:
          TokenizerError: the file is damaged, has no tokenizer, or one of an unknown kind.
        """
        return cls(**tokenizer_files.read_gguf(source))

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: the embedding rows it takes to look up any id."""
        return len(self._pieces)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens: what `skip_special_tokens` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool | None = None,
        allow_special: bool | None = None,
    ) -> np.ndarray:
        """Token ids of a text.

        What a vocabulary has no bytes for becomes its unknown token or, in a byte-level one, is
        left out, as the model was trained: SmolLM2 has none for six control characters.

        Args:
          text: any length; it is never cut.
          add_special_tokens: whether to add what the model expects around a text (for most a BOS
            before it). Default True, and False for what a chat template rendered, which holds
            it already.
          allow_special: whether the text of a control token in `text` becomes that token.
            Default True; in what a chat template rendered, the template's own do, and those
            in its messages do not. Pass False for text from users and documents:
            `<|im_start|>` in it is then plain characters, so it cannot end a turn, start one
            or take another role. Added tokens that are not control tokens (`<think>`) are
            plain characters too, except runs of white space.

        Returns:
          ids: `int32[T]`.

        Raises:
          RequestError: `text` is not a string of Unicode characters.
          TokenizerError: a message's control token cannot be told from the template's.
        """
        if not isinstance(text, str):
            raise RequestError(f"text to encode must be a str, not {type(text).__name__}")
        if (half := _SURROGATE.search(text)) is not None:
            raise RequestError(
                f"text has half a surrogate pair at character {half.start()}, which no encoding of "
                "Unicode has; read the file with errors='replace'"
            )
        if isinstance(text, Rendered):
            add_special_tokens = bool(add_special_tokens)
            if allow_special is None and not add_special_tokens:
                return self._encode_rendered(text)
        backend = self._literal if allow_special is False else self._backend
        return self._encode(backend, text, add_special_tokens is not False)

    def _encode(self, backend: Backend, text: str, add_special_tokens: bool) -> np.ndarray:
        if self._byte_level and len(text) > _RUN:
            runs = (found.span() for found in _LONG_RUN.finditer(text))
            cuts = [at for start, end in runs for at in range(start + _RUN, end - 1, _RUN)]
            if cuts:
                parts = zip([0, *cuts], [*cuts, None], strict=True)
                encoded = [backend.encode(text[i:j], add_special_tokens=False) for i, j in parts]
                whole = type(encoded[0]).merge(encoded)
                encoding = backend.post_process(whole, None, add_special_tokens)
                return np.asarray(encoding.ids, dtype=np.int32)
        try:
            encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:  # a panic of the library is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise RequestError(
                f"the tokenizers library fails on this text of {len(text):,} characters: {error}; "
                "look for a very long run of one kind of character in it, and shorten that"
            ) from error
        return np.asarray(encoding.ids, dtype=np.int32)

    def _encode_rendered(self, prompt: Rendered) -> np.ndarray:
        """Ids in which control tokens are the template's own."""
        names, controls = self._names
        text, meant = told_apart(prompt, names)
        found = list(controls.finditer(text))
        if [f[0] for f in found] == [f[0] for f in controls.finditer(prompt)]:
            return self._encode(self._backend, str(prompt), False)  # no message wrote any
        # Between two control tokens of the template a tokenizer joins characters as it likes: there
        # a message is encoded together with what the template prints beside it.
        ids, done = [], 0
        begins, ends = [0, *(f.end() for f in found)], [*(f.start() for f in found), len(text)]
        for begin, end in zip(begins, ends, strict=True):
            if not meant.keys().isdisjoint(text[begin:end]):
                ids.append(self._encode(self._backend, text[done:begin], False))
                inside = _INSIDE if begin else ""
                plain = spelled(text[begin:end], meant)
                ids.append(self._encode(self._literal, inside + plain, False)[len(inside) :])
                done = end
        ids.append(self._encode(self._backend, text[done:], False))
        return np.concatenate(ids)

    def decode(self, ids: ArrayLike | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
          ids: `int[T]`, any array or a list.
          skip_special_tokens: whether to leave control tokens out.

        Raises:
          RequestError: `ids` is not one sequence of integers, or holds an id without a token.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise RequestError(
                f"decode takes one sequence of integer ids, not {array.dtype}{list(array.shape)}"
            )
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.put_all(array.tolist()) + stream.flush()

    def stream(
        self, *, skip_special_tokens: bool = False, padded_to: int | None = None
    ) -> TokenStream:
        """A decoder for tokens as they come; what it emits concatenates to `decode` of them all.

        Args:
          skip_special_tokens: whether to leave control tokens out.
          padded_to: ids below that are no text where they have no token; default the tokenizer's.
        """
        skip = self.special_ids if skip_special_tokens else frozenset()
        return TokenStream(
            self._pieces,
            skip,
            strips_space=self._strips_space,
            padded_to=self.padded_to if padded_to is None else padded_to,
        )

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token: maybe a part of a UTF-8 character; none where it has no text."""
        return self._pieces[token_id] or b"" if 0 <= token_id < len(self._pieces) else b""

    def control_at_start(self, text: str) -> str | None:
        """The control token whose name a text begins with, if any."""
        names, controls = self._names
        found = controls.match(text.lstrip())
        name = found[0].strip() if found else None
        return name if name in names.control else None

    def to_json(self) -> str:
        """The text of a tokenizer.json that encodes the same way."""
        return self._backend.to_str()

    def to_config(self) -> dict[str, Any]:
        """The content of a tokenizer_config.json to stand beside `to_json`."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"clean_up_tokenization_spaces": False, **self.named_tokens}
        if self.chat is not None:
            named = [{"name": n, "template": text} for n, text in self.chat.sources.items()]
            alone = named[0]["name"] == "default" and len(named) == 1
            config["chat_template"] = named[0]["template"] if alone else named
        return config

    def _id_of(self, role: str) -> int | None:
        text = self.named_tokens.get(role)
        return None if text is None else tokenizer_files.require_known(self._backend, text)

    @cached_property
    def _literal(self) -> Backend:
        """The same tokenizer blind to its added tokens, for text that is not trusted."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        data = json.loads(self._backend.to_str())
        for token in data["added_tokens"]:
            # Some models' role markers are not flagged special, so all tokens but spaces are.
            token["special"] = not token["content"].isspace()
        backend = Backend.from_str(json.dumps(data))
        backend.encode_special_tokens = True
        backend.add_tokens([AddedToken(_INSIDE, special=False, normalized=False)])
        return backend

    @cached_property
    def _names(self) -> tuple[Names, re.Pattern[str]]:
        """The added tokens but spaces, by name; and where they are found in a text, with the spaces
        that some take along.
        """
        added = self._backend.get_added_tokens_decoder().values()
        found = sorted((t for t in added if t.content.strip()), key=lambda t: -len(t.content))
        control = (t.content for t in found if t.special)
        taken = (
            (r"\s*" if t.lstrip else "") + re.escape(t.content) + (r"\s*" if t.rstrip else "")
            for t in found
        )
        pattern = re.compile("|".join(taken) or r"(?!)")
        return Names((t.content for t in found), control), pattern

    @cached_property
    def _pieces(self) -> list[bytes | None]:
        """The bytes of each id; None where an id has no token."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        pieces: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        alphabet = _Alphabet(bpe.byte_alphabet())
        for text, index in vocabulary.items():
            if index in added:  # their text is theirs, not in the alphabet of the model's pieces
                pieces[index] = text.encode()
            elif not self._byte_level:
                byte = _BYTE_PIECE.fullmatch(text)
                pieces[index] = bytes.fromhex(byte[1]) if byte else text.replace("▁", " ").encode()
            else:
                try:
                    pieces[index] = text.translate(alphabet).encode("latin-1")
                except UnicodeEncodeError:  # not all of it in the alphabet
                    pieces[index] = text.encode()
        return pieces


class _Alphabet(dict[int, str]):
    """For `str.translate`: from letters that stand for bytes to the characters of these numbers."""

    def __init__(self, bytes_of: Mapping[str, int]):
        super().__init__({ord(letter): chr(byte) for letter, byte in bytes_of.items()})

    def __missing__(self, letter: int) -> str:
        return "\u0100"  # no byte


class TokenStream:
    """Decodes tokens one at a time and never emits part of a UTF-8 character.

    A token costs the time of its own bytes, whatever came before. Made by `Tokenizer.stream`.
    """

    def __init__(
        self,
        pieces: Sequence[bytes | None],
        skip: frozenset[int],
        *,
        strips_space: bool,
        padded_to: int = 0,
    ):
        self._pieces = pieces
        self._skip = skip
        self._padded_to = padded_to
        self._strips_space = strips_space
        self._at_start = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def copy(self) -> TokenStream:
        """An independent stream that goes on from here."""
        other = copy.copy(self)
        other._utf8 = copy.copy(self._utf8)
        return other

    def put(self, token_id: int) -> str:
        """Takes a token and returns the text that became certain, maybe none.

        Raises:
          RequestError: the tokenizer has no token of this id.
        """
        return self.put_all([int(token_id)])

    def put_all(self, ids: Iterable[int]) -> str:
        """Takes several tokens and returns the text that became certain."""
        return self._emit(self._utf8.decode(b"".join(map(self._piece, ids))))

    def flush(self) -> str:
        """Ends the text: returns what was held back (bytes of an unfinished character: U+FFFD)."""
        text = self._emit(self._utf8.decode(b"", final=True))
        self._at_start = True
        return text

    def _piece(self, index: int) -> bytes:
        piece = self._pieces[index] if 0 <= index < len(self._pieces) else None
        if piece is None and 0 <= index < self._padded_to:
            return b""  # of the model's padding: rows of its embedding that stand for no text
        if piece is None:
            raise RequestError(
                f"token id {index} has no token in this tokenizer of {len(self._pieces)} ids; "
                "the ids are of another model, or the model's vocabulary is padded beyond it"
            )
        return b"" if index in self._skip else piece

    def _emit(self, text: str) -> str:
        if text and self._at_start:
            self._at_start = False
            if self._strips_space:  # the one sentencepiece put before the first word
                return text.removeprefix(" ")
        return text


def _decoding(backend: Backend) -> tuple[bool, bool]:
    """Whether the backend's pieces are byte-level, and whether decoding drops a leading space."""
    state = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    steps = [] if state is None else state.get("decoders", [state])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return False, any(
            step.get("start", 0) > 0 or step.get("prepend_scheme", "never") != "never"
            for step in steps
        )
    raise TokenizerError(
        f"the tokenizer decodes by {' + '.join(kinds) or 'nothing'}; only byte-level and "
        "sentencepiece BPE tokenizers (Llama, Mistral, Qwen, SmolLM and their kin) can be used"
    )
