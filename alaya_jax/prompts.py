"""Conversations, and questions about a document, as the token ids that a model reads.

What a document or a user writes can never become a control token, and a BOS comes once: see
`models.rendered`.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date as Date
from typing import Any, NamedTuple, Protocol

import numpy as np

from alaya_jax.errors import ContextError, RequestError, TokenizerError
from alaya_jax.model import Model
from alaya_jax.models.chat import Message
from alaya_jax.models.rendered import Rendered
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.prefix import common_prefix

_LOOK = 4096
"""Characters behind a date that tell one prompt from another before it is encoded."""

_DOCUMENT, _STAMP = chr(0x100100), chr(0x100101)
"""In place of a document, and of what a template prints for the time: private use."""


class Stored(Protocol):
    """What is looked at of a stored context (`contexts.Context`)."""

    problem: str | None
    """Why it cannot be used, where it cannot."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, int32 [n].

        Raises:
          ContextError: it is damaged.
        """
        ...

    def shared(self, tokens: np.ndarray) -> int:
        """How many tokens it has in common with these, from the first on."""
        ...


class Prompt(NamedTuple):
    """Token ids of a conversation.

    Attributes:
      ids: int32 [n].
      dated: what its chat template printed for the time; "" where it prints none.
    """

    ids: np.ndarray
    dated: str = ""


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
      TokenizerError: it has none.
    """
    if model.tokenizer is None:
        raise TokenizerError(
            f"{model.name} has no tokenizer, so it cannot be given text; put tokenizer.json and "
            "tokenizer_config.json of the same model beside its weights"
        )
    return model.tokenizer


def plain_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text: plain characters behind what the model expects before one (mostly a BOS), or
    what a chat template rendered as it is.

    Raises:
      RequestError: the text begins with a control token's name: rendered elsewhere, it seems.
    """
    if isinstance(text, Rendered):
        return tokenizer.encode(text)
    if isinstance(text, str) and (name := tokenizer.control_at_start(text)):
        raise RequestError(
            f"the text begins with {name!r}, a control token's name, and a str is plain text. If a "
            "chat template rendered it, pass messages=[...], what model.chat.render "
            "returns as it is, or aj.Rendered(text); if it is a document about such tokens, pass "
            "model.encode(text, allow_special=False)"
        )
    return tokenizer.encode(text, allow_special=False)


def question_ids(tokenizer: Tokenizer, document: str, question: str) -> np.ndarray:
    """Ids of a question about a document: one user's turn, the document first."""
    return prompt(tokenizer, [{"role": "user", "content": question}], document).ids


def document_ids(tokenizer: Tokenizer, document: str) -> np.ndarray:
    """The ids that begin every question about a document: what is worth storing."""
    return prompt(tokenizer, None, document, to_store=True).ids


def document_in(tokenizer: Tokenizer, tokens: np.ndarray) -> str | None:
    """The document of which these are the ids, as `document_ids` gives them under any date, but
    for white space at its end; None where they are something else, or the model has no chat
    template.
    """
    if tokenizer.chat is None:
        return None
    text = tokenizer.chat.render(_with_document([{"role": "user", "content": "A"}], _DOCUMENT))
    head, found, _ = _redated(tokenizer, text, [_STAMP] * len(text.stamps)).partition(_DOCUMENT)
    before = re.escape(head).replace(_STAMP, "[^\\n]{1,64}?")
    known = re.fullmatch(f"{before}(.*)", tokenizer.decode(tokens), re.DOTALL)
    return known[1].removesuffix("\n\n") if found and known else None


def prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message] | None,
    document: str | None = None,
    date: Date | None = None,
    stored: Iterable[Stored] = (),
    *,
    to_store: bool = False,
) -> Prompt:
    """A conversation as a model reads it; the assistant speaks next.

    Args:
      tokenizer: a model without a chat template is asked about a document in plain text.
      messages: the turns, oldest first.
      document: a text in front of the first user's message, or alone.
      date: for templates that print one. None is today or, with a document, the date under which a
        stored context holds most of what would be computed anew under today's.
      stored: contexts that are looked at for that.
      to_store: only what begins every conversation that goes on from these messages or, with a
        document, every question about it that follows the messages.

    Raises:
      RequestError: the messages are of another form, or none is a user's.
      TokenizerError: there is no chat template for these messages, or it cannot take them.
    """
    turns = _turns(messages)

    def asked(question: str | None) -> Rendered | str:
        """The prompt; or one with a question of its own about the document."""
        written = turns if question is None else [*turns, {"role": "user", "content": question}]
        if tokenizer.chat is None:
            return _in_plain_text(written, document)
        whole = written if document is None else _with_document(written, document)
        goes_on = to_store and document is None
        return tokenizer.chat.render(whole, False if goes_on else None, date=date)

    # A letter and a digit: whatever the document ends with joins at most one of them.
    questions = ("A", "1") if to_store and document is not None else (None,)
    texts = [asked(question) for question in questions]

    def at(stamps: Sequence[str]) -> np.ndarray:
        found = [tokenizer.encode(_redated(tokenizer, text, stamps)) for text in texts]
        return found[0][: common_prefix(found[0], found[-1])]

    first = texts[0]
    if not isinstance(first, Rendered):
        if date is not None:
            raise RequestError(f"date={date}: this model has no chat template to print it")
        rows = [tokenizer.encode(text, allow_special=False) for text in texts]
        return Prompt(rows[0][: common_prefix(rows[0], rows[-1])])
    today = best = Prompt(at(first.stamps), ", ".join(dict.fromkeys(first.stamps)))
    if first.stamps and document is not None and date is None:
        stored = [context for context in stored if context.problem is None]
        most = known = max((c.shared(today.ids) for c in stored), default=0)
        for stamps in sorted(_dates(tokenizer, first, stored) - {first.stamps}):
            other = Prompt(at(stamps), ", ".join(dict.fromkeys(stamps)))
            shared = max(c.shared(other.ids) for c in stored)
            if shared > most and 2 * (shared - known) > len(other.ids) - known:
                best, most = other, shared
    return best


