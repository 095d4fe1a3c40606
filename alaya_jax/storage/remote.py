"""Contexts in an object store: pushed from a database, found by a prefix, pulled into another.

    alaya_remote.json               what this place is
    chunks/<2 letters>/<name>       see alaya_jax.storage.objects
    contexts/<group>/<id>           the records of one model and namespace
    indexes/, pieces/               see alaya_jax.storage.moved_indexes

A push writes the chunks that are not there, and the record last: what a killed push leaves is
found by the next one, and by nobody else. A pull reads the chunks that no local context has,
compares checksums and tokens, and stores nothing unless all is well.
"""

import dataclasses
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RemoteError, RequestError
from alaya_jax.storage import moved_indexes, objects, sampled
from alaya_jax.storage.in_flight import MOST, Advance, ahead, workers
from alaya_jax.storage.interface import ContextHeader, ContextRecord, ContextStore
from alaya_jax.storage.object_store import ObjectStore, damaged
from alaya_jax.storage.objects import CHUNK, MovedContext
from alaya_jax.storage.pull import gathered, local_prefix, pull_chunks
from alaya_jax.storage.push import push_chunks

_MARK = "alaya_remote.json"
_MARK_TEXT = b'{"format": "alaya_jax contexts", "version": 1}\n'


def _nothing(_: int) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
      moved: the context.
      chunks, nbytes: written, of `moved.chunks` in all; the others were there.
      indexes: kinds that were written.
    """

    moved: MovedContext
    chunks: int
    nbytes: int
    indexes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
      record: the context, as it is in the database now.
      chunks, nbytes: read; the others came from a context that was there.
    """

    record: ContextRecord
    chunks: int
    nbytes: int


class _NearDamaged(ContextError):
    """A local context that was to supply the first tokens of another."""


