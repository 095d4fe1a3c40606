"""A directory whose meta.json vouches for its files, by size and CRC-32, and for itself.

CRC-32 finds accidents, not forgeries.
"""

import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError

META = "meta.json"


class CheckedDirectory:
    """Reads such a directory; what is wrong with it is raised, in the words of the subclass."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Any] = {}  # name -> [size, CRC-32], from meta.json

    def _damaged(self, what: str) -> ContextError:
        """Whose directory this is, what is wrong with it, and the way out."""
        raise NotImplementedError

    def _other_version(self, found: Any, known: int) -> ContextError:
        return self._damaged(f"it has format version {found!r}, and not {known}")

    def _read_meta[T](
        self, version: int, name: tuple[str, str], record: Callable[[dict[str, Any]], T]
    ) -> T:
        """What `record` makes of meta.json, checked.

        Args:
          version: the format that is understood.
          name: the field that must agree with the directory's name, and what it must say.
          record: makes the record; it may raise whatever a missing or odd field makes it raise.
        """
        text = self._read_bytes(META)
        try:
            meta = json.loads(text)
            found, stored = meta["version"], meta.pop("checksum", None)
            if found != version:
                raise self._other_version(found, version)
            if stored != _meta_checksum(meta) or meta[name[0]] != name[1]:
                raise self._damaged(f"{META} does not match its checksum or its directory")
            self._files = meta["files"]
            return record(meta)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(f"{META} cannot be understood ({error})") from error

    def _compare_sizes(self, others: dict[str, int] | None = None) -> None:
        """Checks that the files are there, and that those of known size have it."""
        sizes = {name: size for name, (size, _) in self._files.items()} | (others or {})
        for name, size in sizes.items():
            try:
                found = (self.directory / name).stat().st_size
            except OSError as error:
                raise self._damaged(f"{name} is missing ({error.strerror})") from error
            if found != size:
                raise self._damaged(f"{name} has {found} bytes instead of {size}")

    def _read_bytes(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise self._damaged(f"{name} cannot be read ({error.strerror})") from error

    def _read_array(self, name: str) -> np.ndarray:
        data = self._read_bytes(name)
        if zlib.crc32(data) != self._files[name][1]:
            raise self._damaged(f"{name} does not match its checksum")
        return np.load(io.BytesIO(data))


def write_array(path: Path, array: np.ndarray) -> list[int]:
    """Writes an array as a new .npy file; its size and CRC-32."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return _write_bytes(path, buffer.getvalue())


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Writes meta.json, when all files it vouches for are written, and flushes the directory."""
    meta = meta | {"checksum": _meta_checksum(meta)}
    _write_bytes(directory / META, json.dumps(meta, indent=2).encode())
    flush_directory(directory)


def flush(file: io.BufferedWriter) -> None:
    """Makes the bytes of a file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_bytes(path: Path, data: bytes) -> list[int]:
    with path.open("xb") as file:
        file.write(data)
        flush(file)
    return [len(data), zlib.crc32(data)]


def _meta_checksum(meta: dict[str, Any]) -> int:
    """CRC-32 of a meta.json without its own checksum."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
