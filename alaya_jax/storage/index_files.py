"""The files of an index of a stored context, in its directory, in `index_<kind>`.

    meta.json              version, kind, settings, size and CRC-32 of each file below, and a CRC-32
                           of itself
    layer_<l>_<name>.npy   arrays of one layer

A damaged index is no damage of its context: it can be built again.
"""

import dataclasses
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.files import flush_directory, meta_checksum, write_array, write_bytes
from alaya_jax.storage.interface import IndexRecord

VERSION = 1
PREFIX = "index_"


class StoredIndex:
    """Reads an index's directory. A damaged one has `record.problem` set, and raises when used."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Any] = {}  # name -> [size, CRC-32]
        self.record = IndexRecord(kind=directory.name.removeprefix(PREFIX), settings={}, nbytes=0)
        try:
            self.record = self._read_meta()
            self._compare_sizes()
        except ContextError as error:
            self.record = dataclasses.replace(self.record, problem=str(error))

    def read(self, layer: int) -> dict[str, np.ndarray]:
        """Verified arrays of one layer, by name."""
        if self.record.problem is not None:
            raise ContextError(self.record.problem)
        start = f"layer_{layer:03d}_"
        names = [name for name in self._files if name.startswith(start)]
        if not names:
            raise RequestError(f"the {self.record.kind} index has no layer {layer}")
        arrays = {}
        for name in names:
            data = self._read_bytes(name)
            if zlib.crc32(data) != self._files[name][1]:
                raise self._damaged(f"{name} does not match its checksum")
            arrays[name.removeprefix(start).removesuffix(".npy")] = np.load(io.BytesIO(data))
        return arrays

    def check(self) -> list[str]:
        """Every problem found by reading all bytes."""
        if self.record.problem is not None:
            return [self.record.problem]
        problems = []
        for layer in sorted({int(name.split("_")[1]) for name in self._files}):
            try:
                self.read(layer)
            except ContextError as error:
                problems.append(str(error))
        return problems

    def _damaged(self, what: str) -> ContextError:
        context = self.directory.parent
        return ContextError(
            f"the {self.record.kind} index of context {context.name} in {context.parent.parent} is "
            f"damaged: {what}; build it again (db.build_index, or alaya db index)"
        )

    def _read_bytes(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise self._damaged(f"{name} cannot be read ({error.strerror})") from error

    def _read_meta(self) -> IndexRecord:
        text = self._read_bytes("meta.json")
        try:
            meta = json.loads(text)
            version, stored = meta["version"], meta.pop("checksum", None)
            if version != VERSION:
                raise self._damaged(f"it has format version {version!r}, and not {VERSION}")
            if stored != meta_checksum(meta) or meta["kind"] != self.record.kind:
                raise self._damaged("meta.json does not match its checksum or its directory")
            self._files = meta["files"]
            size = sum(size for size, _ in self._files.values())
            return IndexRecord(kind=meta["kind"], settings=dict(meta["settings"]), nbytes=size)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(f"meta.json cannot be understood ({error})") from error

    def _compare_sizes(self):
        for name, (size, _) in self._files.items():
            try:
                found = (self.directory / name).stat().st_size
            except OSError as error:
                raise self._damaged(f"{name} is missing ({error.strerror})") from error
            if found != size:
                raise self._damaged(f"{name} has {found} bytes instead of {size}")


def stored_indexes(context: Path) -> dict[str, StoredIndex]:
    """The indexes of a context's directory, by kind."""
    found = map(StoredIndex, sorted(context.glob(f"{PREFIX}*")))
    return {index.record.kind: index for index in found}


def write_index(
    directory: Path,
    kind: str,
    settings: Mapping[str, Any],
    layers: Iterable[Mapping[str, np.ndarray]],
) -> None:
    """Writes all files of an index into an empty directory, and flushes them to disk."""
    files = {}
    for layer, arrays in enumerate(layers):
        for name, array in arrays.items():
            file = f"layer_{layer:03d}_{name}.npy"
            little = array.astype(array.dtype.newbyteorder("<"))
            files[file] = write_array(directory / file, little)
    meta = {"version": VERSION, "kind": kind, "settings": dict(settings), "files": files}
    meta["checksum"] = meta_checksum(meta)
    write_bytes(directory / "meta.json", json.dumps(meta, indent=2).encode())
    flush_directory(directory)
