"""What a text must be: JSON of a schema, what matches a regular expression, or a sentence of a
grammar; and which tokens may come next for it. llguidance knows (extra `grammar`).
"""

import dataclasses
import json
import threading
import weakref
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from alaya_jax.errors import AlayaError, RequestError, TokenizerError
from alaya_jax.models.tokenizer import Tokenizer

JSON_OPTIONS = {"lenient": False, "whitespace_pattern": r"[ \t\r\n]{1,40}"}
"""How a schema is kept: what is not supported is an error, whatever the schema says of it; white
space between the parts of JSON is enough to indent it, and has an end.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
    r"""What a sequence's text must be; exactly one of the three.

        aj.Greedy(constraint=aj.Constraint(json_schema={"type": "object"}))
        aj.Sampling(constraint=aj.Constraint(regex=r"(yes|no), because .{10,200}\."))

    Attributes:
      json_schema: JSON Schema, an object or a text of JSON; stored as text, so that a `Constraint`
        stays hashable. Objects have their properties in the schema's order.
      regex: a regular expression of the whole text, in the syntax of Rust's `regex`.
      lark: a grammar in llguidance's form of Lark, whose first rule is `start`.

    Raises:
      RequestError: it is not understood, asks for what is not supported (named), or llguidance is
        not installed.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    lark: str | None = None

    def __post_init__(self):
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"Constraint({', '.join(given)}): give one of json_schema=, regex= and lark="
            )
        (name,) = given
        value = getattr(self, name)
        if name == "json_schema":
            object.__setattr__(self, name, _text_of(value))
        elif not isinstance(value, str):
            raise RequestError(f"Constraint: {name}={value!r} must be a text")
        is_error, said = _library().LLMatcher.validate_grammar_with_warnings(self._grammar())
        if is_error:
            raise RequestError(f"Constraint: {name} cannot be kept: {' '.join(said)}")

    def _grammar(self) -> str:
        """As llguidance writes it."""
        matcher = _library().LLMatcher
        if self.regex is not None:
            return matcher.grammar_from_regex(self.regex)
        if self.lark is not None:
            return matcher.grammar_from_lark(self.lark)
        return matcher.grammar_from_json_schema(self.json_schema, overrides=JSON_OPTIONS)

    def start(self, tokenizer: Tokenizer | None, vocab_size: int) -> Any:
        """A matcher (`llguidance.LLMatcher`) before the first token; its end is token V.

        Raises:
          RequestError: it is not understood.
          TokenizerError: there is no tokenizer.
        """
        if tokenizer is None:
            raise TokenizerError("the model has no tokenizer, so a constraint= cannot be kept")
        library = _library()
        found = library.LLMatcher(_known.of(tokenizer, vocab_size), self._grammar(), log_level=0)
        if found.is_error():
            raise RequestError(f"Constraint: it is not understood: {found.get_error()}")
        return found


def _text_of(schema: Any) -> str:
    if isinstance(schema, str):
        text = schema
    else:
        try:
            text = json.dumps(schema, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"Constraint: json_schema is not JSON: {error}") from error
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"Constraint: json_schema is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise RequestError(f"Constraint: json_schema={text[:80]} must be an object")
    return text


def _library() -> ModuleType:
    """llguidance.

    Raises:
      RequestError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "a constraint needs llguidance; install the extra: pip install alaya_jax[grammar]"
        ) from error
    return llguidance


class _Vocabulary:
    """A tokenizer as llguidance wants it. Behind the model's ids is one more, which ends a text:
    so the ids that end a sequence, which may be several or none, are not its concern.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.eos_token_id = vocab_size
        self.tokens = [*(tokenizer.piece(i) for i in range(vocab_size)), b"<|end|>"]
        controls = (i for i in tokenizer.special_ids if i < vocab_size)
        self.special_token_ids = [*sorted(controls), vocab_size]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        said = text.decode("utf-8", "replace")
        return self._encode(said, allow_special=False, add_special_tokens=False).tolist()


