"""Turns of writers, and leases of readers: locks that the system drops when a process dies."""

import contextlib
import datetime
import fcntl
import logging
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from alaya_jax.errors import DatabaseError

SAID_AFTER = 1.0
"""Seconds that a writer waits before it says for whom."""

_log = logging.getLogger(__name__)
_held: set[int] = set()
"""Descriptors of writers' locks. A child made by fork drops them: it writes nothing of theirs."""


@contextlib.contextmanager
def writers_turn(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds `flock` on `path` in the block: one writer at a time, of all threads and processes.

    Its pid and time stand in the file meanwhile, for the message of who waits.

    Args:
      path: the lock file.
      wait: else False is yielded where another has it.

    Raises:
      DatabaseError: the file system has no locks.
      OSError: the file cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    _held.add(fd)
    try:
        got = _locked(fd, path)
        started, said = time.monotonic(), False
        while wait and not got:
            if not said and time.monotonic() - started > SAID_AFTER:
                _log.warning("waiting for %s, which writes to %s", _writer(fd), path.parent)
                said = True
            time.sleep(0.02)
            got = _locked(fd, path)
        if got:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            with contextlib.suppress(
                OSError
            ):  # a note for others; a full disk is no reason to stop
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"process {os.getpid()} since {now}\n".encode(), 0)
        try:
            yield got
        finally:
            if got and fd in _held:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, 0)
    finally:
        if fd in _held:  # else this is a child, which has closed it
            _held.discard(fd)
            os.close(fd)


@contextlib.contextmanager
def alone(fd: int) -> Iterator[None]:
    """Holds `flock` on a file in the block, which is short.

    Raises:
      OSError: another one holds it for long, or the file system has no locks.
    """
    end = time.monotonic() + SAID_AFTER
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.002)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _locked(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DatabaseError(
            f"cannot lock {path}: {error.strerror}; put the database on a file system with locks, "
            "such as a local disk"
        ) from error
    return True


def _writer(fd: int) -> str:
    note = os.pread(fd, 200, 0).decode(errors="replace").strip()
    return note or "another process"


def _drop_in_child() -> None:
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


class Lease:
    """A shared lock on a context's file: while anyone holds one, its pages stay what they are.

    It goes with `release()`, with the object, or with the process. A child made by fork holds it
    too, as it has the same pages mapped.

    Args:
      path: of the file.

    Raises:
      OSError: there is no such file, or it cannot be opened.
    """

    def __init__(self, path: Path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        fcntl.flock(fd, fcntl.LOCK_SH)
        self.release = weakref.finalize(self, os.close, fd)


def lease_file(database: Path, serial: int) -> Path:
    """What a lease on a context locks."""
    return database / "leases" / f"{serial:016x}"


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """A lease on a directory in the block: nobody takes it for one that was left behind."""
    lease = Lease(directory)
    try:
        yield
    finally:
        lease.release()


@contextlib.contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Whether nobody holds a lease on this file or directory; nobody gets one in the block."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
