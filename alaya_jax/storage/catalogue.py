"""The catalogue of a store: one SQLite file, each row of which vouches for itself.

    contexts, segments, indexes, damage    key, facts (JSON), checksum: see `rows`
    lists                                  key of a context, its tokens and its pages
    totals                                 how many rows there are, and a checksum of their keys

SQLite checks the frames of its log, and nothing of its file: so each row has a checksum, and a row
that is lost is missed by the totals. References to pages and free pages are in no table: they
follow from the page lists.
"""

import contextlib
import dataclasses
import os
import sqlite3
import threading
import types
import urllib.parse
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, DatabaseError
from alaya_jax.storage import checksums
from alaya_jax.storage.rows import (
    BadRow,
    Damage,
    Entry,
    IndexEntry,
    Layout,
    PageList,
    checksum,
    entry,
    facts,
    row,
)

NAME = "catalogue.sqlite"

_MARK = 0x616C6179  # PRAGMA application_id: "alay"
_VERSION = 2
_OTHERS = {"segments": Layout, "indexes": IndexEntry, "damage": Damage}
_TABLES = ("contexts", *_OTHERS)
_SCHEMA = {
    **{
        name: f"CREATE TABLE {name} "
        "(key INTEGER PRIMARY KEY, facts BLOB NOT NULL, checksum INTEGER NOT NULL)"
        for name in _TABLES
    },
    "lists": "CREATE TABLE lists "
    "(key INTEGER PRIMARY KEY, tokens BLOB NOT NULL, pages BLOB NOT NULL)",
    "totals": "CREATE TABLE totals "
    "(key INTEGER PRIMARY KEY, count INTEGER NOT NULL, sum INTEGER NOT NULL)",
}
_BUSY = 60.0
"""Seconds that a transaction waits for another one; each takes milliseconds."""

_of_parents: list[sqlite3.Connection] = []
"""Connections that a fork brought along; SQLite forbids to use them, even to close them."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The catalogue at one moment, but for the lists.

    Attributes:
      contexts: by serial, removed ones too.
      unreadable: contexts whose rows are damaged: why, by serial.
      segments: their layouts, by number.
      indexes: by key.
      damage: by key.
      problems: of other rows that cannot be read, in words.
    """

    contexts: Mapping[int, Entry]
    unreadable: Mapping[int, str]
    segments: Mapping[int, Layout]
    indexes: Mapping[int, IndexEntry]
    damage: Mapping[int, Damage]
    problems: tuple[str, ...] = ()

    @property
    def there(self) -> dict[str, Entry]:
        """Contexts that are not removed, by id."""
        return {e.id: e for e in self.contexts.values() if not e.removed}

    def sound(self, context: Entry, pages: PageList) -> int:
        """How many of its pages, from the first on, are not known to be damaged."""
        bad = np.zeros(len(pages), bool)
        for known in self.damage.values():
            if known.segment == context.segment:
                bad |= (pages.slots == known.slot) & (pages.births == known.birth)
        return int(np.argmax(bad)) if bad.any() else len(pages)


class Change:
    """Rows to be put and deleted in one transaction."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def context(self, serial: int) -> Entry | None:
        """A context's row as it is now, removed or not."""
        query = "SELECT facts, checksum FROM contexts WHERE key = ?"
        found = self._connection.execute(query, (serial,)).fetchone()
        try:
            return entry(serial, _checked("contexts", serial, *found)) if found else None
        except BadRow:
            return None

    def indexes(self, serial: int, kind: str | None = None) -> dict[int, IndexEntry]:
        """The rows of a context's indexes as they are now, of one kind or all, by key."""
        rows = {}
        for key, *found in self._connection.execute("SELECT * FROM indexes").fetchall():
            with contextlib.suppress(BadRow):
                said = row(IndexEntry, _checked("indexes", key, *found))
                if said.serial == serial and kind in (None, said.kind):
                    rows[key] = said
        return rows

    def put(self, table: str, key: int | None, said: Any) -> None:
        """Writes a row; without a key, a new one."""
        if key is None:
            (last,) = self._connection.execute(f"SELECT max(key) FROM {table}").fetchone()
            key = 1 + int(last or 0)
        data = facts(said)
        values = key, data, checksum(table, key, data)
        self._connection.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", values)

    def put_lists(self, key: int, tokens: bytes, pages: bytes) -> None:
        """Writes the lists of a context."""
        self._connection.execute("INSERT INTO lists VALUES (?, ?, ?)", (key, tokens, pages))

    def delete(self, table: str, key: int) -> None:
        """Deletes a row; of a context, with its lists."""
        self._connection.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
        if table == "contexts":
            self._connection.execute("DELETE FROM lists WHERE key = ?", (key,))

    def count(self) -> None:
        """Brings the totals up to date; the last step."""
        self._connection.execute(
            "INSERT OR REPLACE INTO totals VALUES (1, ?, ?)", _totals(self._connection)
        )


