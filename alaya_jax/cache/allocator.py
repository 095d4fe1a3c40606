"""Who owns which page: reference counts on the host, outside jit.

Several sequences may hold one page. A page is written only while one sequence holds it; the
sequence that wants to write a shared page takes a new one and copies (copy on write).
"""

import numpy as np

from alaya_jax.cache.paged import NO_PAGE
from alaya_jax.errors import CacheFullError


class PageAllocator:
    """Reference counts of a pool of pages.

    Pages are handed out in runs of consecutive ids where possible: attention reads a run as one
    slice.
    """

    def __init__(self, num_pages: int, page_size: int, setting: str = "Budget(device=...)"):
        """Args: the pool's size; tokens a page; what to name when the pool is exhausted."""
        self._refs = np.zeros(num_pages, np.int32)
        self._refs[NO_PAGE] = 1  # never handed out
        self._page_size = page_size
        self._setting = setting

    @property
    def capacity(self) -> int:
        """Pages that can be handed out in all."""
        return self._refs.size - 1

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
            raise CacheFullError(
                f"{n * z} more tokens need {n} pages of the KV cache, {free.size} of "
                f"{self.capacity} are free ({self.capacity * z} tokens in all); close sessions, "
                f"or raise {self._setting}"
            )
        taken = _best_run(free, n, after)
        self._refs[taken] = 1
        return taken

    def share(self, pages: np.ndarray) -> None:
        """Adds one reference to each page."""
        self._refs[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """Drops one reference from each page; a page without references is free."""
        if np.any(self._refs[pages] <= 0):
            raise ValueError(f"pages released twice: {pages[self._refs[pages] <= 0].tolist()}")
        self._refs[pages] -= 1

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
