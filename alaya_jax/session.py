"""A session: one running request (or a batch), its tokens, and its pages in the pool."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Array, Float

from alaya_jax.attention.counts import Counts
from alaya_jax.cache.pool import PagePool, Sequence, uninterrupted
from alaya_jax.contexts import graphs
from alaya_jax.errors import CacheFullError, RequestError
from alaya_jax.explain.explanation import Explanation
from alaya_jax.explain.reads import Reads
from alaya_jax.explain.report import report
from alaya_jax.index import Graph, GraphLayer, Indexed
from alaya_jax.index.pages import PageIndexes
from alaya_jax.model import Model
from alaya_jax.models.tokenizer import TokenStream
from alaya_jax.optimizer.choice import PlanChoice
from alaya_jax.optimizer.prefill import PrefillChoice
from alaya_jax.optimizer.situation import choose_for, choose_prefill_for
from alaya_jax.query import Full
from alaya_jax.query.auto import Auto
from alaya_jax.query.origin import Origin, Way
from alaya_jax.query.plan import Attention, Plans, indexes_of, plan_for
from alaya_jax.runtime import layerwise
from alaya_jax.runtime.programs import Fed, Passed
from alaya_jax.runtime.sampling.params import StopText
from alaya_jax.runtime.stack import Stack
from alaya_jax.settings import methods_under_own_settings

if TYPE_CHECKING:
    from alaya_jax.contexts.context import Context

CHUNKS = (8, 64, 512)
"""Tokens that one step of a prefill takes; the last chunk of a prefill is padded to the
next.
"""

GPU_CHUNK = 4096
"""On a GPU a chunk may have so many: 512 queries of 32 heads are 128 blocks of a kernel, fewer than
an H100 has multiprocessors.
"""


@dataclasses.dataclass
class Output:
    """What a sequence has said since it was last given tokens: one output, over all calls.

    Attributes:
      ids: token ids, those that end a text too.
      stream, stop: of the text that is being written; None before its first token, and where
        there is no tokenizer.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    stream: TokenStream | None = None
    stop: StopText = dataclasses.field(default_factory=lambda: StopText(()))

    def copy(self) -> "Output":
        """One that goes on by itself."""
        stream = self.stream and self.stream.copy()
        return Output(list(self.ids), stream, self.stop.going_on(self.stop.stop))


