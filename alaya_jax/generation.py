"""Generating text from a session: prefill, then blocks of decode steps, streamed token by token."""

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from alaya_jax.cache.pool import uninterrupted
from alaya_jax.compilation import Watch
from alaya_jax.errors import AlayaError, RequestError
from alaya_jax.progress import progress_bar
from alaya_jax.query.origin import Way
from alaya_jax.query.plan import Attention
from alaya_jax.runtime.decoding import Decoding, read
from alaya_jax.runtime.output import Output, allowed, require_text
from alaya_jax.runtime.programs import Row
from alaya_jax.runtime.sampling.constraint import masks
from alaya_jax.runtime.sampling.params import Greedy, Sampling
from alaya_jax.runtime.sampling.sampler import init_sampler
from alaya_jax.runtime.streams import Streamer, check_listeners, told
from alaya_jax.session import Session
from alaya_jax.settings import methods_under_own_settings, under_own_settings


class Token(NamedTuple):
    """One generated token.

    Attributes:
      id: token id. That of an end of sequence only where its text is not empty.
      text: new text that it completes; may be empty (half a character, held back as the start of
        a stop string, or an id of a padded vocabulary, which stands for no text).
      logprob: of the model's own distribution, natural logarithm.
      sequence: which sequence of the batch.
      alternatives: the likeliest (id, logprob), as many as `Sampling.logprobs` asks for.
    """

    id: int
    text: str
    logprob: float
    sequence: int = 0
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass
class Timing:
    """Wall times, seconds.

    Attributes:
      prefill_tokens: tokens the model was run over before the first new one, longest sequence.
      first_token_s: from the call to the first token.
      decode_tokens: tokens after the first, over the batch.
      decode_s: from the first token to the last.
      compile_s: of both, what compiling took: the first call of a new plan or shape compiles its
        programs, or reads them from disk.
      decode_compile_s: of `decode_s`.
      programs: how many programs were compiled, or read.
    """

    prefill_tokens: int = 0
    first_token_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    compile_s: float = 0.0
    decode_compile_s: float = 0.0
    programs: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, over the batch, without compiling; 0 when nothing was decoded."""
        took = self.decode_s - self.decode_compile_s
        return self.decode_tokens / took if self.decode_tokens and took > 0 else 0.0


@under_own_settings
def generate(  # noqa: PLR0913 - its keywords are its settings
    session: Session,
    tokens: Any = (),
    *,
    max_new_tokens: int = 256,
    attention: Attention | None = None,
    prefill: Attention | None = None,
    sampling: Sampling | list[Sampling] | None = None,
    progress: bool = False,
    streamer: Streamer | None = None,
    on_token: Callable[["Token"], Any] | None = None,
) -> "Generation":
    """Continues a session, yielding tokens as they come.

        session, rest = db.create_session(prompt)
        for token in aj.generate(session, rest, attention=aj.DIPR(beta=50.0)):
            print(token.text, end="", flush=True)

    Stopping early (`break`, Ctrl-C) leaves the session at the tokens yielded so far. A later call
    without new tokens goes on as one call would: penalties count what was said before, half a
    character waits for its other half, and a stop string may begin in one call and end in the next
    (if `max_new_tokens` ended a call, its beginning was emitted already). A request that cannot fit
    is refused here, before anything runs.

    Args:
      session: where to continue.
      tokens: ids that come first: what `create_session` left over, or the next turn of a
        conversation (a list of such for a batch).
      max_new_tokens: at most so many for each sequence.
      attention: what decoding asks of the keys: a query or a `Plan`, or one a layer; default
        `Full()`.
      prefill: what prefill asks of the keys; default `Full()`, or what `attention=Auto(...)` says.
      sampling: default `Greedy()`; one for all sequences or one for each.
      progress: shows a bar for the prefill on stderr when it is a terminal.
      streamer: an object of `put(ids)` and `end()`, such as `transformers.TextStreamer`: it gets
        the prompt's ids [1, n], then each token's [1] as it is yielded.
      on_token: called with each token before it is yielded; what is true ends the generation
        behind that token ("callback").

    Raises:
      RequestError: too long for the model, nothing to feed, or sampling out of range.
      CacheFullError: no room in the cache, or for an index that is asked.
      TokenizerError: stop strings are asked for and the model has no tokenizer.
    """
    check_listeners(streamer, on_token, getattr(session, "batch_size", 1) > 1)
    return Generation(
        _Request(
            session,
            tokens,
            max_new_tokens,
            attention,
            prefill,
            Greedy() if sampling is None else sampling,
            progress,
        ),
        streamer,
        on_token,
    )


@methods_under_own_settings
class Generation(Iterator[Token]):
    """A running generation: an iterator of tokens, and what is known so far.

    When it is dropped, its room is given back at once: the iterator refers to the request, never to
    this object.

    Attributes:
      session: where it runs.
      ids: token ids so far, without those that end a sequence; a list for each sequence.
      finish_reasons: "eos" (or another of the ids that end it), "stop" (a stop string), "length",
        "callback" (`on_token`), or None while it runs; for each sequence.
      timing: see `Timing`.
    """

    def __init__(
        self,
        request: "_Request",
        streamer: Streamer | None = None,
        on_token: Callable[[Token], Any] | None = None,
    ):
        """See `generate`."""
        self._request = request
        self._tokens = request.run()
        if streamer is not None or on_token is not None:
            self._tokens = told(self._tokens, request.prompt, streamer, on_token, request.stop)
        self.session = request.session
        self.ids, self.finish_reasons = request.ids, request.finish_reasons
        self.timing = request.timing
        self._dropped = weakref.finalize(self, request.give_back)
        self._dropped.atexit = False

    @property
    def text(self) -> str | list[str]:
        """All text so far; a list for a batch."""
        return self._request.text

    @property
    def finish_reason(self) -> str | None:
        """Why the (first) sequence ended."""
        return self.finish_reasons[0]

    def __next__(self) -> Token:
        self._request.require_its_turn()
        return next(self._tokens)

    def close(self) -> None:
        """Stops here, as leaving the loop does."""
        self._tokens.close()
        self._request.give_back()

    def __reduce__(self) -> Any:
        raise RequestError(
            "a generation runs in this process and cannot be copied or pickled; take its tokens, "
            "or fork its session"
        )

    def __repr__(self) -> str:
        return f"Generation({[len(i) for i in self.ids]} tokens, {self.finish_reasons})"


class _Request:
    """What a generation is asked, and how far it is."""

    def __init__(
        self,
        session: Session,
        tokens: Any,
        max_new_tokens: int,
        attention: Attention | None,
        prefill: Attention | None,
        sampling: Sampling | list[Sampling],
        progress: bool,
    ):
        if not isinstance(session, Session):
            raise RequestError(
                f"generate({type(session).__name__}, ...): takes a session first; write session, "
                "rest = db.create_session(prompt), then generate(session, rest)"
            )
        if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={max_new_tokens}: must be a count, at least 1")
        max_new_tokens = int(max_new_tokens)
        model, batch = session.model, session.batch_size
        rows = session.rows(tokens)
        if not all(len(row) for row in rows):
            raise RequestError(
                "generate: every sequence needs at least one token to go on from; pass what "
                "create_session left over"
            )
        each = [sampling] * batch if isinstance(sampling, Sampling) else sampling
        if not (isinstance(each, list | tuple) and all(isinstance(s, Sampling) for s in each)):
            raise RequestError(
                f"sampling={sampling!r}: use aj.Greedy(), aj.Sampling(temperature=...), or a list "
                "with one for each sequence"
            )
        require_text(model, each)
        for s in each:
            s.require_fits(max_new_tokens)
        prompts = [np.concatenate([t, row]) for t, row in zip(session.tokens, rows, strict=True)]
        # Tokens that are given, and not only what is pending, begin another output.
        begun = [
            Output() if len(row) > len(pending) else output
            for row, pending, output in zip(
                rows, session.batch.pending, session.outputs, strict=True
            )
        ]
        self._processors, sampler = init_sampler(
            each, prompts, model.config.vocab_size, [output.ids for output in begun]
        )
        self._allowed = [allowed(model, s) for s in each]
        for follow, output in zip(self._allowed, begun, strict=True):
            if follow is not None:
                for id in output.ids[output.begun :]:
                    follow.accept(id)
        # Randomness goes by position: a session that was left goes on as if it had not been.
        ends = [n + len(row) for n, row in zip(session.lengths, rows, strict=True)]
        self._sampler = dataclasses.replace(
            sampler, step=jax.device_put(np.asarray(ends, np.int32))
        )
        longest = max(ends) + max_new_tokens
        plans = session.both_plans(attention, prefill, longest, max(ends))
        # The last token sampled is never fed, so it needs no room.
        session.batch.make_room([len(row) + max_new_tokens - 1 for row in rows], *plans)

        self.session = session
        self._tokenizer = model.tokenizer
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self.finish_reasons: list[str | None] = [None] * batch
        self.timing = Timing(prefill_tokens=max(len(row) for row in rows))
        self._rows = rows
        self._turn = session.batch.turn
        self._alternatives = [s.logprobs for s in each]
        self._max = max_new_tokens
        self._attention, self._prefill = plans
        self._way = Way.of(self._attention)
        self._progress = progress
        self._end_ids = [s.end_ids(model.eos_ids) for s in each]
        self._texts: list[list[str]] = [[] for _ in range(batch)]
        session.outputs = begun
        for output, s in zip(begun, each, strict=True):
            output.ask(s)

    @property
    def text(self) -> str | list[str]:
        texts = ["".join(pieces) for pieces in self._texts]
        return texts if self.session.batched else texts[0]

    def require_its_turn(self) -> None:
        """Raises RequestError where somebody else has gone on with the session."""
        if self._turn != self.session.batch.turn and self._running.any():
            raise RequestError(
                "the session was closed, or went on by another call, since this generation began; "
                "start another generate()"
            )

    @property
    def prompt(self) -> np.ndarray:
        """Ids in front of the first new token, of the first sequence."""
        return np.concatenate([self.session.tokens[0], self._rows[0]])

    def stop(self) -> None:
        """Ends what still runs, as a callback asks."""
        self.finish_reasons[:] = [reason or "callback" for reason in self.finish_reasons]

    def give_back(self) -> None:
        """Gives up the room that was not used; what a later call has reserved is not ours."""
        if self._turn == self.session.batch.turn:
            self.session.batch.give_room_back()

    def run(self) -> Generator[Token]:
        session, started, timing = self.session, time.perf_counter(), self.timing
        on_read = session.account.on_read("prefill", self._prefill)
        total, watch = timing.prefill_tokens, Watch()
        try:
            decoding, table = self._decoding(), session.pool.table(session.sequences)
            with (
                decoding.ahead(table) if self._max > 1 else contextlib.nullcontext(),
                progress_bar("reading the prompt", total, show=self._progress) as advance,
            ):
                passed, fed = session.batch.feed(self._rows, self._prefill, on_read, advance)
            self._mask(decoding)
            row = decoding.first(passed, fed, session.pool.table(session.sequences))
            token, logprob, alternatives, *_ = read(row)
            timing.first_token_s = time.perf_counter() - started
            timing.compile_s, timing.programs = watch.read()
            prefilling = timing.compile_s
            yield from self._accept(token, logprob, alternatives)
            started = time.perf_counter()
            for row in self._decode(decoding):
                timing.compile_s, timing.programs = watch.read()
                timing.decode_compile_s = timing.compile_s - prefilling
                for new in self._accept(*row):
                    timing.decode_s = time.perf_counter() - started
                    timing.decode_tokens += 1
                    yield new
        finally:
            self.give_back()

    def _decoding(self) -> Decoding:
        session = self.session
        width = max(1, *(len(ids) for ids in self._end_ids))
        end_ids = np.full((session.batch_size, width), -1, np.int32)
        for row, ids in zip(end_ids, self._end_ids, strict=True):
            row[: len(ids)] = ids
        return Decoding(
            session.batch.stack,
            session.pool,
            lambda: session.batch.chain(self._attention),
            end_ids,
            (self._processors, self._sampler),
        )

    def _decode(self, decoding: Decoding) -> Iterator[tuple[Any, Any, Any]]:
        """Rows of new tokens [B] (-1 where a sequence has ended), with log-probabilities.

        While one is read, the next step is under way, unless what is read says what may come next.
        """
        left = self._max - 1
        under_way: Row | None = None
        while under_way is not None or (left > 0 and self._running.any()):
            finished, under_way = under_way, None
            waits = finished is not None and self._is_masked
            if left > 0 and self._running.any() and not waits:
                decoding.allow(self._running)
                self._mask(decoding)
                under_way, left = decoding.step(), left - 1
            if finished is not None:
                token, logprob, alternatives, length, count = read(finished)
                batch, plans = self.session.batch, self._attention
                met = batch.verify_met(plans, finished.counts.met)
                if count.any():
                    self.session.account.count(
                        "decode", plans, finished.counts, length.tolist(), count, met=met
                    )
                    yield token, logprob, alternatives

    @property
    def _is_masked(self) -> bool:
        return any(follow is not None for follow in self._allowed)

    def _mask(self, decoding: Decoding) -> None:
        """Says which ids may come next, where not all may."""
        if self._is_masked:
            each = (follow and follow.mask() for follow in self._allowed)
            decoding.mask(masks(each, self.session.model.config.vocab_size))

    @property
    def _running(self) -> np.ndarray:
        return np.asarray([reason is None for reason in self.finish_reasons])

    def _accept(self, ids: Any, logprobs: Any, alternatives: Any) -> Iterator[Token]:
        """Takes one new token of each running sequence."""
        session = self.session
        for b in range(session.batch_size):
            if self.finish_reasons[b] is not None:
                continue
            id = int(ids[b])
            if id < 0:
                raise AlayaError(
                    f"the logits of sequence {b} are not finite after {session.lengths[b]} tokens; "
                    "check the weights, or use dtype='float32'"
                )
            with uninterrupted():
                text = self._take(b, id)
            if self.finish_reasons[b] != "eos" or text:
                wanted = self._alternatives[b]
                likely = zip(*(a[b, :wanted].tolist() for a in alternatives or ()), strict=True)
                yield Token(id, text, float(logprobs[b]), b, tuple(likely))

    def _take(self, b: int, id: int) -> str:
        """A new token of a running sequence; the text that it completes."""
        session, output = self.session, self.session.outputs[b]
        session.accept(b, id, self._way)
        if (follow := self._allowed[b]) is not None:
            follow.accept(id)
        output.open(self._tokenizer, session.model.config.vocab_size)
        ends = id in self._end_ids[b]
        if not ends:
            self.ids[b].append(id)
        last = len(self.ids[b]) == self._max
        text, self.finish_reasons[b] = output.take(id, ends=ends, last=last)
        self._texts[b].append(text)
        return text