class _Known:
    """Vocabularies that llguidance has read, which takes half a second for 50,000 tokens."""

    def __init__(self):
        self._lock = threading.Lock()
        self._read: weakref.WeakKeyDictionary[Tokenizer, dict[int, Any]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, tokenizer: Tokenizer, vocab_size: int) -> Any:
        with self._lock:
            sizes = self._read.setdefault(tokenizer, {})
            if vocab_size not in sizes:
                library = _library()
                wrapped = library.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
                sizes[vocab_size] = library.LLTokenizer(wrapped)
            return sizes[vocab_size]


_known = _Known()


class Allowed:
    """Which ids a sequence may choose next: those that its constraint lets follow what it said, and
    one that ends it where the constraint is met and as many tokens were said as must be.

    Args:
      constraint: None: any text.
      min_tokens: tokens before one of `end_ids` may come. Where the constraint lets nothing else
        come, it comes sooner.
      end_ids: that end it.
      tokenizer: of the model.
      vocab_size: V.

    Raises:
      RequestError: the constraint is not understood, or there is no id that could end its text.
      TokenizerError: there is a constraint and no tokenizer.
    """

    def __init__(
        self,
        constraint: Constraint | None,
        min_tokens: int,
        end_ids: Iterable[int],
        tokenizer: Tokenizer | None,
        vocab_size: int,
    ):
        self._least, self._count, self._size = min_tokens, 0, vocab_size
        self._ends = frozenset(i for i in end_ids if i < vocab_size)
        self._ended = False
        self._matcher = None
        if constraint is not None:
            if not self._ends:
                raise RequestError(
                    "a constraint needs an id that ends its text, and there is none: leave out "
                    "ignore_eos, or give stop_ids"
                )
            self._matcher = constraint.start(tokenizer, vocab_size)

    def accept(self, id: int) -> None:
        """Takes the token that was chosen.

        Raises:
          AlayaError: it was not allowed.
        """
        self._count += 1
        self._ended = id in self._ends
        if self._matcher is not None and not self._ended:
            taken = self._matcher.consume_token(id)
            if not taken or self._matcher.is_error():
                raise AlayaError(
                    f"token {id}, the {self._count}. of the text, is not what its constraint lets "
                    f"follow: {self._matcher.get_error() or 'it is met'}"
                )

    def mask(self) -> np.ndarray:
        """The next ones, a bit for each id, uint32 [W]: of id i, bit i % 32 of word i // 32. All
        where the text has ended.

        Raises:
          AlayaError: the grammar got too large to be followed.
        """
        words = everything(self._size)
        if self._ended:
            return words
        must_end, may_end = False, True
        if self._matcher is not None:
            found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            if self._matcher.is_error():
                raise AlayaError(
                    f"a constraint cannot be kept any longer: {self._matcher.get_error()}; make it "
                    "simpler"
                )
            may_end = bool(found[self._size // 32] >> self._size % 32 & 1)
            words &= found[: len(words)]
            words[-1] &= np.uint32(2 ** (self._size % 32 or 32) - 1)
            for id in self._ends:
                _put(words, id, False)
            must_end = not words.any()
            if must_end and not may_end:
                raise AlayaError(
                    "a constraint lets no token follow; is one that it needs among the stop_ids?"
                )
        for id in self._ends:
            _put(words, id, may_end and (must_end or self._count >= self._least))
        return words


def everything(vocab_size: int) -> np.ndarray:
    """All ids, uint32 [W]."""
    return np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)


def masks(each: Iterable[np.ndarray | None], vocab_size: int) -> np.ndarray:
    """Masks of a batch, uint32 [B, W]; None: all ids."""
    all = everything(vocab_size)
    return np.stack([all if mask is None else mask for mask in each])


def _put(words: np.ndarray, id: int, on: bool) -> None:
    bit = np.uint32(1 << id % 32)
    if on:
        words[id // 32] |= bit
    else:
        words[id // 32] &= ~bit
