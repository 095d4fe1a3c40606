"""The thread that owns an engine's decoder: it lets requests in, has them take turns, and tells."""

import atexit
import collections
import contextlib
import threading
import time
import weakref
from typing import Any

import numpy as np

from alaya_jax.compilation import Watch
from alaya_jax.db import DB
from alaya_jax.engine.request import EngineStats, FinishReason, Result, Times, scored
from alaya_jax.engine.running import Run
from alaya_jax.errors import AlayaError, CacheFullError, EngineClosedError, QueueFullError
from alaya_jax.generation import Token
from alaya_jax.query.plan import Plans
from alaya_jax.runtime.decoder import Decoder, Event, Failed, Preempted, Scored
from alaya_jax.runtime.group import BLOCK, New, Slot
from alaya_jax.runtime.job import Job
from alaya_jax.runtime.waiting import Waiting
from alaya_jax.settings import for_other_threads

SHARES_FROM = 32
"""Tokens that a request waits for, where another is just computing them."""

RETRY = 0.05
"""Seconds after which a request that did not fit is looked at again, though no page came free: a
session beside the engine may have been closed, or a context unpinned."""


_open: weakref.WeakSet["Loop"] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A process that ends while a program runs is aborted by JAX's runtime (SIGABRT)."""
    for loop in list(_open):
        loop.close()


