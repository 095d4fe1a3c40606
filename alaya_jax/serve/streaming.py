"""Answers as they come: server-sent events, several texts at once, and clients that go away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alaya_jax.engine import Result, Running
from alaya_jax.generation import Token

DONE = "[DONE]"
"""The last event's data."""


@contextlib.asynccontextmanager
async def while_there(receive: Receive, cancel: Callable[[], object]) -> AsyncIterator[None]:
    """Calls `cancel` when the client goes away in the block; its request has been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


class Events(Response):
    """A stream of server-sent events.

    Args:
      events: the data of each: JSON, or a text as it is.
      cancel: called when the client goes away; `events` should then end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Any],
        cancel: Callable[[], object],
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(headers={"Cache-Control": "no-store", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._cancel = events, cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with while_there(receive, self._cancel):
                await send(start)
                async for event in self._events:
                    text = event if isinstance(event, str) else dumps(event)
                    body = f"data: {text}\n\n".encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # it went while something was sent
            self._cancel()
            async for _ in self._events:  # which soon ends
                pass
        finally:
            await self._events.aclose()


def dumps(data: Any) -> str:
    """JSON in one line."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


async def merged(
    runs: Sequence[Running], *, tokens: bool = True
) -> AsyncGenerator[tuple[int, Token | Result]]:
    """Tokens of several runs as they come, each with the run's number; the result of each last.

    Args:
      runs: of the engine.
      tokens: False: results only.

    Raises:
      AlayaError: what a run raises.
    """
    arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def read(number: int, run: Running) -> None:
        try:
            if tokens:
                async for token in run:
                    arrived.put_nowait((number, token))
            arrived.put_nowait((number, await run))
        except Exception as error:
            arrived.put_nowait((number, error))

    readers = [asyncio.create_task(read(i, run)) for i, run in enumerate(runs)]
    try:
        left = len(runs)
        while left:
            number, what = await arrived.get()
            if isinstance(what, Exception):
                raise what
            left -= isinstance(what, Result)
            yield number, what
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