class RemoteContexts:
    """The contexts in an object store. Threads may share it.

    Args:
      objects: the place.
    """

    def __init__(self, objects: ObjectStore):
        self._objects = objects
        self._records: dict[str, MovedContext] = {}  # by key: they never change
        self._marked = False

    @property
    def where(self) -> str:
        """A URL or a path, for errors."""
        return self._objects.where

    def contexts(self, header: ContextHeader | None = None) -> list[MovedContext]:
        """The contexts that are there, oldest first; those that are damaged are left out.

        Args:
          header: only those of its model, layout and namespace.

        Raises:
          RemoteError: the place cannot be read, or is something else.
        """
        known = [m for m in self._read(header) if isinstance(m, MovedContext)]
        return sorted(known, key=lambda m: (m.created, m.id))

    def problems(self) -> list[str]:
        """What is wrong with the records that `contexts` leaves out, in words."""
        return [str(error) for error in self._read(None) if isinstance(error, ContextError)]

    def match(
        self,
        header: ContextHeader,
        tokens: np.ndarray,
        *,
        exact: bool = True,
        without: Container[str] = (),
    ) -> tuple[MovedContext | None, int]:
        """The context that shares most of a prompt, in whole chunks or all of it; how many tokens.

        It goes by names, which a pull then compares with what is inside.

        Args:
          header: of the model, layout and namespace.
          tokens: the prompt, [n].
          exact: only chunks whose keys and values are exact count.
          without: ids of contexts that are left out.
        """
        if exact and header.store_dtype:
            return None, 0  # none is
        best, most = None, 0
        chains: dict[Any, list[str]] = {}
        for moved in self.contexts(header):
            if moved.id in without:
                continue
            origin = () if exact else moved.header.origin
            if origin not in chains:
                mine = dataclasses.replace(header, origin=origin)
                chains[origin] = objects.chunk_names(mine, tokens)
            n = moved.num_tokens
            shared = objects.shared_chunks(chains[origin], moved.chunks) * CHUNK
            if shared // CHUNK == len(moved.chunks) - 1 and shared < n <= len(tokens):
                mine = dataclasses.replace(header, origin=origin)
                parent = moved.chunks[-2] if shared else ""
                rest = tokens[shared:n]
                if objects.chunk_name(mine, parent, shared, rest) == moved.chunks[-1]:
                    shared = n
            if (shared := min(shared, n)) > most:
                best, most = moved, shared
        return best, most

    def push(
        self, store: ContextStore, id: str, *, repair: bool = False, advance: Advance = _nothing
    ) -> Pushed:
        """Writes a context of a database, as far as it is not there, and its indexes.

        Args:
          store: the database.
          id: of the context.
          repair: read what is there, and write anew what is damaged or gone; else a context whose
            record is there is taken to be whole.
          advance: told of the bytes of keys and values that are there or written.

        Raises:
          ContextError: the local context is unknown or damaged, or was stored by a version that
            does not say whose keys these are; or a name that it needs holds something else.
          RemoteError: the place cannot be reached, or refuses. What was written is of use to the
            next push.
        """
        record = _usable(store, id)
        header = record.header
        assert header is not None
        self._mark()
        tokens = store.tokens(id)
        moved = MovedContext(
            id=id,
            header=header,
            num_tokens=record.num_tokens,
            created=record.created,
            chunks=tuple(objects.chunk_names(header, tokens)),
        )
        key, sealed = _record_key(moved), objects.write_record(moved)
        there = self._objects.read(key)
        whole = isinstance(self._record(key), MovedContext) if there else False
        chunks = nbytes = 0
        if whole and not repair:
            advance(moved.nbytes)
        else:
            chunks, nbytes = push_chunks(self._objects, store, moved, tokens, repair, advance)
            if there is None:
                self._objects.put(key, sealed)
            elif not whole:
                self._objects.replace(key, sealed, there.version)
                self._records.pop(key, None)
        indexes = moved_indexes.push(self._objects, store, record, repair=repair)
        return Pushed(moved, chunks, nbytes, tuple(indexes))

    def pull(
        self,
        store: ContextStore,
        moved: MovedContext,
        length: int | None = None,
        *,
        anew: bool = False,
        advance: Advance = _nothing,
    ) -> Pulled:
        """Takes a context, or its first tokens, into a database, all of it or nothing.

        A context that is there is kept, unless it is known to be damaged. What another one there
        shares is not read again. Chunks are gathered in a file without a name beside the database,
        so that memory does not grow with the context.

        Args:
          store: the database.
          moved: the context, from `contexts` or `match`.
          length: how many of its tokens: all of them, or whole chunks.
          anew: in place of the one that is there, since that is damaged.
          advance: told of the bytes of keys and values that are there or read.

        Raises:
          ContextError: a chunk is gone, damaged or of something else.
          RemoteError: the place cannot be reached, or refuses.
          DatabaseError: it cannot be stored.
        """
        store.require_writable()
        n = moved.num_tokens if length is None else length
        if n != moved.num_tokens and not (0 < n < moved.num_tokens and n % CHUNK == 0):
            raise RequestError(f"pull: {n} of {moved.num_tokens} tokens are no whole chunks")
        header = _header_of_prefix(moved, n)
        here = _find(store, moved.id) if n == moved.num_tokens else None
        if here is not None and here.problem is None and not anew:
            advance(moved.nbytes)
            return Pulled(here, 0, 0)
        near, start = local_prefix(self._objects, store, moved, n, here)
        try:
            return self._pull(store, moved, header, near, (start, n), advance)
        except _NearDamaged:  # then it gives nothing: all of it is there
            return self._pull(store, moved, header, None, (0, n), advance)

    def pull_indexes(self, store: ContextStore, moved: MovedContext) -> list[str]:
        """Takes the indexes of a context that a database has whole; the kinds that were taken.

        One that the database has is kept, unless it is damaged.

        Raises:
          ContextError, RemoteError, DatabaseError: as `pull`; the context is not touched.
        """
        return moved_indexes.pull(self._objects, store, moved.id, objects.group(moved.header))

    def _pull(
        self,
        store: ContextStore,
        moved: MovedContext,
        header: ContextHeader,
        near: str | None,
        span: tuple[int, int],
        advance: Advance,
    ) -> Pulled:
        """Reads the tokens of a span, those before it from a local context, and stores both."""
        start, n = span
        advance(moved.of_prefix(start).nbytes)
        tokens = np.zeros(n, np.int32)
        if near is not None:
            tokens[:start] = store.tokens(near)[:start]
        shape = objects.chunk_shape(header, n - start)
        with gathered(store, shape, header.row_dtype) as numbers:
            read = pull_chunks(self._objects, moved, tokens, start, numbers, advance)
            if (id := header.context_id(tokens)) != moved.id and n == moved.num_tokens:
                what = f"its tokens are those of {id}"
                raise ContextError(damaged(self._objects, _record_key(moved), what))

            def kv(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
                for layer in range(header.num_layers):
                    k, v = (half[:, max(first - start, 0) :] for half in numbers[layer])
                    if near is not None and first < start:
                        try:
                            before = store.read_kv(near, layer, first, start)
                        except ContextError as error:
                            raise _NearDamaged(str(error)) from error
                        k, v = (np.concatenate(x, 1) for x in zip(before, (k, v), strict=True))
                    yield k, v

            record = store.write(header, tokens, kv)
        return Pulled(record, len(read), sum(read))

    def _read(self, header: ContextHeader | None) -> list[MovedContext | ContextError]:
        """All records, or those of a model and namespace; what is wrong with those that are not."""
        self._marked_or_empty()
        inside = f"{objects.group(header)}/" if header is not None else ""
        keys = self._objects.keys(f"contexts/{inside}")
        with workers() as pool:
            return list(ahead(pool, ((self._record, key) for key in keys), MOST))

    def _record(self, key: str) -> MovedContext | ContextError:
        """The record under a key, or what is wrong with it."""
        if key in self._records:
            return self._records[key]
        found = self._objects.read(key)
        try:
            if found is None:
                raise ContextError("it is gone")
            moved = objects.read_record(found.data)
            if _record_key(moved) != key:
                raise ContextError("it is of another model, namespace or context")
        except ContextError as error:
            return ContextError(damaged(self._objects, key, str(error)))
        return self._records.setdefault(key, moved)

    def _mark(self) -> None:
        if not self._marked_or_empty():
            self._objects.put(_MARK, _MARK_TEXT)

    def _marked_or_empty(self) -> bool:
        """Whether there are contexts of ours; an error where something else is."""
        if not self._marked:
            found = self._objects.read(_MARK)
            if found is None:
                return False
            if found.data != _MARK_TEXT:
                raise RemoteError(
                    f"{self.where}: {_MARK} is not of this version of alaya_jax; give another "
                    "place, or use the release that wrote it"
                )
            self._marked = True
        return True


def _usable(store: ContextStore, id: str) -> ContextRecord:
    record = _find(store, id)
    if record is None:
        raise ContextError(f"there is no context {id!r} in {store.path}")
    record = sampled.named(record)
    if record.problem is not None or record.header is None:
        raise ContextError(f"context {id}: {record.problem}")
    return record


def _find(store: ContextStore, id: str) -> ContextRecord | None:
    return next((record for record in store.list() if record.id == id), None)


def _header_of_prefix(moved: MovedContext, n: int) -> ContextHeader:
    if n == moved.num_tokens:
        return moved.header
    origin = tuple(run for run in moved.header.origin if run[0] < n)
    title = f"{moved.header.title} (first {n:,} tokens)".strip()
    return dataclasses.replace(moved.header, origin=origin, title=title)


def _record_key(moved: MovedContext) -> str:
    return f"contexts/{objects.group(moved.header)}/{moved.id}"