class Loop:
    """A decoder, its requests, and their thread. Public methods may be called from any thread."""

    def __init__(self, db: DB, slots: int, chunk: int, most_waiting: int):
        """Starts the thread."""
        self.db = db
        self._decoder = Decoder(db.pool, slots, chunk)
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._new: collections.deque[Run] = collections.deque()
        self._cancelled: collections.deque[Run] = collections.deque()
        self._closing = self._closed = False
        self._waiting: Waiting[Run] = Waiting()
        self._runs: dict[Job, Run] = {}
        self._queued = self._count = self._finished = self._failed = self._reused = 0
        self._programs = 0
        self._held: tuple[Slot, ...] = ()
        """As of the end of the last turn, for other threads."""
        self._thread = threading.Thread(
            target=for_other_threads(self._serve), name="alaya engine", daemon=True
        )
        self._thread.start()
        _open.add(self)

    def enqueue(self, run: Run) -> None:
        """Takes a request.

        Raises:
          QueueFullError: as many are waiting as may.
          EngineClosedError: it is closed.
        """
        with self._changed:
            if self._closing:
                raise _closed()
            if self._queued >= self._most_waiting:
                raise QueueFullError(
                    f"{self._queued} requests are waiting, and no more may "
                    f"(Engine(waiting={self._most_waiting})); submit it again when some are done, "
                    "or let more wait"
                )
            self._queued += 1
            run.index, self._count = self._count, self._count + 1
            run.thread = self._thread
            self._new.append(run)
            self._changed.notify()

    def together(self) -> contextlib.AbstractContextManager[Any]:
        """Around requests that are to be seen all at once."""
        return self._changed

    def cancel(self, run: Run) -> None:
        """Ends a request; does not wait."""
        with self._changed:
            if not run.is_over:
                self._cancelled.append(run)
                self._changed.notify()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    def stop(self) -> None:
        """Ends all requests, and the thread; waits for nobody."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self) -> None:
        """`stop`, and waits for the thread, unless it calls this itself."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        decoder, pool, held = self._decoder, self.db.pool, self._held
        with pool.lock:
            free = pool.free_tokens // pool.page_size
            requests = _pages([slot.batch.pages for slot in held])
            kept = np.setdiff1d(self.db.catalogue.resident_pages(), requests)
        pages = pool.capacity_tokens // pool.page_size
        return EngineStats(
            slots=decoder.slots,
            running=len(held),
            prefilling=decoder.prefilling,
            waiting=self._queued,
            requests=self._count,
            finished=self._finished,
            failed=self._failed,
            pages=pages,
            pages_free=free,
            pages_requests=len(requests),
            pages_contexts=len(kept),
            pages_others=pages - free - len(requests) - len(kept),
            tokens_prefilled=decoder.prefilled,
            tokens_reused=self._reused,
            tokens_generated=decoder.generated,
            preemptions=decoder.preemptions,
            steps=decoder.steps,
            programs=self._programs,
        )

    def _serve(self) -> None:
        error: BaseException | None = None
        watch = Watch()
        try:
            while self._listen():
                self._admit()
                for event in self._decoder.turn():
                    self._handle(event)
                self._held = tuple(self._decoder.held)
                self._programs = watch.read()[1]
        except BaseException as raised:  # nobody else would tell who waits
            error = raised
        self._end(error)

    def _listen(self) -> bool:
        """Takes what other threads want; waits while there is nothing to do. False: it ends."""
        with self._changed:
            told = self._closing or self._new or self._cancelled
            if not told and self._decoder.is_idle:
                self._changed.wait(RETRY if len(self._waiting) else None)
            if self._closing:
                return False
            new, self._new = self._new, collections.deque()
            cancelled, self._cancelled = self._cancelled, collections.deque()
        for run in new:
            self._waiting.add(run)
        for run in cancelled:
            self._cancel(run)
        return True

    def _cancel(self, run: Run) -> None:
        if run.is_over:
            return
        if run in self._waiting:
            self._waiting.remove(run)
            self._leaves_queue()
        elif run.job is not None:
            self._decoder.remove(run.job)
        self._finish(run, "cancelled")

    def _leaves_queue(self) -> None:
        with self._changed:
            self._queued -= 1

    def _admit(self) -> None:
        """Lets in who fits now: of those that may go next, first who shares most with a request
        that has pages. Who shares with one whose prompt is being read waits for that.
        """
        decoder = self._decoder
        while len(self._waiting) and len(decoder.held) < decoder.slots:
            ready = []
            for run in self._waiting.candidates():
                shared = coming = 0
                if run.job is not None:
                    shared, coming = decoder.shared(run.job)[0], decoder.coming(run.job)
                if coming - shared < SHARES_FROM:
                    ready.append((shared, run))
            ready.sort(key=lambda pair: -pair[0])
            if not any(self._enter(run) for _, run in ready):
                break

    def _enter(self, run: Run) -> bool:
        """Gives a request pages, if there are enough; whether it waits no more."""
        pool = self.db.pool
        free, now = pool.free_tokens, time.perf_counter()
        if run.tried[0] == free and now - run.tried[1] < RETRY:
            return False
        if self._lacks(run, free):
            run.tried = free, now
            return False
        batch = None
        try:
            job = run.job
            ids = run.ids[: run.scored] if job is None and run.scored else run.ids
            if job is not None:
                ids = job.row[: job.reusable + 1]
            if run.request.cache_salt:
                ids = ids[:1]  # of one token nothing is taken from a context
            session, _ = self.db.create_session(ids, tier="device")
            batch = session.batch
            if job is None:
                job = self.job(run, *self._resolved(run, session))
            self._decoder.insert(job, batch)
        except CacheFullError as error:
            if batch is not None:
                batch.release()
            run.tried = pool.free_tokens, now
            if not self._is_alone:
                return False
            self._waiting.take(run)  # nobody holds what it lacks
            self._leaves_queue()
            self._fail(run, error)
            return True
        except Exception as error:
            if batch is not None:
                batch.release()
            self._waiting.remove(run)
            self._leaves_queue()
            self._fail(run, error)
            return True
        run.job, self._runs[job] = job, run
        if run.admitted is None:
            run.admitted = now
            self._reused += job.reused or 0
        self._waiting.take(run)
        self._leaves_queue()
        return True

    @property
    def _is_alone(self) -> bool:
        """Whether nobody has pages who may give some back."""
        return self._decoder.is_idle and self.stats().pages_others == 0

    def _lacks(self, run: Run, free: int) -> bool:
        """Whether a request surely does not fit into the free tokens, whatever is evicted: to try
        would only evict what others will ask for.
        """
        pool, job, catalogue = self.db.pool, run.job, self.db.catalogue
        if job is None or self._is_alone:
            return False
        size = pool.page_size
        there = free // size + catalogue.evictable()
        needed = -(-min(len(job.row) + BLOCK, job.total) // size)
        if needed - self._decoder.shared(job)[0] // size <= there:
            return False
        if job.salt:
            return True
        stored = catalogue.in_memory(job.row[: job.reusable + 1], exact=self.db.store_dtype is None)
        return needed - stored // size > there

    def _resolved(self, run: Run, session: Any) -> tuple[Plans, Plans]:
        """The plans of a request that leaves them to `Auto`."""
        request, n = run.request, len(run.ids)
        longest = n + request.max_new_tokens
        return session.both_plans(request.attention, request.prefill, longest, n)

    def job(self, run: Run, attention: Plans, prefill: Plans) -> Job:
        """What the decoder is asked."""
        request = run.request
        end_ids = request.sampling.end_ids(self.db.model.eos_ids)
        most = int(request.max_new_tokens)
        asked = attention, prefill, request.sampling, end_ids, most
        more: Any = {"scored": run.scored, "salt": request.cache_salt}
        return Job(run.ids, *asked, split=run.split, allowed=run.allowed, **more)

    def _handle(self, event: Event) -> None:
        if isinstance(event, New):
            run = self._runs.get(event.slot.job)
            if run is not None:
                try:
                    self._take(run, event)
                except BaseException as error:  # sys.exit() of one's own too
                    self._decoder.remove(event.slot.job)
                    self._fail(run, error)
            return
        run = self._runs.get(event.job)
        if run is None:
            return
        match event:
            case Failed():
                self._fail(run, event.error)
            case Preempted():
                with self._changed:
                    self._queued += 1
                self._waiting.add_first(run)
            case Scored():
                self._finish(run, "length")

    def _take(self, run: Run, new: New) -> None:
        """A token of a request; what it raises ends the request."""
        model, request = self.db.model, run.request
        now = time.perf_counter()
        if new.id < 0:
            raise AlayaError(
                f"the logits of request {run.index} are not finite after "
                f"{len(run.ids) + len(run.said)} tokens; check the weights, or use dtype='float32'"
            )
        run.first = now if run.first is None else run.first
        run.last = now
        job, output = new.slot.job, run.output
        ends = new.id in job.end_ids
        if not ends:
            run.said.append(new.id)
        output.ids.append(new.id)
        output.open(model.tokenizer, model.config.vocab_size)
        last = len(run.said) == request.max_new_tokens
        text, reason = output.take(new.id, ends=ends, last=last)
        run.pieces.append(text)
        if reason is not None:
            self._decoder.remove(job)
        if reason != "eos" or text:
            token = Token(new.id, text, new.logprob, 0, new.alternatives)
            run.put(token)
            if run.on_token is not None and run.on_token(token) and reason is None:
                self._decoder.remove(job)
                reason = "cancelled"
        if reason is not None:
            self._finish(run, reason)

    def _finish(self, run: Run, reason: Any) -> None:
        job, now = run.job, time.perf_counter()
        if job is not None:
            self._runs.pop(job, None)
        waited = (now if run.admitted is None else run.admitted) - run.submitted
        decoded = 0.0 if run.first is None or run.last is None else run.last - run.first
        first = None if run.first is None else run.first - run.submitted
        more = 0 if job is None else len(job.generated) - 1
        logprobs = alternatives = None
        if run.scored and job is not None and reason != "cancelled":
            logprobs, alternatives = scored(job.scores, len(run.ids))
        finish_reason: FinishReason = reason
        self._finished += 1
        run.end(
            Result(
                index=run.index,
                prompt_tokens=len(run.ids),
                ids=tuple(run.said),
                text="".join(run.pieces),
                tokens=tuple(run.tokens),
                finish_reason=finish_reason,
                cached_tokens=(job and job.reused) or 0,
                keys_read=job.attended / more if job is not None and more > 0 else float("nan"),
                timing=Times(waited, first, decoded, now - run.submitted),
                programs=0 if job is None else job.programs,
                prompt_logprobs=logprobs,
                prompt_alternatives=alternatives,
            )
        )

    def _fail(self, run: Run, error: BaseException) -> None:
        if run.job is not None:
            self._runs.pop(run.job, None)
        self._failed += 1
        run.end(None, error)

    def _end(self, error: BaseException | None) -> None:
        """Nobody waits for ever: all that is left fails, and its pages are given back."""
        with self._changed:
            self._closing = True
            left = [*self._new, *self._waiting, *self._runs.values()]
            self._new.clear()
        with contextlib.suppress(Exception):
            self._decoder.clear()
        self._held = ()
        for run in dict.fromkeys(left):
            if not run.is_over:
                why = _closed() if error is None else _broken(error)
                self._fail(run, why)
        self._queued = 0


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine is closed; open another with aj.Engine(db)")


def _broken(error: BaseException) -> EngineClosedError:
    closed = EngineClosedError(
        f"the engine ended by an error: {type(error).__name__}: {str(error)[:300]}; open another "
        "with aj.Engine(db)"
    )
    closed.__cause__ = error
    return closed


def _pages(lists: list[np.ndarray]) -> np.ndarray:
    """The different pages of several sequences."""
    return np.unique(np.concatenate(lists)) if lists else np.zeros(0, np.int32)
