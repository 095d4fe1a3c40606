"""A context into the pool: whole or not at all. Whoever calls this holds the writers' lock."""

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, DatabaseError
from alaya_jax.storage import collect
from alaya_jax.storage.given import whole_layers
from alaya_jax.storage.interface import ContextHeader, ContextRecord, Source
from alaya_jax.storage.lock import lease_file
from alaya_jax.storage.placing import Place, placed
from alaya_jax.storage.pool import Pool
from alaya_jax.storage.rows import Entry, PageList
from alaya_jax.storage.segment import Segment


def intact(pool: Pool, id: str, tokens: np.ndarray) -> Entry | None:
    """A context that is there, as far as is known without reading its keys and values.

    Raises:
      DatabaseError: another context has its name.
    """
    snapshot = pool.catalogue.snapshot()
    entry = snapshot.there.get(id)
    if entry is None or pool.segment_problem(snapshot, entry.segment, entry.header) is not None:
        return None
    try:
        if not np.array_equal(pool.catalogue.tokens(entry), tokens):
            raise DatabaseError(
                f"context {id} in {pool.path} has the same name and other tokens; remove it to "
                "store this one"
            )
        _, pages = pool.pages(snapshot, entry)
    except ContextError:
        return None
    return entry if snapshot.sound(entry, pages) == len(pages) else None


def write_context(
    pool: Pool,
    header: ContextHeader,
    tokens: np.ndarray,
    kv: Source | Iterable[tuple[Any, Any]],
    progress: Callable[[int, int], None] | None,
) -> ContextRecord:
    """Writes a context that is not there, or is damaged: pages, checksums, and its row last.

    Raises:
      RequestError, DatabaseError, OSError: see `ContextStore.write`; nothing is left.
    """
    id = header.context_id(tokens)
    collect.removed(pool)
    snapshot = pool.catalogue.snapshot()
    place = placed(header, tokens, snapshot, pool.catalogue, pool.segment_problem)
    _require_room(pool, place, len(tokens))
    serial = secrets.randbits(62)
    pages = place.pages(serial)
    segment = pool.segment(place.segment, snapshot, place.layout)
    entry, lists = Entry.new(serial, id, header, tokens, place.segment, pages)
    start = place.shared * header.page_size
    layers = whole_layers(kv, start, header, tokens, progress)
    try:
        lease = lease_file(pool.path, serial)
        os.close(os.open(lease, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if place.is_new:
            segment.create()
        if len(place.fresh):
            segment.write(PageList(place.fresh, pages.births[place.shared :]), layers)
        with pool.catalogue.changing() as change:
            before = snapshot.there.get(id)
            if before is not None and (now := change.context(before.serial)) is not None:
                change.put("contexts", now.serial, dataclasses.replace(now, removed=True))
                entry = dataclasses.replace(entry, pinned=now.pinned)
            if place.is_new:
                change.put("segments", place.segment, place.layout)
            change.put("contexts", serial, entry)
            change.put_lists(serial, *lists)
    except BaseException:
        # What cannot be taken back is in free pages: gc gives it back.
        with contextlib.suppress(OSError, ContextError, DatabaseError):
            _take_back(pool, serial, place, segment)
        raise
    return entry.record


def _take_back(pool: Pool, serial: int, place: Place, segment: Segment) -> None:
    if serial in pool.catalogue.snapshot().contexts:
        return  # interrupted when all was done
    lease_file(pool.path, serial).unlink(missing_ok=True)
    if place.is_new:
        pool.forget_segment(place.segment)
        segment.delete()
    else:
        segment.punch(place.fresh)


def _require_room(pool: Pool, place: Place, tokens: int) -> None:
    """Raises DatabaseError where the disk has no room; no other writer takes any meanwhile."""
    needed = len(place.fresh) * place.layout.page_bytes + 16 * tokens + (64 << 10)
    free = shutil.disk_usage(pool.path).free
    if needed > free:
        # Perhaps a killed writer left something in pages that nobody holds.
        collect.free_space(pool)
        free = shutil.disk_usage(pool.path).free
    if needed > free:
        raise DatabaseError(
            f"a context of {tokens} tokens needs {needed} bytes more, and {pool.path} "
            f"has {free} free; remove contexts, or put the database on another disk"
        )
