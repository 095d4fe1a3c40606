"""Where a context's pages go: which ones another context lends, and which free ones it takes."""

import dataclasses
import secrets
from collections.abc import Callable

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.prefix import common_prefix
from alaya_jax.storage.catalogue import CatalogueFile, Snapshot
from alaya_jax.storage.interface import ContextHeader
from alaya_jax.storage.rows import Entry, Layout, PageList
from alaya_jax.storage.slots import chosen, free_slots

LEAST_PAGES = 1 << 16
"""Of a segment; its files are sparse."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Pages for a context.

    Attributes:
      segment: its number.
      layout: of the segment.
      is_new: whether the segment is still to be made.
      lent: pages that another context holds and that begin this one.
      fresh: free slots for the rest, i32 [m].
    """

    segment: int
    layout: Layout
    is_new: bool
    lent: PageList
    fresh: np.ndarray

    @property
    def shared(self) -> int:
        """How many pages are lent."""
        return len(self.lent)

    def pages(self, serial: int) -> PageList:
        """All of them; the fresh ones are made by the write of this serial."""
        born = np.full(len(self.fresh), serial, np.int64)
        return PageList(
            np.concatenate([self.lent.slots, self.fresh]).astype(np.int32),
            np.concatenate([self.lent.births, born]),
        )


def placed(
    header: ContextHeader,
    tokens: np.ndarray,
    snapshot: Snapshot,
    catalogue: CatalogueFile,
    problem: Callable[[Snapshot, int, ContextHeader], str | None],
) -> Place:
    """Pages for a new context: as many shared ones as there are, all in one segment.

    Args:
      header, tokens: of the context.
      snapshot, catalogue: what is there.
      problem: why a segment cannot be used, or None.
    """
    count = -(-len(tokens) // header.page_size)
    free = {
        number: free_slots(held(snapshot, catalogue, number), layout.num_pages)
        for number, layout in snapshot.segments.items()
        if problem(snapshot, number, header) is None
    }
    best, lent = None, PageList(np.zeros(0, np.int32), np.zeros(0, np.int64))
    for lender in snapshot.there.values():
        if lender.segment not in free or lender.header.family != header.family:
            continue
        try:
            found = _lent(header, tokens, lender, snapshot, catalogue)
        except ContextError:  # a damaged one lends nothing
            continue
        if len(found) > len(lent) and len(free[lender.segment]) >= count - len(found):
            best, lent = lender.segment, found
    needed = count - len(lent)
    if best is None:
        best = next((number for number, slots in free.items() if len(slots) >= count), None)
    if best is not None:
        return Place(best, snapshot.segments[best], False, lent, chosen(free[best], needed))
    room = max(LEAST_PAGES, 1 << (count - 1).bit_length())
    fresh = np.arange(count, dtype=np.int32)
    return Place(secrets.randbits(31), Layout.of(header, room), True, lent, fresh)


def held(snapshot: Snapshot, catalogue: CatalogueFile, segment: int) -> list[np.ndarray]:
    """The pages of each context of a segment, of removed ones too.

    A context whose list is damaged can never be read again, and holds nothing.
    """
    lists = []
    for context in snapshot.contexts.values():
        if context.segment == segment and segment in snapshot.segments:
            try:
                lists.append(catalogue.pages(context, snapshot.segments[segment].num_pages).slots)
            except ContextError:
                continue
    return lists


def _lent(
    header: ContextHeader,
    tokens: np.ndarray,
    lender: Entry,
    snapshot: Snapshot,
    catalogue: CatalogueFile,
) -> PageList:
    """Pages that begin a context with these tokens: full ones, and the last one where all agree."""
    common = min(len(tokens), lender.num_tokens, _alike(header.origin, lender.header.origin))
    common = common_prefix(catalogue.tokens(lender)[:common], tokens)
    size = header.page_size
    count = -(-common // size) if common == len(tokens) else common // size
    pages = catalogue.pages(lender, snapshot.segments[lender.segment].num_pages)
    count = min(count, snapshot.sound(lender, pages))
    return PageList(pages.slots[:count], pages.births[:count])


def _alike(one: tuple[tuple[int, str], ...], other: tuple[tuple[int, str], ...]) -> int:
    """Up to which token keys and values of two origins were computed in the same way."""
    for a, b in zip(one, other, strict=False):
        if a != b:
            return min(a[0], b[0])
    longer = max(one, other, key=len)
    shorter = min(len(one), len(other))
    return longer[shorter][0] if len(longer) > shorter else 2**31
