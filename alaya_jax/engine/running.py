"""A request under way: what the engine's thread tells of it, and who listens."""

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import numpy as np

from alaya_jax.engine.request import Request, Result
from alaya_jax.errors import RequestError
from alaya_jax.generation import Token
from alaya_jax.runtime.job import Job
from alaya_jax.runtime.output import Output
from alaya_jax.runtime.sampling.constraint import Allowed


class Run:
    """What an engine knows of a request. Its thread writes, any thread may read.

    Attributes:
      request, index, ids: what is asked, its number, and its prompt.
      job: what the decoder is asked; None until an `Auto` is resolved.
      split, scored, allowed: see `Job`.
      on_token: called with each token in the engine's thread.
      output, pieces: what it says.
      submitted, admitted, first, last: when; seconds of `time.perf_counter`.
      tried: tokens that were free when it last did not fit, and when that was.
      thread: the engine's, once it is taken.
    """

    def __init__(
        self,
        request: Request,
        ids: np.ndarray,
        on_token: Callable[[Token], Any] | None,
        *,
        split: int,
        scored: int,
    ):
        """See the attributes."""
        self.request, self.ids, self.on_token = request, ids, on_token
        self.split, self.scored = split, scored
        self.index = -1
        self.job: Job | None = None
        self.allowed: Allowed | None = None
        self.output = Output()
        self.output.ask(request.sampling)
        self.pieces: list[str] = []
        self.said: list[int] = []
        self.submitted = time.perf_counter()
        self.admitted: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.tried: tuple[int, float] = (-1, 0.0)
        self.tokens: list[Token] = []
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_over(self) -> bool:
        """Whether it has a result or an error."""
        return self.result is not None or self.error is not None

    def put(self, token: Token) -> None:
        """A token came."""
        with self._changed:
            self.tokens.append(token)
            self._tell()

    def end(self, result: Result | None, error: BaseException | None = None) -> None:
        """It has ended, with one of the two."""
        with self._changed:
            self.result, self.error = result, error
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def require_other_thread(self) -> None:
        """Raises in the engine's own thread, which would wait for itself for ever."""
        if threading.current_thread() is self.thread:
            raise RequestError(
                f"request {self.index} is waited for in the engine's own thread, by an on_token: "
                "the engine would wait for itself; submit there, and wait in another thread"
            )

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Until `ready()`; whether it is."""
        if not ready():
            self.require_other_thread()
        with self._changed:
            return self._changed.wait_for(ready, timeout)

    @contextlib.contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Has it called after each change, until the block ends."""
        with self._changed:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def outcome(self) -> Result:
        """The result; raises the error, where there is one."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


class Running:
    """A request that was submitted: an iterator of its tokens, and its result.

        for token in running: ...           # as they come
        result = running.result()           # waits
        async for token in running: ...
        result = await running

    A request whose handle is dropped is cancelled, unless it has an `on_token`: nobody could see
    what comes of it. Any thread may use it.
    """

    def __init__(self, run: Run, cancel: Callable[[Run], None]):
        """Made by `Engine.submit`."""
        self._run, self._cancel = run, cancel
        if run.on_token is None:
            weakref.finalize(self, cancel, run).atexit = False

    @property
    def index(self) -> int:
        """Its number among the engine's requests, from 0."""
        return self._run.index

    @property
    def prompt_ids(self) -> np.ndarray:
        """Ids of its prompt, int32 [n]."""
        return self._run.ids

    @property
    def tokens(self) -> list[Token]:
        """Those that came so far."""
        return list(self._run.tokens)

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._run.is_over

    def cancel(self) -> None:
        """Ends it: its result holds what came so far ("cancelled"). If it has ended, nothing
        happens. Does not wait.
        """
        self._cancel(self._run)

    def result(self, timeout: float | None = None) -> Result:
        """Waits for its end.

        Args:
          timeout: seconds; None: as long as it takes.

        Raises:
          TimeoutError: it has not ended until then; it goes on.
          RequestError: it is under way, and an `on_token` waits, so that the engine cannot.
          AlayaError: it failed; or what `on_token` raised.
        """
        run = self._run
        if not run.wait(lambda: run.is_over, timeout):
            raise TimeoutError(
                f"request {run.index} has not ended after {timeout} s, with {len(run.tokens)} "
                "tokens so far; wait longer, or cancel()"
            )
        return run.outcome()

    def __iter__(self) -> Iterator[Token]:
        run, at = self._run, 0
        while True:
            run.wait(lambda at=at: len(run.tokens) > at or run.is_over)
            while at < len(run.tokens):
                yield run.tokens[at]
                at += 1
            if run.is_over and at == len(run.tokens):
                break
        run.outcome()

    async def __aiter__(self) -> AsyncIterator[Token]:
        run, at = self._run, 0
        with _Wakes(run) as wakes:
            while True:
                over = run.is_over
                while at < len(run.tokens):
                    yield run.tokens[at]
                    at += 1
                if over:
                    break
                await wakes.wait()
        run.outcome()

    def __await__(self) -> Generator[Any, None, Result]:
        return self._ended().__await__()

    async def _ended(self) -> Result:
        run = self._run
        with _Wakes(run) as wakes:
            while not run.is_over:
                await wakes.wait()
        return run.outcome()

    def __reduce__(self) -> Any:
        raise RequestError("a running request is of this process, and cannot be pickled")

    def __repr__(self) -> str:
        run = self._run
        if run.error is not None:
            how = f"failed: {type(run.error).__name__}"
        else:
            how = "running" if run.result is None else run.result.finish_reason
        return f"Running(request {run.index}, {len(run.tokens)} tokens, {how})"


class _Wakes:
    """Wakes a coroutine whenever a run changes."""

    def __init__(self, run: Run):
        if not run.is_over:
            run.require_other_thread()
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._listening = run.listening(self._tell)

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Until it changes, or has since the last time."""
        await self._event.wait()
        self._event.clear()

    def __enter__(self) -> "_Wakes":
        self._listening.__enter__()
        self._event.set()  # what came before is looked at
        return self

    def __exit__(self, *error: Any) -> None:
        self._listening.__exit__(*error)
