r"""Contexts in one file, as the objects that a shared store would have.

    alaya contexts 1\n
    u32 length of a name, u64 length of an object, name, object       as often as there are objects
    u32 0, u64 how many there are, SHA-256 of all bytes before

No name is ever used as a path, nothing is compressed, and no length reaches beyond the file, so
that what a file can do is bounded by its size; and a file is read only when its last line is
right. Formats such as zip and tar parse what has no bound before anything can be verified.
"""

import hashlib
import os
import re
import secrets
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from alaya_jax.errors import ContextError, DatabaseError
from alaya_jax.storage.object_store import Found

MOST_OBJECTS = 1 << 20
"""In one file."""

_MARK = b"alaya contexts 1\n"
_LENGTHS = struct.Struct("<IQ")
_NAME = re.compile(r"alaya_remote\.json|(chunks|contexts|indexes|pieces)(/[0-9a-zA-Z]+){2,3}")
_LONGEST = 256  # of a name
_DIGEST = 32
_STEP = 8 << 20  # bytes that are read at a time


class _Archive:
    """What both ends of a file have: an `ObjectStore` of what is in it."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()
        self.where = str(self.path)
        self._at: dict[str, tuple[int, int]] = {}  # where an object begins, and its length
        self._fd = -1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where!r}, {len(self._at)} objects)"

    def read(self, key: str) -> Found | None:
        """See `ObjectStore.read`."""
        data = self.begins(key, 1 << 62)
        return None if data is None else Found(data, b"")

    def begins(self, key: str, count: int) -> bytes | None:
        """See `ObjectStore.begins`."""
        if key not in self._at:
            return None
        at, size = self._at[key]
        return self._bytes(at, min(count, size))

    def keys(self, prefix: str) -> list[str]:
        """See `ObjectStore.keys`."""
        return sorted(key for key in self._at if key.startswith(prefix))

    def put(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put`."""
        raise DatabaseError(f"{self.where} is open to be read")

    def replace(self, key: str, data: bytes, version: bytes) -> bool:
        """See `ObjectStore.replace`: what is written stays."""
        raise DatabaseError(f"{self.where}: {key} is written already")

    def _bytes(self, at: int, count: int) -> bytes:
        data = os.pread(self._fd, count, at)
        while len(data) < count:  # one call reads 2 GiB at most
            more = os.pread(self._fd, count - len(data), at + len(data))
            if not more:
                raise ContextError(f"{self.where} became shorter while it was read")
            data += more
        return data


class ArchiveWriter(_Archive):
    """An `ObjectStore` to push into; a file when the block ends well, and else nothing.

    Args:
      path: the file, made for its owner alone; one that is there is replaced.

    Raises:
      DatabaseError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._new = self.path.with_name(f".{self.path.name}-{secrets.token_hex(4)}")
        self._digest, self._end = hashlib.sha256(), 0
        self._writing = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self._new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            self._append([_MARK])
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._append([_LENGTHS.pack(0, len(self._at))])
                self._append([self._digest.digest()])
                os.fsync(self._fd)
                self._new.replace(self.path)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(self._fd)
            self._new.unlink(missing_ok=True)

    def put(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put`."""
        name = key.encode()
        with self._writing:
            if key in self._at:
                return False
            try:
                self._append([_LENGTHS.pack(len(name), len(data)), name])
                at = self._end
                self._append([data])
            except OSError as error:
                raise self._failed(error) from error
            self._at[key] = at, len(data)
        return True

    def _append(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(self._fd, left) :]
            self._digest.update(part)
            self._end += len(part)

    def _failed(self, error: OSError) -> DatabaseError:
        return DatabaseError(
            f"writing {self.where} failed: {error.strerror}; nothing of it was kept, give a file "
            "on a disk that has room and can be written"
        )


class ArchiveReader(_Archive):
    """An `ObjectStore` to pull from: a file that was read once and is whole.

    Args:
      path: the file.
      advance: told of the bytes that were verified.

    Raises:
      ContextError: it is no such file, or it is damaged.
      DatabaseError: it cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], advance: Callable[[int], object] = lambda _: None
    ):
        super().__init__(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._scan(self._verified(advance))
        except OSError as error:
            self.close()
            raise self._unreadable(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _verified(self, advance: Callable[[int], object]) -> int:
        """Where the digest begins, that the bytes before it have."""
        size = os.fstat(self._fd).st_size
        if self._bytes(0, min(size, len(_MARK))) != _MARK:
            raise ContextError(
                f"{self.where} does not hold contexts that this alaya_jax reads; `alaya db export` "
                "writes such files"
            )
        end, at, found = size - _DIGEST, 0, hashlib.sha256()
        while at < end:
            data = self._bytes(at, min(_STEP, end - at))
            found.update(data)
            at += len(data)
            advance(len(data))
        if end < at or self._bytes(end, _DIGEST) != found.digest():
            raise self._damaged("it does not match its checksum")
        return end

    def _scan(self, end: int) -> None:
        """Notes where each object is."""
        at = len(_MARK)
        while True:
            if at + _LENGTHS.size > end:
                raise self._damaged("it ends too early")
            name_size, size = _LENGTHS.unpack(self._bytes(at, _LENGTHS.size))
            at += _LENGTHS.size
            if name_size == 0:
                break
            if name_size > _LONGEST or name_size + size > end - at:
                raise self._damaged("a length in it reaches beyond its end")
            name = self._bytes(at, name_size).decode("ascii", "replace")
            if not _NAME.fullmatch(name):
                raise self._damaged(f"{name[:80]!r} is no name of an object")
            if name in self._at:
                raise self._damaged(f"it holds {name} twice")
            if len(self._at) == MOST_OBJECTS:
                raise self._damaged(f"it holds more than {MOST_OBJECTS:,} objects")
            self._at[name] = at + name_size, size
            at += name_size + size
        if at != end or size != len(self._at):
            raise self._damaged("it holds another number of objects than it says")

    def _damaged(self, what: str) -> ContextError:
        return ContextError(f"{self.where} is damaged: {what}; export the contexts once more")

    def _unreadable(self, error: OSError) -> DatabaseError:
        return DatabaseError(f"{self.where} cannot be read: {error.strerror}; give another file")
