"""Leaves: what indexes know of a segment's pages (sketches, summaries), in files beside them.

    leaves/<name>/meta.json   which index made them, of what form; <name> is a digest of it
    leaves/<name>/003         of one layer: birth and checksum of each page [P], then arrays
                              [K, P, ...] as programs read them, each from a multiple of 4 KiB on

They are made of keys and values and can be made again. So nothing that is wrong with them is an
error for who asks: what is not found right is not known. A page's are written under a lock, by
`pwrite`, its birth and checksum last; nothing is flushed. Torn, stale, damaged or misplaced ones do
not match their checksum, which is salted with name, layer, slot and birth.

The files are sparse. Of one length each, they are mapped as keys and values are.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.storage.files import make_directory, replace_file
from alaya_jax.storage.leaf_file import Form, LeafFile, opened_leaves, punch_leaves
from alaya_jax.storage.lock import alone
from alaya_jax.storage.rows import Layout, PageList

FOLDER = "leaves"
META = "meta.json"

_log = logging.getLogger(__name__)


class Leaves:
    """The leaves that one index has in a segment.

    Args:
      directory: of the segment.
      layout: of the segment.
      form: of the files.
    """

    def __init__(self, directory: Path, layout: Layout, form: Form):
        self.directory = directory / FOLDER / form.name
        self.layout, self.form = layout, form

    @property
    def index(self) -> str:
        """Which index, for people."""
        return str(self.form.made["index"])

    def file(self, layer: int, *, read_only: bool) -> LeafFile | None:
        """Those of one layer; None where they cannot be had, and have to be kept in memory."""
        path = self.directory / f"{layer:03d}"
        for only in (True,) if read_only else (False, True):
            try:
                with self._at_hand(read_only=only):
                    return LeafFile(path, self.layout, self.form, layer, read_only=only)
            except (OSError, ValueError, ContextError) as error:
                _log.debug("leaves of %s cannot be kept in files: %s", self.index, error)
        return None

    @contextlib.contextmanager
    def _at_hand(self, *, read_only: bool) -> Iterator[None]:
        """The directory is there in the block, in which nobody else makes anything in it."""
        if read_only:
            _require_own(self.directory)
            yield
            return
        for directory in (self.directory.parent, self.directory):
            make_directory(directory)
        fd = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with alone(fd):
                if _read(self.directory / META) != self.form.to_bytes():
                    replace_file(self.directory / META, self.form.to_bytes())
                yield
        finally:
            os.close(fd)

    def punch(self, slots: np.ndarray) -> bool:
        """Gives the space of pages that nobody holds back; False where that cannot be done."""
        regions, size = self.form.regions(self.layout)
        for path in self._files():
            try:
                fd = opened_leaves(path, size, read_only=False)
            except OSError:
                continue  # `file` makes it anew
            try:
                if not punch_leaves(fd, regions, slots, self.layout.num_pages):
                    return False
            finally:
                os.close(fd)
        return True

    def nbytes(self, pages: PageList) -> int:
        """Bytes of the leaves of pages, of all layers."""
        count = sum(int(one.claimed(pages.slots, pages.births).sum()) for _, one in self._open())
        return count * self.layout.num_kv_heads * sum(self.form.pieces())

    def wrong(self, pages: PageList) -> Iterator[tuple[int, np.ndarray]]:
        """(layer, indices in `pages`) of those that do not match their checksums."""
        for layer, one in self._open():
            asked = pages.slots, pages.births
            bad = np.flatnonzero(one.claimed(*asked) & ~one.known(*asked))
            if len(bad):
                yield layer, bad

    def unusable(self) -> list[Path]:
        """Files that are none of this form; they are made anew when they are next asked for."""
        return [p for p in self._files() if self.file(int(p.name), read_only=True) is None]

    def _open(self) -> Iterator[tuple[int, LeafFile]]:
        for path in self._files():
            if (one := self.file(int(path.name), read_only=True)) is not None:
                yield int(path.name), one

    def _files(self) -> Iterable[Path]:
        return (
            path
            for layer in range(self.layout.num_layers)
            if os.path.lexists(path := self.directory / f"{layer:03d}")
        )


def found(segment: Path, layout: Layout) -> list[Leaves]:
    """All that lie in a segment's directory, but for what is something else."""
    there = []
    for path in _directories(segment):
        try:
            _require_own(path)
            one = Leaves(segment, layout, Form.from_bytes(_read(path / META)))
        except (OSError, ValueError):
            continue
        if one.directory == path and one.form.fits(layout):
            there.append(one)
    return there


def others(segment: Path, layout: Layout) -> list[Path]:
    """What lies among them and is something else."""
    known = {one.directory for one in found(segment, layout)}
    folder = segment / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [folder]
    return [path for path in _directories(segment) if path not in known]


def sizes(segment: Path, layout: Layout, pages: PageList) -> dict[str, int]:
    """Bytes that are stored of what each index knows of pages."""
    total: dict[str, int] = {}
    for one in found(segment, layout):
        total[one.index] = total.get(one.index, 0) + one.nbytes(pages)
    return {index: nbytes for index, nbytes in total.items() if nbytes}


def problems(segment: Path, layout: Layout, pages: PageList, whose: str) -> list[str]:
    """All that is wrong with the leaves of some pages, in words."""
    said = []
    for one in found(segment, layout):
        for layer, wrong in one.wrong(pages):
            more = f", and of {len(wrong) - 1} more," if len(wrong) > 1 else ""
            said.append(
                f"what {one.index} knows of page {wrong[0]} of {whose} in layer {layer}{more} does "
                "not match its checksum; nothing is lost, it is made again when next asked for"
            )
        said += [
            f"{path} is no file of what {one.index} knows of pages; nothing is lost, it is made "
            "again when it is next asked for"
            for path in one.unusable()
        ]
    return said + [
        f"{path} holds no leaves of an index; nothing is lost, alaya db gc takes it away"
        for path in others(segment, layout)
    ]


def _directories(segment: Path) -> list[Path]:
    folder = segment / FOLDER
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(folder.iterdir())


def _read(path: Path) -> bytes:
    """A small file; empty where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(fd, "rb") as file:
        return file.read(1 << 16)


def _require_own(directory: Path) -> None:
    for path in (directory.parent, directory):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise OSError(f"{path} is no directory")
