"""The catalogue: which contexts there are, and which of them have their pages in the pool.

match    the context that shares most of a prompt
lock     a share of its first tokens' pages, which nobody evicts; read from the store if need be
insert   a new context, stored whole or not at all
evict    the pages of the one that was used longest ago
"""

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from alaya_jax.at_rest import StoreDtype, decoded, encoded
from alaya_jax.budget import Budget
from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.cache.residency import FileAccount, Residency
from alaya_jax.cache.tiers import Coded, HostPages, HostPool
from alaya_jax.contexts import graphs
from alaya_jax.contexts.context import Context
from alaya_jax.contexts.lending import Lending
from alaya_jax.errors import AlayaError, CacheFullError, ConfigError, ContextError, RequestError
from alaya_jax.index import Graph, learnt
from alaya_jax.index.pages import PageIndexes
from alaya_jax.index.room import Part, Room
from alaya_jax.model import Model
from alaya_jax.query.origin import Origin
from alaya_jax.query.plan import Tier
from alaya_jax.runtime.apart import Apart
from alaya_jax.runtime.batch import Batch, Placing
from alaya_jax.runtime.stack import Stack
from alaya_jax.sharding import cpu_beside
from alaya_jax.storage import ContextHeader, ContextRecord, ContextStore, Source, sampled

EXACT = Origin()
"""Of keys and values that were computed by attention to every key."""


HOME_TOKENS = 8192
"""New tokens of all sessions whose pages are read where they lie, where the model's devices cannot
read files, at most: they are kept on the CPU too."""


class Home(NamedTuple):
    """Where some sequences are: their pages, what is known of them, and the model's layers."""

    pool: PagePool
    indexes: PageIndexes
    stack: Stack


