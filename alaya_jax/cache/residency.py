"""What is kept in memory of mapped files: an account of what was read, and a bound.

The system maps a page of a file when it is first read, and takes it back when it wants to. Where a
bound is set, what was read longest ago is let go of in time: of keys and values first, then of
those of pinned contexts, and of what indexes know of pages last. To let go of a page that a program
is about to read costs time, and nothing else: it is read again.
"""

import collections
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Hashable, Iterator

import jax
import numpy as np
from jaxtyping import Int, UInt8

BOTH = 3
"""Keys (1) and values (2) of a page."""

_SLACK = 4096
"""Pages that the queue may list beside those that are kept."""


@dataclasses.dataclass
class PagesMet:
    """Pages that programs met, by where they were; layer by layer, each of a kv head by itself.

    Attributes:
      pool: int64 [L], in the pool.
      memory: int64 [L], of mapped files, read before and not let go of since.
      disk: int64 [L], of mapped files, others.
      bytes_read: int64 [L], keys and values that `disk` brought into memory.
      bytes_verified: int64 [L], that were compared with their checksums.
    """

    pool: Int[np.ndarray, " L"]
    memory: Int[np.ndarray, " L"]
    disk: Int[np.ndarray, " L"]
    bytes_read: Int[np.ndarray, " L"]
    bytes_verified: Int[np.ndarray, " L"]

    @classmethod
    def nothing(cls, layers: int) -> "PagesMet":
        """Zeros."""
        return cls(*(np.zeros(layers, np.int64) for _ in dataclasses.fields(cls)))

    def add(self, other: "PagesMet") -> None:
        """Adds another account's numbers to these."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).__iadd__(getattr(other, field.name))

    @staticmethod
    def hit_rate(memory: int, disk: int) -> float | None:
        """Share of the mapped pages met that were in memory; None where none was met."""
        return memory / (memory + disk) if memory + disk else None


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept of one layer's pages in one set of files.

    Attributes:
      piece: bytes of the keys of a page of a head, or of its values; of leaves, of a page.
      let_go: gives back the memory of some pages; None: it cannot be given back.
      used: int64 [Q], when each was last met; 0: it is not kept.
      pieces: uint8 [K, Q], whether keys (1) and values (2) are; of leaves [1, Q].
      leaves: whether it is what an index knows of pages.
      pinned: which pages are of pinned contexts, bool [Q]; None: none.
    """

    piece: int
    let_go: Callable[[np.ndarray], None] | None
    used: Int[np.ndarray, " Q"]
    pieces: UInt8[np.ndarray, "K Q"]
    leaves: bool
    pinned: Callable[[], np.ndarray | None] = lambda: None

    def bytes_of(self, pages: np.ndarray) -> np.ndarray:
        """Bytes that are kept of each of some pages."""
        return np.bitwise_count(self.pieces[:, pages]).sum(0, dtype=np.int64) * self.piece


Entry = tuple[int, Kept, np.ndarray]
"""Pages that were met at a time; those met again since are in a later entry."""


