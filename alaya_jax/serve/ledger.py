"""What was asked of the server and what became of it: texts under way, and the last that ended."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from alaya_jax.engine import Result

KEPT = 200
"""Texts that are remembered after their end."""


@dataclasses.dataclass(eq=False)
class Entry:
    """One text.

    Attributes:
      id: of the request, which several texts may share.
      user: as the client says it.
      plan: words for what is asked of the keys.
      prompt_tokens: of its prompt.
      began: seconds since 1970.
      times: seconds on a clock of its own: asked, first token, last token.
      tokens: new ones so far.
      result: once it has ended well.
      error: once it has not.
    """

    id: str
    user: str
    plan: str
    prompt_tokens: int
    began: float = dataclasses.field(default_factory=time.time)
    times: tuple[float, float | None, float | None] = dataclasses.field(
        default_factory=lambda: (time.perf_counter(), None, None)
    )
    gaps: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    result: Result | None = None
    error: str | None = None

    def token(self, _: Any) -> None:
        """A token came."""
        now = time.perf_counter()
        asked, first, last = self.times
        if last is not None:
            self.gaps.append(now - last)
        self.times = asked, now if first is None else first, now
        self.tokens += 1

    @property
    def first_token_s(self) -> float | None:
        """From the request to its first token, waiting included."""
        asked, first, _ = self.times
        return None if first is None else first - asked

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        _, first, last = self.times
        return 0.0 if first is None or last is None else last - first

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        result = self.result
        said: dict[str, Any] = {
            "id": self.id,
            "object": "request",
            "user": self.user,
            "state": "failed" if self.error else "running" if result is None else "finished",
            "attention": self.plan,
            "created": int(self.began),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "first_token_s": self.first_token_s,
            "decode_s": self.decode_s,
            "error": self.error,
        }
        if result is not None:
            said |= {
                "finish_reason": result.finish_reason,
                "cached_tokens": result.cached_tokens,
                "keys_read": None if math.isnan(result.keys_read) else result.keys_read,
                "queued_s": result.timing.queued_s,
                "total_s": result.timing.total_s,
                "programs": result.programs,
            }
        return said


class Ledger:
    """All of them.

    Args:
      on_end: called with each entry when it has ended.

    Attributes:
      running: those under way, oldest first.
    """

    def __init__(self, on_end: Callable[[Entry], object] = lambda entry: None):
        self.running: list[Entry] = []
        self._ended: collections.deque[Entry] = collections.deque(maxlen=KEPT)
        self._on_end = on_end

    def begin(self, entry: Entry) -> None:
        """A text is under way."""
        self.running.append(entry)

    def end(self, entry: Entry, ended: Result | Exception) -> None:
        """It is not any more."""
        if isinstance(ended, Exception):
            entry.error = str(ended) or type(ended).__name__
        else:
            entry.result = ended
        self.running.remove(entry)
        self._ended.append(entry)
        self._on_end(entry)

    def entries(self, id: str | None = None) -> list[Entry]:
        """Newest first: those under way, then the last that ended; or those of one request."""
        found = [*reversed(self.running), *reversed(self._ended)]
        return [e for e in found if id in (None, e.id)]
