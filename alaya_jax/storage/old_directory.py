"""Databases of earlier versions, as `migrate` reads them: a directory a context, `contexts/<id>/`.

meta.json      version, header, size and CRC-32 of the two files below, and a CRC-32 of itself
tokens.npy     i32 [n]
checksums.npy  CRC-32 of every block of 256 tokens, u32 [L, 2, blocks]: keys 0, values 1
layer_<l>.kv   keys, then values, each [n, K, D], little-endian
index_<kind>/  see `index_files`
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.checked import CheckedDirectory
from alaya_jax.storage.index_files import StoredIndex
from alaya_jax.storage.interface import DTYPES, ContextHeader, ContextRecord

BLOCK = 256  # tokens under one checksum
VERSION = 2  # 1 did not say whether keys and values are exact
_INDEX = "index_"


class OldContext(CheckedDirectory):
    """Reads a context's directory. A damaged one has `record.problem` set, and raises when used."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        try:
            self.record = self._read_meta(VERSION, ("id", directory.name), _record_of)
            header = self._usable()
            size = self.record.nbytes // header.num_layers
            layers = range(header.num_layers)
            self._compare_sizes({_layer_name(layer): size for layer in layers})
        except ContextError as error:
            known = getattr(self, "record", None) or ContextRecord(
                id=directory.name, header=None, num_tokens=0, created=0.0
            )
            self.record = dataclasses.replace(known, problem=str(error))

    def tokens(self) -> np.ndarray:
        """Token ids, i32 [n]."""
        self._usable()
        return self._read_array("tokens.npy")

    def read_kv(self, layer: int, start: int, end: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Verified views of the mapped layer file, each [K, end - start, D]."""
        header, count = self._usable(), self.record.num_tokens
        stop = count if end is None else end
        if not (0 <= layer < header.num_layers and 0 <= start <= stop <= count):
            raise RequestError(
                f"context {self.record.id} has layers 0 to {header.num_layers - 1} and {count} "
                f"tokens; tokens {start} to {stop} of layer {layer} were asked for"
            )
        data = self._map(layer)
        for problem in self._bad_blocks(layer, data, start, stop):
            raise self._damaged(problem)
        shape = (2, count, header.num_kv_heads, header.head_dim)
        kv = data.view(DTYPES[header.dtype]).reshape(shape)[:, start:stop]
        return kv[0].transpose(1, 0, 2), kv[1].transpose(1, 0, 2)

    def indexes(self) -> dict[str, StoredIndex]:
        """Its indexes, by kind; damaged ones too."""
        found = {}
        for directory in sorted(self.directory.glob(f"{_INDEX}*")):
            kind = directory.name.removeprefix(_INDEX)
            found[kind] = StoredIndex(directory, kind, f"context {self.directory.name}")
        return found

    def _damaged(self, what: str) -> ContextError:
        database = self.directory.parent.parent
        return ContextError(
            f"context {self.directory.name} in {database} is damaged: {what}; remove it and "
            "import it again"
        )

    def _usable(self) -> ContextHeader:
        if self.record.problem is not None or self.record.header is None:
            raise ContextError(self.record.problem)
        return self.record.header

    def _other_version(self, found: Any, known: int) -> ContextError:
        return ContextError(
            f"context {self.directory.name} in {self.directory.parent.parent} has format "
            f"version {found!r}, and this alaya_jax reads version {known}; use the "
            "release that wrote it, or remove it and import it again"
        )

    @functools.cached_property
    def _checksums(self) -> np.ndarray:
        return self._read_array("checksums.npy")

    def _map(self, layer: int) -> np.ndarray:
        """The bytes of a layer, u8 [2, n, K D size], read-only."""
        name, count = _layer_name(layer), self.record.num_tokens
        width = self.record.nbytes // (2 * count * self._usable().num_layers)
        try:
            data = np.memmap(self.directory / name, np.uint8, "r")
            return np.asarray(data).reshape(2, count, width)
        except (OSError, ValueError) as error:  # gone or cut since the store was opened
            raise self._damaged(f"{name} cannot be mapped ({error})") from error

    def _bad_blocks(self, layer: int, data: np.ndarray, start: int, stop: int) -> Iterator[str]:
        blocks = range(start // BLOCK, -(-stop // BLOCK)) if start < stop else ()
        for half, name in enumerate(("keys", "values")):
            for block in blocks:
                first = block * BLOCK
                rows = data[half, first : first + BLOCK]
                if zlib.crc32(rows) != self._checksums[layer, half, block]:
                    last = first + len(rows) - 1
                    yield (
                        f"the {name} of tokens {first} to {last} of layer {layer} "
                        f"({_layer_name(layer)}) do not match their checksum"
                    )


def _record_of(meta: dict[str, Any]) -> ContextRecord:
    return ContextRecord(
        id=meta["id"],
        header=ContextHeader(**meta["header"]),
        num_tokens=meta["num_tokens"],
        created=meta["created"],
    )


def _layer_name(layer: int) -> str:
    return f"layer_{layer:03d}.kv"
