"""Who is told of tokens while they come: a streamer, as transformers has them, and a callback."""

from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np

from alaya_jax.errors import RequestError


class Streamer(Protocol):
    """What `transformers.TextStreamer`, `TextIteratorStreamer` and their like offer."""

    def put(self, value: Any) -> None:
        """Takes token ids: first the prompt's, int [1, n], then each new one's, int [1]."""
        ...

    def end(self) -> None:
        """There will be no more."""
        ...


class Numbered(Protocol):
    """A token."""

    @property
    def id(self) -> int:
        """Its token id."""
        ...


def check_listeners(streamer: Any, on_token: Any, batched: bool) -> None:
    """Refuses what cannot listen.

    Raises:
      RequestError: it has other methods, or the session is a batch.
    """
    if streamer is not None:
        if isinstance(streamer, type) or not all(
            callable(getattr(streamer, name, None)) for name in ("put", "end")
        ):
            raise RequestError(
                f"streamer={streamer!r}: must have put(ids) and end(), as "
                "transformers.TextStreamer has"
            )
        if batched:
            raise RequestError(
                "streamer= takes one sequence, and the session is a batch; use on_token=, which is "
                "told the sequence of each token"
            )
    if on_token is not None and not callable(on_token):
        raise RequestError(f"on_token={on_token!r}: must be a function of a token")


def told[T: Numbered](
    tokens: Generator[T],
    prompt: np.ndarray,
    streamer: Streamer | None,
    on_token: Callable[[T], Any] | None,
    stopped: Callable[[], None],
) -> Generator[T]:
    """The same tokens; each is told before it is yielded.

    Args:
      tokens: closed at the end, whoever ends it.
      prompt: ids before the first token, int32 [n].
      streamer: `end` is called once, also where the loop is left.
      on_token: what it returns, if true, ends the generation behind this token.
      stopped: called where it does.
    """
    try:
        if streamer is not None:
            streamer.put(prompt[None].astype(np.int64))
        for token in tokens:
            if streamer is not None:
                streamer.put(np.asarray([token.id]))
            ends = on_token is not None and on_token(token)
            if ends:
                stopped()
            yield token
            if ends:
                return
    finally:
        tokens.close()
        if streamer is not None:
            streamer.end()