class Residency:
    """The account of all mapped files of a database. Threads may share it.

    Attributes:
      limit: bytes that are kept, at most; None: as many as the system keeps.
      setting: how errors name it.
      beside: says how many of these bytes something else takes, which is not let go of.
      nbytes: that are kept, by this account.
      leaves_nbytes: of these, what indexes know of pages.
      memory, disk: pages met so far, see `PagesMet`.
      bytes_read, bytes_verified: see there.
    """

    def __init__(self, limit: int | None = None, setting: str = ""):
        """Starts with nothing kept."""
        self.limit, self.setting = limit, setting
        self.beside: Callable[[], int] = lambda: 0
        self.nbytes = self.leaves_nbytes = 0
        self.memory = self.disk = self.bytes_read = self.bytes_verified = 0
        self._clock = 0
        self._kept: dict[Hashable, Kept] = {}
        self._queues: tuple[collections.deque[Entry], ...] = tuple(
            collections.deque() for _ in range(2)
        )
        """Of pages and of leaves, what was met longest ago first."""
        self._listed = 0
        self._pages = 0
        self._guard = threading.RLock()

    @property
    def room(self) -> int | None:
        """Bytes of `limit` that mapped pages may take; None: no bound."""
        return None if self.limit is None else max(self.limit - self.beside(), 0)

    def kept(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """The account of some files; the first who asks makes it."""
        with self._guard:
            if key not in self._kept:
                self._kept[key] = make()
            return self._kept[key]

    def touch(
        self, kept: Kept, pages: Int[np.ndarray, " n"], met: UInt8[np.ndarray, "K n"] | None = None
    ) -> tuple[int, int, int]:
        """Some pages are read, or were: they are kept now, see `make_room`.

        Args:
          kept: of which files.
          pages: each once.
          met: keys (1) and values (2) of each head that are read; None: all.

        Returns:
          how many of a head were kept before; how many were not; bytes that were not.
        """
        with self._guard:
            if met is not None:
                some = np.flatnonzero(met.any(axis=0))
                pages, met = pages[some], met[:, some]
            if not len(pages):
                return 0, 0, 0
            whole = 1 if kept.leaves else BOTH
            held = kept.pieces[:, pages]
            new = (np.uint8(whole) if met is None else met) & ~held
            count = held.size if met is None else int(np.count_nonzero(met))
            missed = int(np.count_nonzero(new))
            size = int(np.bitwise_count(new).sum(dtype=np.int64)) * kept.piece
            kept.pieces[:, pages] = held | new
            self._pages += int(np.count_nonzero(kept.used[pages] == 0))
            self._clock += 1
            kept.used[pages] = self._clock
            self.nbytes += size
            if kept.leaves:
                self.leaves_nbytes += size
            else:
                self.bytes_read += size
            if self.limit is not None and kept.let_go is not None:
                self._list((self._clock, kept, pages))
            return count - missed, missed, size

    def make_room(
        self, spare: int = 0, wait: Callable[[], object] = lambda: None, since: int | None = None
    ) -> None:
        """Lets go of what was met longest ago until the rest is within the bound.

        Args:
          spare: bytes below the bound.
          wait: called before anything is let go of: what is read now ends.
          since: nothing is let go of that was met after this `now`.
        """
        room = self.room
        if room is None or self.nbytes + spare <= room:
            return
        wait()
        with self._guard:
            data, leaves = self._queues
            for queue, pinned in ((data, False), (data, True), (leaves, True)):
                left: list[Entry] = []
                while queue and self.nbytes + spare > room:
                    if since is not None and queue[0][0] > since:
                        break
                    over = self.nbytes + spare - room
                    left += self._let_go_of(queue.popleft(), over, pinned=pinned)
                queue.extendleft(reversed(left))

    @property
    def now(self) -> int:
        """Grows whenever something is met."""
        return self._clock

    def count(self, memory: int, disk: int) -> None:
        """A program met so many pages; see `PagesMet`."""
        with self._guard:
            self.memory += memory
            self.disk += disk

    def verified(self, count: int) -> None:
        """So many bytes were compared with their checksums."""
        with self._guard:
            self.bytes_verified += count

    def _let_go_of(self, entry: Entry, over: int, *, pinned: bool) -> Iterator[Entry]:
        """Lets go of so many bytes of an entry, if it has them; what of it stays."""
        clock, kept, pages = entry
        self._listed -= len(pages)
        pages = pages[kept.used[pages] == clock]
        staying = None if pinned else kept.pinned()
        if staying is not None:
            yield from self._again(clock, kept, pages[staying[pages]])
            pages = pages[~staying[pages]]
        if not len(pages):
            return
        sizes = kept.bytes_of(pages)
        enough = int(np.searchsorted(np.cumsum(sizes), over)) + 1
        gone = pages[:enough]
        assert kept.let_go is not None
        kept.let_go(gone)
        size = int(sizes[:enough].sum())
        self.nbytes -= size
        self.leaves_nbytes -= size if kept.leaves else 0
        self._pages -= len(gone)
        kept.used[gone], kept.pieces[:, gone] = 0, 0
        yield from self._again(clock, kept, pages[enough:])

    def _again(self, clock: int, kept: Kept, pages: np.ndarray) -> Iterator[Entry]:
        if len(pages):
            self._listed += len(pages)
            yield clock, kept, pages

    def _list(self, entry: Entry) -> None:
        _, kept, pages = entry
        self._queues[kept.leaves].append(entry)
        self._listed += len(pages)
        if self._listed > 2 * self._pages + _SLACK:
            for queue in self._queues:
                current = [(t, k, p[k.used[p] == t]) for t, k, p in queue]
                queue.clear()
                queue.extend(entry for entry in current if len(entry[2]))
            self._listed = sum(len(p) for queue in self._queues for _, _, p in queue)


class FileAccount:
    """The account of a set of mapped files: of their keys and values, layer by layer."""

    def __init__(
        self,
        residency: Residency,
        name: str,
        keys: jax.Array | np.ndarray,
        *,
        let_go: Callable[[int, np.ndarray], None] | None = None,
        pinned: Callable[[], np.ndarray | None] = lambda: None,
    ):
        """Args:
        residency: of all files.
        name: of these.
        keys: of any layer, [K, Q, Z, D].
        let_go: gives back the memory of pages of a layer.
        pinned: see `Kept`.
        """
        self.residency, self.name = residency, name
        heads, pages, *page = keys.shape
        self._shape, self._piece = (heads, pages), math.prod(page) * keys.dtype.itemsize
        self._let_go, self._pinned = let_go, pinned

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in one layer, keys and values of all heads."""
        return 2 * self._shape[0] * self._piece

    def layer(self, layer: int) -> Kept:
        """What is kept of a layer's keys and values."""
        heads, pages = self._shape

        def make() -> Kept:
            let_go = self._let_go and functools.partial(self._let_go, layer)
            return self._make(self._piece, let_go, heads, pages)

        return self.residency.kept((self.name, layer), make)

    def leaves(
        self, key: Hashable, piece: int, let_go: Callable[[np.ndarray], None] | None
    ) -> Kept:
        """What is kept of what an index knows of a layer's pages.

        Args:
          key: of the index and the layer.
          piece: bytes of a page.
          let_go: see `Kept`.
        """
        pages = self._shape[1]
        return self.residency.kept(
            (self.name, key), lambda: self._make(piece, let_go, 1, pages, leaves=True)
        )

    def _make(
        self,
        piece: int,
        let_go: Callable[[np.ndarray], None] | None,
        heads: int,
        pages: int,
        *,
        leaves: bool = False,
    ) -> Kept:
        used, pieces = np.zeros(pages, np.int64), np.zeros((heads, pages), np.uint8)
        return Kept(piece, let_go, used, pieces, leaves, self._pinned)
