"""One writer or many readers of a database, by a lock the system drops when a process dies."""

import contextlib
import datetime
import fcntl
import os
import weakref
from pathlib import Path

from alaya_jax.errors import DatabaseError, DatabaseInUseError


class DatabaseLock:
    """Holds `flock` on `<path>/lock`, exclusive for a writer, shared for readers.

    A writer leaves its pid and time in the file, for the message that another process gets. The
    lock goes with `release()`, with the object, or with the process.

    Raises:
      DatabaseInUseError: another holder is in the way.
      DatabaseError: the file system has no locks.
      OSError: the lock file cannot be opened.
    """

    def __init__(self, path: Path, *, shared: bool):
        fd = _open(path / "lock", shared)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            note = os.pread(fd, 200, 0).decode(errors="replace").strip()
            os.close(fd)
            raise DatabaseInUseError(_in_use(path, note)) from error
        except OSError as error:
            os.close(fd)
            raise DatabaseError(
                f"cannot lock {path / 'lock'}: {error.strerror}; put the database on a file "
                "system with locks, such as a local disk"
            ) from error
        self.release = weakref.finalize(self, _release, fd)
        _clear(fd)  # whoever gets the lock knows that the note of a dead writer is stale
        if not shared:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            os.pwrite(fd, f"process {os.getpid()} since {now}\n".encode(), 0)


def _open(path: Path, shared: bool) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        if not shared:
            raise
        return os.open(path, os.O_RDONLY)  # a reader needs no right to write


def _clear(fd: int):
    with contextlib.suppress(OSError):  # opened for reading
        os.ftruncate(fd, 0)


def _release(fd: int):
    _clear(fd)
    os.close(fd)


def _in_use(path: Path, note: str) -> str:
    if not note:
        return (
            f"database {path} is open with read_only=True in another process; close it there, or "
            "open it with read_only=True here too"
        )
    if note.startswith(f"process {os.getpid()} "):
        return f"database {path} is already open for writing in this {note}; close that one first"
    return (
        f"database {path} is open for writing in {note}; close it there or wait for it to end, or "
        "use another path"
    )
