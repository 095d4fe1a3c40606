"""A directory whose meta.json vouches for its files, by size and CRC-32, and for itself.

CRC-32 finds accidents, not forgeries.
"""

import io
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.storage.files import flush_directory, write_file

META = "meta.json"

_NAME = re.compile(r"[A-Za-z0-9_]+\.[a-z]+")
MAPPED = 1 << 20
"""Bytes of an array from which on it is mapped and not read."""


class CheckedDirectory:
    """Reads such a directory; what is wrong with it is raised, in the words of the subclass."""

    def __init__(self, directory: Path, verified: set[str] | None = None):
        """Args:
        directory: which.
        verified: names of files of it that this process has verified; added to.
        """
        self.directory = directory
        self._files: dict[str, list[int]] = {}  # name -> [size, CRC-32], from meta.json
        self._verified = set() if verified is None else verified

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
            self._files = _sizes_and_checksums(meta["files"])
            return record(meta)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
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
            fd = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with os.fdopen(fd, "rb") as file:
                return file.read()
        except OSError as error:
            raise self._damaged(f"{name} cannot be read ({error.strerror})") from error

    def _read_array(self, name: str, *, mapped: bool = False) -> np.ndarray:
        """An array, verified; a large one may be mapped, and was verified once."""
        mapped = mapped and self._files[name][0] >= MAPPED
        data = b""
        if not (mapped and name in self._verified):
            data = self._read_bytes(name)
            if [len(data), zlib.crc32(data)] != self._files[name]:
                self._verified.discard(name)
                raise self._damaged(f"{name} does not match its checksum")
            self._verified.add(name)
        try:
            if mapped:
                return np.load(self.directory / name, mmap_mode="r")
            return np.load(io.BytesIO(data))
        except (OSError, ValueError) as error:
            raise self._damaged(f"{name} is no array ({error})") from error


def _sizes_and_checksums(files: dict[str, Any]) -> dict[str, list[int]]:
    """By name, as meta.json has them; ValueError where one is no name of a file, or no number."""
    for name, found in files.items():
        if not _NAME.fullmatch(name) or list(map(type, found)) != [int, int]:
            raise ValueError(f"{name!r} is no file of this directory")
    return files


def write_array(path: Path, array: np.ndarray) -> list[int]:
    """Writes an array as a new .npy file; its size and CRC-32."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    data = buffer.getvalue()
    write_file(path, data)
    return [len(data), zlib.crc32(data)]


def write_meta(directory: Path, meta: dict[str, Any]) -> bytes:
    """Writes meta.json, when all files it vouches for are written, and flushes the directory; what
    it says.
    """
    data = json.dumps(meta | {"checksum": _meta_checksum(meta)}, indent=2).encode()
    write_file(directory / META, data)
    flush_directory(directory)
    return data


def _meta_checksum(meta: dict[str, Any]) -> int:
    """CRC-32 of a meta.json without its own checksum."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
