"""Many requests at once over one database: they share its pool, its model's programs and, where
they begin alike, what was computed of their prompts.

    with aj.Engine(db) as engine:
        running = engine.submit(aj.Request("Three rivers:", max_new_tokens=40))
        for token in running:
            print(token.text, end="", flush=True)
        for result in engine.run([aj.Request(prompt) for prompt in prompts]):
            print(result.text, result.timing)
"""

import collections
import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from alaya_jax import prompts
from alaya_jax.db import DB
from alaya_jax.engine.loop import Loop
from alaya_jax.engine.request import EngineStats, Request, Result
from alaya_jax.engine.running import Run, Running
from alaya_jax.errors import CacheFullError, QueueFullError, RequestError
from alaya_jax.generation import Token
from alaya_jax.progress import progress_bar
from alaya_jax.query import Full
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Attention, Plans, indexes_of, plan_for, tier_of
from alaya_jax.runtime.batch import CHUNKS
from alaya_jax.runtime.output import allowed, require_text
from alaya_jax.runtime.sampling.params import Greedy, Sampling
from alaya_jax.runtime.sampling.sampler import check_vocabulary
from alaya_jax.settings import methods_under_own_settings


@methods_under_own_settings
class Engine:
    """Runs requests of a database side by side: continuous batching.

    One thread of its own does the work, turn by turn: it lets in waiting requests that fit, reads a
    chunk of one prompt, and has all others choose a token. What a request gets is what `generate`
    would give it alone, whoever runs beside it. The order in which requests are let in, and lose
    their pages, is in `docs/serving.md`. Any thread may use it, and the database meanwhile.
    An engine that is dropped is closed, but nobody waits for it.

    Args:
      db: where it runs; closing it closes the engine.
      slots: requests at most that have pages at the same time.
      chunk: tokens at most that are read of prompts in a turn, while others wait for their next.
      waiting: requests at most that have no pages yet.

    Raises:
      RequestError: a setting is out of its range, or JAX runs in several processes.
    """

    def __init__(self, db: DB, slots: int = 16, chunk: int = 512, waiting: int = 1024):
        if not isinstance(db, DB):
            raise RequestError(f"Engine({type(db).__name__}): takes a database, aj.DB(path, model)")
        for name, value in (("slots", slots), ("chunk", chunk), ("waiting", waiting)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise RequestError(f"Engine({name}={value!r}): must be a count, at least 1")
        if jax.process_count() > 1:
            raise RequestError(
                "Engine: JAX runs in several processes here, which would have to take turns with "
                "the same requests; use aj.generate in each of them"
            )
        self.db = db
        self._slots, self._chunk = int(slots), int(chunk)
        self._loop = Loop(db, int(slots), int(chunk), int(waiting))
        # Whoever drops it may hold the pool's lock, and must not wait for a thread that needs it.
        self._dropped = weakref.finalize(self, self._loop.stop)
        self._dropped.atexit = False
        db.close_before(self._loop)

    def submit(self, request: Request, on_token: Callable[[Token], Any] | None = None) -> Running:
        """Takes a request, and returns at once.

        Args:
          request: what is asked.
          on_token: called with each token in the engine's thread, which waits for it; what is true
            cancels the request behind that token, and what it raises becomes its error.

        Raises:
          RequestError: it can never be served: it is too long for the model, or asks for what is
            not to be had.
          CacheFullError: it, or an index that it asks, would not fit if it were alone.
          TokenizerError: it needs a tokenizer or chat template, and the model has none.
          QueueFullError: as many are waiting as may.
          EngineClosedError: the engine is closed.
        """
        if not isinstance(request, Request):
            raise RequestError(f"submit({type(request).__name__}): takes an aj.Request(prompt)")
        if on_token is not None and not callable(on_token):
            raise RequestError(f"on_token={on_token!r}: must be a function of a token")
        ids = prompt_ids(self.db, request.prompt)
        scored = int(request.prompt_logprobs)
        return self.start(Run(request, ids, on_token, split=len(ids), scored=scored))

    def start(self, run: Run) -> Running:
        """`submit`, of a prompt whose ids are known."""
        request, ids = run.request, run.ids
        self._require_possible(request, ids)
        run.allowed = allowed(self.db.model, request.sampling)
        if not isinstance(request.attention, Auto) and not isinstance(request.prefill, Auto):
            run.job = self._loop.job(run, *self._plans(request, len(ids)))
        self._loop.enqueue(run)
        return Running(run, self._loop.cancel)

    def run(self, requests: Iterable[Request], progress: bool = False) -> Iterator[Result]:
        """Runs requests, and yields their results in the order of the requests.

        As many are submitted ahead as may wait. When the iterator is left early, what has not ended
        is cancelled.

        Args:
          requests: taken one after another, as there is room for them.
          progress: shows a bar on stderr when it is a terminal.

        Raises:
          AlayaError: the request whose turn it is failed, or could not be taken; see `submit`.
        """
        given = list(requests) if progress else requests
        total = len(given) if isinstance(given, list) else 0
        starts = (functools.partial(self.submit, request) for request in given)
        with (
            progress_bar("answering", total, "requests", show=progress) as advance,
            contextlib.closing(in_order(starts)) as results,
        ):
            for result in results:
                yield result
                advance(1)

    def warm_up(
        self,
        attention: Attention | None = None,
        sampling: Sequence[Sampling] = (Greedy(),),
        *,
        progress: bool = False,
    ) -> None:
        """Has the programs compiled, or read from disk, that requests of a plan wait for: by a few
        short ones of its own, which share nothing. Call it before others come.

        They are those of the layers for prompts, in chunks of 8, 64 and 512 tokens, and for steps
        of 1, 4, 16, ... rows; and the choice of a token in as many rows: 9 with 16 slots. Behind
        that nothing is compiled for texts of up to 8,192 tokens (512 pages of 16) with that plan.

        Args:
          attention: see `Request`.
          sampling: one of each kind that will be asked: `Greedy()` stands for all temperatures and
            filters; `Greedy(logprobs=1)` for alternatives and penalties; with `min_tokens=1` either
            stands for those with a constraint.
          progress: shows a bar on stderr when it is a terminal.

        Raises:
          AlayaError: as `submit`; or one of them failed.
        """
        widths = [n + 1 for n in (0, *CHUNKS) if n < self._chunk]
        if self.db.pool.target.platform == "cpu":
            widths = widths[: len(CHUNKS)]
        rows, n = [1], 1  # the fewest requests that take each number of rows
        while n < self._slots:
            rows, n = [*rows, n + 1], n * 4
        waves = [(length, 1, sampling[0]) for length in widths]
        waves += [(1, n, each) for i, each in enumerate(sampling) for n in rows[i == 0 :]]
        with progress_bar("compiling", len(waves), "steps", show=progress) as advance:
            for length, count, each in waves:
                self._wave(length, count, attention, each)
                advance(1)

    def _wave(
        self, length: int, count: int, attention: Attention | None, sampling: Sampling
    ) -> None:
        """Runs requests of so many tokens at the same time."""
        most = 8 + count * length // self._chunk  # until the last one's prompt is read, and more
        ends: dict[str, Any] = {"ignore_eos": True, "min_tokens": 0}
        if sampling.is_masked:
            ends = {"ignore_eos": False, "min_tokens": most}
        endless = dataclasses.replace(sampling, constraint=None, stop=(), stop_ids=(), **ends)
        requests = [
            Request([0] * length, most, attention, None, endless, cache_salt=f"warm-up {i}")
            for i in range(count)
        ]
        with self._loop.together():
            running = [self.submit(request) for request in requests]
        for each in running:
            each.result()

    def stats(self) -> EngineStats:
        """What it does at the moment, and has done."""
        return self._loop.stats()

    def close(self) -> None:
        """Ends all requests, those that run with an `EngineClosedError`, and gives their pages
        back; closing twice is allowed. The database stays open.
        """
        self._dropped.detach()
        self._loop.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise RequestError(
            "an engine runs in this process and cannot be copied or pickled; open its database and "
            "another engine there"
        )

    def __repr__(self) -> str:
        if self._loop.is_closing:
            return "Engine(closed)"
        stats = self.stats()
        return f"Engine({self.db.model.name}, {stats.running} running, {stats.waiting} waiting)"

    def _plans(self, request: Request, n: int) -> tuple[Plans, Plans]:
        """What decoding and the prefill ask; raises where there is no room for it."""
        model, home = self.db.model, self.db.home
        longest = n + request.max_new_tokens

        def learnt() -> bool:
            return home.indexes.learnt is not None

        def plans(asked: Any, length: int) -> Plans:
            asked = Full() if asked is None else asked
            found = plan_for(asked, model.config, length, None, learnt)
            parts = home.indexes.parts(indexes_of(found, model.config.num_hidden_layers))
            if not home.indexes.room.fits(parts):
                home.indexes.room.refuse(parts)
            return found

        each = plans(request.attention, longest), plans(request.prefill, n)
        if tier_of(*each) == "host":
            raise RequestError(
                "Plan(tier='host'): an engine's requests share the pool, into which stored pages "
                "are brought; use aj.generate for a context that is read where it lies"
            )
        return each

    def _require_possible(self, request: Request, ids: np.ndarray) -> None:
        """Raises where a request can never be served."""
        model, pool, sampling = self.db.model, self.db.pool, request.sampling
        require_text(model, [sampling])
        check_vocabulary(sampling, model.config.vocab_size)
        n, most = len(ids), int(request.max_new_tokens)
        if not n:
            raise RequestError("the prompt has no tokens; give at least one")
        # The last token is never fed, so it needs no room.
        total, limit = n + max(most - 1, 0), model.length_limit
        if total > limit:
            raise RequestError(
                f"{n:,} tokens of the prompt and {most:,} to come exceed the {limit:,} that "
                f"{model.name} takes; shorten it, ask for fewer (max_new_tokens=), or "
                f"{model.way_to_longer}"
            )
        if total > pool.capacity_tokens:
            needed = self.db.budget.for_tokens(model, pool.page_size, total)
            raise CacheFullError(
                f"{n:,} tokens of the prompt and {most:,} to come need {total:,} tokens of the KV "
                f"cache, which holds {pool.capacity_tokens:,}; ask for fewer (max_new_tokens=), or "
                f"raise {self.db.budget.setting} to at least {needed.device_bytes:,} bytes"
            )


def in_order(starts: Iterable[Callable[[], Running]]) -> Generator[Result]:
    """Starts requests, as many ahead as may wait, and yields their results in their order. When it
    is left early, what has not ended is cancelled.
    """
    ahead: collections.deque[Running] = collections.deque()
    try:
        for start in starts:
            while True:
                try:
                    ahead.append(start())
                    break
                except QueueFullError:
                    if not ahead:
                        raise
                yield ahead.popleft().result()
            while ahead and ahead[0].done():
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for running in ahead:
            running.cancel()


def prompt_ids(db: DB, prompt: Any) -> np.ndarray:
    """Ids of a request's prompt; see `Request`."""
    messages = isinstance(prompt, list | tuple) and any(isinstance(p, Mapping) for p in prompt)
    given = (None, prompt) if messages else (prompt, None)
    # Not `DB.prompt`, which looks at contexts for a document's date: no lock is waited for.
    return prompts.of(db.model, *given, None, None).ids


__all__ = ["Engine", "EngineStats", "Request", "Result", "Running", "prompt_ids"]
