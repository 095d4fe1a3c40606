"""Sequences that run together: their tokens, their pages, and what is known of their keys.

What a session holds below the words that a user knows: a model feeds it (`Batch.feed`, or layer by
layer, `layerwise`), and attention, analysis and planning look at it.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from alaya_jax.attention.counts import Counts
from alaya_jax.cache.pool import PagedSequence, PagePool, uninterrupted
from alaya_jax.cache.residency import PagesMet
from alaya_jax.cache.tiers import HostPool
from alaya_jax.errors import CacheFullError, RequestError
from alaya_jax.index import Flat, Graph, GraphLayer, Index, Indexed
from alaya_jax.index.pages import PageIndexes
from alaya_jax.index.room import Claim, Part, Parts
from alaya_jax.model import Model
from alaya_jax.query.origin import Origin, Way
from alaya_jax.query.plan import Plans, Tier, indexes_of, tier_of
from alaya_jax.runtime.programs import Fed, Passed
from alaya_jax.runtime.reading import Reading
from alaya_jax.runtime.stack import Chain, Stack

CHUNKS = (8, 64, 512)
"""Tokens that one step of a prefill takes; the last chunk of a prefill is padded to the
next.
"""

GPU_CHUNK = 4096
"""On a GPU a chunk may have so many: 512 queries of 32 heads are 128 blocks of a kernel, fewer than
an H100 has multiprocessors.
"""

OnOutput = Callable[[Any, Fed], None]
"""Told what the layers made of a chunk's tokens, [B, T, E], and the chunk; the next one donates
both."""

OnRead = Callable[[Counts, list[int], Any, int, PagesMet | None], None]
"""Told what a program read, [L, B, H]; lengths before it; new tokens of each sequence; how many it
took at once; pages met, where some are mapped."""


class GraphSource(Protocol):
    """The graphs that a batch's sequences may ask."""

    def layer(self, b: int, index: Graph, layer: int) -> GraphLayer:
        """Of one layer and sequence, as far as the sequence's keys are the graph's.

        Raises:
          RequestError, ContextError: there is none.
        """
        ...

    def part(self, b: int, index: Graph, layer: int) -> dict[Part, int]:
        """What that takes of memory, by account. Raises as `layer`."""
        ...

    def known(self) -> tuple[Graph | None, int]:
        """The graph that all sequences can ask, and how many keys of each it knows at least; None,
        and how many it would know, where they have none, or not the same.
        """
        ...

    def fork(self) -> "GraphSource":
        """Another of the same, for a fork of the batch."""
        ...

    def let_go(self) -> None:
        """The batch asks for nothing more; waits for nobody."""
        ...


@dataclasses.dataclass(frozen=True)
class Placing:
    """Where a batch's stored pages are read, and why.

    Attributes:
      tier: as it was asked for when the batch was opened; None: it was not.
      reason: why they are where they are.
      mapped: the mapped pages of a sequence's context; None where it has no context. Raises
        RequestError where none can be mapped.
    """

    tier: Tier | None = None
    reason: str = ""
    mapped: Callable[[int], HostPool | None] = lambda b: None


