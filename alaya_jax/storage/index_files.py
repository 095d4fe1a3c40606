"""The files of an index of a stored context, in its directory, in `index_<kind>`.

    meta.json              version, kind, settings, size and CRC-32 of each file below, and a CRC-32
                           of itself
    layer_<l>_<name>.npy   arrays of one layer

A damaged index is no damage of its context: it can be built again.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.checked import CheckedDirectory, write_array, write_meta
from alaya_jax.storage.interface import IndexRecord

VERSION = 1
PREFIX = "index_"


class StoredIndex(CheckedDirectory):
    """Reads an index's directory. A damaged one has `record.problem` set, and raises when used."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.record = IndexRecord(kind=directory.name.removeprefix(PREFIX), settings={}, nbytes=0)
        try:
            self.record = self._read_meta(VERSION, ("kind", self.record.kind), _record_of)
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
        return {n.removeprefix(start).removesuffix(".npy"): self._read_array(n) for n in names}

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


def _record_of(meta: dict[str, Any]) -> IndexRecord:
    size = sum(size for size, _ in meta["files"].values())
    return IndexRecord(kind=meta["kind"], settings=dict(meta["settings"]), nbytes=size)


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
    write_meta(directory, meta)
