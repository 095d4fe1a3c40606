"""A store in a directory: pages of all contexts in pool files, and a catalogue that says whose.

    <path>/alaya_db.json      what this directory is
    <path>/lock               held while somebody writes: see `lock`
    <path>/catalogue.sqlite   see `catalogue`
    <path>/segments/<n>/      see `segment`
    <path>/indexes/<name>/    see `index_files`
    <path>/leases/<serial>    locked while somebody reads a context where it lies

A context is written into free pages, flushed to disk, and comes into being by one transaction of
the catalogue: it is there whole or not at all, and a killed writer leaves free pages.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, DatabaseError, RequestError
from alaya_jax.storage import collect, leaves
from alaya_jax.storage.catalogue import NAME, RemovedError, Snapshot
from alaya_jax.storage.files import flush_directory, make_directory
from alaya_jax.storage.given import token_ids
from alaya_jax.storage.index_files import StoredIndex, write_index
from alaya_jax.storage.interface import (
    Collected,
    ContextHeader,
    ContextRecord,
    IndexRecord,
    Source,
    StoreStats,
)
from alaya_jax.storage.lock import holding, lease_file, unused, writers_turn
from alaya_jax.storage.mapped import MappedPages
from alaya_jax.storage.opening import prepare
from alaya_jax.storage.pool import UNREADABLE, Pool
from alaya_jax.storage.rows import Entry, IndexEntry, PageList
from alaya_jax.storage.segment import Segment
from alaya_jax.storage.writing import intact, write_context

_CHECKED_AT_ONCE = 1024
"""Pages."""


class PoolStore:
    """A `ContextStore` in a directory, which is made if it is not there.

    Threads and processes may share it: writers take turns, and readers wait for nobody. A process
    made by fork may go on with it.

    Args:
      path: the database directory.
      read_only: allow no change, and need no right to write.

    Raises:
      DatabaseError: the path cannot be used, or holds something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False):
        self.path = Path(path).absolute()
        self.read_only = read_only
        self._closed = False
        self._verified: dict[str, set[str]] = {}  # of indexes, by their directories
        try:
            self._prepare()
            self._pool = Pool(self.path, read_only=read_only)
        except OSError as error:
            right = "read" if read_only else "written"
            raise DatabaseError(
                f"cannot open a database at {self.path}: {error.strerror}; give the path of a "
                f"directory that can be {right}"
            ) from error

    def __enter__(self) -> "PoolStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._snapshot().there)} contexts"
        return f"PoolStore({str(self.path)!r}, {state})"

    def _prepare(self) -> None:
        prepare(self.path, read_only=self.read_only)

    def close(self) -> None:
        """Lets go of the database; closing twice is allowed."""
        self._closed = True
        self._pool.close()

    def require_writable(self) -> None:
        """Raises DatabaseError when nothing can be written: closed, or open for reading only."""
        self._usable(writing=True)

    def version(self) -> Hashable:
        """See `ContextStore.version`."""
        self._usable()
        return self._pool.catalogue.version()

    def list(self, namespace: str | None = None) -> Sequence[ContextRecord]:
        """See `ContextStore.list`."""
        snapshot = self._snapshot()
        cut: dict[int, str | None] = {}
        records = []
        for entry in snapshot.there.values():
            if namespace is not None and entry.header.namespace != namespace:
                continue
            if entry.segment not in cut:
                cut[entry.segment] = self._pool.segment_problem(
                    snapshot, entry.segment, entry.header
                )
            problem = cut[entry.segment]
            problem = None if problem is None else str(self._pool.damaged(entry, problem))
            records.append(dataclasses.replace(entry.record, problem=problem))
        if namespace is None:
            records += [self._pool.unreadable(*item) for item in snapshot.unreadable.items()]
        return sorted(records, key=lambda r: (r.created, r.id))

    def tokens(self, id: str) -> np.ndarray:
        """See `ContextStore.tokens`."""
        return self._settled(lambda: self._pool.catalogue.tokens(self._entry(id)[1]))

    def read_kv(
        self, id: str, layer: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ContextStore.read_kv`."""
        return self._settled(lambda: self._read_kv(id, layer, start, stop))

    def _read_kv(
        self, id: str, layer: int, start: int, stop: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        snapshot, entry = self._entry(id)
        header, count = entry.header, entry.num_tokens
        stop = count if stop is None else stop
        if not (0 <= layer < header.num_layers and 0 <= start <= stop <= count):
            raise RequestError(
                f"context {id} has layers 0 to {header.num_layers - 1} and {count} "
                f"tokens; tokens {start} to {stop} of layer {layer} were asked for"
            )
        size = header.page_size
        first = start // size
        segment, pages = self._pool.pages(snapshot, entry)
        some = slice(first, -(-stop // size) if start < stop else first)
        part = PageList(pages.slots[some], pages.births[some])
        try:
            halves, wrong = segment.read(part, layer)
        except ContextError as error:
            self._pool.require_there(entry)
            raise self._pool.damaged(entry, str(error)) from error
        if wrong:
            self._pool.require_there(entry)  # else its pages are others' by now
            found = [(first + i, kind) for i, kind in wrong]
            raise self._pool.wrong(entry, pages, segment, layer, found)
        self._pool.touch(entry)
        tokens = slice(start - first * size, stop - first * size)
        k, v = (half.reshape(len(half), -1, header.row_width)[:, tokens] for half in halves)
        k.flags.writeable = v.flags.writeable = False
        return k, v

    def mapped(self, id: str) -> MappedPages:
        """See `ContextStore.mapped`."""
        return self._settled(lambda: self._mapped(id))

    def _mapped(self, id: str) -> MappedPages:
        _, entry = self._entry(id)
        lease = self._pool.lease(entry)
        self._pool.require_there(entry)  # not removed before the lease was there
        snapshot, _ = self._entry(id)
        segment, pages = self._pool.pages(snapshot, entry)
        try:
            segment.check_files()
        except ContextError as error:
            raise self._pool.damaged(entry, str(error)) from error
        self._pool.touch(entry)

        def damaged(layer: int, wrong: Any) -> ContextError:
            return self._pool.wrong(entry, pages, segment, layer, wrong)

        return MappedPages(id, pages, segment, lease, damaged, read_only=self.read_only)

    def check(self, id: str) -> Sequence[str]:
        """See `ContextStore.check`."""
        if id.startswith(UNREADABLE):
            return [str(record.problem) for record in self.list() if record.id == id]
        return self._settled(lambda: self._check(id))

    def _check(self, id: str) -> Sequence[str]:
        snapshot, entry = self._entry(id)
        problems = []
        try:
            if (
                problem := self._pool.segment_problem(snapshot, entry.segment, entry.header)
            ) is not None:
                raise self._pool.damaged(entry, problem)
            tokens = self._pool.catalogue.tokens(entry)
            if entry.header.context_id(tokens) != id:
                problems.append(
                    str(self._pool.damaged(entry, f"its token ids in {NAME} are another's"))
                )
            segment, pages = self._pool.pages(snapshot, entry)
            for layer in range(entry.header.num_layers):
                found = []
                for first in range(0, len(pages), _CHECKED_AT_ONCE):
                    some = slice(first, first + _CHECKED_AT_ONCE)
                    part = PageList(pages.slots[some], pages.births[some])
                    _, wrong = segment.read(part, layer)
                    found += [(first + i, kind) for i, kind in wrong]
                if found:
                    self._pool.require_there(entry)
                    problems.append(str(self._pool.wrong(entry, pages, segment, layer, found)))
        except RemovedError:
            raise
        except ContextError as error:
            problems.append(str(error))
        for kind in self.indexes(id):
            problems += self.check_index(id, kind)
        return problems + list(self.check_leaves(id))

    def check_index(self, id: str, kind: str) -> Sequence[str]:
        """See `ContextStore.check_index`."""
        index = self._stored_indexes(id).get(kind)
        return [f"there is no {kind} index"] if index is None else index.check()

    def leaves(self, id: str) -> Mapping[str, int]:
        """See `ContextStore.leaves`."""
        self._entry(id)
        try:
            segment, pages = self._pages(id)
        except ContextError:
            return {}  # it is damaged, which `check` says
        return leaves.sizes(segment.directory, segment.layout, pages)

    def check_leaves(self, id: str) -> Sequence[str]:
        """See `ContextStore.check_leaves`."""
        try:
            segment, pages = self._pages(id)
        except ContextError:
            return []  # of a context that is damaged itself
        whose = f"context {id} in {self.path}"
        return leaves.problems(segment.directory, segment.layout, pages, whose)

    def _pages(self, id: str) -> tuple[Segment, PageList]:
        return self._settled(lambda: self._pool.pages(*self._entry(id)))

    def check_catalogue(self) -> Sequence[str]:
        """Every problem of the catalogue's file as a whole, in words."""
        return self._pool.catalogue.check() + list(self._snapshot().problems)

    def indexes(self, id: str) -> Mapping[str, IndexRecord]:
        """See `ContextStore.indexes`."""
        return {kind: index.record for kind, index in self._stored_indexes(id).items()}

    def read_index(self, id: str, kind: str, layer: int) -> dict[str, np.ndarray]:
        """See `ContextStore.read_index`."""
        index = self._stored_indexes(id).get(kind)
        if index is None:
            raise ContextError(f"context {id} in {self.path} has no {kind} index; build it first")
        return index.read(layer)

    def write_index(
        self,
        id: str,
        kind: str,
        settings: Mapping[str, Any],
        layers: Iterable[Mapping[str, np.ndarray]],
    ) -> None:
        """See `ContextStore.write_index`."""
        self._usable(writing=True)
        _, entry = self._entry(id)
        name = secrets.token_hex(8)
        new = self.path / "indexes" / name
        old: list[str] = [name]
        try:
            make_directory(new)
            with holding(new):
                meta = write_index(new, kind, settings, layers)
                flush_directory(new.parent)
                with self._pool.catalogue.changing() as change:
                    found = change.context(entry.serial)
                    if found is None or found.removed:
                        raise self._pool.unknown(id)
                    same = change.indexes(entry.serial, kind)
                    for key in same:
                        change.delete("indexes", key)
                    row = IndexEntry(serial=entry.serial, kind=kind, name=name, meta=meta)
                    change.put("indexes", None, row)
                old = [row.name for row in same.values()]
        except (OSError, DatabaseError) as error:
            raise DatabaseError(
                f"writing the {kind} index of context {id} to {self.path} failed: {error}; the "
                "context is as it was, build the index again once the disk is right"
            ) from error
        finally:
            for gone in old:
                self._verified.pop(gone, None)
                shutil.rmtree(self.path / "indexes" / gone, ignore_errors=True)

    def write(
        self,
        header: ContextHeader,
        tokens: Any,
        kv: Source | Iterable[tuple[Any, Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> ContextRecord:
        """See `ContextStore.write`."""
        self._usable(writing=True)
        tokens = token_ids(tokens)
        id = header.context_id(tokens)
        if (there := intact(self._pool, id, tokens)) is not None:
            return there.record
        try:
            with writers_turn(self.path / "lock"):
                if (there := intact(self._pool, id, tokens)) is not None:  # another was faster
                    return there.record
                return write_context(self._pool, header, tokens, kv, progress)
        except (OSError, DatabaseError) as error:
            raise DatabaseError(
                f"writing context {id} to {self.path} failed: {error}; nothing of it was kept, "
                "store it again once the disk is right"
            ) from error

    def remove(self, id: str) -> None:
        """See `ContextStore.remove`."""
        self._usable(writing=True)
        try:
            if id.startswith(UNREADABLE):
                self._remove_unreadable(id)
            else:
                _, entry = self._entry(id)
                with self._pool.catalogue.changing() as change:
                    found = change.context(entry.serial)
                    if found is None or found.removed:
                        raise self._pool.unknown(id)
                    if found.pinned:
                        raise ContextError(
                            f"context {id} in {self.path} is pinned; unpin it first "
                            "(context.unpin(), or alaya db unpin)"
                        )
                    change.put("contexts", found.serial, dataclasses.replace(found, removed=True))
            # A writer that is at work, or the next one, or gc, frees the pages else.
            with writers_turn(self.path / "lock", wait=False) as mine:
                if mine:
                    collect.removed(self._pool)
        except OSError as error:
            raise DatabaseError(
                f"removing context {id} from {self.path} failed: {error}"
            ) from error

    def pin(self, id: str, pinned: bool = True) -> None:
        """See `ContextStore.pin`."""
        self._usable(writing=True)
        self._pool.alter(self._entry(id)[1], pinned=pinned)

    def remember(self, id: str, *, created: float) -> None:
        """Sets when a context was first stored, for one that comes from elsewhere."""
        self._usable(writing=True)
        self._pool.alter(self._entry(id)[1], created=created)

    def gc(self) -> Collected:
        """See `ContextStore.gc`."""
        self._usable(writing=True)
        try:
            with writers_turn(self.path / "lock"):
                return collect.everything(self._pool)
        except OSError as error:
            raise DatabaseError(f"collecting in {self.path} failed: {error}") from error

    def stats(self) -> StoreStats:
        """See `ContextStore.stats`."""
        snapshot = self._snapshot()
        indexes = [
            found.nbytes
            for entry in snapshot.there.values()
            for found in self.indexes(entry.id).values()
        ]
        return collect.stats(self._pool, sum(indexes))

    def _stored_indexes(self, id: str) -> dict[str, StoredIndex]:
        snapshot, entry = self._entry(id)
        found = {}
        for row in snapshot.indexes.values():
            if row.serial == entry.serial:
                found[row.kind] = StoredIndex(
                    self.path / "indexes" / row.name,
                    row.kind,
                    f"context {id} in {self.path}",
                    row.meta,
                    self._verified.setdefault(row.name, set()),
                )
        return found

    def _remove_unreadable(self, id: str) -> None:
        serial = next((s for s in self._snapshot().unreadable if id == f"{UNREADABLE}{s}"), None)
        if serial is None:
            raise self._pool.unknown(id)
        with unused(lease_file(self.path, serial)) as free:
            if not free:
                raise ContextError(f"{id} in {self.path} is being read; remove it later")
            with self._pool.catalogue.changing() as change:
                for key in change.indexes(serial):
                    change.delete("indexes", key)
                change.delete("contexts", serial)

    def _settled[T](self, use: Callable[[], T]) -> T:
        """What a use of a context gives, once more when it was removed meanwhile: then it is gone,
        which `_entry` says, or stored anew.
        """
        while True:
            with contextlib.suppress(RemovedError):
                return use()

    def _entry(self, id: str) -> tuple[Snapshot, Entry]:
        self._usable()
        return self._pool.entry(id)

    def _snapshot(self) -> Snapshot:
        self._usable()
        return self._pool.catalogue.snapshot()

    def _usable(self, *, writing: bool = False):
        if self._closed:
            raise DatabaseError(f"database {self.path} is closed; open it again")
        if writing and self.read_only:
            raise DatabaseError(
                f"database {self.path} is open with read_only=True; open it without, to change it"
            )
