"""The files of one stored context, in a directory named by its id.

    meta.json      version, header, size and CRC-32 of the two files below, and a CRC-32 of itself
    tokens.npy     i32 [n]
    checksums.npy  CRC-32 of every block of 256 tokens, u32 [L, 2, blocks]: keys 0, values 1
    layer_<l>.kv   keys, then values, each [n, K, D], little-endian

Tokens come before heads in a layer file, so that a range of tokens is one run of bytes to map, to
verify and to read.
"""

import dataclasses
import functools
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.checked import CheckedDirectory, flush, write_array, write_meta
from alaya_jax.storage.interface import DTYPES, ContextHeader, ContextRecord

BLOCK = 256  # tokens under one checksum
VERSION = 2  # 1 did not say whether keys and values are exact


class StoredContext(CheckedDirectory):
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

    def check(self) -> list[str]:
        """Every problem found by reading all bytes."""
        try:
            header = self._usable()
            self.tokens()
            self._checksums  # noqa: B018 - read for its check
        except ContextError as error:
            return [str(error)]
        problems = []
        for layer in range(header.num_layers):
            try:
                data = self._map(layer)
                found = self._bad_blocks(layer, data, 0, self.record.num_tokens)
                problems += [str(self._damaged(problem)) for problem in found]
            except ContextError as error:
                problems.append(str(error))
        return problems

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


def write_context(
    directory: Path,
    record: ContextRecord,
    tokens: np.ndarray,
    kv: Iterable[tuple[Any, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes all files of a context into an empty directory, and flushes them to disk."""
    header = record.header
    assert header is not None
    checksums, layers = [], iter(kv)
    for layer in range(header.num_layers):
        pair = next(layers, None)
        if pair is None:
            raise RequestError(
                f"kv ended after {layer} layers; the header says {header.num_layers}"
            )
        try:
            k, v = pair
        except (TypeError, ValueError) as error:
            raise RequestError(f"kv of layer {layer} is no pair of keys and values") from error
        halves = (_checked(k, "k", layer, record), _checked(v, "v", layer, record))
        with (directory / _layer_name(layer)).open("xb") as file:
            checksums.append([_write_half(file, half) for half in halves])
            flush(file)
        if progress is not None:
            progress(layer + 1, header.num_layers)
    if next(layers, None) is not None:
        raise RequestError(f"kv goes on after the {header.num_layers} layers of the header")
    files = {
        "tokens.npy": write_array(directory / "tokens.npy", tokens.astype("<i4")),
        "checksums.npy": write_array(directory / "checksums.npy", np.array(checksums, "<u4")),
    }
    meta = {
        "version": VERSION,
        "id": record.id,
        "header": dataclasses.asdict(header),
        "num_tokens": record.num_tokens,
        "created": record.created,
        "files": files,
    }
    write_meta(directory, meta)


def _checked(half: Any, name: str, layer: int, record: ContextRecord) -> np.ndarray:
    header, array = record.header, np.asarray(half)
    assert header is not None
    want = (header.num_kv_heads, record.num_tokens, header.head_dim)
    if array.shape != want or array.dtype != DTYPES[header.dtype]:
        raise RequestError(
            f"{name} of layer {layer} is {array.dtype} {list(array.shape)}; the header and the "
            f"tokens say {header.dtype} {list(want)} [K, n, D]"
        )
    return array


def _write_half(file: io.BufferedWriter, array: np.ndarray) -> list[int]:
    checksums = []
    for first in range(0, array.shape[1], BLOCK):
        rows = np.ascontiguousarray(array[:, first : first + BLOCK].transpose(1, 0, 2))
        data = rows.view(np.uint8)  # bfloat16 has no buffer of its own
        checksums.append(zlib.crc32(data))
        file.write(data)
    return checksums


def _layer_name(layer: int) -> str:
    return f"layer_{layer:03d}.kv"
