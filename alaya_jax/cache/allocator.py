"""Who owns which page: reference counts on the host, outside jit.

Several sequences may hold one page. A page is written only while one sequence holds it; the
sequence that wants to write a shared page takes a new one and copies (copy on write).
"""

import numpy as np

from alaya_jax.cache.paged import NO_PAGE
from alaya_jax.errors import CacheFullError

STRIPE = 32
"""Consecutive pages of a sequence that lie on one device, where its pages are spread over several:
a tile's worth at 16 tokens a page.
"""


class PageAllocator:
    """Reference counts of a pool of pages.

    Pages are handed out in runs of consecutive ids where possible: attention reads a run as one
    slice. Where the pool is split over devices, a sequence's pages are spread over them in stripes.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        setting: str = "Budget(device=...)",
        shards: int = 1,
    ):
        """Args: the pool's size; tokens a page; what to name when the pool is exhausted; into how
        many equal parts the pool is split.
        """
        self._refs = np.zeros(num_pages, np.int32)
        self._shard_pages = num_pages // shards
        self._refs[NO_PAGE :: self._shard_pages] = 1  # of each shard one is never handed out
        self._shards = shards
        self._page_size = page_size
        self._setting = setting

    @property
    def capacity(self) -> int:
        """Pages that can be handed out in all."""
        return self._refs.size - self._shards

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return int(np.count_nonzero(self._refs == 0))

    def allocate(self, n: int, after: int | None = None) -> np.ndarray:
        """Takes `n` free pages, each with one reference.

        Args:
          n: how many.
          after: a page that they should follow, to extend a run.

        Raises:
          CacheFullError: fewer than `n` are free; nothing is taken.
        """
        free = np.flatnonzero(self._refs == 0)
        if n > free.size:
            z = self._page_size
            way_out = "close open sessions (session.close()), or raise"
            raise CacheFullError(
                f"{n * z} more tokens need {n} pages of the KV cache, {free.size} of "
                f"{self.capacity} are free ({self.capacity * z} tokens in all); "
                f"{way_out if n <= self.capacity else 'raise'} {self._setting}"
            )
        taken = _best_run(free, n, after) if self._shards == 1 else self._spread(free, n, after)
        self._refs[taken] = 1
        return taken

    def _spread(self, free: np.ndarray, n: int, after: int | None) -> np.ndarray:
        """`n` of the free pages, from all shards, so that what is left free is even."""
        by_shard = np.split(free, np.searchsorted(free, self._first_pages()[1:]))
        sizes = np.asarray([len(pages) for pages in by_shard])
        # The level that taking n pages brings the shards with most free pages down to.
        left = np.sort(sizes)[::-1]
        levels = (np.cumsum(left) - n) / np.arange(1, len(left) + 1)
        below = np.append(left[1:], 0)
        level = levels[np.argmax(levels >= below)] if n else left[0]
        take = np.maximum(sizes - int(np.ceil(level)), 0)
        for shard in np.argsort(take - sizes, kind="stable")[: n - take.sum()]:
            take[shard] += 1
        runs = [
            _best_run(pages, count, after if after in range(*bounds) else None)
            for pages, count, bounds in zip(by_shard, take, self._bounds(), strict=True)
        ]
        stripes = [
            run[i : i + STRIPE]
            for i in range(0, max(map(len, runs), default=0), STRIPE)
            for run in runs
        ]
        return np.concatenate([free[:0], *stripes])

    def _first_pages(self) -> np.ndarray:
        return np.arange(self._shards) * self._shard_pages

    def _bounds(self) -> list[tuple[int, int]]:
        return [(int(first), int(first) + self._shard_pages) for first in self._first_pages()]

    def share(self, pages: np.ndarray) -> None:
        """Adds one reference to each page."""
        self._refs[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """Drops one reference from each page; a page without references is free."""
        if np.any(self._refs[pages] <= 0):
            raise ValueError(f"pages released twice: {pages[self._refs[pages] <= 0].tolist()}")
        self._refs[pages] -= 1

    def holders(self, pages: np.ndarray) -> np.ndarray:
        """How many references each page has, int32 [n]."""
        return self._refs[pages]

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds this page."""
        return bool(self._refs[page] > 1)


def _best_run(free: np.ndarray, n: int, after: int | None) -> np.ndarray:
    """`n` of the sorted free pages: behind `after` if possible, else the tightest run that holds
    all of them, else the longest runs first.
    """
    if n == 0:
        return free[:0]
    starts = np.flatnonzero(np.diff(free, prepend=free[0] - 2) != 1)
    lengths = np.diff(starts, append=free.size)
    if after is not None:
        at = int(np.searchsorted(free, after + 1))
        if at + n <= free.size and free[at + n - 1] == after + n:
            return free[at : at + n]
    fits = np.flatnonzero(lengths >= n)
    if fits.size:
        start = starts[fits[np.argmin(lengths[fits])]]
        return free[start : start + n]
    order = np.argsort(-lengths, kind="stable")
    pieces = [free[starts[r] : starts[r] + lengths[r]] for r in order]
    return np.concatenate(pieces)[:n]
