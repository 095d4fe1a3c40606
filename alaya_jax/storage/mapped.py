"""A stored context whose pages are read where they lie."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.leaf_file import Form, LeafFile
from alaya_jax.storage.leaves import Leaves
from alaya_jax.storage.lock import Lease
from alaya_jax.storage.rows import PageList
from alaya_jax.storage.segment import Segment


class MappedPages:
    """See `MappedContext`. Threads may share it.

    Args:
      id: of the context.
      listed: its pages.
      segment: where they lie.
      lease: held until `close`.
      damaged: makes the error of what is wrong with (layer, [(index in the pages, kind)]).
      read_only: write no leaves.
    """

    def __init__(
        self,
        id: str,
        listed: PageList,
        segment: Segment,
        lease: Lease,
        damaged: Callable[[int, list[tuple[int, int]]], ContextError],
        *,
        read_only: bool,
    ):
        self._read_only = read_only
        self.id, self._listed, self._segment = id, listed, segment
        self._lease, self._damaged = lease, damaged
        self._order = np.argsort(listed.slots)
        self._sorted = listed.slots[self._order]

    def __enter__(self) -> "MappedPages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """See `MappedContext`."""
        return str(self._segment.directory)

    @property
    def pages(self) -> np.ndarray:
        """See `MappedContext`."""
        return self._listed.slots

    @property
    def births(self) -> np.ndarray:
        """See `MappedContext`."""
        return self._listed.births

    def layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See `MappedContext`."""
        self._require(layer)
        return self._segment.mapped(layer)

    def verify(self, layer: int, pages: Any, asked: np.ndarray | None = None) -> int:
        """See `MappedContext`."""
        self._require(layer)
        index = self._index(pages)
        some = PageList(self._listed.slots[index], self._listed.births[index])
        wrong, compared = self._segment.verify(some, layer, asked)
        if wrong:
            raise self._damaged(layer, [(int(index[i]), kind) for i, kind in wrong])
        return compared

    def leaves(
        self, layer: int, made: Mapping[str, Any], arrays: Sequence[tuple[tuple[int, ...], str]]
    ) -> LeafFile | None:
        """See `MappedContext`."""
        self._require(layer)
        found = Leaves(self._segment.directory, self._segment.layout, Form(made, tuple(arrays)))
        return found.file(layer, read_only=self._read_only)

    def read_ahead(self, layer: int, pages: Any) -> None:
        """See `MappedContext`."""
        self._require(layer)
        slots = self._listed.slots[np.unique(self._index(pages))]
        self._segment.advise(layer, slots, mmap.MADV_WILLNEED)

    def let_go(self, layer: int, pages: Any) -> None:
        """See `MappedContext`."""
        self._segment.let_go(layer, np.unique(np.asarray(pages, np.int64)))

    def resident_bytes(self) -> int:
        """See `MappedContext`."""
        return self._segment.resident_bytes(self._listed.slots)

    def close(self) -> None:
        """See `MappedContext`; closing twice is allowed."""
        self._lease.release()

    def _index(self, pages: Any) -> np.ndarray:
        """Where pages are in the context's list."""
        asked = np.asarray(pages, np.int64)
        at = np.searchsorted(self._sorted, asked)
        found = at < len(self._sorted)
        found[found] = self._sorted[at[found]] == asked[found]
        if not found.all():
            raise RequestError(
                f"page {asked[~found][0]} is not one of context {self.id}; `pages` lists its own"
            )
        return self._order[at]

    def _require(self, layer: int) -> None:
        if not self._lease.release.alive:
            raise ContextError(f"context {self.id} is closed; map it again")
        if not 0 <= layer < self._segment.layout.num_layers:
            last = self._segment.layout.num_layers - 1
            raise RequestError(f"context {self.id} has layers 0 to {last}, and not {layer}")
