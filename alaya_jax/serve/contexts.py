"""Stored contexts over HTTP: imported with progress, listed, pinned, deleted."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from alaya_jax.contexts.context import Context
from alaya_jax.errors import AlayaError, CacheFullError
from alaya_jax.serve.fields import Body, Refusal
from alaya_jax.serve.messages import taken_messages
from alaya_jax.serve.protocol import Served


def described(context: Context) -> dict[str, Any]:
    """A context as JSON."""
    return {
        "id": context.id,
        "object": "context",
        "title": context.title,
        "tokens": context.num_tokens,
        "exact_tokens": context.exact_tokens,
        "bytes": context.nbytes,
        "created": int(context.created),
        "pinned": context.pinned,
        "in_memory": context.resident is not None,
        "store_dtype": context.store_dtype,
        "problem": context.problem,
    }


class Import:
    """A context that is computed and stored, in a thread of its own.

    Args:
      served: its database.
      data: the request: a document, messages or a prompt, and a title.

    Raises:
      Refusal: it is not understood.
      AlayaError: of the chat template, or the tokenizer.
    """

    def __init__(self, served: Served, data: Any):
        body = Body(data)
        served.check_model(body)
        self.stream = body.take("stream", bool, False)
        self._title = body.take("title", str, "")
        self._pinned = body.take("pinned", bool, False)
        prompt, document = body.either("prompt"), body.take("document", str)
        messages = taken_messages(body, served.db.model.chat) if body.has("messages") else None
        body.done()
        self._db = served.db
        if (prompt is None) == (not messages and document is None):
            raise Refusal("give a document, messages, both of them, or a prompt", "document")
        if prompt is None:
            found = self._db.prompt(messages=messages, document=document, to_store=True)
            self._ids = found.ids
        else:
            self._ids = served.ids(prompt)
        if len(self._ids) > self._db.model.length_limit:
            raise Refusal(
                f"it has {len(self._ids):,} tokens, and {served.name} takes up to "
                f"{self._db.model.length_limit:,}",
                code="context_length_exceeded",
            )
        self._gone = threading.Event()
        self.done, self.total = 0, len(self._ids)

    def cancel(self) -> None:
        """Stores nothing, and ends after the chunk that is computed now."""
        self._gone.set()

    def run(self, on_progress: Callable[[], object] = lambda: None) -> Context:
        """Computes and stores it; what is stored already is not computed again.

        Args:
          on_progress: called when `done` has grown.

        Raises:
          Refusal: there is no room now.
          AlayaError: as `DB.import_context`.
        """

        def advance(count: int) -> None:
            self._require_wanted()
            self.done += count
            on_progress()

        db = self._db
        try:
            self._require_wanted()
            context = db.import_context(self._ids, title=self._title, progress=advance)
            if self._pinned:
                context.pin()
        except CacheFullError as error:
            if self.total > db.pool.capacity_tokens:
                raise
            raise Refusal(
                f"there is no room beside the requests that run: {error}",
                status=503,
                code="cache_full",
                headers={"Retry-After": "5"},
            ) from error
        self.done = self.total
        return context

    def _require_wanted(self) -> None:
        if self._gone.is_set():
            raise _Gone("the client that asked for the context went away, or the server stops")


class _Gone(AlayaError):
    """Nobody waits any more."""


async def events(wanted: Import) -> AsyncGenerator[dict[str, Any]]:
    """How far an import is, at most four times a second, then the context."""
    loop, moved = asyncio.get_running_loop(), asyncio.Event()
    work = asyncio.create_task(
        asyncio.to_thread(wanted.run, lambda: loop.call_soon_threadsafe(moved.set))
    )
    work.add_done_callback(lambda _: moved.set())
    started = time.perf_counter()
    try:
        while not work.done():
            await moved.wait()
            moved.clear()
            if not work.done():
                yield {
                    "object": "context.progress",
                    "tokens": wanted.done,
                    "of": wanted.total,
                    "seconds": time.perf_counter() - started,
                }
                await asyncio.sleep(0.25)
        yield described(work.result())
    finally:
        wanted.cancel()
        with contextlib.suppress(Exception):
            await work
