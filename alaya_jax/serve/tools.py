"""Calls of functions in what a model writes, in the forms that Llama 3, Qwen (Hermes) and Mistral
were trained to write.

They are JSON objects with a name and "arguments" or "parameters", alone, in a list, several behind
one another, or between marks.
"""

import dataclasses
import json
import re
from typing import Any

_MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_BETWEEN = re.compile("|".join([r"[\s;,]+", *map(re.escape, _MARKS)]))


@dataclasses.dataclass(frozen=True)
class Call:
    """A function's name, and its arguments as a text of JSON."""

    name: str
    arguments: str


class Calls:
    """Tells a text that comes in pieces from the calls in it.

    Calls are one piece at the end of a text. What begins like one is held back until the text ends,
    and is text after all where it is no call of a known function.

    Args:
      names: of the functions; none: everything is text.
    """

    def __init__(self, names: frozenset[str]):
        self._names = names
        self._held = ""
        self._begun = not names
        self._calling = False

    def put(self, text: str) -> str:
        """Takes the next piece; returns what is certainly text."""
        if not self._names:
            return text
        self._held += text
        if self._calling:
            return ""
        if not self._begun:
            start = self._held.lstrip()
            if not start:
                return ""
            self._begun, self._calling = True, start.startswith(("{", "["))
            if self._calling:
                return ""
        at = min((i for m in _MARKS if (i := self._held.find(m)) >= 0), default=-1)
        if at < 0:
            longest = min(max(map(len, _MARKS)) - 1, len(self._held))
            ends = (n for n in range(longest, 0, -1) if self._ends_in_mark(n))
            at = len(self._held) - next(ends, 0)
        else:
            self._calling = True
        said, self._held = self._held[:at], self._held[at:]
        return said

    def finish(self) -> tuple[str, list[Call]]:
        """Ends the text: the rest of it, and the calls."""
        held, self._held = self._held, ""
        calls = self._read(held) if self._names else []
        return ("", calls) if calls else (held, [])

    def _ends_in_mark(self, n: int) -> bool:
        return any(mark.startswith(self._held[-n:]) for mark in _MARKS)

    def _read(self, text: str) -> list[Call]:
        decoder, at, calls = json.JSONDecoder(), 0, []
        while at < len(text):
            if between := _BETWEEN.match(text, at):
                at = between.end()
                continue
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                return []
            for said in value if isinstance(value, list) else [value]:
                call = self._call(said)
                if call is None:
                    return []
                calls.append(call)
        return calls

    def _call(self, said: Any) -> Call | None:
        if not isinstance(said, dict) or said.get("name") not in self._names:
            return None
        given = said.get("arguments", said.get("parameters", {}))
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        # Half a surrogate pair, which JSON may hold in ASCII, is in no encoding of Unicode.
        return Call(said["name"], arguments.encode(errors="backslashreplace").decode())
