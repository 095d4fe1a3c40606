"""Text that a chat template printed, kept apart from text that anybody may have written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Self

from alaya_jax.errors import TokenizerError

Part = tuple[Callable[[Any], str], Any]
"""A printer, and the JSON data of others that it prints."""


class Rendered(str):
    """A prompt as a chat template prints it: its control tokens are meant as such, and the BOS is
    there.

    Otherwise a `str`. `Tokenizer.encode`, `DB.create_session` and `DB.import_context` add nothing
    around it, and take what spells a control token inside a message for plain characters. What is
    added with `+` is plain text too; other string methods return a `str`, which is plain text
    throughout.

    Args:
      text: a prompt that another program rendered, in which every control token is meant.
    """

    parts: tuple[Part, ...]
    stamps: tuple[str, ...]
    """What the template printed for the time, in its order."""

    def __new__(
        cls, text: str = "", parts: Iterable[Part] = (), stamps: Iterable[str] = ()
    ) -> Self:
        """See the class; `parts` and `stamps` are `ChatTemplate.render`'s to give."""
        self = super().__new__(cls, text)
        self.parts = tuple(parts) or ((partial(_same, text), None),)
        self.stamps = tuple(stamps)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.parts, self.stamps

    def __add__(self, other: str) -> Rendered:
        more = _parts(other)
        stamps = other.stamps if isinstance(other, Rendered) else ()
        return Rendered(str.__add__(self, other), self.parts + more, self.stamps + stamps)

    def __radd__(self, other: str) -> Rendered:
        return Rendered(str.__add__(other, self), _parts(other) + self.parts, self.stamps)


def _same(text: str, _: Any) -> str:
    return text


def _parts(text: str) -> tuple[Part, ...]:
    return text.parts if isinstance(text, Rendered) else ((str, text),)


class Names:
    """Texts that a tokenizer takes for tokens of their own wherever they stand.

    Args:
      names: the texts.
      control: those of them that no message may ever write.
    """

    def __init__(self, names: Iterable[str], control: Iterable[str]):
        known = sorted(names, key=len, reverse=True)
        self.control = frozenset(control)
        self._whole = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        self._begins = {n[:i] for n in known for i in range(1, len(n))}
        self._ends = {n[i:] for n in known for i in range(1, len(n))}
        self._longest = max(map(len, known), default=0)

    def hold(self, text: str, put: Callable[[str], str]) -> str:
        """`text` with `put(name)` in place of each name, and of what may become one with what a
        template prints before or behind it.
        """
        text = self._whole.sub(lambda found: put(found[0]), text)
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        if n := next((n for n in lengths if text[-n:] in self._begins), 0):
            text = text[:-n] + put(text[-n:])
        if n := next((n for n in lengths if text[:n] in self._ends), 0):
            text = put(text[:n]) + text[n:]
        return text

    def in_(self, text: str) -> list[str]:
        """The names in a text, in order."""
        return self._whole.findall(text)


def told_apart(prompt: Rendered, names: Names) -> tuple[str, dict[str, str]]:
    """A rendered prompt in which each name that a message wrote is one meaningless character.

    The template is run again on messages with such characters in place of the names. A name that it
    looks for itself (`</think>`, to leave out what an assistant thought) stays where it is.

    Returns:
      the text, and what each such character stands for.

    Raises:
      TokenizerError: a control token that a message wrote cannot be told apart from the
        template's own.
    """
    strings = [text for _, data in prompt.parts for text in _strings(data)]
    marks: dict[str, str] = {}
    # Rare ideographs: a template that prints or escapes data leaves them as they are.
    free = (chr(c) for c in range(0x20000, 0x2A6D0) if chr(c) not in prompt)

    def put(name: str) -> str:
        if name not in marks:
            marks[name] = next(free)
        return marks[name]

    held = [names.hold(text, put) for text in strings]
    meant = {mark: name for name, mark in marks.items()}
    changed = [i for i, text in enumerate(strings) if held[i] != text]

    def printed(chosen: Iterable[int]) -> str:
        wanted = set(chosen)
        turn = iter(range(len(strings)))

        def swap(text: str) -> str:
            return held[i] if (i := next(turn)) in wanted else text

        return "".join(printer(_mapped(data, swap)) for printer, data in prompt.parts)

    def is_same(text: str) -> bool:
        return spelled(text, meant) == prompt

    if not changed:
        return str(prompt), {}
    everything = _tried(printed, changed)
    if is_same(everything):
        return everything, meant
    # The template looks into some of them: those stay as they are.
    safe = [i for i in changed if is_same(_tried(printed, [i]))]
    text = _tried(printed, safe)
    if not is_same(text):
        text, safe = str(prompt), []
    for i in set(changed) - set(safe):
        pieces = [meant[mark] for mark in held[i] if mark in meant]
        for name in names.control:
            if any(p in name for p in pieces) and text.count(name) > everything.count(name):
                raise TokenizerError(
                    f"a message spells the control token {name!r}, or a part of it, where the chat "
                    "template reads it, so the two cannot be told apart; take it out of the message"
                )
    return text, meant


def _tried(printed: Callable[[Iterable[int]], str], chosen: Iterable[int]) -> str:
    try:
        return printed(chosen)
    except TokenizerError:  # the template refuses what it does not know
        return ""


def spelled(text: str, meant: dict[str, str]) -> str:
    """`text` with each character of `told_apart` replaced by what it stands for."""
    return text.translate({ord(mark): name for mark, name in meant.items()})


def _strings(data: Any) -> Iterator[str]:
    seen: list[str] = []
    _mapped(data, lambda text: seen.append(text) or text)
    return iter(seen)


def _mapped(data: Any, change: Callable[[str], str]) -> Any:
    """JSON data with every text in it changed, in one fixed order."""
    if isinstance(data, str):
        return change(data)
    if isinstance(data, list):
        return [_mapped(item, change) for item in data]
    if isinstance(data, dict):
        return {change(key): _mapped(value, change) for key, value in data.items()}
    return data
