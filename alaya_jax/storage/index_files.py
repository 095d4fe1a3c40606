"""The files of a stored index, in a directory of its own.

    meta.json              version, kind, settings, size and CRC-32 of each file below, and a CRC-32
                           of itself
    layer_<l>_<name>.npy   arrays of one layer

They are read, or mapped, without a look at keys and values. A damaged index is no damage of its
context: it can be built again.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage import checksums
from alaya_jax.storage.checked import META, CheckedDirectory, write_array, write_meta
from alaya_jax.storage.interface import IndexRecord

VERSION = 1


class StoredIndex(CheckedDirectory):
    """Reads an index's directory. A damaged one has `record.problem` set, and raises when used.

    Args:
      directory: where it is.
      kind: what it must be.
      owner: "context <id> in <database>", for errors.
      meta: checksum of its meta.json, where that is known.
      verified: see `CheckedDirectory`.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        owner: str,
        meta: int | None = None,
        verified: set[str] | None = None,
    ):
        super().__init__(directory, verified)
        self._owner = owner
        self.record = IndexRecord(kind=kind, settings={}, nbytes=0)
        try:
            self.record = self._read_meta(VERSION, ("kind", kind), _record_of)
            if meta is not None and _checksum(self._read_bytes(META)) != meta:
                raise self._damaged(f"{META} is not the one that was written")
            self._compare_sizes()
        except ContextError as error:
            self.record = dataclasses.replace(self.record, problem=str(error))

    def read(self, layer: int) -> dict[str, np.ndarray]:
        """Verified arrays of one layer, by name, large ones mapped."""
        return self._layer(layer, mapped=True)

    def check(self) -> list[str]:
        """Every problem found by reading all bytes."""
        if self.record.problem is not None:
            return [self.record.problem]
        problems = []
        for layer in range(self.num_layers):
            try:
                self._layer(layer, mapped=False)
            except ContextError as error:
                problems.append(str(error))
        return problems

    @property
    def num_layers(self) -> int:
        """How many layers have files, from 0 on."""
        return 1 + max((int(name.split("_")[1]) for name in self._files), default=-1)

    def _layer(self, layer: int, *, mapped: bool) -> dict[str, np.ndarray]:
        if self.record.problem is not None:
            raise ContextError(self.record.problem)
        start = f"layer_{layer:03d}_"
        names = [name for name in self._files if name.startswith(start)]
        if not names:
            raise RequestError(f"the {self.record.kind} index has no layer {layer}")
        return {
            name.removeprefix(start).removesuffix(".npy"): self._read_array(name, mapped=mapped)
            for name in names
        }

    def _damaged(self, what: str) -> ContextError:
        return ContextError(
            f"the {self.record.kind} index of {self._owner} is damaged: {what}; build it again "
            "(db.build_index, or alaya db index)"
        )


def _record_of(meta: dict[str, Any]) -> IndexRecord:
    for name in meta["files"]:
        if not name.startswith("layer_") or not name.split("_")[1].isdigit():
            raise ValueError(f"{name!r} is no file of an index")
    size = sum(size for size, _ in meta["files"].values())
    return IndexRecord(kind=meta["kind"], settings=dict(meta["settings"]), nbytes=size)


def write_index(
    directory: Path,
    kind: str,
    settings: Mapping[str, Any],
    layers: Iterable[Mapping[str, np.ndarray]],
) -> int:
    """Writes all files of an index into an empty directory, and flushes them to disk.

    Returns:
      the checksum of its meta.json.
    """
    files = {}
    for layer, arrays in enumerate(layers):
        for name, array in arrays.items():
            file = f"layer_{layer:03d}_{name}.npy"
            little = array.astype(array.dtype.newbyteorder("<"))
            files[file] = write_array(directory / file, little)
    meta = {"version": VERSION, "kind": kind, "settings": dict(settings), "files": files}
    return _checksum(write_meta(directory, meta))


def _checksum(meta: bytes) -> int:
    return checksums.of_bytes(meta) >> 1
