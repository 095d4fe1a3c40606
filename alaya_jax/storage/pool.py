"""An open database as reading, writing and collecting see it: catalogue, segments, leases, and the
words for what is wrong.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alaya_jax.errors import ContextError, DatabaseError
from alaya_jax.storage.catalogue import NAME, CatalogueFile, Snapshot
from alaya_jax.storage.interface import ContextHeader, ContextRecord
from alaya_jax.storage.lock import Lease, lease_file
from alaya_jax.storage.rows import Damage, Entry, Layout, PageList
from alaya_jax.storage.segment import NAMES, Segment

UNREADABLE = "unreadable-"
"""How the ids of contexts begin whose rows are damaged."""

_TOUCHED_EVERY = 60.0
"""Seconds between two notes of a context's last use."""


class Pool:
    """Pages and catalogue of a database. Threads may share it.

    Args:
      path: of the database.
      read_only: write nothing.

    Raises:
      DatabaseError: the catalogue cannot be used.
    """

    def __init__(self, path: Path, *, read_only: bool):
        self.path, self.read_only = path, read_only
        self.catalogue = CatalogueFile(path, read_only=read_only)
        self._segments: dict[int, Segment] = {}

    def segment(self, number: int, snapshot: Snapshot, layout: Layout | None = None) -> Segment:
        """A segment by its number; of a new one, the layout is given."""
        if number not in self._segments:
            directory = self.path / "segments" / str(number)
            self._segments[number] = Segment(directory, layout or snapshot.segments[number])
        return self._segments[number]

    def segment_problem(self, snapshot: Snapshot, number: int, header: ContextHeader) -> str | None:
        """Why a segment cannot hold such a context, or None."""
        layout = snapshot.segments.get(number)
        if layout is None or not layout.holds(header):
            return f"segment {number} is not in {NAME} as it must be"
        try:
            self.segment(number, snapshot).check_files()
        except ContextError as error:
            return str(error)
        return None

    def pages(self, snapshot: Snapshot, entry: Entry) -> tuple[Segment, PageList]:
        """A context's pages, and where they are. Raises ContextError."""
        layout = snapshot.segments.get(entry.segment)
        if layout is None or not layout.holds(entry.header):
            raise self.damaged(entry, f"segment {entry.segment} is not in {NAME} as it must be")
        pages = self.catalogue.pages(entry, layout.num_pages)
        return self.segment(entry.segment, snapshot), pages

    def lease(self, entry: Entry) -> Lease:
        """A lease on a context. It may have been removed before the lease was there."""
        path = lease_file(self.path, entry.serial)
        try:
            if not self.read_only:  # somebody deleted it: make it again
                os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            return Lease(path)
        except OSError as error:
            raise self.damaged(entry, f"{path} cannot be opened ({error.strerror})") from error

    def touch(self, entry: Entry) -> None:
        """Notes that a context was used."""
        if not self.read_only and time.time() - entry.used > _TOUCHED_EVERY:
            # A full disk does not keep anyone from reading.
            with contextlib.suppress(DatabaseError, ContextError):
                self.alter(entry, used=time.time())

    def alter(self, entry: Entry, **changes: Any) -> None:
        """Changes fields of a context's row. Raises ContextError when it is gone."""
        with self.catalogue.changing() as change:
            found = change.context(entry.serial)
            if found is None or found.removed:
                raise self.unknown(entry.id)
            change.put("contexts", found.serial, dataclasses.replace(found, **changes))

    def unreadable(self, serial: int, why: str) -> ContextRecord:
        """The record of a context whose row is damaged."""
        id = f"{UNREADABLE}{serial}"
        problem = (
            f"context {id} in {self.path} is damaged: its row in {NAME} is unreadable ({why}); "
            "remove it and import it again"
        )
        return ContextRecord(id=id, header=None, num_tokens=0, created=0.0, problem=problem)

    def wrong(
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
            if not self.read_only and damage not in self.catalogue.snapshot().damage.values():
                # If it cannot be noted, the error to come still says it.
                with contextlib.suppress(DatabaseError), self.catalogue.changing() as change:
                    change.put("damage", None, damage)
        i, kind = min(wrong)
        size = entry.header.page_size
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        file = segment.file(layer, kind).relative_to(self.path)
        return self.damaged(
            entry,
            f"the {NAMES[kind]} of tokens {i * size} to {min((i + 1) * size, entry.num_tokens) - 1}"
            f" of layer {layer} (page {pages.slots[i]} of {file}{more}) do not match their "
            "checksum",
        )

    def damaged(self, entry: Entry, what: str) -> ContextError:
        """The error of a damaged context, with the way out."""
        return ContextError(
            f"context {entry.id} in {self.path} is damaged: {what}; remove it and import it again"
        )

    def unknown(self, id: str) -> ContextError:
        """The error of a context that is not there."""
        return ContextError(f"no context {id!r} in {self.path}; list() names those there are")

    def entry(self, id: str) -> tuple[Snapshot, Entry]:
        """A context's row, and what else is in the catalogue. Raises ContextError."""
        snapshot = self.catalogue.snapshot()
        if id not in snapshot.there:
            if id.startswith(UNREADABLE):
                for serial, why in snapshot.unreadable.items():
                    if id == f"{UNREADABLE}{serial}":
                        raise ContextError(self.unreadable(serial, why).problem)
            raise self.unknown(id)
        return snapshot, snapshot.there[id]

    def forget_segment(self, number: int) -> None:
        """Of one that was not made after all."""
        self._segments.pop(number, None)

    def close(self) -> None:
        """Lets go of the catalogue; closing twice is allowed."""
        self.catalogue.close()
