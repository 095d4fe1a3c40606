"""How a directory becomes a database, and how one is recognized."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alaya_jax.errors import DatabaseError
from alaya_jax.storage.catalogue import NAME, CatalogueFile
from alaya_jax.storage.files import flush_directory, make_directory, replace_file
from alaya_jax.storage.lock import writers_turn

MARK = "alaya_db.json"
MARK_TEXT = {"format": "alaya_jax database", "store": "pool", "version": 3}
BEFORE = {"format": "alaya_jax database", "store": "directory", "version": 1}

_FOLDERS = ("segments", "indexes", "leases")


def prepare(path: Path, *, read_only: bool) -> None:
    """Makes or recognizes the directory. One of something else is not touched."""
    if path.exists() and not path.is_dir():
        raise DatabaseError(f"{path} is a file; give the path of a directory")
    mark = path / MARK
    if read_only and not mark.exists():
        raise DatabaseError(
            f"there is no database at {path}; open it without read_only=True to make one"
        )
    if not path.exists():
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        make_directory(path)
    if not mark.exists():
        if not _is_unfinished(path):
            raise DatabaseError(
                f"{path} holds other files and is no database; give a new or empty directory"
            )
        with writers_turn(path / "lock"):
            if not mark.exists():
                make_parts(path)
                replace_file(mark, json.dumps(MARK_TEXT).encode())
    elif not read_only:
        os.close(os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
    require_mark(path, MARK_TEXT)
    for name in _FOLDERS:
        if (path / name).is_symlink() or not (path / name).is_dir():
            raise DatabaseError(
                f"{path / name} is no directory of the database's own; put back a copy of the "
                "database"
            )


def is_marked(path: Path, text: Mapping[str, Any]) -> bool:
    """Whether a directory is marked as a database of this form."""
    return _marked(path) == text


def require_mark(path: Path, text: Mapping[str, Any]) -> None:
    """Raises DatabaseError where a directory is not marked as a database of this form."""
    found = _marked(path)
    if found == text:
        return
    if found == BEFORE:
        raise DatabaseError(
            f"{path} was written by an earlier version; bring it over with: alaya db migrate {path}"
        )
    raise DatabaseError(
        f"{path / MARK} says {found!r}, not {text!r}; use the release of alaya_jax that "
        "wrote this database, or give another path"
    )


def _marked(path: Path) -> Any:
    try:
        return json.loads((path / MARK).read_bytes())
    except (ValueError, RecursionError):
        return None


def make_parts(path: Path) -> None:
    """Makes all of an empty database but its mark; done twice, it is done once."""
    for name in _FOLDERS:
        make_directory(path / name)
    CatalogueFile.create(path)
    flush_directory(path)


def _is_unfinished(path: Path) -> bool:
    """Empty, or left by a process that was killed before it had made a database of it."""
    names = {p.name for p in path.iterdir() if not p.name.startswith(f".{MARK}.")}
    known = {"lock", *_FOLDERS, *(NAME + ending for ending in ("", "-wal", "-shm", "-journal"))}
    own = NAME in names or not any(
        any((path / name).iterdir()) for name in names.intersection(_FOLDERS)
    )
    return names <= known and own