class Batch:
    """Sequences in a pool, their tokens, and the indexes and graphs of their keys.

    Pages are given back by `release`, or when the batch is collected. One thread at a time.

    Attributes:
      model, stack: that it runs, and its layers as programs.
      pool, indexes: where its pages are, and what indexes know of pages.
      graphs: what its sequences may ask.
      origins: how the keys and values of each sequence were computed.
      placing: where its stored pages are read.
      reused: tokens of each that were there when it was made.
      pending: tokens of each that were generated but are not in the cache yet: the next call feeds
        them first.
      ahead: int64 [L], tokens that `layerwise.update` wrote in each layer and not in all yet.
      turn: calls so far that write here: a generation of an earlier turn must not go on.
    """

    def __init__(
        self,
        model: Model,
        stack: Stack,
        indexes: PageIndexes,
        graphs: GraphSource,
        sequences: list[PagedSequence],
        tokens: list[np.ndarray],
        origins: list[Origin],
        placing: Placing | None = None,
    ):
        """Takes over the pages of `sequences`, which hold `tokens`."""
        self.model, self.stack = model, stack
        self.pool: PagePool = indexes.pool
        self.indexes, self.graphs = indexes, graphs
        self.origins = origins
        self.placing = placing or Placing()
        self.reused = [s.length for s in sequences]
        self.pending: list[list[int]] = [[] for _ in sequences]
        self.ahead = np.zeros(model.config.num_hidden_layers, np.int64)
        self.turn = 0
        self._sequences = sequences
        self._tokens: list[list[int]] = [t.tolist() for t in tokens]
        self._claim = claim = indexes.room.claim()
        self._release = weakref.finalize(self, _release, self.pool, sequences, claim, graphs)
        self._release.atexit = False

    @property
    def is_open(self) -> bool:
        """Whether it holds its pages."""
        return self._release.alive

    @property
    def sequences(self) -> list[PagedSequence]:
        """Where each sequence is in the pool.

        Raises:
          RequestError: they were given back.
        """
        if not self.is_open:
            raise RequestError("the session is closed; open another with DB.create_session")
        return self._sequences

    @property
    def size(self) -> int:
        """B."""
        return len(self._sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, of each sequence."""
        return [s.length for s in self.sequences]

    @property
    def tokens(self) -> list[np.ndarray]:
        """Ids of the tokens in the cache, of each sequence; shorter where `update` gave none."""
        return [np.asarray(t, np.int32) for t in self._tokens]

    @property
    def pages(self) -> np.ndarray:
        """Ids of the pages that its sequences hold, in whatever order; none when released."""
        return np.concatenate([sequence.pages for sequence in self._sequences])

    def share(self, other: "Batch", length: int) -> None:
        """Takes the first tokens of another batch's sequence in place of those that it has: nothing
        has to be computed for them. Both are of one sequence.

        Args:
          other: has these tokens, and they are whole pages: it writes behind them only.
          length: how many.
        """
        (mine,), (theirs,) = self.sequences, other.sequences
        taken = self.pool.share(theirs, length)
        with uninterrupted():
            self.pool.release(mine)
            mine.pages, mine.length = taken.pages, length
            self._tokens[0] = other._tokens[0][:length]
            self.origins[0] = other.origins[0].upto(length)
            self.reused[0] = length

    def require_graphs(self, plans: Plans) -> None:
        """Raises RequestError or ContextError where a plan asks for a graph that a sequence lacks:
        before anything runs.
        """
        self._graph_parts(self._indexes_of(plans))

    def _indexes_of(self, plans: Plans, first: int = 0, last: int | None = None) -> list[Index]:
        """The index that plans ask of each layer, from a first to a last one; of others `Flat`."""
        indexes = indexes_of(plans, self.model.config.num_hidden_layers)
        last = len(indexes) - 1 if last is None else last
        return [x if first <= i <= last else Flat() for i, x in enumerate(indexes)]

    def _graphs(
        self, indexes: list[Index], rows: list[int] | None = None
    ) -> Iterator[tuple[int, Graph, int]]:
        """The graphs among them, of all sequences or some: sequence, graph, layer."""
        for layer, index in enumerate(indexes):
            if isinstance(index, Graph):
                for b in range(self.size) if rows is None else rows:
                    yield b, index, layer

    def _graph_parts(self, indexes: list[Index], rows: list[int] | None = None) -> Parts:
        """What these take; raises as `require_graphs`."""
        parts: dict[Part, int] = {}
        for each in self._graphs(indexes, rows):
            parts |= self.graphs.part(*each)
        return parts

    def graph_bytes(self, index: Graph) -> int:
        """What the sequences' graphs of one layer take of memory; raises as `require_graphs`."""
        return sum(self._graph_parts([index]).values())

    def room_beside(self, offered: Sequence[Index]) -> int | None:
        """Bytes for its pages and indexes: what other batches ask of others than the offered ones
        is held. None: no bound.
        """
        room = self.indexes.room
        others = room.claimed(self._claim).items()
        held = sum(size for (index, _), size in others if index not in offered)
        return None if room.limit is None else room.limit - held

    def ask_from(self, layer: int, plans: Plans) -> None:
        """Makes room for the indexes that plans ask of a layer and of those behind it.

        Raises:
          RequestError, ContextError: a plan asks for a graph, and a sequence has none.
          CacheFullError: there is none; the batch asks what it asked before.
        """
        before = {part: size for part, size in self._claim.parts.items() if part[1] < layer}
        with self._asking([self._indexes_of(plans, layer)], before):
            pass

    @contextlib.contextmanager
    def _asking(self, asked: list[list[Index]], besides: Parts | None = None) -> Iterator[None]:
        """Makes room for indexes, which the batch asks from now on, if the block does not fail.

        Args:
          asked: of each layer, of plans that run together.
          besides: what it asks beside these.
        """
        parts: dict[Part, int] = {**(besides or {})}
        for indexes in asked:
            parts |= {**self.indexes.parts(indexes), **self._graph_parts(indexes)}
        with self.pool.lock, self._claim.asking(parts):
            self.indexes.make_room(parts, self._claim)
            for indexes in asked:
                for each in self._graphs(indexes):
                    self.graphs.layer(*each)
            yield

    def cover(
        self, plans: Plans, rows: list[int] | None = None, only: int | None = None
    ) -> Indexed:
        """What the plans' indexes know of the keys in the cache.

        Pages in mapped files are verified beside the programs, see `Reading`.

        Args:
          plans: that ask.
          rows: of which sequences; None: of all.
          only: of which layer; None: of all.

        Raises:
          RequestError, ContextError: a plan asks for a graph, and a sequence has none; or pages
            that an index is made of are damaged.
          CacheFullError: there is no memory for an index.
        """
        rows = list(range(self.size)) if rows is None else rows
        wanted = self._indexes_of(plans, *(() if only is None else (only, only)))
        sequences = [self.sequences[b] for b in rows]
        hosts = [s.host for s in sequences if s.host is not None]
        with self.pool.here(), self.pool.lock:
            if graphs := self._graph_parts(wanted, rows):
                self.indexes.make_room(graphs)
            indexed = self.indexes.cover(wanted, sequences)
            layers = tuple(
                tuple(self.graphs.layer(b, index, i) for b in rows)
                if isinstance(index, Graph)
                else indexed.layers[i]
                for i, index in enumerate(wanted)
            )
        host = hosts[0].layers if hosts else None  # all of one name
        return dataclasses.replace(indexed, layers=layers, host=host)

    def reading(self, plans: Plans) -> Reading:
        """What these plans read of mapped pages."""
        return Reading(self.pool, self.sequences, plans)

    def chain(self, plans: Plans) -> Chain:
        """The layers, as these plans have them attend; raises as `cover`."""
        stack = self.stack
        return stack.chain(plans, stack.at_cache(self.cover(plans)), self.reading(plans))

    def verify(self) -> None:
        """Compares all mapped pages with their checksums; raises ContextError for damage."""
        for sequence in self.sequences:
            if sequence.host is not None:
                sequence.host.verified()

    def verify_met(self, plans: Plans, met: Any, layer: int = 0) -> PagesMet | None:
        """Compares mapped pages that were met with their checksums, before what came of them is
        used; waits for the program.

        Args:
          plans: that were answered.
          met: of some layers, uint8 [L', B, K, N], see `Counts`; None: none of them says it.
          layer: the first of them.

        Returns:
          what was met since this was asked last; None where no pages are mapped.

        Raises:
          ContextError: one is damaged.
        """
        hosts = [s.host for s in self.sequences if s.host is not None]
        if not hosts:
            return None
        if met is not None:
            self.reading(plans).after(layer, np.asarray(met))
        pages = PagesMet.nothing(self.model.config.num_hidden_layers)
        for host in hosts:
            pages.add(host.take_reads())
        return pages

    def feed(
        self,
        rows: list[np.ndarray],
        plans: Plans,
        on_read: OnRead,
        on_chunk: Callable[[int], None] | None = None,
        on_output: OnOutput | None = None,
    ) -> tuple[Passed, Fed]:
        """Runs the model over new tokens, what is pending in front, for which room is made.

        Args:
          rows: ids of each sequence.
          plans: how attention is answered.
          on_read: called after each chunk, as is `on_chunk`, with the number of its tokens.
          on_output: called with what the layers made of each chunk.

        Returns:
          what the layers made of each sequence's last token, and the last chunk.
        """
        stack = self.stack
        passed: Passed | None = None
        x, fed, done, way = None, None, 0, Way.of(plans)
        while done < max(len(row) for row in rows):
            left = max(len(row) for row in rows) - done
            widths = CHUNKS if self.pool.target.platform == "cpu" else (*CHUNKS, GPU_CHUNK)
            width = next((c for c in widths if c >= left), widths[-1])
            chunk = np.zeros((self.size, width), np.int32)
            new = np.zeros(self.size, np.int32)
            for b, row in enumerate(rows):
                part = row[done : done + width]
                chunk[b, : len(part)], new[b] = part, len(part)
            if x is None or x.shape[1] != width:
                x = stack.between(self.size, width)
            fed = stack.put(Fed(chunk, new, self.pool.table(self.sequences)))  # type: ignore
            with self.pool.lock:
                chain = self.chain(plans)
                passed = stack.start(self.size, passed, chain.account(fed.table))
                if not self.pool.allocated:  # that goes on in another thread
                    stack.compile(self.pool.abstract, chain, fed.table, width)
                with self.pool.lend() as lent:
                    x, passed = stack.layers(lent, chain, x, passed, fed)
            if on_output is not None:
                on_output(x, fed)
            met = self.verify_met(plans, passed.counts.met)
            on_read(stack.counts(passed), self.lengths, new, width, met)
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

    def place(self, *plans: Plans) -> None:
        """Has stored pages where plans say that they are read, if they do.

        Pages of other files than the batch's first stay in the pool.

        Raises:
          RequestError: plans name two tiers, or another than the batch was opened for, or one that
            is not to be had here.
          CacheFullError: pages that are brought into the pool do not fit.
          ContextError: the context is damaged, or no longer there.
        """
        tier, placing = tier_of(*plans), self.placing
        if tier is None:
            return
        if placing.tier not in (None, tier):
            raise RequestError(
                f"Plan(tier={tier!r}): the session was opened by create_session(tier="
                f"{placing.tier!r}); leave one of the two out"
            )
        if tier == "device" and self.pool.device is not None:
            raise RequestError(
                "Plan(tier='device'): this session's cache is on the CPU beside the model's "
                "devices; open another with create_session(tier='device')"
            )
        with self.pool.lock:
            before = [s.host for s in self.sequences]
            for b, sequence in enumerate(self.sequences):
                if tier == "device":
                    self.pool.bring(sequence)
                elif sequence.host is None:
                    self._map(b, sequence)
            if before != [s.host for s in self.sequences]:
                self.placing = dataclasses.replace(placing, reason=f"Plan(tier={tier!r})")

    def _map(self, b: int, sequence: PagedSequence) -> None:
        """Takes what a sequence has of its context from where that lies: whole pages."""
        count = self.reused[b] // self.pool.page_size
        host = self.placing.mapped(b) if count else None
        names = {s.host.name for s in self.sequences if s.host is not None}
        if host is not None and names <= {host.name}:
            self.pool.map_first(sequence, host, count)

    def make_room(self, counts: list[int], *plans: Plans) -> None:
        """Reserves pages for new tokens of each sequence.

        Args:
          counts: of each.
          plans: that these tokens will be answered by.

        Raises:
          RequestError: a sequence would be longer than the model allows; or see `place`.
          CacheFullError: no room for them or for the plans' indexes, and no sequence got any; or
            a plan reads more mapped pages at once than may be kept in memory.
        """
        self.place(*plans)
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
        with self._asking([self._indexes_of(asked) for asked in plans]):
            for asked in plans:
                self.reading(asked).require_room()
            try:
                for sequence, count in zip(self.sequences, counts, strict=True):
                    self.pool.reserve(sequence, count)
            except CacheFullError:
                for sequence, keep in zip(self.sequences, before, strict=True):
                    self.pool.trim(sequence, keep)
                raise
        self.turn += 1

    def give_room_back(self) -> None:
        """Gives up what was reserved and holds no token; when released there is nothing."""
        for sequence in self._sequences:
            self.pool.trim(sequence)

    def accept(self, b: int, token: int, way: Way) -> None:
        """Records a generated token of sequence `b`; the one before it is in the cache now."""
        self._commit(b, self.pending[b], way)
        self.pending[b] = [token]

    def _commit(self, b: int, tokens: list[int], way: Way) -> None:
        sequence = self.sequences[b]
        end = sequence.length + len(tokens)
        self.origins[b] = self.origins[b].then(sequence.length, end, way)
        self._tokens[b].extend(tokens)
        sequence.length = end

    def fork(self) -> "Batch":
        """A second one with the same tokens. Pages are shared until one of the two writes."""
        if any(self.ahead):
            raise RequestError("fork: update() wrote new tokens in some layers only")
        other = Batch(
            self.model,
            self.stack,
            self.indexes,
            self.graphs.fork(),
            [self.pool.share(s, s.length) for s in self.sequences],
            self.tokens,
            list(self.origins),
            self.placing,
        )
        other.reused = list(self.reused)
        other.pending = [list(p) for p in self.pending]
        return other

    def release(self) -> None:
        """Gives the pages back; a second time nothing happens."""
        self._release()
        self.turn += 1


def _release(
    pool: PagePool, sequences: list[PagedSequence], claim: Claim, graphs: GraphSource
) -> None:
    for sequence in sequences:
        pool.release(sequence)
    claim.end()
    graphs.let_go()
