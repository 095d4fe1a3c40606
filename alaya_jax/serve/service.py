"""The life of a server: starting, ready, stopping; and the way to its engine."""

import asyncio
import threading
import time
from collections.abc import Callable

from alaya_jax.engine import Engine, EngineStats, Request, Running
from alaya_jax.errors import EngineClosedError, QueueFullError
from alaya_jax.serve.contexts import Import
from alaya_jax.serve.fields import Refusal
from alaya_jax.serve.ledger import Entry, Ledger
from alaya_jax.serve.metrics import Metrics
from alaya_jax.serve.protocol import Asked, Served


class Service:
    """An engine, and what the routes know beside it.

    Args:
      start: makes the engine; takes as long as loading a model does, in a thread of its own.
      name: of the model, as clients say it.
      attention: words for what is asked of the keys where a request says nothing.
      api_key: without it in `Authorization: Bearer`, nothing is served; None: no key is needed.
      hosts: names by which it may be called; None: any.

    Attributes:
      failure: why it cannot serve, where it cannot: `start` failed, or the engine ended by an
        error. `on_failure` is called then.
      importing: held by the one of `imports` that computes.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        name: str,
        *,
        attention: str = "full",
        api_key: str | None = None,
        hosts: frozenset[str] | None = None,
    ):
        self.name, self.attention, self.api_key, self.hosts = name, attention, api_key, hosts
        self.failure: BaseException | None = None
        self.stopping = False
        self._start = start
        self.on_failure: Callable[[], object] = lambda: None
        self._engine: Engine | None = None
        self._starting = threading.Thread(target=self._run, name="alaya-start", daemon=True)
        self._closed, self._changing = False, threading.Lock()
        self.created = int(time.time())
        self.importing, self.imports = asyncio.Lock(), set[Import]()
        self.metrics = Metrics(self.stats)
        self.ledger = Ledger(self.metrics.ended)

    def start(self) -> None:
        """Begins to make the engine."""
        self._starting.start()

    def wait(self) -> None:
        """Until the engine is there, or starting it has failed."""
        self._starting.join()

    def _run(self) -> None:
        try:
            engine = self._start()
        except BaseException as error:
            self.fail(error)
            return
        with self._changing:
            self._engine = engine
        if self.stopping:  # meanwhile
            self.close()

    @property
    def is_starting(self) -> bool:
        """Whether the engine is being made."""
        return self._starting.is_alive()

    def fail(self, error: BaseException) -> None:
        """It cannot serve any more."""
        if not self.stopping and self.failure is None:
            self.failure = error
            self.on_failure()

    def close(self) -> None:
        """Ends what runs, whose clients hear of it, and lets go of the engine and its database;
        twice is allowed. An engine that is being made is let go of when it is there.
        """
        with self._changing:
            self.stopping = True
            for wanted in list(self.imports):
                wanted.cancel()
            if self._engine is not None and not self._closed:
                self._closed = True
                self._engine.close()
                self._engine.db.close()

    @property
    def state(self) -> str:
        """How it stands: "starting", "ready", "stopping" or "failed"."""
        if self.stopping:
            return "stopping"
        if self.failure is not None:
            return "failed"
        return "starting" if self._engine is None else "ready"

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
          Refusal: it is not there yet, or not any more.
        """
        if self.state != "ready" or self._engine is None:
            raise Refusal(
                f"the server is {self.state}; GET /health says when it is ready",
                status=503,
                code=self.state,
                headers={"Retry-After": "2"},
            )
        return self._engine

    @property
    def served(self) -> Served:
        """What requests are understood against; raises as `engine`."""
        return Served(self.engine.db, self.name, self.attention)

    def submit(self, asked: Asked, id: str) -> list[tuple[Running, Entry]]:
        """Hands the texts of a request to the engine, all of them or none.

        Raises:
          Refusal: the queue is full.
          AlayaError: one can never fit.
        """
        runs: list[tuple[Running, Entry]] = []
        try:
            for prompt, most, sampling in asked.each():
                entry = Entry(id, asked.user, asked.plan, len(prompt))
                wanted = Request(
                    prompt,
                    max_new_tokens=most,
                    attention=asked.attention,
                    sampling=sampling,
                    prompt_logprobs=asked.scores_prompt,
                    cache_salt=asked.cache_salt,
                )
                runs.append((self.engine.submit(wanted, on_token=entry.token), entry))
        except BaseException as error:
            for run, _ in runs:
                run.cancel()
            if isinstance(error, EngineClosedError):
                self.fail(error)
            if isinstance(error, QueueFullError):
                self.metrics.rejected.inc()
                raise Refusal(
                    str(error), status=429, code="queue_full", headers={"Retry-After": "1"}
                ) from error
            raise
        for _, entry in runs:
            self.ledger.begin(entry)
        return runs

    def stats(self) -> EngineStats | None:
        """How the engine stands; None where there is none."""
        return None if self._engine is None or self._closed else self._engine.stats()