class Catalogue:
    """The contexts of one model and namespace, in a store and in the pages of a pool.

    Threads may share it: they take turns under the pool's lock.

    Attributes:
      store: where they are at rest.
      pool: pages of the contexts that are in memory, and of all sessions.
      residency: what is kept in memory of pages that are read where they lie.
      indexes: what indexes know of these pages, and their share of the budget.
      stack: the model's layers, as compiled programs.
    """

    def __init__(
        self,
        store: ContextStore,
        model: Model,
        namespace: str,
        *,
        page_size: int,
        budget: Budget,
        store_dtype: StoreDtype | None = None,
    ):
        """Args:
        store: taken over: `close` closes it.
        model, namespace: whose contexts these are; others in the store are not shown.
        page_size: of the pool, which evicts contexts when its pages run out.
        budget: of the pool, of indexes beside it, and of what is kept in memory of mapped files.
        store_dtype: what new contexts are stored in; None: as they were computed.

        Raises:
          RequestError: see `Budget.pages`.
        """
        self._model, self._namespace = model, namespace
        self._budget = budget
        self._store_dtype: StoreDtype | None = store_dtype
        self.store = store
        self.pool = PagePool(
            model.config,
            model.dtype,
            budget.pages(model, page_size),
            page_size,
            budget.setting,
            where=model.mesh,
            rules=model.rules,
            evict=self.evict,
        )
        self.residency = Residency(budget.host_bytes, budget.host_setting)
        self._mapped: dict[str, dict[str, tuple[Context, np.ndarray]]] = {}
        """Contexts that were mapped and their pages, by the files' name and their id."""
        pages = self.pool.num_pages * page_size * model.token_bytes
        room = Room(budget.device_bytes, pages, budget.setting, self._forget_graphs)
        self.indexes = PageIndexes(self.pool, self._find_learnt, room)
        self.stack = Stack(model.params, model.frame, model.layers_per_program)
        self._home: Home | None = None
        self._contexts: dict[str, Context] = {}
        self._seen: Hashable = None
        self._clock = 0
        self._closed = False
        self._look()

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def contexts(self) -> list[Context]:
        """All, oldest first, damaged ones too."""
        with self.pool.lock:
            self._look()
            return sorted(self._contexts.values(), key=lambda c: (c.created, c.id))

    @property
    def header(self) -> ContextHeader:
        """What contexts are that are computed by attention to every key, without a title."""
        return self._header("", EXACT, self._store_dtype)

    def id_of(self, context: Context | str, what: str) -> str:
        """A context's id; a handle of another database is refused.

        Args:
          context: a handle, or an id, which need not be here.
          what: the method that was called, for the error.

        Raises:
          RequestError: it is neither.
          ContextError: the handle is of another database.
        """
        if isinstance(context, str):
            return context
        if not isinstance(context, Context):
            raise RequestError(f"{what}({context!r}): takes a context of this database, or its id")
        if context.store is not self.store:
            raise ContextError(
                f"{what}: {context!r} is of the database {str(context.store.path)!r}, opened by "
                f"another DB, and this one is {str(self.store.path)!r}; pass its id to mean the "
                "one here"
            )
        return context.id

    def find(self, context: Context | str, what: str) -> Context:
        """The context of a handle or an id.

        Raises:
          RequestError, ContextError: see `id_of`; or it is not here.
        """
        id = self.id_of(context, what)
        with self.pool.lock:
            self._look()
            if id not in self._contexts:
                raise ContextError(f"{what}: there is no context {id!r} in {self.store.path}")
            return self._contexts[id]

    def of_tokens(self, tokens: np.ndarray) -> Context | None:
        """The context of just these tokens, computed by attention to every key and stored as new
        ones are, where there is one.
        """
        with self.pool.lock:
            self._look()
            context = self._contexts.get(self.header.context_id(tokens))
            if context is None or context.num_tokens != len(tokens):
                return None
            # Tokens are compared too: a name is a digest.
            exact = self._store_dtype is None
            same = context.problem is not None or context.shared(tokens, exact=exact) == len(tokens)
            return context if same else None

    def match(self, tokens: np.ndarray, *, exact: bool = True) -> tuple[Context | None, int]:
        """The context that shares most tokens, and how many; the last token of a prompt is always
        left over.

        Args:
          tokens: the prompt.
          exact: only what has exact keys and values is shared; else, of equally many, the most
            exact.
        """
        best, most = None, (0, 0)
        with self.pool.lock:
            self._look()
            for context in self._contexts.values():
                held = min(context.exact_tokens if exact else context.num_tokens, len(tokens) - 1)
                if context.problem is not None or (held, context.origin.exact(held)) <= most:
                    continue
                shared = context.shared(tokens[:-1], exact=exact)
                if (found := (shared, context.origin.exact(shared))) > most:
                    best, most = context, found
        return best, most[0]

    def match_graph(self, tokens: np.ndarray, wanted: Graph | None) -> tuple[Context | None, int]:
        """Of the contexts that have such a graph, or any, the one that shares most tokens, and how
        many.
        """
        with self.pool.lock:
            self._look()
            usable = [c for c in self._contexts.values() if c.problem is None]
            having = [c for c in usable if any(wanted is None or wanted.fits(x) for x in c.indexes)]
            shared = [context.shared(tokens) for context in having]
            most = max(shared, default=0)
            return (having[shared.index(most)], most) if most else (None, 0)

    def lock(self, context: Context, length: int, tier: Tier | None = "device") -> PagedSequence:
        """A share of the pages of a context's first tokens: they stay until it is released.

        Args:
          context: which.
          length: how many tokens.
          tier: "device": in the pool, what is not there is read from the store; "host": where they
            lie in the store, and nothing is read yet; None: in the pool if they fit, else where
            they lie.

        Raises:
          ContextError: the stored context is damaged.
          CacheFullError: there is no room.
          RequestError: this model's devices cannot read pages where they lie.
        """
        with self.pool.lock:
            self._touch(context)
            if tier == "host":
                return self._map(context, length)
            resident = context.resident
            if resident is None or resident.length < length:
                try:
                    resident = self._read_on(context, length)
                except CacheFullError:
                    if tier is not None or self._no_host is not None or self._beside is not None:
                        raise
                    return self._map(context, length)
            return self.pool.share(resident, length)

    def _map(self, context: Context, length: int) -> PagedSequence:
        """The pages of a context's first tokens where they lie."""
        if self._no_host is not None:
            raise RequestError(f"tier='host': {self._no_host}; leave tier= out")
        pool = self._at("host").pool
        mapped = self.store.mapped(context.id)
        layers = range(self._model.config.num_hidden_layers)
        kind = context.store_dtype

        def entered(half: np.ndarray) -> Any:
            rows = jax.device_put(half)
            return rows if kind is None else Coded(rows, kind, self._model.dtype)

        try:
            with pool.here():
                there = tuple(HostPages(*map(entered, mapped.layer(layer))) for layer in layers)
            keys, _ = mapped.layer(0)
        except BaseException:
            mapped.close()
            raise

        def verify(layer: int, pages: np.ndarray, asked: np.ndarray | None = None) -> int:
            try:
                return mapped.verify(layer, pages, asked)
            except ContextError as error:
                context.problem = str(error)
                raise

        name = mapped.name
        beside = self._mapped.setdefault(name, {})
        beside[context.id] = context, mapped.pages

        def pinned() -> np.ndarray | None:
            lists = [pages for context, pages in list(beside.values()) if context.pinned]
            if not lists:
                return None
            found = np.zeros(keys.shape[1], bool)
            found[np.concatenate(lists)] = True
            return found

        host = HostPool(
            name,
            there,
            mapped.pages,
            mapped.births,
            account=FileAccount(self.residency, name, keys, let_go=mapped.let_go, pinned=pinned),
            verify=verify,
            leaves=mapped.leaves,
            release=mapped.close,
        )
        return pool.mapped(host, length)

    @functools.cached_property
    def _no_host(self) -> str | None:
        """Why pages cannot be read where they lie; None: they can."""
        try:
            cpu_beside(self._model.mesh)
        except ConfigError as error:
            return str(error)
        return None

    @functools.cached_property
    def _beside(self) -> Any:
        """The CPU that reads pages where they lie, if the model runs elsewhere."""
        return None if self._no_host is not None else cpu_beside(self._model.mesh)

    def _find_learnt(self) -> learnt.Learnt | None:
        return learnt.find(self._model.fingerprint, self._model.directory)

    @property
    def home(self) -> Home:
        """Where sequences of the pool are."""
        return self._at(None)

    def in_memory(self, tokens: np.ndarray, *, exact: bool) -> int:
        """How many of a prompt's first tokens are in the pool; see `match`."""
        context, length = self.match(tokens, exact=exact)
        resident = context and context.resident
        return min(length, resident.length) if resident else 0

    def evictable(self) -> int:
        """Pages that evicting would free: of contexts that are not pinned, held by nobody else."""
        with self.pool.lock:
            contexts = [c for c in self._contexts.values() if c.resident and not c.pinned]
            if not contexts:
                return 0
            pages = np.concatenate([c.resident.pages for c in contexts if c.resident])
            pages, times = np.unique(pages, return_counts=True)
            return int(np.count_nonzero(self.pool.holders(pages) == times))

    def resident_pages(self) -> np.ndarray:
        """Ids of the pool's pages that hold contexts, int32 [n], ascending."""
        with self.pool.lock:
            held = [c.resident.pages for c in self._contexts.values() if c.resident is not None]
            return np.unique(np.concatenate([np.zeros(0, np.int32), *held]))

    def _at(self, tier: Tier | None) -> "Home":
        """Where sequences are: all together, but for those whose pages are read where they lie,
        beside devices that cannot read files; these are on the CPU.
        """
        device = self._beside
        if tier != "host" or device is None:
            return Home(self.pool, self.indexes, self.stack)
        with self.pool.lock:
            if self._home is None:
                size, model = self.pool.page_size, self._model
                pages = min(self.pool.num_pages, -(-HOME_TOKENS // size) + 1)
                setting = f"{HOME_TOKENS:,} tokens"
                pool = PagePool(model.config, model.dtype, pages, size, setting, where=device)
                pool.lock = self.pool.lock  # one: contexts are looked at under either
                stack = Apart(model.params, model.frame, device)
                # The cache itself is of the size above, whatever the budget.
                budget = self._budget
                room = Room(budget.host_bytes, 0, budget.host_setting, self._forget_graphs)
                indexes = PageIndexes(pool, self._find_learnt, room)
                self.residency.beside = lambda: sum(indexes.nbytes().values())
                self._home = Home(pool, indexes, stack)
            return self._home

    def _forget_graphs(self) -> None:
        """Lets go of graphs that no session asks."""
        for context in self._contexts.values():
            context.forget_graph()

    @property
    def index_bytes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes that indexes and graphs take of `Budget.device`, and of `Budget.host` beside other
        devices; see `PageIndexes.nbytes`.
        """
        beside = {} if self._home is None else self._home.indexes.nbytes()
        return self.indexes.nbytes(), beside

    def open(
        self, rows: list[np.ndarray], *, exact: bool, tier: Tier | None = None
    ) -> tuple[Batch, list[Context | None]]:
        """A batch of the longest stored prefixes of some prompts, and the contexts they are from.

        Args:
          rows: token ids of each prompt.
          exact: see `match`.
          tier: see `lock`. Pages that lie in different files are not read in one batch: those that
            lie in other files than the first sequence's come into the pool.

        Raises:
          ContextError, CacheFullError, RequestError: see `lock`.
        """
        sequences, found, origins = [], [], []
        asked, reason = tier, f"create_session(tier={tier!r})"
        if tier is None:
            reason = f"the prompt does not fit into {self._budget.setting}"
        if tier is None and self._no_host is None:
            pages = sum(-(-len(tokens) // self.pool.page_size) + 1 for tokens in rows)
            too_long = pages * self.pool.page_size > self.pool.capacity_tokens
            if too_long and self._is_for_home(rows, exact):
                tier = "host"
        home = self._at(tier)
        with self.pool.lock:
            try:
                for tokens in rows:
                    context, length, sequence = self._lock_prefix(tokens, exact, tier)
                    names = {s.host.name for s in (*sequences, sequence) if s.host is not None}
                    if len(names) > 1:
                        assert context is not None
                        if home.pool is not self.pool:
                            home.pool.release(sequence)
                            raise RequestError(
                                "tier='host': the prompts go on from contexts in different files, "
                                "and one batch reads those of one; open a session for each"
                            )
                        sequence = self.lock(context, length)
                    sequences.append(sequence)
                    found.append(context)
                    origins.append(context.origin.upto(length) if context else EXACT)
            except BaseException:
                for sequence in sequences:
                    home.pool.release(sequence)
                raise
        tokens = [row[: s.length] for row, s in zip(rows, sequences, strict=True)]
        lent = Lending(home.pool, found, tokens, self.match_graph, home.indexes.room)

        def mapped(b: int) -> HostPool | None:
            context = found[b]
            if self._beside is not None and home.pool is self.pool:
                raise RequestError(
                    "Plan(tier='host'): this session's cache is on the model's devices; open "
                    "another with create_session(tier='host')"
                )
            return None if context is None else self._map(context, len(tokens[b])).host

        placing = Placing(asked, reason, mapped)
        what = home.stack, home.indexes, lent
        batch = Batch(self._model, *what, sequences, tokens, origins, placing)
        return batch, found

    def _is_for_home(self, rows: list[np.ndarray], exact: bool) -> bool:
        """Whether prompts that do not fit into the pool are to be read where they lie: beside
        other devices, if that is where most of them is.
        """
        if self._beside is None:
            return True
        known = [self.match(tokens, exact=exact)[1] for tokens in rows]
        new = [len(tokens) - length for tokens, length in zip(rows, known, strict=True)]
        return all(known) and sum(new) < self._at("host").pool.capacity_tokens

    def _lock_prefix(
        self, tokens: np.ndarray, exact: bool, tier: Tier | None
    ) -> tuple[Context | None, int, PagedSequence]:
        """The context that shares most tokens, how many, and a share of their pages.

        One that another process removes in between is looked past.
        """
        while True:
            context, length = self.match(tokens, exact=exact)
            if context is None:
                return None, 0, PagedSequence()
            try:
                return context, length, self.lock(context, length, tier)
            except ContextError:
                if self._is_there(context):
                    raise

    def _look(self) -> None:
        """Takes in what other processes stored and removed; sessions that read what is gone go on.

        The caller holds the pool's lock.
        """
        if self._closed or (seen := self.store.version()) == self._seen:
            return
        shown = {record.id: record for record in filter(None, map(self._shown, self.store.list()))}
        for id, context in list(self._contexts.items()):
            if id not in shown or shown[id].created != context.created:
                gone = self._contexts.pop(id)
                gone.pinned = False
                self.drop(gone)
        for id, record in shown.items():
            if id in self._contexts:
                self._contexts[id].pinned = record.pinned
            else:
                self._contexts[id] = Context(record, self.store)
        self._seen = seen

    def _read_on(self, context: Context, length: int) -> PagedSequence:
        """Brings the first tokens of a context into memory, going on from the last full page that
        is there.
        """
        held, size = context.resident or PagedSequence(), self.pool.page_size
        start = held.length // size * size
        longer = self.pool.share(held, start)
        try:
            self.pool.reserve(longer, length - start)
            for layer in range(len(self.pool.kv.k)):
                k, v = self._computed(context, self.store.read_kv(context.id, layer, start, length))
                self.pool.write(longer, layer, k, v, start)
        except BaseException as error:
            self.pool.release(longer)
            if isinstance(error, ContextError) and self._is_there(context):
                context.problem = str(error)
            raise
        longer.length = length
        self._release_pages(context)
        context.resident = longer
        return longer

    def _computed(self, context: Context, halves: tuple[np.ndarray, ...]) -> Any:
        """Keys and values at rest as the model computes with them."""
        kind = context.store_dtype
        if kind is None:
            return halves
        return tuple(decoded(half, kind, self._model.dtype) for half in halves)

    def _is_there(self, context: Context) -> bool:
        """Whether no other process removed it."""
        self._look()
        return self._contexts.get(context.id) is context

    def insert(
        self,
        tokens: np.ndarray,
        kv: Source,
        *,
        title: str = "",
        origin: Origin = EXACT,
    ) -> Context:
        """Stores a context; one that is there already is kept, unless it is damaged.

        Args:
          tokens: ids, int32 [n].
          kv: gives keys and values, see `Source`; not called where all of it is there.
          title: for people.
          origin: how they were computed.

        Raises:
          RequestError: kv has other shapes, or numbers that `store_dtype` cannot hold.
          DatabaseError: it cannot be written.
        """
        kind = self._store_dtype
        given = kv if kind is None else _coded(kv, kind)
        record = self.store.write(self._header(title, origin, kind), tokens, given)
        with self.pool.lock:
            self._look()
            # Another process may have removed it already: to the caller it was stored.
            return self._contexts.get(record.id) or Context(record, self.store)

    def is_damaged(self, id: str) -> bool:
        """Whether such a context is here and cannot be used."""
        return id in self._contexts and self._contexts[id].problem is not None

    def adopt(self, record: ContextRecord) -> None:
        """Takes up a context that came into the store by another way, in place of a damaged one."""
        with self.pool.lock:
            self._look()
            known = self._contexts.get(record.id)
            if known is None or known.problem is not None:
                if known is not None:
                    self.drop(known)
                self._contexts[record.id] = Context(record, self.store)

    def keep(self, context: Context, sequence: PagedSequence) -> None:
        """Keeps a context in memory, in the pages of a sequence that holds its tokens; and what
        indexes know of these in the store, for processes that read it where it lies. Not one that
        is stored in 8 bits: it is to answer now as it will when it was read back.
        """
        if context.header is None or context.header.store_dtype:
            return
        with self.pool.lock:
            if context.resident is None and sequence.host is None:
                context.resident = self.pool.share(sequence, sequence.length)
                self._touch(context)
        if self._no_host is None and self.indexes.nbytes():
            # Not needed: it may have been removed meanwhile, or there is no memory left to map it.
            with contextlib.suppress(AlayaError, OSError):
                host = self._map(context, sequence.length).host
                assert host is not None
                self.indexes.share_leaves(sequence, host)

    def build_graph(self, context: Context, index: Graph, *, progress: bool) -> None:
        """Builds a graph and stores it with its context, unless an equal one is there, undamaged.

        Raises:
          ContextError, CacheFullError, DatabaseError: the context is damaged, it or its graph does
            not fit into the budget, or the graph cannot be written.
        """
        there = any(index.fits(built) for built in context.indexes)
        if there and not self.store.check_index(context.id, graphs.KIND):
            return
        self._require_room(context, index)
        sequence = self.lock(context, context.num_tokens, None)
        try:
            layers = graphs.build_layers(
                self.stack,
                self.pool,
                sequence,
                context.tokens,
                index,
                progress=progress,
            )
            self.store.write_index(context.id, graphs.KIND, index.built, layers)
        finally:
            self.pool.release(sequence)
        context.forget_graph()

    def _require_room(self, context: Context, index: Graph) -> None:
        """Raises CacheFullError where no session could hold such a graph in memory: in the pool's,
        or on the CPU beside the model's devices.
        """
        layers = range(self._model.config.num_hidden_layers)

        def parts(where: PageIndexes) -> dict[Part, int]:
            each = (
                graphs.part(context.id, context.num_tokens, index, where.pool, i) for i in layers
            )
            return {part: size for layer in each for part, size in layer.items()}

        places = [self.indexes] + ([] if self._beside is None else [self._at("host").indexes])
        if not any(where.room.fits(parts(where)) for where in places):
            self.indexes.room.refuse(parts(self.indexes))

    def evict(self) -> bool:
        """Drops the context that was used longest ago; False where none is in memory but pinned
        ones.
        """
        resident = [c for c in self._contexts.values() if c.resident is not None and not c.pinned]
        if not resident:
            return False
        self.drop(min(resident, key=lambda c: c.used))
        return True

    def drop(self, context: Context) -> None:
        """Gives back a context's pages and graph; it stays in the store."""
        with self.pool.lock:
            context.forget_graph()
            self._release_pages(context)

    def remove(self, id: str) -> None:
        """Deletes a context from the store; sessions that read it go on.

        Raises:
          ContextError: it is not there.
        """
        with self.pool.lock:
            self.store.remove(id)
            gone = self._contexts.pop(id, None)
            if gone is not None:
                self.drop(gone)

    def close(self) -> None:
        """Lets go of the pages and the store; closing twice is allowed."""
        with self.pool.lock:
            for context in self._contexts.values():
                self.drop(context)
            self._closed = True
        self.store.close()

    def _release_pages(self, context: Context) -> None:
        if context.resident is not None:
            self.pool.release(context.resident)
            context.resident = None

    def _touch(self, context: Context) -> None:
        self._clock += 1
        context.used = self._clock

    def _header(self, title: str, origin: Origin, store_dtype: str | None) -> ContextHeader:
        c = self._model.config
        origin = origin.at_rest(store_dtype) if store_dtype else origin
        return ContextHeader(
            fingerprint=self._model.fingerprint,
            dtype=self._model.dtype.name,
            num_layers=c.num_hidden_layers,
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            page_size=self.pool.page_size,
            origin=origin.runs,
            store_dtype=store_dtype or "",
            namespace=self._namespace,
            title=title,
        )

    def _is_ours(self, header: ContextHeader) -> bool:
        ours = self._header(header.title, Origin(header.origin), header.store_dtype)
        return header == ours

    def _shown(self, record: ContextRecord) -> ContextRecord | None:
        """The record if it is ours, or may be: because it is damaged, or its model is not known.

        One of another model, layout or namespace is not ours to show.
        """
        header = record.header
        if header is None or self._is_ours(header):
            return record
        record = sampled.named(record)
        of_any_model = dataclasses.replace(header, fingerprint=self._model.fingerprint)
        unknown = record.problem == sampled.UNKNOWN_MODEL
        return record if unknown and self._is_ours(of_any_model) else None


def _coded(kv: Source, kind: StoreDtype) -> Source:
    """Keys and values as rows in 8 bits, see `at_rest`. What is no array [K, n, D] stays as it is:
    the store says what is wrong with it.
    """

    def half(x: Any) -> Any:
        array = np.asarray(x)
        return encoded(array, kind) if array.ndim == 3 and array.size else array

    return lambda start: (tuple(map(half, pair)) for pair in kv(start))


def finite(kv: Iterable[Any]) -> Source:
    """Keys and values of whole contexts that a user gives, layer by layer: a NaN would reach every
    later answer, or none, by the plan that is asked.

    The source raises:
      RequestError: a number is not finite.
    """

    def source(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for layer, (k, v) in enumerate(kv):
            for name, x in (("keys", k), ("values", v)):
                bad = ~np.isfinite(np.asarray(x))
                if bad.any():
                    at = ", ".join(map(str, np.argwhere(bad)[0]))
                    raise RequestError(
                        f"import_context(kv=...): the {name} of layer {layer} are not finite, first"
                        f" at [{at}] of [K, n, D]; give finite numbers, or leave kv out"
                    )
            k, v = (x[:, start:] if x.ndim == 3 else x for x in map(np.asarray, (k, v)))
            yield k, v

    return source