def of(
    model: Model,
    given: Any,
    messages: Sequence[Message] | None,
    document: str | None,
    date: Date | None,
    stored: Iterable[Stored] = (),
    *,
    to_store: bool = False,
) -> Prompt:
    """The token ids of whatever a user gives as a prompt: text, ids, messages or a document.

    Args:
      model: its vocabulary, tokenizer and chat template.
      given, messages, document, date: see `DB.create_session`, where `given` is its prompt.
      stored, to_store: see `prompt`.

    Raises:
      RequestError: there is no prompt, or two; or it is of another form.
      TokenizerError: the model has no tokenizer, or no chat template for the messages.
    """
    if given is None and messages is None and document is None:
        raise RequestError(
            "there is no prompt; give text, token ids (whole numbers), "
            "messages=[{'role': 'user', 'content': ...}], or document="
        )
    if given is None:
        tokenizer = tokenizer_of(model)
        found = prompt(tokenizer, messages, document, date, stored, to_store=to_store)
        return found._replace(ids=model.check_tokens(found.ids))
    if messages is not None or document is not None or date is not None:
        raise RequestError("give a prompt, or messages=, document= and date=, not both")
    if isinstance(given, Mapping) or (
        isinstance(given, list | tuple) and any(isinstance(p, Mapping) for p in given)
    ):
        raise RequestError("these are messages of a chat: pass them as messages=[...]")
    if isinstance(given, str):
        given = plain_ids(tokenizer_of(model), given)
    return Prompt(model.check_tokens(given))


def _turns(messages: Any) -> list[dict[str, Any]]:
    if messages is None:
        return []
    if isinstance(messages, str | Mapping) or not all(
        isinstance(m, Mapping) and "role" in m for m in messages
    ):
        raise RequestError(
            "messages must be one conversation, a list of {'role': ..., 'content': ...}; for a "
            "batch pass [model.chat.render(m) for m in conversations]"
        )
    return [dict(message) for message in messages]


def _with_document(turns: list[dict[str, Any]], document: str) -> list[dict[str, Any]]:
    """The document in front of what the user says first."""
    at = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if at is None or not isinstance(turns[at].get("content"), str):
        raise RequestError(
            "document= goes in front of the user's first message, and there is none with a text; "
            "add {'role': 'user', 'content': question}"
        )
    content = f"{document}\n\n{turns[at]['content']}"
    return [*turns[:at], {**turns[at], "content": content}, *turns[at + 1 :]]


def _in_plain_text(turns: list[dict[str, Any]], document: str | None) -> str:
    if document is None or [turn["role"] for turn in turns] != ["user"]:
        raise TokenizerError(
            "this model has no chat template, so it takes no messages but one question about a "
            "document=; pass it a text to continue"
        )
    return f"{document}\n\nQuestion: {turns[0].get('content')}\nAnswer:"


def _redated(tokenizer: Tokenizer, text: Any, stamps: Sequence[str]) -> Rendered:
    if tuple(stamps) == text.stamps:
        return text
    assert tokenizer.chat is not None
    return tokenizer.chat.at(text, _saying(stamps))


def _saying(stamps: Sequence[str]) -> Callable[[str], str]:
    told = iter(stamps)
    return lambda format: next(told, "")


def _dates(tokenizer: Tokenizer, text: Rendered, stored: Iterable[Stored]) -> set[tuple[str, ...]]:
    """The dates under which contexts go on most like this prompt."""
    marks = [chr(0x100000 + i) for i in range(len(text.stamps))]  # private use
    marked = _redated(tokenizer, text, marks)
    end = max(marked.rfind(mark) for mark in marks) + 1
    if not end:
        return set()
    rest = marked[end : end + _LOOK]
    pattern = re.escape(marked[:end])
    for i, mark in enumerate(marks):
        pattern = pattern.replace(mark, f"(?P<d{i}>[^\\n]{{1,64}}?)", 1)
        pattern = pattern.replace(mark, f"(?P=d{i})")
    shape = re.compile(pattern + f"(?={re.escape(rest[:8])})")
    most, dates = 0, set()
    for context in stored:
        try:
            known = tokenizer.decode(context.tokens[: end + _LOOK])
        except ContextError:  # damaged: the others serve
            continue
        if found := shape.match(known):
            alike = zip(rest, known[found.end() :], strict=False)
            length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], alike))
            if length > most:
                most, dates = length, set()
            if length == most:
                groups = found.groupdict()
                dates.add(tuple(groups.get(f"d{i}", s) for i, s in enumerate(text.stamps)))
    return dates
