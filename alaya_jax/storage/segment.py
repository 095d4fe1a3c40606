"""A segment: files of pages of one layout, in `segments/<number>/`.

    k.000, v.000, ...   [K, P, Z, D] of each layer: as the engine has them, to be mapped as they
                        are; rows of D + 2 bytes where the layout has a `store_dtype`
    checksums           u32 [L, P, 2, K], see `checksums`
    leaves/             what indexes know of the pages, see `leaves`

All are sparse: a page that nobody holds takes no room. A page that a context holds is never
written again.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.storage import checksums, leaves
from alaya_jax.storage.files import (
    flush_directory,
    make_directory,
    opened,
    punched,
    read_at,
    write_at,
)
from alaya_jax.storage.rows import Layout, PageList
from alaya_jax.storage.slots import located, runs

KINDS = "kv"
NAMES = ("keys", "values")
CHECKSUMS = "checksums"

_AT_ONCE = 256
"""Pages of one head that are copied to be verified."""

_BEHIND = 2
"""Layers that are on their way to the disk while the next one is asked for."""

_libc = ctypes.CDLL(None, use_errno=True)


class Segment:
    """The files of one segment. Opening it reads nothing.

    Args:
      directory: of the segment.
      layout: of its files.
    """

    def __init__(self, directory: Path, layout: Layout):
        self.directory, self.layout = directory, layout
        self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
        self._guard = threading.Lock()
        self._sizes = dict.fromkeys(_file_names(layout), layout.file_bytes)
        self._sizes[CHECKSUMS] = layout.num_layers * layout.num_pages * self._sums_bytes
        self._births = np.zeros(layout.num_pages, np.int64)
        """Of the pages that `_verified` speaks of."""
        pieces = layout.num_layers, len(KINDS), layout.num_kv_heads, layout.num_pages
        self._verified = np.zeros(pieces, bool)

    @property
    def _sums_bytes(self) -> int:
        """Of a page's checksums in one layer."""
        return 4 * len(KINDS) * self.layout.num_kv_heads

    def create(self) -> None:
        """Makes the files, which take no room yet."""
        make_directory(self.directory)
        for name, size in self._sizes.items():
            fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
                os.fsync(fd)
            finally:
                os.close(fd)
        flush_directory(self.directory)
        flush_directory(self.directory.parent)

    def delete(self) -> None:
        """Deletes the files; what is mapped stays mapped."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(self, pages: PageList, layers: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes pages that nobody holds, layer by layer, and flushes them to the disk.

        Args:
          pages: which, [m].
          layers: keys and values [K, t, D] of L layers, (m - 1) Z < t <= m Z; the rest of the last
            page becomes zeros.
        """
        layout = self.layout
        shape = layout.num_layers, len(pages), len(KINDS), layout.num_kv_heads
        found = np.zeros(shape, "<u4")
        with ThreadPoolExecutor(_BEHIND) as disk:
            under_way: list[Future[None]] = []
            for layer, halves in enumerate(layers):
                for kind, half in enumerate(halves):
                    paged = self._paged(half, len(pages))
                    name = _name(kind, layer)
                    under_way.append(disk.submit(self._write_pages, name, pages, paged))
                    sums = checksums.of_pages(paged, pages.slots, pages.births, layer, kind)
                    found[layer, :, kind] = sums
                while len(under_way) > 2 * _BEHIND:
                    under_way.pop(0).result()
            for job in under_way:
                job.result()
        with self._open(CHECKSUMS, os.O_RDWR) as fd:
            for layer, sums in enumerate(found):
                for part, start in located(pages.slots):
                    write_at(fd, sums[part].tobytes(), self._sums_at(layer, start))
            os.fsync(fd)

    def read(
        self, pages: PageList, layer: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], list[tuple[int, int]]]:
        """Copies of pages of one layer, each [K, m, Z, D], and (index in `pages`, kind) of those
        that are not what was stored.

        Raises:
          ContextError: a file is missing or cut.
        """
        heads, _, *page = self.layout.shape
        stored = self._stored(pages, layer)

        def half(kind: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
            data = np.empty((heads, len(pages), *page), self.layout.row_dtype)
            self._read_pages(_name(kind, layer), pages, data)
            found = checksums.of_pages(data, pages.slots, pages.births, layer, kind)
            wrong = np.flatnonzero((found != stored[:, kind]).any(axis=1))
            return data, [(int(i), kind) for i in wrong]

        # Of one kind the checksums, while the other is on its way from the disk.
        with ThreadPoolExecutor(2) as both:
            (k, wrong_k), (v, wrong_v) = both.map(half, (0, 1))
        return (k, v), wrong_k + wrong_v

    def verify(
        self, pages: PageList, layer: int, asked: np.ndarray | None = None
    ) -> tuple[list[tuple[int, int]], int]:
        """Compares mapped pages of a layer with their checksums, each once in a process.

        Args:
          pages: which, [m].
          layer: which.
          asked: of each kind, head and page whether it is, bool [2, K, m]; None: all are.

        Returns:
          (index in `pages`, kind) of those that are not what was stored; how many bytes were not
          compared before.

        Raises:
          ContextError: a file is missing or cut.
        """
        missing = self._unverified(pages, layer)
        if asked is not None:
            missing &= asked
        if not missing.any():
            return [], 0
        self.check_files(layer)  # a page that a file no longer has would end us
        listed = np.flatnonzero(missing.any(axis=(0, 1)))
        stored = self._stored(PageList(pages.slots[listed], pages.births[listed]), layer)
        place = np.zeros(len(pages), np.int64)
        place[listed] = np.arange(len(listed))
        wrong: set[tuple[int, int]] = set()
        for kind, mapped in enumerate(self.mapped(layer)):
            for head in range(self.layout.num_kv_heads):
                index = np.flatnonzero(missing[kind, head])
                for first in range(0, len(index), _AT_ONCE):
                    part = index[first : first + _AT_ONCE]
                    slots, births = pages.slots[part], pages.births[part]
                    data = mapped[head : head + 1, slots]
                    now = checksums.of_pages(data, slots, births, layer, kind, head)[:, 0]
                    right = now == stored[place[part], kind, head]
                    wrong.update((int(i), kind) for i in part[~right])
                    self._now_verified(slots[right], births[right], (layer, kind, head))
        return sorted(wrong), int(missing.sum()) * self.layout.piece

    def mapped(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer, each [K, P, Z, D], read-only and mapped."""
        return self._map(_name(0, layer))[1], self._map(_name(1, layer))[1]

    def _unverified(self, pages: PageList, layer: int) -> np.ndarray:
        """What this process has not found right of these pages, bool [2, K, m]."""
        with self._guard:
            stale = pages.slots[self._births[pages.slots] != pages.births]
            self._verified[..., stale] = False
            self._births[pages.slots] = pages.births
            return ~self._verified[layer][..., pages.slots]

    def _now_verified(
        self, slots: np.ndarray, births: np.ndarray, where: tuple[int, int, int]
    ) -> None:
        """Remembers that pages of a layer, kind and head were found right."""
        with self._guard:
            self._verified[where][slots[self._births[slots] == births]] = True

    def let_go(self, layer: int, slots: np.ndarray) -> None:
        """Gives back the memory of pages of a layer, what the system keeps of the files too."""
        self.advise(layer, slots, mmap.MADV_DONTNEED)
        piece = self.layout.piece
        for kind in range(len(KINDS)):
            # A file that is gone, or cut, has nothing more to give.
            with (
                contextlib.suppress(ContextError),
                self._open(_name(kind, layer), os.O_RDONLY) as fd,
            ):
                for head in range(self.layout.num_kv_heads):
                    for start, stop in runs(slots):
                        first = (head * self.layout.num_pages + start) * piece
                        os.posix_fadvise(fd, first, (stop - start) * piece, os.POSIX_FADV_DONTNEED)

    def advise(self, layer: int, slots: np.ndarray, advice: int) -> None:
        """`madvise` for pages of a layer, of keys and values."""
        piece = self.layout.piece
        for kind in range(len(KINDS)):
            mapped, _ = self._map(_name(kind, layer))
            for head in range(self.layout.num_kv_heads):
                first = head * self.layout.num_pages
                for start, stop in runs(slots):
                    begin, end = (first + start) * piece, (first + stop) * piece
                    begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
                    mapped.madvise(advice, begin, end - begin)

    def resident_bytes(self, slots: np.ndarray) -> int:
        """How much of these pages, of all layers, is in the system's memory (`mincore`)."""
        size, piece = self.layout.file_bytes, self.layout.piece
        heads = np.arange(self.layout.num_kv_heads)[:, None] * self.layout.num_pages
        starts = ((heads + slots) * piece).reshape(-1)
        seen = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        total = 0
        for layer in range(self.layout.num_layers):
            for array in self.mapped(layer):
                address = ctypes.c_void_p(array.ctypes.data)
                if _libc.mincore(address, ctypes.c_size_t(size), seen):
                    raise OSError(ctypes.get_errno(), "mincore")
                inside = np.frombuffer(seen, np.uint8) & 1
                # A piece may be a part of a system page, or several: as many of its bytes as lie
                # in pages that are there.
                for offset in range(0, piece, min(piece, mmap.PAGESIZE)):
                    here = inside[(starts + offset) // mmap.PAGESIZE]
                    total += int(here.sum()) * min(piece - offset, mmap.PAGESIZE)
        return total

    def punch(self, slots: np.ndarray) -> bool:
        """Gives the space of pages that nobody holds back to the file system; False where that
        cannot be done.
        """
        layout = self.layout
        for name in self._sizes:
            is_sums = name == CHECKSUMS
            piece = self._sums_bytes if is_sums else layout.piece
            with self._open(name, os.O_RDWR) as fd:
                for row in range(layout.num_layers if is_sums else layout.num_kv_heads):
                    for start, stop in runs(slots):
                        begin = (row * layout.num_pages + start) * piece
                        if not punched(fd, begin, (stop - start) * piece):
                            return False
        return all(one.punch(slots) for one in leaves.found(self.directory, layout))

    def check_files(self, layer: int | None = None) -> None:
        """Raises ContextError when a file, or one of a layer, is missing or has a wrong length."""
        one = [_name(kind, layer) for kind in (0, 1)] if layer is not None else None
        for name in one or self._sizes:
            with self._open(name, os.O_RDONLY):
                pass

    def file(self, layer: int, kind: int) -> Path:
        """Where the keys (0) or values (1) of a layer are."""
        return self.directory / _name(kind, layer)

    def _stored(self, pages: PageList, layer: int) -> np.ndarray:
        """The checksums of pages of a layer, u32 [m, 2, K], as they were stored."""
        found = np.empty((len(pages), len(KINDS), self.layout.num_kv_heads), "<u4")
        with self._open(CHECKSUMS, os.O_RDONLY) as fd:
            for part, start in located(pages.slots):
                read_at(fd, found[part], self._sums_at(layer, start))
        return found

    def _sums_at(self, layer: int, slot: int) -> int:
        """Where the checksums of a page of a layer are."""
        return (layer * self.layout.num_pages + slot) * self._sums_bytes

    def _paged(self, half: np.ndarray, count: int) -> np.ndarray:
        """Tokens [K, t, D] as whole pages [K, m, Z, D]; without a copy where they are that."""
        heads, tokens, dim = half.shape
        size = self.layout.page_size
        if tokens != count * size:
            padded = np.zeros((heads, count * size, dim), half.dtype)
            padded[:, :tokens] = half
            half = padded
        elif any(not half[head].flags.c_contiguous for head in range(heads)):
            half = np.ascontiguousarray(half)
        return half.reshape(heads, count, size, dim)

    def _write_pages(self, name: str, pages: PageList, data: np.ndarray) -> None:
        with self._open(name, os.O_RDWR) as fd:
            for part, offset in self._pieces(pages):
                write_at(fd, memoryview(data[part].reshape(-1).view(np.uint8)), offset)
            os.fsync(fd)

    def _read_pages(self, name: str, pages: PageList, into: np.ndarray) -> None:
        with self._open(name, os.O_RDONLY) as fd:
            for part, offset in self._pieces(pages):
                read_at(fd, into[part], offset)

    def _pieces(self, pages: PageList) -> Iterator[tuple[tuple[int, slice], int]]:
        """Stretches of pages [K, m, Z, D] that lie together in a file, and where."""
        for head in range(self.layout.num_kv_heads):
            for part, start in located(pages.slots):
                first = head * self.layout.num_pages + start
                yield (head, part), first * self.layout.piece

    def _open(self, name: str, flags: int) -> Any:
        return opened(self.directory / name, flags, self._sizes[name])

    def _map(self, name: str) -> tuple[mmap.mmap, np.ndarray]:
        layout = self.layout
        with self._guard:
            if name not in self._maps:
                with self._open(name, os.O_RDONLY) as fd:
                    found = mmap.mmap(fd, layout.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
                found.madvise(mmap.MADV_RANDOM)
                self._maps[name] = found, np.ndarray(layout.shape, layout.row_dtype, found)
            return self._maps[name]


def _file_names(layout: Layout) -> list[str]:
    return [_name(kind, layer) for layer in range(layout.num_layers) for kind in (0, 1)]


def _name(kind: int, layer: int) -> str:
    return f"{KINDS[kind]}.{layer:03d}"
