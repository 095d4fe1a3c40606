"""Which slots of a segment are free, and which of them a context takes. Pure functions of lists."""

from collections.abc import Iterable, Iterator

import numpy as np


def free_slots(held: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Slots of `count` that are in none of these lists of pages, ascending.

    Nobody keeps a list of free slots or a count of references: both follow from the contexts, so
    that they cannot disagree with them.
    """
    references = np.zeros(count, np.int64)
    for pages in held:
        references += np.bincount(pages, minlength=count)
    return np.flatnonzero(references == 0).astype(np.int32)


def chosen(free: np.ndarray, count: int) -> np.ndarray:
    """`count` of the free slots: of the shortest run that has room, else the first there are."""
    if count == 0:
        return free[:0]
    found = list(runs(free))
    fitting = [(stop - start, start) for start, stop in found if stop - start >= count]
    if not fitting:
        return free[:count]
    start = min(fitting)[1]
    return np.arange(start, start + count, dtype=np.int32)


def located(slots: np.ndarray) -> Iterator[tuple[slice, int]]:
    """Of each stretch of `runs`: where in the list it is, and its first slot."""
    done = 0
    for start, stop in runs(slots):
        yield slice(done, done + stop - start), start
        done += stop - start


def runs(slots: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, one past the last) of each stretch of slots that follow one another, as listed."""
    if len(slots):
        ends = np.flatnonzero(np.diff(slots) != 1) + 1
        for first, last in zip([0, *ends], [*ends, len(slots)], strict=True):
            yield int(slots[first]), int(slots[last - 1]) + 1
