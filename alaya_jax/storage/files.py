"""Files and directories that only their owner may look into, and that survive a power cut."""

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alaya_jax.errors import ContextError

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def make_directory(path: Path) -> None:
    """Makes a directory for its owner alone, whatever the umask; one that is there is kept.

    Raises:
      ContextError: a link or a file is there.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        path.chmod(0o700)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise ContextError(f"{path} is no directory; the database is damaged")


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and flushes it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file in place of another one: after a crash it is the old one or the new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    try:
        write_file(new, data)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    flush_directory(path.parent)


def flush_directory(path: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(path: Path, flags: int, size: int) -> Iterator[int]:
    """A file of the database, if it is one of this length and no link.

    Raises:
      ContextError: it is not; it names the file.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ContextError(f"{path} cannot be opened ({error.strerror})") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise ContextError(f"{path} has {found.st_size} bytes instead of {size}")
        yield fd
    finally:
        os.close(fd)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of it there."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def read_at(fd: int, into: np.ndarray, offset: int) -> None:
    """Fills an array that lies in one piece.

    Raises:
      ContextError: the file ends before.
    """
    view = memoryview(into.reshape(-1).view(np.uint8))
    while len(view):
        done = os.preadv(fd, [view], offset)
        if not done:
            raise ContextError("a file of the database ended while it was read")
        view, offset = view[done:], offset + done


def punched(fd: int, start: int, length: int) -> bool:
    """Gives a part of a file back to the file system, which then holds zeros; False where it
    cannot.
    """
    if not hasattr(_libc, "fallocate"):
        return False
    numbers = ctypes.c_int64(start), ctypes.c_int64(length)
    return _libc.fallocate(ctypes.c_int(fd), ctypes.c_int(_PUNCH), *numbers) == 0