class CatalogueFile:
    """An open catalogue. Threads may share it, and a child made by fork opens its own.

    Args:
      directory: of the database.
      read_only: write nothing, and need no right to.

    Raises:
      DatabaseError: it is missing, damaged or something else.
    """

    def __init__(self, directory: Path, *, read_only: bool):
        self.path = directory / NAME
        self._read_only = read_only
        self._turn = threading.RLock()
        self._pid = os.getpid()
        self._changes = 0
        self._snapshot: tuple[Hashable, Snapshot] | None = None
        self._frozen: Hashable = None
        self._connection: sqlite3.Connection | None = None
        with self._opened():
            pass

    @classmethod
    def create(cls, directory: Path) -> None:
        """Makes an empty one, or finishes one whose maker was killed."""
        path = directory / NAME
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        try:
            with contextlib.closing(_connect(path, "mode=rw")) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("BEGIN IMMEDIATE")
                found = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
                if found == (0,):
                    for table in _SCHEMA.values():
                        connection.execute(table)
                    Change(connection).count()
                    connection.execute(f"PRAGMA application_id={_MARK}")
                    connection.execute(f"PRAGMA user_version={_VERSION}")
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise DatabaseError(f"cannot make {path}: {error}") from error

    def close(self) -> None:
        """Lets go of the file; closing twice is allowed."""
        with self._turn:
            connection, self._connection = self._connection, None
            if connection is not None and self._pid == os.getpid():
                connection.close()

    def version(self) -> Hashable:
        """Another one when any process has changed the catalogue."""
        with self._opened() as connection:
            return self._version_of(connection)

    def snapshot(self) -> Snapshot:
        """All rows but the lists, as they are now."""
        with self._opened() as connection:
            version = self._version_of(connection)
            if self._snapshot is None or self._snapshot[0] != version:
                connection.execute("BEGIN")
                try:
                    # Asked inside: what the transaction sees is of this version or a later one.
                    self._snapshot = version, self._read(connection)
                finally:
                    connection.execute("COMMIT")
            return self._snapshot[1]

    def tokens(self, context: Entry) -> np.ndarray:
        """Its token ids, i32 [n]. Raises ContextError."""
        data = self._list("tokens", context, context.tokens)
        if len(data) != 4 * context.num_tokens:
            raise self._damaged(context, "tokens")
        return np.frombuffer(data, "<i4").astype(np.int32)

    def pages(self, context: Entry, num_slots: int) -> PageList:
        """Its pages. Raises ContextError."""
        data = self._list("pages", context, context.pages)
        try:
            return PageList.from_bytes(data, context.num_pages, num_slots)
        except BadRow as error:
            raise self._damaged(context, "pages") from error

    @contextlib.contextmanager
    def changing(self) -> Iterator[Change]:
        """A transaction: all that is done in the block becomes true when it ends, or nothing."""
        with self._opened() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                change = Change(connection)
                yield change
                change.count()
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            finally:
                self._changes += 1

    def tidy(self) -> None:
        """Gives back the room of rows that were deleted."""
        with self._opened() as connection:
            (free,), (pages,) = (
                connection.execute(f"PRAGMA {name}").fetchone()
                for name in ("freelist_count", "page_count")
            )
            if free > max(16, pages // 4):
                connection.execute("VACUUM")
                self._changes += 1
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self) -> list[str]:
        """Every problem of the file as a whole, in words."""
        with self._opened() as connection:
            found = [text for (text,) in connection.execute("PRAGMA quick_check(20)")]
        return [] if found == ["ok"] else [f"{self.path}: {text}" for text in found]

    def _list(self, column: str, context: Entry, want: int) -> bytes:
        with self._opened() as connection:
            query = f"SELECT {column} FROM lists WHERE key = ?"
            found = connection.execute(query, (context.serial,)).fetchone()
        data = found[0] if found else None
        if not isinstance(data, bytes) or checksums.of_bytes(data) >> 1 != want:
            raise self._damaged(context, column)
        return data

    def _damaged(self, context: Entry, column: str) -> ContextError:
        what = {"tokens": "token ids", "pages": "pages as they are listed"}[column]
        return ContextError(
            f"context {context.id} in {self.path.parent} is damaged: its {what} in {NAME} do not "
            "match their checksum; remove it and import it again"
        )

    def _read(self, connection: sqlite3.Connection) -> Snapshot:
        if connection.execute("SELECT count, sum FROM totals").fetchall() != [_totals(connection)]:
            raise self._unusable("rows are missing, or are there that were not written")
        found: dict[str, dict[int, Any]] = {name: {} for name in _TABLES}
        unreadable, problems = {}, []
        for name in _TABLES:
            for key, *stored in connection.execute(f"SELECT * FROM {name}"):
                try:
                    said = _checked(name, key, *stored)
                    kind = _OTHERS.get(name)
                    found[name][key] = row(kind, said) if kind else entry(key, said)
                except BadRow as error:
                    if name == "contexts":
                        unreadable[key] = str(error)
                    else:
                        problems.append(f"{self.path}: row {key} of {name} is damaged ({error})")
        views = {name: types.MappingProxyType(rows) for name, rows in found.items()}
        return Snapshot(
            **views, unreadable=types.MappingProxyType(unreadable), problems=tuple(problems)
        )

    def _version_of(self, connection: sqlite3.Connection) -> Hashable:
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        return self._frozen, version, self._changes

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone until the block ends; SQLite's errors as ours."""
        if self._pid != os.getpid():
            self._after_fork()
        with self._turn:
            try:
                if self._frozen is not None and self._frozen != self._stamp():
                    self.close()  # it was changed under a connection that does not look
                if self._connection is None:
                    self._connection = self._open()
                yield self._connection
            except (sqlite3.Error, MemoryError, UnicodeDecodeError) as error:
                raise self._unusable(str(error)) from error  # the last where SQLite quotes damage

    def _after_fork(self) -> None:
        if self._connection is not None:
            _of_parents.append(self._connection)
        self._connection, self._snapshot = None, None
        self._turn, self._pid = threading.RLock(), os.getpid()

    def _open(self) -> sqlite3.Connection:
        if self.path.is_symlink() or not self.path.is_file():
            raise self._unusable("it is no file")
        self._frozen = None
        if not self._read_only:
            connection = self._recognized(_connect(self.path, "mode=rw"))
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA journal_size_limit={16 << 20}")
            return connection
        try:
            return self._recognized(_connect(self.path, "mode=ro"))
        except sqlite3.OperationalError:
            # Where nothing may be written, SQLite cannot share a log; without one it need not.
            if os.access(self.path.parent, os.W_OK) or self._log_bytes():
                raise
        self._frozen = self._stamp()
        return self._recognized(_connect(self.path, "mode=ro&immutable=1"))

    def _recognized(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        try:
            named = [
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version")
            ]
            found = dict(connection.execute("SELECT name, sql FROM sqlite_schema"))
            if named != [_MARK, _VERSION] or found != _SCHEMA:
                raise self._unusable("it is not the catalogue of an alaya_jax database")
        except BaseException:
            connection.close()
            raise
        return connection

    def _stamp(self) -> Hashable:
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns, self._log_bytes()

    def _log_bytes(self) -> int:
        log = self.path.with_name(NAME + "-wal")
        return log.stat().st_size if log.exists() else 0

    def _unusable(self, what: str) -> DatabaseError:
        return DatabaseError(
            f"{self.path} cannot be used: {what}; if this does not pass, put back a copy of the "
            "database, or give another path and import its documents again"
        )


def _checked(table: str, key: int, said: Any, stored: Any) -> bytes:
    if not isinstance(said, bytes) or stored != checksum(table, key, said):
        raise BadRow("the row does not match its checksum")
    return said


def _connect(path: Path, how: str) -> sqlite3.Connection:
    uri = f"file:{urllib.parse.quote(str(path))}?{how}"
    connection = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY
    )
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    return connection


def _totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many rows there are, and a checksum of their keys. What else a row says is its own."""
    named = [
        checksum(name, key, b"")
        for name in _TABLES
        for (key,) in connection.execute(f"SELECT key FROM {name}")
    ]
    return len(named), sum(named) % 2**62