@methods_under_own_settings
class Session:
    """The connection between stored contexts and one running request (AlayaDB, section 5).

    Made by `DB.create_session`. Two ways to use it:

    - `aj.generate(session, rest)` runs the model of the database;
    - a model of your own calls `update` and `attention` in each layer.

    Pages are given back by `close`, at the end of a `with` block, or when the session is collected.
    One thread at a time may use a session; threads may share its database.

    Attributes:
      reused: tokens of each sequence that came from a stored context.
      contexts: the context of each, or None.
      origins: how the keys and values of each were computed; see `Origin`.
    """

    def __init__(
        self,
        model: Model,
        pool: PagePool,
        indexes: PageIndexes,
        stack: Stack,
        sequences: list[Sequence],
        tokens: list[np.ndarray],
        contexts: "list[Context | None]",
        *,
        origins: list[Origin],
        batched: bool,
    ):
        """Made by the database; takes over the pages of `sequences`."""
        self.model = model
        self.pool = pool
        self.indexes = indexes
        self.stack = stack
        self._sequences = sequences
        self.batched = batched
        self.contexts = contexts
        self.origins = origins
        self.reused = [s.length for s in sequences]
        self.pending: list[list[int]] = [[] for _ in sequences]
        """Tokens that were generated but are not in the cache yet: the next call feeds them
        first.
        """
        self.outputs = [Output() for _ in sequences]
        """What each sequence said since it was last given tokens."""
        self.reads: dict[str, Reads] = {}
        self._graphs: dict[tuple[int, Any, int], GraphLayer] = {}
        """By sequence, building settings and layer; kept as the session's pages are."""
        self.lender: Callable[[np.ndarray, Graph | None], tuple[Context | None, int]] = lambda *_: (
            None,
            0,
        )
        """Finds another context's graph where a sequence's own has none, and how far it goes."""
        self.choice: PlanChoice | None = None
        """What `Auto` chose last, and why."""
        self.prefill_choice: PrefillChoice | None = None
        """The same for a prefill."""
        self.dated = ""
        """What the chat template printed for the time, where it does."""
        self.turn = 0
        """Calls so far that write here: a generation of an earlier turn must not go on."""
        self._tokens: list[list[int]] = [t.tolist() for t in tokens]
        self._release = weakref.finalize(self, _release, pool, sequences)
        self._release.atexit = False
        self.ahead = np.zeros(model.config.num_hidden_layers, np.int64)
        """Tokens that `update` wrote in each layer and not in all yet."""

    @property
    def sequences(self) -> list[Sequence]:
        """Where each sequence is in the pool.

        Raises:
          RequestError: the session is closed.
        """
        if not self._release.alive:
            raise RequestError("the session is closed; open another with DB.create_session")
        return self._sequences

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self._sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, of each sequence."""
        return [s.length for s in self.sequences]

    @property
    def length(self) -> int:
        """Tokens in the cache; of the longest sequence of a batch."""
        return max(self.lengths)

    @property
    def tokens(self) -> list[np.ndarray]:
        """Ids of the tokens in the cache, of each sequence; shorter where `update` gave none."""
        return [np.asarray(t, np.int32) for t in self._tokens]

    @property
    def context(self) -> "Context | None":
        """The context that the (first) sequence was opened on."""
        return self.contexts[0]

    def rows(self, tokens: Any) -> list[np.ndarray]:
        """One array of new token ids for each sequence, what is pending in front.

        Raises:
          RequestError: not one list for each sequence, or ids outside the vocabulary.
        """
        rows = list(tokens) if self.batched else [tokens]
        rows = rows or [()] * self.batch_size  # nothing new, in a batch
        if len(rows) != self.batch_size:
            raise RequestError(
                f"the session has {self.batch_size} sequences and {len(rows)} lists of tokens were "
                "given"
            )
        checked = [self.model.check_tokens(row) for row in rows]
        return [
            np.concatenate([np.asarray(p, np.int32), row])
            for p, row in zip(self.pending, checked, strict=True)
        ]

    def prefill(
        self,
        tokens: Any,
        attention: Attention | None = None,
        *,
        on_chunk: Callable[[int], None] | None = None,
    ) -> Float[Array, "B V"]:
        """Runs the model over new tokens and keeps their keys and values.

        Args:
          tokens: ids of the new tokens (a list of such for a batch; lengths may differ, and be 0
            for a sequence that has nothing new, whose logits are then meaningless).
          attention: what the new tokens attend to; default `Full()`.
          on_chunk: called with the number of tokens done, after each chunk.

        Returns:
          logits of the last token of each sequence, float32.

        Raises:
          RequestError: longer than the model allows.
          CacheFullError: no room; nothing was computed.
        """
        rows = self.rows(tokens)
        if not max(len(row) for row in rows):
            raise RequestError("prefill: there are no tokens to run the model over")
        longest = max(n + len(row) for n, row in zip(self.lengths, rows, strict=True))
        plans = self.plans(attention, longest, prefill=True)
        self.make_room([len(row) for row in rows])
        passed, _ = self.feed(rows, plans, on_chunk)
        return self.stack.logits(passed)

    def plans(self, attention: Attention | None, length: int, prefill: bool = False) -> Plans:
        """What answers `attention`, default `Full()`, in sequences of up to so many tokens.

        A prefill reads each key for many queries at once: `Auto` has it read every key, or blocks
        of them, as its `prefill` says.

        Raises:
          RequestError, ContextError: a plan asks for a graph, and a sequence has none.
        """

        def choose(auto: Auto) -> Plans:
            if prefill:
                self.prefill_choice = choose_prefill_for(auto, self, length)
                return self.prefill_choice.plan
            self.choice = choose_for(auto, self, length)
            return self.choice.plans

        asked = Full() if attention is None else attention
        plans = plan_for(asked, self.model.config, length, choose)
        for layer, index in enumerate(indexes_of(plans, self.model.config.num_hidden_layers)):
            if isinstance(index, Graph):  # missing, it is refused before anything runs
                for b in range(self.batch_size):
                    self._graph(b, index, layer)
        return plans

    def cover(self, plans: Plans, rows: list[int] | None = None) -> Indexed:
        """What the plans' indexes know of the keys in the cache; of all sequences, or of `rows`.

        Raises:
          RequestError, ContextError: a plan asks for a graph, and a sequence has none.
        """
        rows = list(range(self.batch_size)) if rows is None else rows
        wanted = indexes_of(plans, self.model.config.num_hidden_layers)
        indexed = self.indexes.cover(wanted, [self.sequences[b] for b in rows])
        layers = (
            tuple(self._graph(b, index, i) for b in rows)
            if isinstance(index, Graph)
            else indexed.layers[i]
            for i, index in enumerate(wanted)
        )
        return dataclasses.replace(indexed, layers=tuple(layers))

    def _graph(self, b: int, index: Graph, layer: int) -> GraphLayer:
        """The graph of a layer of a sequence's context, as far as the sequence has reused it."""
        key = b, tuple(index.built.items()), layer
        with self.pool.lock:
            if key in self._graphs:
                return self._graphs[key]
            graphs.require_no_context_axis(self.model, index)
            context, known = self._graph_owner(b, index)
            if context is None:
                raise RequestError(
                    f"sequence {b} was opened on no stored context, and a graph index belongs to "
                    "one; use aj.Sketch(), or db.import_context(...) and db.build_index(context, "
                    "aj.Graph()) before create_session"
                )
            self._graphs[key] = graphs.of_prefix(context.graph(index, self.model, layer), known)
        return self._graphs[key]

    def _graph_owner(self, b: int, wanted: Graph | None) -> "tuple[Context | None, int]":
        """Whose graph a sequence asks, such a one or any, and how many of its keys it knows."""
        context, known = self.contexts[b], self.reused[b]
        if context is None or not context.has_graph:
            # Exact keys of equal tokens are equal: a graph of a shorter prefix is as good, so far.
            exact = self.origins[b].exact(known)
            lent, shared = self.lender(self.tokens[b][:exact], wanted)
            context, known = (lent, shared) if lent is not None else (context, known)
        return context, known

    def known_graph(self) -> tuple[Graph | None, int]:
        """The graph that all sequences can ask, and how many keys of each it knows at least; None,
        and how many it would know, where they have none, or not the same.
        """
        least, same = min(self.reused), None
        for b in range(self.batch_size):
            context, known = self._graph_owner(b, None)
            found = context.indexes if context else ()
            if not found or (same and not same.fits(found[0])):
                return None, least
            same, least = found[0], min(least, known)
        return same, least

    def feed(
        self,
        rows: list[np.ndarray],
        plans: Plans,
        on_chunk: Callable[[int], None] | None = None,
    ) -> tuple[Passed, Fed]:
        """`prefill` of what `rows` returned, for which room is made.

        Returns:
          what the layers made of each sequence's last token, and the last chunk.
        """
        stack = self.stack
        passed: Passed | None = None
        x, fed, done, way = None, None, 0, Way.of(plans)
        while done < max(len(row) for row in rows):
            left = max(len(row) for row in rows) - done
            widths = CHUNKS if self.model.target.platform == "cpu" else (*CHUNKS, GPU_CHUNK)
            width = next((c for c in widths if c >= left), widths[-1])
            chunk = np.zeros((self.batch_size, width), np.int32)
            new = np.zeros(self.batch_size, np.int32)
            for b, row in enumerate(rows):
                part = row[done : done + width]
                chunk[b, : len(part)], new[b] = part, len(part)
            if x is None or x.shape[1] != width:
                x = stack.between(self.batch_size, width)
            passed = stack.start(self.batch_size, passed)
            fed = stack.put(Fed(chunk, new, self.pool.table(self.sequences)))  # type: ignore
            with self.pool.lock:
                chain = stack.chain(plans, stack.put(self.cover(plans)))
                with self.pool.lend() as lent:
                    x, passed = stack.layers(lent, chain, x, passed, fed)
            self.count_reads("prefill", plans, stack.counts(passed), self.lengths, new, width)
            with uninterrupted():
                for b, count in enumerate(new):
                    self._commit(b, rows[b][done : done + count].tolist(), way)
                self.pending = [[] for _ in rows]  # was in front of the first chunk
            if on_chunk is not None:
                on_chunk(int(new.max()))
            done += width
        assert passed is not None
        assert fed is not None
        return passed, fed

    def make_room(self, counts: list[int]) -> None:
        """Reserves pages for new tokens of each sequence.

        Raises:
          RequestError: a sequence would be longer than the model allows.
          CacheFullError: no room; no sequence got any.
        """
        if any(self.ahead):
            raise RequestError(
                "update() wrote new tokens in some layers only; finish the other layers first"
            )
        limit = self.model.length_limit
        for length, count in zip(self.lengths, counts, strict=True):
            if length + count > limit:
                raise RequestError(
                    f"{length:,} tokens in the cache and {count:,} to come exceed the {limit:,} "
                    f"that {self.model.name} takes; ask for at most {max(limit - length, 0):,} more"
                )
        before = [len(sequence.pages) for sequence in self.sequences]
        try:
            for sequence, count in zip(self.sequences, counts, strict=True):
                self.pool.reserve(sequence, count)
        except CacheFullError:
            for sequence, keep in zip(self.sequences, before, strict=True):
                self.pool.trim(sequence, keep)
            raise
        self.turn += 1

    def give_room_back(self) -> None:
        """Gives up what was reserved and holds no token; of a closed session there is nothing."""
        for sequence in self._sequences:
            self.pool.trim(sequence)

    def accept(self, b: int, token: int, way: Way) -> None:
        """Records a generated token of sequence `b`; the one before it is in the cache now."""
        with uninterrupted():
            self._commit(b, self.pending[b], way)
            self.pending[b] = [token]
            self.outputs[b].ids.append(token)

    def _commit(self, b: int, tokens: list[int], way: Way) -> None:
        sequence = self.sequences[b]
        end = sequence.length + len(tokens)
        self.origins[b] = self.origins[b].then(sequence.length, end, way)
        self._tokens[b].extend(tokens)
        sequence.length = end

    def count_reads(
        self,
        phase: str,
        plans: Plans,
        counts: Counts,
        lengths: list[int],
        new: Any,
        tokens: int = 1,
    ) -> None:
        """Adds what a program read, [L, B, H], to the account that `explain` shows; `tokens`: of
        each sequence that it took at once.
        """
        reads = self.reads.get(phase)
        if reads is None or not reads.is_of(plans):
            reads = Reads(plans, self.model, self.pool.page_size, tokens)
            self.reads[phase] = reads
        # Token i of n new ones sees the `length` before it, the i before it, and itself.
        visible = sum(
            int(n) * length + int(n) * (int(n) + 1) // 2
            for length, n in zip(lengths, new, strict=True)
        )
        reads.add(counts, visible, int(np.sum(new)))

    def update(
        self,
        q: Any,
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        layer: int,
        *,
        return_kv: bool = False,
    ) -> tuple[Array | None, Array | None]:
        """Appends keys and values of T new tokens of one layer (AlayaDB, Table 2).

        Call it once in each layer, then `attention` for that layer. Token ids are not known this
        way: pass them to `DB.store`.

        Args:
          q: queries of the new tokens, [B, T, H, D], or None; an index may learn from them.
          k: keys, after RoPE.
          v: values.
          layer: from 0.
          return_kv: give back all keys and values of the (single) sequence.

        Returns:
          k, v of the whole sequence [K, n, D] with `return_kv`, else (None, None).

        Raises:
          RequestError: wrong shapes or layer, or a generated token is still to be fed.
          CacheFullError: no room.
        """
        del q
        return layerwise.update(self, k, v, layer, return_kv)

    def attention(
        self, q: Float[Array, "B T H D"], layer: int, query: Attention | None = None
    ) -> Float[Array, "B T H D"]:
        """Attention of the last T tokens of one layer, after `update` (AlayaDB, Table 2).

        Args:
          q: rotated queries of the T tokens that were appended last, not scaled.
          layer: from 0.
          query: a query or a plan; default `Full()`.

        Raises:
          RequestError: wrong shape or layer, or more tokens than there are.
        """
        return layerwise.attention(self, q, layer, query)

    def fork(self) -> "Session":
        """A second session with the same tokens. Pages are shared until one of the two writes."""
        if any(self.ahead):
            raise RequestError("fork: update() wrote new tokens in some layers only")
        sequences = [self.pool.share(s, s.length) for s in self.sequences]
        other = Session(
            self.model,
            self.pool,
            self.indexes,
            self.stack,
            sequences,
            self.tokens,
            list(self.contexts),
            origins=list(self.origins),
            batched=self.batched,
        )
        other.reused, other.dated = list(self.reused), self.dated
        other._graphs, other.lender = dict(self._graphs), self.lender
        other.pending = [list(p) for p in self.pending]
        other.outputs = [output.copy() for output in self.outputs]
        return other

    def __copy__(self) -> "Session":
        return self.fork()

    def __deepcopy__(self, memo: Any) -> "Session":
        return self.fork()

    def __reduce__(self) -> Any:
        raise RequestError(
            "a session cannot be pickled: its keys and values are in this process's memory; "
            "db.store(session), and in the other process open the database and call "
            "create_session with its tokens"
        )

    def explain(
        self,
        analyze: bool = False,
        attention: Attention | None = None,
        *,
        sequence: int = 0,
    ) -> Explanation:
        """What this session asked of its keys and what was really read, by phase and layer.

        Args:
          analyze: also runs the last cached token's attention again, each layer timed and held
            against full attention: the true share of the mass, the error of the output, the keys
            attended to. The cache is only read.
          attention: the plan to show and to analyze; default what decoding did last (or the
            prefill, or `Full()`).
          sequence: of a batch, which to analyze.

        Raises:
          RequestError: there is nothing to analyze, or the session is closed.
          PlanError: what an `Auto` asks cannot be had.
        """
        if not self._release.alive:
            if analyze or attention is not None:
                raise RequestError("the session is closed; what it read is explain() without more")
            return self._explanation
        with self.pool.lock if analyze else contextlib.nullcontext():
            return report(self, analyze, attention, sequence)

    def close(self) -> None:
        """Gives the pages back; closing twice is allowed."""
        if self._release.alive:
            self._explanation = self.explain()
        self._release()
        self.turn += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if not self._release.alive:
            return "Session(closed)"
        return f"Session({self.model.name}, lengths {self.lengths}, reused {self.reused})"


def _release(pool: PagePool, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        pool.release(sequence)
