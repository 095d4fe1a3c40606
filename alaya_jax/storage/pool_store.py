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
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, DatabaseError, RequestError
from alaya_jax.storage import collect
from alaya_jax.storage.catalogue import NAME, CatalogueFile, Snapshot
from alaya_jax.storage.files import flush_directory, make_directory
from alaya_jax.storage.index_files import StoredIndex, write_index
from alaya_jax.storage.interface import (
    Collected,
    ContextHeader,
    ContextRecord,
    IndexRecord,
    Source,
    StoreStats,
)
from alaya_jax.storage.lock import Lease, holding, lease_file, unused, writers_turn
from alaya_jax.storage.mapped import MappedPages
from alaya_jax.storage.opening import prepare
from alaya_jax.storage.placing import Place, placed
from alaya_jax.storage.rows import Damage, Entry, IndexEntry, PageList
from alaya_jax.storage.segment import NAMES, Segment
from alaya_jax.storage.writing import token_ids, whole_layers

_UNREADABLE = "unreadable-"
_TOUCHED_EVERY = 60.0
"""Seconds between two notes of a context's last use."""
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
        self._segments: dict[int, Segment] = {}
        self._verified: dict[str, set[str]] = {}  # of indexes, by their directories
        try:
            self._prepare()
            self._catalogue = CatalogueFile(self.path, read_only=read_only)
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
        state = "closed" if self._closed else f"{len(self._catalogue.snapshot().there)} contexts"
        return f"PoolStore({str(self.path)!r}, {state})"

    def _prepare(self) -> None:
        prepare(self.path, read_only=self.read_only)

    def close(self) -> None:
        """Lets go of the database; closing twice is allowed."""
        self._closed = True
        self._catalogue.close()

    def require_writable(self) -> None:
        """Raises DatabaseError when nothing can be written: closed, or open for reading only."""
        self._usable(writing=True)

    def version(self) -> Hashable:
        """See `ContextStore.version`."""
        self._usable()
        return self._catalogue.version()

    def list(self, namespace: str | None = None) -> Sequence[ContextRecord]:
        """See `ContextStore.list`."""
        snapshot = self._snapshot()
        cut: dict[int, str | None] = {}
        records = []
        for entry in snapshot.there.values():
            if namespace is not None and entry.header.namespace != namespace:
                continue
            if entry.segment not in cut:
                cut[entry.segment] = self._segment_problem(snapshot, entry.segment, entry.header)
            problem = cut[entry.segment]
            problem = None if problem is None else str(self._damaged(entry, problem))
            records.append(dataclasses.replace(entry.record, problem=problem))
        if namespace is None:
            records += [self._unreadable(*item) for item in snapshot.unreadable.items()]
        return sorted(records, key=lambda r: (r.created, r.id))

    def tokens(self, id: str) -> np.ndarray:
        """See `ContextStore.tokens`."""
        return self._catalogue.tokens(self._entry(id)[1])

    def read_kv(
        self, id: str, layer: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ContextStore.read_kv`."""
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
        segment, pages = self._pages(snapshot, entry)
        some = slice(first, -(-stop // size) if start < stop else first)
        part = PageList(pages.slots[some], pages.births[some])
        try:
            halves, wrong = segment.read(part, layer)
        except ContextError as error:
            raise self._damaged(entry, str(error)) from error
        if wrong:
            now = self._snapshot().there.get(id)
            if now is None:  # removed meanwhile, and its pages are others' by now
                raise self._unknown(id)
            if now.serial != entry.serial:
                return self.read_kv(id, layer, start, stop)
            found = [(first + i, kind) for i, kind in wrong]
            raise self._wrong(entry, pages, segment, layer, found)
        self._touch(entry)
        tokens = slice(start - first * size, stop - first * size)
        k, v = (half.reshape(len(half), -1, header.head_dim)[:, tokens] for half in halves)
        k.flags.writeable = v.flags.writeable = False
        return k, v

    def mapped(self, id: str) -> MappedPages:
        """See `ContextStore.mapped`."""
        _, entry = self._entry(id)
        lease = self._lease(entry)
        snapshot, now = self._entry(id)  # not removed before the lease was there
        if now.serial != entry.serial:
            return self.mapped(id)
        segment, pages = self._pages(snapshot, entry)
        try:
            segment.check_files()
        except ContextError as error:
            raise self._damaged(entry, str(error)) from error
        self._touch(entry)

        def damaged(layer: int, wrong: Any) -> ContextError:
            return self._wrong(entry, pages, segment, layer, wrong)

        return MappedPages(id, pages, segment, lease, damaged)

    def check(self, id: str) -> Sequence[str]:
        """See `ContextStore.check`."""
        if id.startswith(_UNREADABLE):
            return [str(record.problem) for record in self.list() if record.id == id]
        snapshot, entry = self._entry(id)
        problems = []
        try:
            if (
                problem := self._segment_problem(snapshot, entry.segment, entry.header)
            ) is not None:
                raise self._damaged(entry, problem)
            tokens = self._catalogue.tokens(entry)
            if entry.header.context_id(tokens) != id:
                problems.append(str(self._damaged(entry, f"its token ids in {NAME} are another's")))
            segment, pages = self._pages(snapshot, entry)
            for layer in range(entry.header.num_layers):
                found = []
                for first in range(0, len(pages), _CHECKED_AT_ONCE):
                    some = slice(first, first + _CHECKED_AT_ONCE)
                    part = PageList(pages.slots[some], pages.births[some])
                    _, wrong = segment.read(part, layer)
                    found += [(first + i, kind) for i, kind in wrong]
                if found:
                    problems.append(str(self._wrong(entry, pages, segment, layer, found)))
        except ContextError as error:
            problems.append(str(error))
        for kind in self.indexes(id):
            problems += self.check_index(id, kind)
        return problems

    def check_index(self, id: str, kind: str) -> Sequence[str]:
        """See `ContextStore.check_index`."""
        index = self._stored_indexes(id).get(kind)
        return [f"there is no {kind} index"] if index is None else index.check()

    def check_catalogue(self) -> Sequence[str]:
        """Every problem of the catalogue's file as a whole, in words."""
        return self._catalogue.check() + list(self._snapshot().problems)

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
                with self._catalogue.changing() as change:
                    found = change.context(entry.serial)
                    if found is None or found.removed:
                        raise self._unknown(id)
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
        if (there := self._intact(id, tokens)) is not None:
            return there.record
        try:
            with writers_turn(self.path / "lock"):
                if (there := self._intact(id, tokens)) is not None:  # another was faster
                    return there.record
                collect.removed(self.path, self._catalogue, self._segment)
                return self._write(id, header, tokens, kv, progress)
        except OSError as error:
            raise self._failed(id, error) from error

    def remove(self, id: str) -> None:
        """See `ContextStore.remove`."""
        self._usable(writing=True)
        try:
            if id.startswith(_UNREADABLE):
                self._remove_unreadable(id)
            else:
                _, entry = self._entry(id)
                with self._catalogue.changing() as change:
                    found = change.context(entry.serial)
                    if found is None or found.removed:
                        raise self._unknown(id)
                    if found.pinned:
                        raise ContextError(
                            f"context {id} in {self.path} is pinned; unpin it first "
                            "(context.unpin(), or alaya db unpin)"
                        )
                    change.put("contexts", found.serial, dataclasses.replace(found, removed=True))
            # A writer that is at work, or the next one, or gc, frees the pages else.
            with writers_turn(self.path / "lock", wait=False) as mine:
                if mine:
                    collect.removed(self.path, self._catalogue, self._segment)
        except OSError as error:
            raise DatabaseError(
                f"removing context {id} from {self.path} failed: {error}"
            ) from error

    def pin(self, id: str, pinned: bool = True) -> None:
        """See `ContextStore.pin`."""
        self._usable(writing=True)
        self._alter(self._entry(id)[1], pinned=pinned)

    def remember(self, id: str, *, created: float) -> None:
        """Sets when a context was first stored, for one that comes from elsewhere."""
        self._usable(writing=True)
        self._alter(self._entry(id)[1], created=created)

    def gc(self) -> Collected:
        """See `ContextStore.gc`."""
        self._usable(writing=True)
        try:
            with writers_turn(self.path / "lock"):
                return collect.everything(self.path, self._catalogue, self._segment)
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
        return collect.stats(self.path, self._catalogue, snapshot, sum(indexes))

    def _write(
        self,
        id: str,
        header: ContextHeader,
        tokens: np.ndarray,
        kv: Source | Iterable[tuple[Any, Any]],
        progress: Callable[[int, int], None] | None,
    ) -> ContextRecord:
        """Writes a context that is not there, or is damaged; this is the only writer."""
        snapshot = self._snapshot()
        place = placed(header, tokens, snapshot, self._catalogue, self._segment_problem)
        self._require_room(place, len(tokens))
        serial = secrets.randbits(62)
        pages = place.pages(serial)
        segment = self._segment(place.segment, snapshot, place.layout)
        lease = lease_file(self.path, serial)
        entry, lists = Entry.new(serial, id, header, tokens, place.segment, pages)
        start = place.shared * header.page_size
        layers = whole_layers(kv, start, header, tokens, progress)
        try:
            os.close(os.open(lease, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            if place.is_new:
                segment.create()
            if len(place.fresh):
                segment.write(PageList(place.fresh, pages.births[place.shared :]), layers)
            with self._catalogue.changing() as change:
                before = snapshot.there.get(id)
                if before is not None and (now := change.context(before.serial)) is not None:
                    change.put("contexts", now.serial, dataclasses.replace(now, removed=True))
                    entry = dataclasses.replace(entry, pinned=now.pinned)
                if place.is_new:
                    change.put("segments", place.segment, place.layout)
                change.put("contexts", serial, entry)
                change.put_lists(serial, *lists)
        except BaseException as error:
            lease.unlink(missing_ok=True)
            with contextlib.suppress(
                OSError, ContextError
            ):  # what is left is free: gc gives it back
                if place.is_new:
                    self._segments.pop(place.segment, None)
                    segment.delete()
                else:
                    segment.punch(place.fresh)
            if isinstance(error, OSError | DatabaseError):
                raise self._failed(id, error) from error
            raise
        return entry.record

    def _require_room(self, place: Place, tokens: int) -> None:
        """Raises DatabaseError where the disk has no room; no other writer takes any meanwhile."""
        needed = len(place.fresh) * place.layout.page_bytes + 16 * tokens + (64 << 10)
        free = shutil.disk_usage(self.path).free
        if needed > free:
            # Perhaps a killed writer left something in pages that nobody holds.
            collect.free_space(self._catalogue, self._segment)
            free = shutil.disk_usage(self.path).free
        if needed > free:
            raise DatabaseError(
                f"a context of {tokens} tokens needs {needed} bytes more, and {self.path} "
                f"has {free} free; remove contexts, or put the database on another disk"
            )

    def _intact(self, id: str, tokens: np.ndarray) -> Entry | None:
        """A context that is there, as far as is known without reading its keys and values."""
        snapshot = self._snapshot()
        entry = snapshot.there.get(id)
        if (
            entry is None
            or self._segment_problem(snapshot, entry.segment, entry.header) is not None
        ):
            return None
        try:
            if not np.array_equal(self._catalogue.tokens(entry), tokens):
                raise DatabaseError(
                    f"context {id} in {self.path} has the same name and other tokens; remove it to "
                    "store this one"
                )
            _, pages = self._pages(snapshot, entry)
        except ContextError:
            return None
        return entry if snapshot.sound(entry, pages) == len(pages) else None

    def _segment(self, number: int, snapshot: Snapshot, layout: Any = None) -> Segment:
        if number not in self._segments:
            directory = self.path / "segments" / str(number)
            self._segments[number] = Segment(directory, layout or snapshot.segments[number])
        return self._segments[number]

    def _segment_problem(
        self, snapshot: Snapshot, number: int, header: ContextHeader
    ) -> str | None:
        """Why a segment cannot hold such a context, or None."""
        layout = snapshot.segments.get(number)
        if layout is None or not layout.holds(header):
            return f"segment {number} is not in {NAME} as it must be"
        try:
            self._segment(number, snapshot).check_files()
        except ContextError as error:
            return str(error)
        return None

    def _pages(self, snapshot: Snapshot, entry: Entry) -> tuple[Segment, PageList]:
        layout = snapshot.segments.get(entry.segment)
        if layout is None or not layout.holds(entry.header):
            raise self._damaged(entry, f"segment {entry.segment} is not in {NAME} as it must be")
        pages = self._catalogue.pages(entry, layout.num_pages)
        return self._segment(entry.segment, snapshot), pages

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

    def _lease(self, entry: Entry) -> Lease:
        path = lease_file(self.path, entry.serial)
        try:
            if not self.read_only:  # somebody deleted it: make it again
                os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            return Lease(path)
        except OSError as error:
            raise self._damaged(entry, f"{path} cannot be opened ({error.strerror})") from error

    def _touch(self, entry: Entry) -> None:
        """Notes that a context was used."""
        if not self.read_only and time.time() - entry.used > _TOUCHED_EVERY:
            # A full disk does not keep anyone from reading.
            with contextlib.suppress(DatabaseError, ContextError):
                self._alter(entry, used=time.time())

    def _alter(self, entry: Entry, **changes: Any) -> None:
        with self._catalogue.changing() as change:
            found = change.context(entry.serial)
            if found is None or found.removed:
                raise self._unknown(entry.id)
            change.put("contexts", found.serial, dataclasses.replace(found, **changes))

    def _remove_unreadable(self, id: str) -> None:
        serial = next((s for s in self._snapshot().unreadable if id == f"{_UNREADABLE}{s}"), None)
        if serial is None:
            raise self._unknown(id)
        with unused(lease_file(self.path, serial)) as free:
            if not free:
                raise ContextError(f"{id} in {self.path} is being read; remove it later")
            with self._catalogue.changing() as change:
                for key in change.indexes(serial):
                    change.delete("indexes", key)
                change.delete("contexts", serial)

    def _unreadable(self, serial: int, why: str) -> ContextRecord:
        id = f"{_UNREADABLE}{serial}"
        problem = (
            f"context {id} in {self.path} is damaged: its row in {NAME} is unreadable ({why}); "
            "remove it and import it again"
        )
        return ContextRecord(id=id, header=None, num_tokens=0, created=0.0, problem=problem)

    def _wrong(
        self,
        entry: Entry,
        pages: PageList,
        segment: Segment,
        layer: int,
        wrong: Sequence[tuple[int, int]],
    ) -> ContextError:
        """The error of damaged pages, (index in the pages, kind) each; noted, so that nobody
        shares them.
        """
        for i in sorted({i for i, _ in wrong}):
            damage = Damage(
                segment=entry.segment, slot=int(pages.slots[i]), birth=int(pages.births[i])
            )
            if not self.read_only and damage not in self._snapshot().damage.values():
                # If it cannot be noted, the error to come still says it.
                with contextlib.suppress(DatabaseError), self._catalogue.changing() as change:
                    change.put("damage", None, damage)
        i, kind = min(wrong)
        size = entry.header.page_size
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        file = segment.file(layer, kind).relative_to(self.path)
        return self._damaged(
            entry,
            f"the {NAMES[kind]} of tokens {i * size} to {min((i + 1) * size, entry.num_tokens) - 1}"
            f" of layer {layer} (page {pages.slots[i]} of {file}{more}) do not match their "
            "checksum",
        )

    def _damaged(self, entry: Entry, what: str) -> ContextError:
        return ContextError(
            f"context {entry.id} in {self.path} is damaged: {what}; remove it and import it again"
        )

    def _failed(self, id: str, error: Exception) -> DatabaseError:
        return DatabaseError(
            f"writing context {id} to {self.path} failed: {error}; nothing of it was kept, "
            "store it again once the disk is right"
        )

    def _unknown(self, id: str) -> ContextError:
        return ContextError(f"no context {id!r} in {self.path}; list() names those there are")

    def _entry(self, id: str) -> tuple[Snapshot, Entry]:
        snapshot = self._snapshot()
        if id not in snapshot.there:
            if id.startswith(_UNREADABLE):
                for serial, why in snapshot.unreadable.items():
                    if id == f"{_UNREADABLE}{serial}":
                        raise ContextError(self._unreadable(serial, why).problem)
            raise self._unknown(id)
        return snapshot, snapshot.there[id]

    def _snapshot(self) -> Snapshot:
        self._usable()
        return self._catalogue.snapshot()

    def _usable(self, *, writing: bool = False):
        if self._closed:
            raise DatabaseError(f"database {self.path} is closed; open it again")
        if writing and self.read_only:
            raise DatabaseError(
                f"database {self.path} is open with read_only=True; open it without, to change it"
            )
