"""The leaves of one index and one layer, in a file that is mapped: see `leaves`.

births and checksums   [P] of pages, 16 bytes each
arrays                 [K, P, ...] each, from a multiple of 4 KiB on
"""

import dataclasses
import json
import logging
import mmap
import os
import stat
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.storage import checksums, identity
from alaya_jax.storage.files import punched, read_at, write_at
from alaya_jax.storage.interface import DTYPES
from alaya_jax.storage.lock import alone
from alaya_jax.storage.rows import Layout
from alaya_jax.storage.slots import located, runs

VERSION = 1

_AT_ONCE = 256
"""Pages that are copied to be verified."""

_SIDE = np.dtype([("birth", "<i8"), ("sum", "<u8")])
_DTYPES = {**DTYPES, **{name: np.dtype(name) for name in ("int8", "uint8", "uint32")}}
_ALIGNED = 4096
_MOST = 1 << 46
"""Bytes of a file that is believed."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Form:
    """What a file of leaves holds.

    Attributes:
      made: plain data: the index, as "index", and all else that what it makes of a page depends on.
      arrays: shape and name of the dtype of each array, without the axes [K, P].
    """

    made: Mapping[str, Any]
    arrays: Sequence[tuple[tuple[int, ...], str]]

    def to_bytes(self) -> bytes:
        """As meta.json has it; equal forms are equal bytes."""
        arrays = [[list(shape), dtype] for shape, dtype in self.arrays]
        said = {"version": VERSION, "made": dict(self.made), "arrays": arrays}
        return json.dumps(said, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Form":
        """Raises ValueError where it is something else."""
        try:
            said = json.loads(data)
            arrays = tuple((tuple(shape), dtype) for shape, dtype in said["arrays"])
            counts = [n for shape, _ in arrays for n in shape]
            right = (
                said["version"] == VERSION
                and isinstance(said["made"]["index"], str)
                and all(type(n) is int and 0 < n < 1 << 31 for n in counts)
                and all(dtype in _DTYPES for _, dtype in arrays)
            )
        except (TypeError, LookupError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if not right:
            raise ValueError("not a form of leaves")
        return cls(said["made"], arrays)

    @property
    def name(self) -> str:
        """Of the directory."""
        return identity.digest(self.to_bytes())

    def fits(self, layout: Layout) -> bool:
        """Whether a file of it is of a length that is believed."""
        return self.regions(layout)[1] <= _MOST

    def pieces(self) -> list[int]:
        """Bytes of a page in one kv head, of each array."""
        return [
            int(np.prod(shape, dtype=object)) * _DTYPES[dtype].itemsize
            for shape, dtype in self.arrays
        ]

    def regions(self, layout: Layout) -> tuple[list[tuple[int, int, int]], int]:
        """(start, rows of P pieces, bytes of a piece) of births and checksums and then of each
        array, and the length of the file.
        """
        found, end = [], 0
        arrays = ((layout.num_kv_heads, piece) for piece in self.pieces())
        for heads, piece in ((1, _SIDE.itemsize), *arrays):
            found.append((end, heads, piece))
            end += heads * layout.num_pages * piece
            end += -end % _ALIGNED
        return found, end


class LeafFile:
    """What an index knows of the pages of one layer. Threads take turns.

    Args:
      path: of the file; one that is not there, or of a wrong length, is made anew.
      layout: of the segment.
      form: of the file.
      layer: which.
      read_only: only read what is there.

    Attributes:
      arrays: [K, P, ...] each, mapped, to be read only: what `known` or `write` says of pages holds
        for these.

    Raises:
      OSError, ValueError: it cannot be opened, made, or mapped.
    """

    def __init__(self, path: Path, layout: Layout, form: Form, layer: int, *, read_only: bool):
        self._read_only, self._layout = read_only, layout
        self._salt = checksums.of_bytes(f"{form.name} {layer}".encode())
        self._regions, self._size = form.regions(layout)
        if not form.fits(layout):
            raise ValueError(f"{path} would have {self._size} bytes")
        # The file that is mapped is written to, whatever its name means later.
        self._fd = opened_leaves(path, self._size, read_only=read_only)
        weakref.finalize(self, os.close, self._fd)
        self._map = mapped = mmap.mmap(self._fd, self._size, mmap.MAP_SHARED, mmap.PROT_READ)
        rows = layout.num_kv_heads, layout.num_pages
        self.arrays = tuple(
            np.ndarray((*rows, *shape), _DTYPES[dtype], mapped, start)
            for (shape, dtype), (start, _, _) in zip(form.arrays, self._regions[1:], strict=True)
        )

    def claimed(self, pages: np.ndarray, births: np.ndarray) -> np.ndarray:
        """Of which pages it says, right or wrong, that they are known: bool [n]."""
        return self._side(pages)["birth"] == births

    def known(self, pages: np.ndarray, births: np.ndarray) -> np.ndarray:
        """Which pages `arrays` hold the leaves of, by their checksums: bool [n].

        Args:
          pages, births: i32 and i64 [n]; who asks holds a lease on them.
        """
        side = self._side(pages)
        found = side["birth"] == births
        there = np.flatnonzero(found)
        for part in (there[i : i + _AT_ONCE] for i in range(0, len(there), _AT_ONCE)):
            some = pages[part]
            # Not by the mapping: a part that cannot be read would end us.
            arrays = zip(self._regions[1:], self.arrays, strict=True)
            try:
                held = [self._read(region, some, x.shape[2:], x.dtype) for region, x in arrays]
                found[part] = self._sums(held, some, births[part]) == side["sum"][part]
            except (OSError, ContextError):
                found[part] = False
        return found

    def write(self, pages: np.ndarray, births: np.ndarray, parts: Sequence[np.ndarray]) -> bool:
        """Writes the leaves of pages, unless another process did meanwhile; whether `arrays` hold
        right ones now.

        Args:
          pages, births: i32 and i64 [n]; who writes holds a lease on them.
          parts: of each array, [K, n, ...].
        """
        if self._read_only:
            return False
        try:
            with alone(self._fd):
                self._require_whole()
                new = np.flatnonzero(~self.known(pages, births))
                some, parts = pages[new], [np.asarray(part)[:, new] for part in parts]
                try:
                    self._write(some, births[new], parts)
                except OSError:
                    punch_leaves(self._fd, self._regions, some, self._layout.num_pages)
                    raise
                return bool(self.known(pages, births).all())
        except OSError as error:
            _log.debug("leaves are kept in memory: %s", error)
            return False

    def let_go(self, pages: np.ndarray) -> None:
        """Gives back the memory of some pages' leaves; they are read again when next used."""
        for start, heads, piece in self._regions[1:]:
            for head in range(heads):
                first = start + head * self._layout.num_pages * piece
                for one, stop in runs(np.unique(pages)):
                    begin, end = first + one * piece, first + stop * piece
                    begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
                    self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
                    os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _require_whole(self) -> None:
        """Raises OSError where a part that programs may read is gone."""
        if os.fstat(self._fd).st_size != self._size:
            raise OSError("the file was cut")

    def _side(self, pages: np.ndarray) -> np.ndarray:
        """Births and checksums of pages, [n] of `_SIDE`."""
        try:
            self._require_whole()
            return self._read(self._regions[0], pages, (), _SIDE)[0]
        except (OSError, ContextError):
            return np.zeros(len(pages), _SIDE)

    def _read(
        self,
        region: tuple[int, int, int],
        pages: np.ndarray,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        start, heads, piece = region
        into = np.empty((heads, len(pages), *shape), dtype)
        for head in range(heads):
            first = start + head * self._layout.num_pages * piece
            for some, slot in located(pages):
                read_at(self._fd, into[head, some], first + slot * piece)
        return into

    def _write(self, pages: np.ndarray, births: np.ndarray, parts: list[np.ndarray]) -> None:
        if not len(pages):
            return
        side = np.empty(len(pages), _SIDE)
        side["birth"], side["sum"] = births, self._sums(parts, pages, births)
        arrays = [*zip(self._regions[1:], parts, strict=True), (self._regions[0], side[None])]
        for (start, heads, piece), part in arrays:
            for head in range(heads):
                first = start + head * self._layout.num_pages * piece
                for some, slot in located(pages):
                    data = np.ascontiguousarray(part[head, some])
                    write_at(self._fd, data.reshape(-1).view(np.uint8).data, first + slot * piece)

    def _sums(
        self, parts: Sequence[np.ndarray], pages: np.ndarray, births: np.ndarray
    ) -> np.ndarray:
        """Checksums of leaves, given as [K, n, ...] of each array."""
        rows = [
            np.ascontiguousarray(np.moveaxis(part, 1, 0)).reshape(len(pages), -1).view(np.uint8)
            for part in parts
        ]
        return checksums.of_rows(np.concatenate(rows, axis=1), pages, births, self._salt)


def opened_leaves(path: Path, size: int, *, read_only: bool) -> int:
    """The descriptor of a file of this length, which is made if need be."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    if read_only:
        fd = os.open(path, os.O_RDONLY | flags)
    else:
        if os.path.lexists(path) and not _is_file(path.lstat(), (0, size)):
            path.unlink()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    try:
        if not read_only and _is_file(os.fstat(fd), (0,)):
            os.ftruncate(fd, size)
        if not _is_file(os.fstat(fd), (size,)):
            raise OSError(f"{path} is no file of {size} bytes")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_file(status: os.stat_result, sizes: tuple[int, ...]) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_size in sizes


def punch_leaves(
    fd: int, regions: list[tuple[int, int, int]], slots: np.ndarray, num_pages: int
) -> bool:
    """Gives the space of some pages back; False where that cannot be done."""
    for start, heads, piece in regions:
        for head in range(heads):
            for first, stop in runs(slots):
                begin = start + (head * num_pages + first) * piece
                if not punched(fd, begin, (stop - first) * piece):
                    return False
    return True
