"""Brings a database of an earlier version over: contexts, their graphs, and when they were stored.

The new files grow beside the old ones. The mark of the directory changes when all is there and was
read back, and only then the old files go: killed at any point, it goes on where it was.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alaya_jax.errors import ContextError, DatabaseError, DatabaseInUseError
from alaya_jax.storage.files import replace_file
from alaya_jax.storage.lock import unused, writers_turn
from alaya_jax.storage.old_directory import OldContext
from alaya_jax.storage.opening import BEFORE, MARK, MARK_TEXT, is_marked, make_parts, require_mark
from alaya_jax.storage.pool_store import PoolStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Migrated:
    """What `migrate` did.

    Attributes:
      contexts: new ids of those that are over now, by their old ones.
      indexes: how many came with them.
      damaged: contexts that could not be brought over, and why; their old files are kept.
      lost: indexes that were damaged, and have to be built again: why, by new id.
    """

    contexts: dict[str, str]
    indexes: int
    damaged: dict[str, str]
    lost: dict[str, str]


class _Growing(PoolStore):
    """A store in a directory that is not yet marked as one."""

    def _prepare(self) -> None:
        make_parts(self.path)


def migrate(path: Path, progress: Callable[[int], None] | None = None) -> Migrated:
    """Brings all contexts of a database over that one of an earlier version wrote.

    Args:
      path: of the database.
      progress: called with the bytes of keys and values of each layer that is over.

    Raises:
      DatabaseError: there is no such database, somebody uses it, or the disk is full.
    """
    path = path.absolute()
    if not (path / MARK).exists():
        raise DatabaseError(f"there is no database at {path}")
    marked = is_marked(path, MARK_TEXT)
    if not marked:
        require_mark(path, BEFORE)
    if not (path / "contexts").is_dir():
        if not marked:
            _mark(path)
        return Migrated(contexts={}, indexes=0, damaged={}, lost={})
    with writers_turn(path / "lock", wait=False) as alone:
        if not alone:
            raise DatabaseInUseError(f"database {path} is in use by another process; end it first")
    with unused(path / "contexts") as only, _Growing(path) as store:
        if not only:
            raise DatabaseInUseError(f"database {path} is being migrated by another process")
        done = _bring(store, old_contexts(path), progress)
        with writers_turn(path / "lock"):
            late = {old.directory.name for old in old_contexts(path)}
            if late - {*done.contexts, *done.damaged}:
                raise DatabaseInUseError(
                    f"an earlier version stored a context in {path} meanwhile; end it, and migrate "
                    "again"
                )
            _mark(path)
        for id in done.contexts:  # half of a context is not to look like a damaged one
            (path / "contexts" / id).rename(path / "contexts" / f".gone-{id}")
        for gone in (path / "contexts").glob(".gone-*"):
            shutil.rmtree(gone)
        if not done.damaged:
            shutil.rmtree(path / "contexts")
    return done


def old_contexts(path: Path) -> list[OldContext]:
    """The contexts that are still to be brought over, oldest first."""
    directory = path / "contexts"
    if not directory.is_dir():
        return []
    found = [OldContext(d) for d in directory.iterdir() if not d.name.startswith(".")]
    return sorted(found, key=lambda c: (c.record.created, c.record.id))


def _mark(path: Path) -> None:
    make_parts(path)
    replace_file(path / MARK, json.dumps(MARK_TEXT).encode())


def _bring(
    store: PoolStore, contexts: list[OldContext], progress: Callable[[int], None] | None
) -> Migrated:
    over, indexes, damaged, lost = {}, 0, {}, {}
    for old in contexts:
        name = old.directory.name
        try:
            over[name] = _bring_one(store, old, progress)
        except ContextError as error:
            damaged[name] = str(error)
            continue
        for kind, index in old.indexes().items():
            if kind in store.indexes(over[name]) and not store.check_index(over[name], kind):
                continue
            if found := index.check():
                lost[over[name]] = "; ".join(found)
                continue
            layers = (index.read(layer) for layer in range(index.num_layers))
            store.write_index(over[name], kind, index.record.settings, layers)
            indexes += 1
    return Migrated(contexts=over, indexes=indexes, damaged=damaged, lost=lost)


def _bring_one(store: PoolStore, old: OldContext, progress: Callable[[int], None] | None) -> str:
    """A context, read back when it is there; its new id."""
    tokens, header = old.tokens(), old.record.header
    assert header is not None  # else its tokens could not be read
    each = old.record.nbytes // header.num_layers

    def kv(start: int) -> Iterator[tuple[Any, Any]]:
        for layer in range(header.num_layers):
            yield old.read_kv(layer, start, None)
            if progress is not None:
                progress(each)

    record = store.write(header, tokens, kv)
    if problems := store.check(record.id):
        raise ContextError(problems[0])
    store.remember(record.id, created=old.record.created)
    return record.id
