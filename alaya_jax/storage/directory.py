"""A store in a directory: plain files, one directory a context, one writer at a time.

    <path>/alaya_db.json    what this directory is
    <path>/lock             see alaya_jax.storage.lock
    <path>/contexts/<id>/   see alaya_jax.storage.files, and index_files

A context is written into `contexts/.tmp-*`, flushed to disk and renamed: it is there whole or not
at all. What a killed process left is swept away by the next writer, who holds the lock.
"""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, DatabaseError, RequestError
from alaya_jax.storage.checked import flush_directory
from alaya_jax.storage.files import StoredContext, write_context
from alaya_jax.storage.index_files import PREFIX, StoredIndex, stored_indexes, write_index
from alaya_jax.storage.interface import ContextHeader, ContextRecord, IndexRecord
from alaya_jax.storage.lock import DatabaseLock

_MARK = "alaya_db.json"
_MARK_TEXT = {"format": "alaya_jax database", "store": "directory", "version": 1}


class DirectoryStore:
    """A `ContextStore` in a directory, which is made if it is not there.

    Threads may share it. A process made by fork shares the lock, and must not write.

    Args:
      path: the database directory.
      read_only: allow no change; any number of readers may then share it, but not with a writer.

    Raises:
      DatabaseError: the path cannot be used, holds something else, or is in use.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False):
        self.path = Path(path).absolute()
        self.read_only = read_only
        self._directory = self.path / "contexts"
        self._changing = threading.Lock()
        self._closed = False
        try:
            self._lock = self._prepare()
            try:
                self._contexts = self._load()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            right = "read" if read_only else "written"
            raise DatabaseError(
                f"cannot open a database at {self.path}: {error.strerror}; give the path of a "
                f"directory that can be {right}"
            ) from error

    def __enter__(self) -> "DirectoryStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._contexts)} contexts"
        return f"DirectoryStore({str(self.path)!r}, {state})"

    def close(self) -> None:
        """Lets go of the database; closing twice is allowed."""
        self._closed = True
        self._lock.release()

    def require_writable(self) -> None:
        """Raises DatabaseError when nothing can be written: closed, or open for reading only."""
        self._usable(writing=True)

    def list(self, namespace: str | None = None) -> Sequence[ContextRecord]:
        """See `ContextStore.list`."""
        self._usable()
        records = [context.record for context in self._contexts.values()]
        if namespace is not None:
            records = [r for r in records if r.header and r.header.namespace == namespace]
        return sorted(records, key=lambda r: (r.created, r.id))

    def tokens(self, id: str) -> np.ndarray:
        """See `ContextStore.tokens`."""
        return self._context(id).tokens()

    def read_kv(
        self, id: str, layer: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ContextStore.read_kv`."""
        return self._context(id).read_kv(layer, start, stop)

    def check(self, id: str) -> Sequence[str]:
        """See `ContextStore.check`."""
        problems = self._context(id).check()
        for index in stored_indexes(self._directory / id).values():
            problems += index.check()
        return problems

    def check_index(self, id: str, kind: str) -> Sequence[str]:
        """See `ContextStore.check_index`."""
        self._context(id)
        index = stored_indexes(self._directory / id).get(kind)
        return [f"there is no {kind} index"] if index is None else index.check()

    def indexes(self, id: str) -> Mapping[str, IndexRecord]:
        """See `ContextStore.indexes`."""
        self._context(id)
        found = stored_indexes(self._directory / id)
        return {kind: index.record for kind, index in found.items()}

    def read_index(self, id: str, kind: str, layer: int) -> dict[str, np.ndarray]:
        """See `ContextStore.read_index`."""
        self._context(id)
        directory = self._directory / id / f"{PREFIX}{kind}"
        if not directory.is_dir():
            raise ContextError(f"context {id} in {self.path} has no {kind} index; build it first")
        return StoredIndex(directory).read(layer)

    def write_index(
        self,
        id: str,
        kind: str,
        settings: Mapping[str, Any],
        layers: Iterable[Mapping[str, np.ndarray]],
    ) -> None:
        """See `ContextStore.write_index`."""
        self._usable(writing=True)
        self._context(id)
        final = self._directory / id / f"{PREFIX}{kind}"
        new = self._directory / f".tmp-{id}-{secrets.token_hex(4)}"
        try:
            new.mkdir()
            write_index(new, kind, settings, layers)
            with self._changing:
                self._context(id)  # it may have been removed meanwhile
                old = self._directory / f".tmp-{id}-{secrets.token_hex(4)}"
                if final.exists():
                    final.rename(old)
                new.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            flush_directory(final.parent)
        except OSError as error:
            raise DatabaseError(
                f"writing the {kind} index of context {id} to {self.path} failed: {error}; the "
                "context is as it was, build the index again once the disk is right"
            ) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def write(
        self,
        header: ContextHeader,
        tokens: Any,
        kv: Iterable[tuple[Any, Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> ContextRecord:
        """See `ContextStore.write`."""
        self._usable(writing=True)
        tokens = _token_ids(tokens)
        id = header.context_id(tokens)
        if self._intact(id):
            return self._contexts[id].record
        record = ContextRecord(id=id, header=header, num_tokens=len(tokens), created=time.time())
        free = shutil.disk_usage(self._directory).free
        if record.nbytes > free:
            raise DatabaseError(
                f"a context of {len(tokens)} tokens needs {record.nbytes} bytes, and {self.path} "
                f"has {free} free; remove contexts, or put the database on another disk"
            )
        new = self._directory / f".tmp-{id}-{secrets.token_hex(4)}"
        try:
            new.mkdir()
            write_context(new, record, tokens, kv, progress)
            with self._changing:
                if not self._intact(id):  # else another thread was faster
                    if id in self._contexts:
                        self._discard(id)
                    new.rename(self._directory / id)
                    self._contexts[id] = StoredContext(self._directory / id)
                written = self._contexts[id].record
            flush_directory(self._directory)
        except OSError as error:
            raise DatabaseError(
                f"writing context {id} to {self.path} failed: {error}; nothing of it was kept, "
                "store it again once the disk is right"
            ) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return written

    def remove(self, id: str) -> None:
        """See `ContextStore.remove`."""
        self._usable(writing=True)
        self._context(id)
        try:
            with self._changing:
                self._discard(id)
        except OSError as error:
            raise DatabaseError(
                f"removing context {id} from {self.path} failed: {error}"
            ) from error

    def _prepare(self) -> DatabaseLock:
        """Makes or recognizes the directory, and locks it. A directory of something else is not
        touched.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DatabaseError(f"{self.path} is a file; give the path of a directory")
        marked = (self.path / _MARK).exists()
        if self.read_only and not marked:
            raise DatabaseError(
                f"there is no database at {self.path}; open it without read_only=True to make one"
            )
        if not self.read_only:
            self.path.mkdir(parents=True, exist_ok=True)
        if not marked and not self._is_unfinished():
            raise DatabaseError(
                f"{self.path} holds other files and is no database; give a new or empty directory"
            )
        return DatabaseLock(self.path, shared=self.read_only)

    def _is_unfinished(self) -> bool:
        """Empty, or left by a process that was killed before it had made a database of it."""
        names = {p.name for p in self.path.iterdir()}
        inside = self._directory.iterdir() if "contexts" in names else ()
        return names <= {"lock", "contexts"} and all(p.name.startswith(".tmp-") for p in inside)

    def _load(self) -> dict[str, StoredContext]:
        mark = self.path / _MARK
        if not self.read_only:
            self._directory.mkdir(exist_ok=True)
            for left in self._directory.glob(".tmp-*"):
                shutil.rmtree(left)
            if not mark.exists():
                new = self._directory / ".tmp-mark"
                new.mkdir()
                (new / _MARK).write_text(json.dumps(_MARK_TEXT))
                (new / _MARK).rename(mark)
                new.rmdir()
                flush_directory(self.path)
        try:
            text = json.loads(mark.read_bytes())
        except ValueError:
            text = None
        if text != _MARK_TEXT:
            raise DatabaseError(
                f"{mark} says {text!r}, not {_MARK_TEXT!r}; use the release of alaya_jax that "
                "wrote this database, or give another path"
            )
        names = (d for d in self._directory.iterdir() if not d.name.startswith("."))
        return {d.name: StoredContext(d) for d in names}

    def _discard(self, id: str):
        """Takes a context away by one rename, then frees its space."""
        grave = self._directory / f".tmp-{id}-{secrets.token_hex(4)}"
        (self._directory / id).rename(grave)
        del self._contexts[id]
        shutil.rmtree(grave)

    def _usable(self, *, writing: bool = False):
        if self._closed:
            raise DatabaseError(f"database {self.path} is closed; open it again")
        if writing and self.read_only:
            raise DatabaseError(
                f"database {self.path} is open with read_only=True; open it without, to change it"
            )

    def _context(self, id: str) -> StoredContext:
        self._usable()
        if id not in self._contexts:
            raise ContextError(f"no context {id!r} in {self.path}; list() names those there are")
        return self._contexts[id]

    def _intact(self, id: str) -> bool:
        return id in self._contexts and self._contexts[id].record.problem is None


def _token_ids(tokens: Any) -> np.ndarray:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise RequestError(
            f"tokens are {ids.dtype} {list(ids.shape)}; give whole numbers [n], at least one"
        )
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise RequestError(f"token ids reach from {ids.min()} to {ids.max()}; use 0 to 2**31 - 1")
    return ids.astype(np.int32)
